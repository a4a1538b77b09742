"""What proposes a block: a trained drafter, or prompt lookup, the competitor that needs no parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from specauf.drafter.dflash import ContextKV, DFlash, Pending
from specauf.objective.blocks import block_inputs
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Proposer(Protocol):
    """Proposes the B-1 tokens after each row's last committed token. Rows of a batch may differ in length."""

    block_size: int
    layer_ids: Sequence[int]
    """Target layers whose outputs `observe` wants."""

    def start(self, rows: int, max_length: int) -> None:
        """Begin a batch of `rows` sequences of at most `max_length` tokens."""

    def observe(self, features: Float[Tensor, "b s taps_h"], positions: Int[Tensor, "b s"]) -> None:
        """Features of verified inputs. Those past a row's last committed token are overwritten later."""

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows of the batch."""

    def propose(self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, " b"]) -> Int[Tensor, "b k"]:
        """`ids[i, : anchors[i] + 1]` are committed. Returns B-1 draft tokens per row."""


class DrafterProposer:
    """A DFlash drafter and its context keys and values, kept per row at the absolute position.

    Indexing by position makes ragged batches trivial: what lies at or beyond the anchor is masked, as in training.
    """

    def __init__(self, drafter: DFlash, target: Target) -> None:
        self.drafter, self.target = drafter.eval(), target
        self.block_size = drafter.config.block_size
        self.layer_ids = drafter.config.target_layer_ids
        self._context: list[ContextKV] = []

    def start(self, rows: int, max_length: int) -> None:
        config = self.drafter.config
        shape = (rows, config.num_key_value_heads, max_length + self.block_size, config.head_dim)
        like = self.drafter.fc.weight
        self._context = [
            ContextKV(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)
        ]

    @torch.no_grad()
    def observe(self, features: Tensor, positions: Tensor) -> None:
        fresh = self.drafter.context(features.to(self.drafter.fc.weight.dtype), positions)
        for kept, new in zip(self._context, fresh, strict=True):
            index = positions[:, None, :, None].expand_as(new.key)
            kept.key.scatter_(2, index, new.key)
            kept.value.scatter_(2, index, new.value)

    def select(self, rows: Tensor) -> None:
        self._context = [ContextKV(kv.key[rows], kv.value[rows]) for kv in self._context]

    def propose(self, ids: Tensor, anchors: Tensor) -> Tensor:
        return self.logits(ids, anchors).argmax(-1)

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, " b"]) -> Float[Tensor, "b k v"]:
        """Of every slot's marginal: the slots are predicted side by side, so a block's law is their product."""
        width = int(anchors.max())
        context = [ContextKV(kv.key[:, :, :width], kv.value[:, :, :width]) for kv in self._context]
        return self.target.logits(self.hidden(ids, anchors[:, None], context)[:, 0])

    def hidden(
        self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], context: list[ContextKV]
    ) -> Float[Tensor, "b n k h"]:
        """Final hidden states of the predicted slots of any blocks of `ids`."""
        out: Tensor = self.drafter(self._embeds(ids, anchors), anchors, context)
        return out[:, :, 1:]

    def pending(self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], context: list[ContextKV]) -> Pending:
        """The same, of the slots that will be asked for."""
        return self.drafter.pending(self._embeds(ids, anchors), anchors, context)

    def _embeds(self, ids: Tensor, anchors: Tensor) -> Tensor:
        config = self.drafter.config
        tokens = block_inputs(ids, anchors, config.block_size, config.mask_token_id)
        return self.target.embed(tokens).to(self.drafter.fc.weight.dtype)


class PromptLookup:
    """Copy what followed the latest earlier occurrence of the last three, else two, else one tokens."""

    layer_ids: Sequence[int] = ()

    def __init__(self, block_size: int, longest: int = 3) -> None:
        self.block_size, self.longest = block_size, longest
        self._seen: list[_Ngrams] = []

    def start(self, rows: int, max_length: int) -> None:
        self._seen = [_Ngrams(self.longest) for _ in range(rows)]

    def observe(self, features: Tensor, positions: Tensor) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        self._seen = [self._seen[i] for i in rows.tolist()]

    def propose(self, ids: Tensor, anchors: Tensor) -> Tensor:
        rows = [row[: a + 1].tolist() for row, a in zip(ids, anchors.tolist(), strict=True)]
        drafts = [seen.continuation(row, self.block_size - 1) for seen, row in zip(self._seen, rows, strict=True)]
        return torch.tensor(drafts, device=ids.device)


class _Ngrams:
    """Where each n-gram of a growing sequence was last followed by something."""

    def __init__(self, longest: int) -> None:
        self.longest, self.read = longest, 0
        self.last: dict[tuple[int, ...], int] = {}

    def continuation(self, tokens: list[int], length: int) -> list[int]:
        """`length` tokens after the latest match; the last token repeated where there is nothing to copy."""
        for end in range(self.read + 1, len(tokens)):  # n-grams that end before the last token have a successor
            for n in range(1, self.longest + 1):
                if end >= n:
                    self.last[tuple(tokens[end - n : end])] = end
        self.read = max(self.read, len(tokens) - 1)
        out: list[int] = []
        for n in range(self.longest, 0, -1):
            start = self.last.get(tuple(tokens[-n:])) if len(tokens) >= n else None
            if start is not None:
                out = tokens[start : start + length]
                break
        return out + [tokens[-1]] * (length - len(out))
