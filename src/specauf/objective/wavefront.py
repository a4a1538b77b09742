"""The LM head on the slots that need it, once each, with bounded memory.

The head is most of a block drafter's training step. Two observations make it cheap without changing a number:

- AUF's loss is zero after the first failing slot, so the head is evaluated left to right and a block leaves as soon as its
  argmax is wrong: about tau head rows per block instead of B-1 (the *wavefront*).
- Credits are detached, so the gradient of a row's cross entropy with respect to its hidden state, W^T (softmax - onehot),
  can be formed while the row's logits are still in memory and scaled by its credit later. No logits are kept and no row
  is evaluated twice, for any objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Readout(NamedTuple):
    """What the head said of every slot. Rows that were not evaluated hold zeros and false."""

    ce: Float[Tensor, "b n k"]
    """Cross entropy of the label, in nats, float32 (float64 for float64 input)."""
    hit: Bool[Tensor, "b n k"]
    """The argmax (lowest index on a tie) equals the label."""
    evaluated: Bool[Tensor, "b n k"]
    grad: Float[Tensor, "b n k h"] | None
    """d ce / d hidden of each row."""


def default_cuts(num_predictions: int) -> list[int]:
    """Stage ends 1, 2, 4, 8, ..., N: few launches, and few rows beyond the supports."""
    cuts = [1]
    while cuts[-1] < num_predictions:
        cuts.append(min(2 * cuts[-1], num_predictions))
    return cuts


@torch.no_grad()
def read_head(
    hidden: Float[Tensor, "b n k h"],
    labels: Int[Tensor, "b n k"],
    valid: Bool[Tensor, "b n k"],
    weight: Float[Tensor, "v h"],
    bias: Float[Tensor, " v"] | None = None,
    *,
    cuts: Sequence[int] | None = None,
    logits_rows: int = 256,
    with_grad: bool = True,
) -> Readout:
    """Evaluate the head on the valid rows, stage by stage; a block whose argmax failed does not enter the next stage.

    `cuts` are the stage ends, ascending, the last one k; None is a single stage, the dense readout. At most `logits_rows`
    rows of logits exist at a time. Rows are evaluated in stage-major order; results do not depend on the cuts up to the
    rounding of differently shaped matrix products.
    """
    b, n, k, h = hidden.shape
    real = torch.promote_types(hidden.dtype, torch.float32)
    flat, flat_labels = hidden.reshape(-1, h), labels.reshape(-1)
    ce = torch.zeros(b * n * k, dtype=real, device=hidden.device)
    hit = torch.zeros(b * n * k, dtype=torch.bool, device=hidden.device)
    evaluated = torch.zeros_like(hit)
    grad = torch.zeros_like(flat) if with_grad else None
    alive = torch.ones(b, n, dtype=torch.bool, device=hidden.device)
    start = 0
    for stop in [k] if cuts is None else cuts:
        todo = torch.zeros_like(valid)
        todo[..., start:stop] = valid[..., start:stop] & alive[..., None]
        rows = todo.view(-1).nonzero().squeeze(1)
        for part in rows.split(logits_rows):
            ce[part], hit[part], part_grad = _rows(flat[part], flat_labels[part], weight, bias, with_grad)
            if grad is not None and part_grad is not None:
                grad[part] = part_grad
        evaluated[rows] = True
        alive &= (hit.view(b, n, k) | ~todo)[..., start:stop].all(-1)
        start = stop
        if cuts is not None and not alive.any():
            break
    shape = (b, n, k)
    return Readout(
        ce.view(shape), hit.view(shape), evaluated.view(shape), None if grad is None else grad.view_as(hidden)
    )


def _rows(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross entropy, hit and gradient of a few rows: one product to the vocabulary and one back."""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = labels[:, None]
    top, best = logits.max(-1, keepdim=True)
    gold = logits.gather(1, index)
    soft = logits.sub_(top).exp_()  # in place: a row of logits is the largest thing in a training step
    total = soft.sum(-1, keepdim=True)
    ce = (total.log() + top - gold).squeeze(1)
    hit = best.squeeze(1) == labels
    if not with_grad:
        return ce, hit, None
    # The label's -1 is applied to the product, not to the probabilities, which spares one pass over the vocabulary.
    back = (soft.to(weight.dtype) @ weight) / total.to(weight.dtype) - weight[labels]
    return ce, hit, back.to(hidden.dtype)
