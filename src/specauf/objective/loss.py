"""The weighted loss L = sum m c l / sum m c (paper, equation 1): one reducer for every objective.

A loss is an additive pair (num, den). Both are summed over micro-batches and ranks before the division, so neither
accumulation nor world size changes the objective. `num.backward()` puts un-normalised gradients into the drafter. Dividing
them by the total `den` of the optimizer step is exact, because the credits, and hence `den`, are constants. A loss may have
several parts, each with its own pair (L2R's separately normalised focal term): L = sum_p scale_p num_p / den_p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from specauf.objective.credit import Slots, position_decay
from specauf.objective.registry import Rows, Rule, call, check_options, rule_of
from specauf.objective.wavefront import Head, Readout, RowSource, default_cuts, read_head

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from specauf.objective.blocks import Blocks

Reduction = Literal["global", "block", "sequence"]


@dataclass(frozen=True)
class Objective:
    """A rule by name, with its position decay, its reduction and its options (see `registry.RULES`).

    `reduction` says what is averaged. `global` is one ratio over every valid slot. `block` is a mean within each block,
    then over blocks (the paper's display formula). `sequence` is the sum over slots divided by the number of sequences
    (D-PACE's authors). Raises `ValueError` on a name, option or value that does not exist, and lists the valid ones.
    """

    name: str = "auf"
    gamma: float | None = None
    reduction: Reduction = "global"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        rule = self.rule
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma must be > 0, got {self.gamma}")
        if rule.gamma is None and self.gamma is not None:
            raise ValueError(f"objective {self.name!r} takes no gamma; {self.name + '-decay'!r} does")
        if isinstance(rule.gamma, str) and self.gamma is None:
            raise ValueError(f"objective {self.name!r} needs a gamma")
        if self.reduction not in ("global", "block", "sequence"):
            raise ValueError(f"unknown reduction {self.reduction!r}. Valid: global, block, sequence")
        object.__setattr__(self, "gamma", rule.gamma if self.gamma is None else self.gamma)
        object.__setattr__(self, "options", check_options(self.name, rule, self.options))

    @property
    def rule(self) -> Rule:
        return rule_of(self.name)

    @property
    def truncates(self) -> bool:
        """Whether the head reads a block only up to the slot where it fails. An option `eps` must be above 0 for that."""
        return self.rule.survives is not None and self.options.get("eps", 1) > 0

    @property
    def needs_target(self) -> bool:
        """Whether the loss or the credit reads the target's distribution at every slot."""
        return self.rule.rows != ("ce",) or "target_prob" in self.rule.needs

    @property
    def formed(self) -> tuple[str, ...]:
        """The gradients to form while the head's rows are in memory: none where autograd is off."""
        return self.rule.rows if torch.is_grad_enabled() else ()

    def require(self, target_hidden: Tensor | None, uniform: Tensor | None) -> None:
        """Raise `ValueError` when an input that the rule reads is not there."""
        for name, missing in (
            ("target_hidden", self.needs_target and target_hidden is None),
            ("uniform", "uniform" in self.rule.needs and uniform is None),
        ):
            if missing:
                raise ValueError(f"objective {self.name!r} needs {name!r}")

    def survives(self, slots: Slots) -> Tensor:
        found: Tensor = call(self.rule.survives, slots, self.options)  # type: ignore[arg-type]
        return found


class LossTerms(NamedTuple):
    num: Float[Tensor, " parts"]
    """Sums of credited losses; differentiable with respect to the hidden states."""
    den: Float[Tensor, " parts"]
    """Denominators, summed over all micro-batches and ranks before the division; constants."""
    scale: Float[Tensor, " parts"]
    credit: Float[Tensor, "b n k"]
    """m c, summed over the parts with their scales; zero on invalid slots, before any normalisation within a block."""
    readout: Readout
    survival: Float[Tensor, " k"] | None = None
    """Share of the blocks that survive each slot, where the objective reads them left to right."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss, if these terms are the whole optimizer step; 0 where nothing is valid."""
        return (self.scale * self.num / torch.where(self.den > 0, self.den, 1)).sum()

    def mixed(self, den: Float[Tensor, " parts"]) -> LossTerms:
        """The parts combined into one of denominator 1, for when their denominators in the whole step are known: `den`."""
        one = self.den.new_ones(1)
        return self._replace(num=self._replace(den=den).loss[None], den=one, scale=one)


def block_loss(
    hidden: Float[Tensor, "b n k h"] | RowSource,
    blocks: Blocks,
    objective: Objective,
    head: Head,
    *,
    target_hidden: Float[Tensor, "b n k h"] | None = None,
    uniform: Float[Tensor, "b n k"] | None = None,
    logits_rows: int = 256,
    cuts: Sequence[int] | None = None,
) -> LossTerms:
    """The objective on the drafter's final hidden states of the predicted slots, given as a tensor or computed on demand.

    `head` is the target's; it gets no gradient. `target_hidden` holds the target's final hidden states at the position before
    each label (PARD-2, LK), `uniform` one number in [0, 1) per slot (sampled AUF), and `cuts` the wavefront's stage ends (see
    `plan_cuts`). Rows outside the credited support get a gradient of exactly 0.0.

    A label for which the head has no row fails, has no credit and is in no denominator. Under `torch.no_grad` no gradient is
    formed. Raises `ValueError` when an input is missing.
    """
    source = Recorded(hidden)
    objective.require(target_hidden, uniform)
    readout = read_head(
        source,
        blocks.labels,
        blocks.valid,
        head,
        cuts=(cuts or default_cuts(blocks.valid.shape[-1])) if objective.truncates else None,
        survives=objective.survives,
        uniform=uniform,
        target_hidden=target_hidden if objective.needs_target else None,
        temperature=objective.options.get("temperature", 1.0),
        wants=objective.formed,
        ranks="rank" in objective.rule.needs,
        logits_rows=logits_rows,
    )
    parts = credit_of(readout, blocks, objective, uniform)
    terms = finish(readout, torch.cat(source.given), blocks, objective, parts)
    return terms._replace(survival=survival(readout, blocks, objective, uniform)) if objective.truncates else terms


def credit_of(
    readout: Readout, blocks: Blocks, objective: Objective, uniform: Float[Tensor, "b n k"] | None = None
) -> list[tuple[float, Float[Tensor, "b n k"]]]:
    """(scale, m c) of every part, detached; m is also 0 where the head has no row for the label."""
    decay = position_decay(blocks.valid.shape[-1], objective.gamma).to(readout.ce)
    with torch.no_grad():
        found = call(objective.rule.credit, readout.slots(blocks.valid, uniform, decay), objective.options)
        parts = found if isinstance(found, tuple) else ((1.0, found),)
        return [(scale, torch.where(learnable(readout, blocks), c.to(readout.ce), 0.0)) for scale, c in parts]


def finish(
    readout: Readout,
    rows: Float[Tensor, "rows h"],
    blocks: Blocks,
    objective: Objective,
    parts: Sequence[tuple[float, Float[Tensor, "b n k"]]],
    expansion: Float[Tensor, "v e"] | None = None,
) -> LossTerms:
    """The loss of rows that were already read, from the gradients formed then and the credits in `parts`."""
    nums, dens, weights = weigh(readout, blocks, objective, parts)
    if weights is not None:
        nums = _WithGradient.apply(
            rows,
            expansion,
            nums,
            weights.flatten(2)[..., readout.order],
            readout.expansion_grad,
            *(readout.grad[kind] for kind in objective.rule.rows),  # type: ignore[index]
        )
    return LossTerms(
        nums,
        dens,
        readout.ce.new_tensor([scale for scale, _ in parts]),
        sum((scale * credit for scale, credit in parts), torch.zeros_like(readout.ce)),
        readout._replace(grad=None, order=None, expansion_grad=None),
    )


def weigh(
    readout: Readout,
    blocks: Blocks,
    objective: Objective,
    parts: Sequence[tuple[float, Float[Tensor, "b n k"]]],
) -> tuple[Float[Tensor, " parts"], Float[Tensor, " parts"], Float[Tensor, "kinds parts b n k"] | None]:
    """The num and the den of every part, and the factor of each row's gradient, which autograd finds on [b, n, k].

    For a plain cross entropy the factors follow from the credits alone, whatever the readout holds. There are none where
    autograd is off.
    """
    rule, learns = objective.rule, torch.is_grad_enabled()
    leaves = {kind: getattr(readout, kind).clone().requires_grad_(learns) for kind in rule.rows}
    figures = {"ce": readout.ce, "kl": readout.kl, "overlap": readout.overlap, **leaves}
    rows = call(
        rule.loss, Rows(**figures, valid=learnable(readout, blocks), outside=readout.outside), objective.options
    )
    reduced = [reduce(rows, credit, objective.reduction) for _, credit in parts]
    weights = None
    if learns:
        found = [
            torch.autograd.grad(num, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for num, _ in reduced
        ]
        weights = torch.stack([torch.stack(kind) for kind in zip(*found, strict=True)])
    return torch.stack([num.detach() for num, _ in reduced]), torch.stack([den for _, den in reduced]), weights


def reduce(
    loss: Float[Tensor, "b n k"], credit: Float[Tensor, "b n k"], reduction: Reduction
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(num, den) of one part."""
    if reduction == "global":
        return (credit * loss).sum(), credit.sum()
    if reduction == "block":
        total = credit.sum(-1, keepdim=True)
        return (credit / torch.where(total > 0, total, 1) * loss).sum(), (total > 0).sum().to(credit)
    return (credit * loss).sum(), credit.new_tensor(float(credit.shape[0]))


def learnable(readout: Readout, blocks: Blocks) -> Bool[Tensor, "b n k"]:
    """The slots that have a loss: valid ones whose label the head has a row for."""
    return blocks.valid if readout.outside is None else blocks.valid & ~readout.outside


def survival(readout: Readout, blocks: Blocks, objective: Objective, uniform: Tensor | None) -> Float[Tensor, " k"]:
    goes_on = (objective.survives(readout.slots(blocks.valid, uniform)) | ~blocks.valid).cumprod(-1)
    real = blocks.valid.any(-1, keepdim=True)
    return (goes_on * real).sum((0, 1)) / real.sum().clamp(min=1)


class Recorded:
    """Passes rows to the head as constants, and keeps them for the gradient."""

    def __init__(self, hidden: Tensor | RowSource) -> None:
        self.hidden = hidden
        self.given: list[Tensor] = []

    def rows(self, todo: Tensor) -> Tensor:
        with torch.enable_grad():
            self.given.append(self.hidden[todo] if isinstance(self.hidden, torch.Tensor) else self.hidden.rows(todo))
        return self.given[-1].detach()


class _WithGradient(torch.autograd.Function):
    """The parts' sums, whose gradients were formed when the head read the rows.

    With respect to the rows: the sum over kinds (`ce`, `kl`, `overlap`) of weight x row gradient. With respect to an
    expansion of the head, if there is one: `expansion_grad`, which has the weights in it already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        expansion: Tensor | None,
        value: Tensor,
        weights: Tensor,
        expansion_grad: Tensor | None,
        *grads: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weights, expansion_grad, *grads)
        return value

    @staticmethod
    @once_differentiable  # a second derivative would be silently zero
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        weights, expansion_grad, *grads = ctx.saved_tensors  # kinds parts rows; parts v e; rows h each
        total = torch.zeros_like(grads[0])
        for weight, grad in zip(weights, grads, strict=True):
            row = (outputs[0].to(weight.dtype) @ weight)[:, None]
            # A row of weight 0 stays 0 even where its gradient overflowed.
            total = torch.where(row != 0, total + grad * row.to(grad.dtype), total)
        wide = (
            None
            if expansion_grad is None
            else torch.einsum("p,pve->ve", outputs[0].to(expansion_grad.dtype), expansion_grad)
        )
        return total, wide, None, None, None, *(None for _ in grads)
