"""One reducer for every objective.

A loss is an additive pair (num, den): sums over micro-batches and ranks are taken before the division, so that neither
accumulation nor world size changes the objective. `num.backward()` puts un-normalised gradients into the drafter; dividing
them by the window's total `den` is exact, because the credits and hence `den` are constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from specauf.objective.credit import CREDITS, position_decay
from specauf.objective.wavefront import Readout, default_cuts, read_head

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from specauf.objective.blocks import Blocks

Reduction = Literal["global", "block", "sequence"]


@dataclass(frozen=True)
class Objective:
    """A credit by name, with its position decay and its reduction.

    `reduction`: `global` is one ratio over every valid slot; `block` a mean within a block, then over blocks (the paper's
    display formula); `sequence` the sum over slots divided by the number of sequences.
    """

    name: str = "auf"
    gamma: float | None = None
    reduction: Reduction = "global"

    def __post_init__(self) -> None:
        if self.name not in CREDITS:
            raise ValueError(f"unknown objective {self.name!r}; valid: {', '.join(CREDITS)}")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma must be > 0, got {self.gamma}")
        if ("decay" in self.name) != (self.gamma is not None):
            raise ValueError(f"objective {self.name!r} with gamma={self.gamma}: only the decay objectives take a gamma")

    @property
    def truncates(self) -> bool:
        return CREDITS[self.name][1]


class LossTerms(NamedTuple):
    num: Float[Tensor, ""]
    """Sum of credited cross entropies; differentiable with respect to the hidden states."""
    den: Float[Tensor, ""]
    """What the sum over all micro-batches and ranks is divided by; a constant."""
    credit: Float[Tensor, "b n k"]
    """m c: zero on invalid slots, before any normalisation within a block."""
    readout: Readout


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to `hidden` was formed with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outputs[0].to(grad.dtype), None, None


def credit_of(readout: Readout, blocks: Blocks, objective: Objective) -> Float[Tensor, "b n k"]:
    """m c for every slot, detached."""
    support, _ = CREDITS[objective.name]
    decay = position_decay(blocks.valid.shape[-1], objective.gamma).to(readout.ce)
    return support(readout.hit, blocks.valid).to(readout.ce) * decay * blocks.valid


def reduce(
    ce: Float[Tensor, "b n k"], credit: Float[Tensor, "b n k"], reduction: Reduction
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "b n k"]]:
    """(num, den, the weight of each row in num), with num = sum(weight * ce)."""
    if reduction == "global":
        weight, den = credit, credit.sum()
    elif reduction == "block":
        total = credit.sum(-1, keepdim=True)
        weight, den = credit / total.clamp(min=torch.finfo(credit.dtype).tiny), (total > 0).sum().to(credit)
    else:
        weight, den = credit, credit.new_tensor(float(credit.shape[0]))
    return (weight * ce).sum(), den, weight


def block_loss(
    hidden: Float[Tensor, "b n k h"],
    blocks: Blocks,
    objective: Objective,
    weight: Float[Tensor, "v h"],
    bias: Float[Tensor, " v"] | None = None,
    *,
    logits_rows: int = 256,
) -> LossTerms:
    """The objective on the drafter's final hidden states of the predicted slots.

    `weight` [v, h] and `bias` [v] are the target's frozen LM head; they get no gradient. Rows outside the credited support
    get a gradient of exactly 0.0.
    """
    cuts = default_cuts(hidden.shape[2]) if objective.truncates else None
    readout = read_head(hidden.detach(), blocks.labels, blocks.valid, weight, bias, cuts=cuts, logits_rows=logits_rows)
    credit = credit_of(readout, blocks, objective)
    num, den, row_weight = reduce(readout.ce, credit, objective.reduction)
    assert readout.grad is not None
    grad = torch.where(row_weight[..., None] > 0, readout.grad * row_weight[..., None].to(readout.grad), 0)
    return LossTerms(_WithGradient.apply(hidden, num, grad), den, credit, readout._replace(grad=None))
