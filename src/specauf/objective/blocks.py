"""Which token each slot of a block predicts: anchors, slots, labels and validity. Alignment is decided here alone.

A block of `block_size` B slots starts at its *anchor*, the last committed token, at position a. Slot 0 holds the anchor's
token, slots 1..B-1 hold MASK, and slot k predicts the token at position a+k: N = B-1 predictions. The drafter sees the
target's features at positions < a, never at a: decoding does not have those yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from specauf.objective.credit import exclusive_prefix

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

_MASK63 = 0x7FFFFFFFFFFFFFFF
SLOT_UNIFORM = 31
"""Stream of the counter hash from which `slot_uniform` draws."""


class Blocks(NamedTuple):
    """n blocks in each of b sequences, N predictions each. Integers are int64, masks are bool."""

    anchors: Int[Tensor, "b n"]
    """Position of slot 0; 0 where `keep` is false."""
    keep: Bool[Tensor, "b n"]
    """False where a sequence with fewer anchors than the widest is padded."""
    labels: Int[Tensor, "b n k"]
    """The token each prediction is trained towards; 0 where invalid."""
    valid: Bool[Tensor, "b n k"]
    """m: block kept, label inside the sequence and supervised. May have holes, which are skipped and end no support."""


def sample_anchors(
    loss_mask: Bool[Tensor, "b s"], uid: Int[Tensor, " b"], num_anchors: int, *, seed: int, epoch: int
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """At most `num_anchors` anchors per sequence, a uniform random subset, ascending, and which of them are real.

    Position a qualifies when a and a+1 are supervised, so the first prediction of a kept block is always valid (SpecForge's
    rule since July 2026). `uid` [b] identifies the conversation, so that its draws do not depend on the batch (see
    `counter_hash`).
    """
    s = loss_mask.shape[1]
    candidate = torch.zeros_like(loss_mask)
    candidate[:, :-1] = loss_mask[:, :-1] & loss_mask[:, 1:]
    position = torch.arange(s, device=loss_mask.device)
    key = counter_hash(seed, epoch, uid[:, None], position[None, :]).masked_fill(~candidate, _MASK63)
    width = max(1, min(num_anchors, int(candidate.sum(1).max())))
    chosen = key.topk(width, dim=1, largest=False).indices
    keep = candidate.gather(1, chosen)
    anchors = chosen.masked_fill(~keep, s).sort(1).values  # real anchors first, ascending
    return anchors.masked_fill(anchors == s, 0), anchors < s


def build_blocks(
    input_ids: Int[Tensor, "b s"],
    loss_mask: Bool[Tensor, "b s"],
    anchors: Int[Tensor, "b n"],
    keep: Bool[Tensor, "b n"],
    block_size: int,
    target_argmax: Int[Tensor, "b s"] | None = None,
) -> Blocks:
    """Labels and validity of the B-1 predictions of every block.

    With `target_argmax`, the target's argmax after each position, the labels are the target's instead of the data's. A
    block then ends after the first slot where the two differ: the later argmaxes follow a token that the target did not
    choose.
    """
    s = input_ids.shape[1]
    position = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)  # b n k
    inside = (position < s) & keep[..., None]
    flat = position.clamp(max=s - 1).flatten(1)
    labels = input_ids.gather(1, flat).view_as(position)
    valid = inside & loss_mask.gather(1, flat).view_as(position)
    if target_argmax is not None:
        said = before_labels(target_argmax, anchors, block_size).to(labels)
        valid &= exclusive_prefix(said == labels)
        labels = said
    return Blocks(anchors, keep, labels.masked_fill(~valid, 0), valid)


def covered(blocks: Blocks, length: int) -> int:
    """How many of the sequences' tokens are the label of a valid slot; a token that several blocks predict counts once."""
    slot = torch.arange(1, blocks.valid.shape[-1] + 1, device=blocks.valid.device)
    position = (blocks.anchors[..., None] + slot).clamp(max=length - 1).flatten(1)
    found = position.new_zeros(len(position), length).scatter_add_(1, position, blocks.valid.flatten(1).long())
    return int((found > 0).sum())


def before_labels(values: Tensor, anchors: Int[Tensor, "b n"], block_size: int) -> Tensor:
    """`values` [b, s, ...] at the position before each label, where the target predicts it: [b, n, k, ...]."""
    position = anchors[..., None] + torch.arange(block_size - 1, device=anchors.device)
    row = torch.arange(len(values), device=values.device)[:, None, None]
    return values[row, position.clamp(max=values.shape[1] - 1)]


def block_inputs(
    input_ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], block_size: int, mask_token_id: int
) -> Int[Tensor, "b n slots"]:
    """Token ids that enter the drafter: the anchor's token in slot 0, MASK in the other `block_size` - 1."""
    ids = anchors.new_full((*anchors.shape, block_size), mask_token_id)
    ids[..., 0] = input_ids.gather(1, anchors)
    return ids


def prefix_tokens(
    input_ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], num_predictions: int
) -> Int[Tensor, "b n k"]:
    """The token before each predicted one, at a .. a+N-1: what a causal head reads under teacher forcing."""
    position = anchors[..., None] + torch.arange(num_predictions, device=anchors.device)
    flat = position.clamp(max=input_ids.shape[1] - 1).flatten(1)
    return input_ids.gather(1, flat).view_as(position)


def slot_uniform(
    uid: Int[Tensor, " b"], anchors: Int[Tensor, "b n"], block_size: int, *, seed: int, epoch: int
) -> Float[Tensor, "b n k"]:
    """One float64 in [0, 1) per prediction: a function of its counters, like the anchors."""
    slot = torch.arange(1, block_size, device=anchors.device)
    return counter_uniform(seed, SLOT_UNIFORM, epoch, uid[:, None, None], anchors[..., None], slot)


def counter_uniform(*parts: Tensor | int) -> Float[Tensor, ...]:
    """`counter_hash` as a float64 in [0, 1)."""
    return (counter_hash(*parts) >> 10).double() * 2.0**-53


def counter_hash(*parts: Tensor | int) -> Int[Tensor, ...]:
    """Hash the arguments to well-mixed integers in [0, 2^63): chained splitmix64, broadcast over tensors.

    Randomness is a function of counters, not of a generator's state: the same (seed, epoch, conversation, position) gives
    the same number whatever the batch layout, the world size or the point at which a run was resumed.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        part = torch.as_tensor(part, dtype=torch.int64)
        state = state.to(part.device) if part.ndim else state
        x = (state ^ part) - 7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer; int64 wraps
        x = (x ^ _shift(x, 30)) * -4658895280553007687
        x = (x ^ _shift(x, 27)) * -7723592293110705685
        state = x ^ _shift(x, 31)
    return state & _MASK63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed 64-bit integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
