"""A drafter with part of the target's vocabulary: which tokens it keeps, how they are stored, and the head that remains.

The drafter's head is the target's, restricted to the kept tokens, one row each in the order of their ids. They are stored
as in speculators: `t2d` marks which of the target's tokens are kept, and row r stands for token r + d2t[r].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from specauf.objective.wavefront import Head
from specauf.strict import ConfigError, UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from specauf.drafter.dflash import DFlash


def draft_head(drafter: DFlash, head: Head) -> Head:
    """The target's head, or the part that `drafter` keeps. A part is a copy: make it once. Raises as `kept_tokens` does."""
    tokens = kept_tokens(drafter)
    if tokens is None:
        return head
    tokens = tokens.to(head.weight.device)
    rows_of = torch.full((drafter.config.vocab_size,), -1, device=tokens.device)
    rows_of[tokens] = torch.arange(len(tokens), device=tokens.device)
    bias = None if head.bias is None else head.bias[tokens]
    return head._replace(weight=head.weight[tokens], bias=bias, rows_of=rows_of)


def kept_tokens(drafter: DFlash) -> Int[Tensor, " rows"] | None:
    """The tokens of the drafter's vocabulary, ascending; None when it has the target's.

    Raises `UserError` when they have not been decided, or when `t2d` and `d2t` contradict each other.
    """
    if drafter.config.draft_vocab_size is None:
        return None
    if not drafter.t2d.any():
        raise UserError("this drafter's vocabulary has not been decided: a run does so when it is opened")
    tokens = torch.arange(len(drafter.d2t), device=drafter.d2t.device) + drafter.d2t
    if not torch.equal(drafter.t2d.nonzero().squeeze(1), tokens):
        raise UserError("this drafter's `t2d` and `d2t` name different tokens, or not in ascending order")
    return tokens


def keep_tokens(drafter: DFlash, tokens: Int[Tensor, " rows"]) -> None:
    """Make `tokens`, ascending, the vocabulary of a drafter that has a reduced one."""
    drafter.t2d.zero_()
    drafter.t2d[tokens] = True
    drafter.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
    kept_tokens(drafter)


def most_frequent(
    labels: Int[Tensor, " labels"], size: int, vocab_size: int, always: Collection[int] = ()
) -> Int[Tensor, " rows"]:
    """The `size` most frequent of `labels`, ascending; ties, and room left over, go to the lowest ids.

    The tokens in `always` (those that end a text) come first. Raises `ConfigError` when they alone are too many.
    """
    if len(always) > size:
        raise ConfigError(f"a draft vocabulary of {size} has no room for the {len(always)} tokens that end a text")
    counts = torch.bincount(labels.long(), minlength=vocab_size)
    counts[list(always)] = torch.iinfo(counts.dtype).max
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(labels: Int[Tensor, " labels"], kept: Bool[Tensor, " tokens"]) -> float:
    """Share of `labels` in the vocabulary that `kept`, a `t2d`, marks. No drafter with it can be right about the rest."""
    return float(kept[labels.long()].double().mean()) if len(labels) else 1.0
