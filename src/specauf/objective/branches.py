"""Domino's loss (paper, section 5.2): two branches over the same slots.

    L = lambda_base L_base + (1 - lambda_base) L_final

Each branch has its own objective, support and denominator. The base branch is the LM head W on the drafter's hidden state
z. The final branch adds a low-rank correction: its rows are [z ; e], its head is [W ; W2], and W2 is trained. A branch's
credit is read off its own predictions or off the other's (Table 3).

The final branch's support is read left to right. It is exact: up to its first mismatch the branch predicts under teacher
forcing what it would predict in decoding, because the prefix so far is the data's. Behind a hole in the labels, though, the
prefix holds tokens that nobody supervised.

W2's gradient is a sum over rows, each weighted by its credit, so the credits must be known first. A credit that is known
beforehand (a position prior, or the other branch's support) takes one pass over the final branch, if the loss is a cross
entropy. A credit that is read off the final branch itself takes two: one without gradient, staged like any wavefront, and
one over the rows that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from specauf.objective.blocks import Blocks
from specauf.objective.credit import Slots
from specauf.objective.loss import LossTerms, Objective, Recorded, credit_of, finish, survival, weigh
from specauf.objective.registry import cross_entropy
from specauf.objective.wavefront import Head, Readout, RowSource, default_cuts, read_head

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Side = Literal["base", "final"]
SIDES: tuple[Side, Side] = ("base", "final")
PRIORS = ("uniform", "decay", "first-k")
READ = ("ce", "hit", "prob")


class Branch(NamedTuple):
    """What one branch is trained on."""

    objective: Objective
    support: Side
    """The branch whose predictions the credit is read off; unused for a position prior."""

    @property
    def prior(self) -> bool:
        """Whether the credit is known before any row is read."""
        return self.objective.name.removesuffix("-decay") in PRIORS


VARIANTS: dict[str, tuple[str, str, Side]] = {
    "decay-only": ("decay", "decay", "final"),
    "b-auf": ("auf", "uniform", "final"),
    "b-auf-d": ("auf-decay", "decay", "final"),
    "s-auf": ("auf", "auf", "base"),
    "s-auf-d": ("auf-decay", "auf-decay", "base"),
    "f-auf": ("auf", "auf", "final"),
    "f-auf-d": ("auf-decay", "auf-decay", "final"),
}
"""Table 3 of the paper: (base branch's objective, final branch's objective, source of the latter's support).

The base branch always uses its own support. Without decay, B-AUF's final branch is uniform, so it differs from decay-only
in decay as well as in support.
"""


class TwoBranchTerms(NamedTuple):
    terms: LossTerms
    """The parts of both branches, scaled by lambda_base and 1 - lambda_base; credit and readout are the final branch's."""
    base: LossTerms
    final: LossTerms


def two_branch_loss(
    hidden: RowSource,
    corrected: RowSource,
    blocks: Blocks,
    base: Branch,
    final: Branch,
    lam: float,
    head: Head,
    *,
    target_hidden: Float[Tensor, "b n k h"] | None = None,
    uniform: Float[Tensor, "b n k"] | None = None,
    logits_rows: int = 256,
    cuts: Mapping[Side, Sequence[int]] | None = None,
) -> TwoBranchTerms:
    """Domino's loss: `hidden` gives the rows z, `corrected` the rows [z ; e], with e zero for uncorrected predictions.

    `lam` is lambda_base and `head.expansion` is W2. The other arguments are those of `block_loss`; `cuts` are the stage ends of
    each branch. Raises `ValueError` when an objective's input is missing, or when two objectives read the same branch at
    different temperatures.
    """
    branches: dict[Side, Branch] = {"base": base, "final": final}
    sources: dict[Side, RowSource] = {"base": hidden, "final": corrected}
    heads: dict[Side, Head] = {"base": head._replace(expansion=None), "final": head}
    for branch in (base, final):
        branch.objective.require(target_hidden, uniform)

    def read(side: Side, valid: Tensor, needs_target: bool, **how: Any) -> tuple[Readout, Tensor]:
        source = Recorded(sources[side])
        readout = read_head(
            *(source, blocks.labels, valid, heads[side]),
            target_hidden=target_hidden if needs_target else None,
            logits_rows=logits_rows,
            **how,
        )
        return readout, torch.cat(source.given)

    # The passes that credits are read off.
    gates: dict[Side, tuple[Readout, Tensor]] = {}
    for side in SIDES:
        readers = [b for b in branches.values() if b.support == side and not b.prior]
        if readers:
            how = _reading([b.objective for b in readers], blocks, (cuts or {}).get(side), uniform)
            needs_target = any(b.objective.needs_target for b in readers)
            own = side == "base" and base in readers  # its head is frozen, so this pass can form its gradient
            gates[side] = read(side, blocks.valid, needs_target, wants=base.objective.formed if own else (), **how)

    # The losses, over the slots that count.
    nothing = torch.zeros_like(blocks.valid)
    zeros = nothing.to(torch.promote_types(head.weight.dtype, torch.float32))
    unread = Readout(zeros, nothing, nothing, zeros)
    found: dict[Side, LossTerms] = {}
    for side in SIDES:
        branch, objective = branches[side], branches[side].objective
        parts = credit_of(unread if branch.prior else gates[branch.support][0], blocks, objective, uniform)
        plain = objective.rule.loss is cross_entropy
        # A cross entropy counts the slots with credit alone; any other loss may look along the block.
        counted = blocks.valid & torch.stack([c != 0 for _, c in parts]).any(0) if plain else blocks.valid
        if side in gates and gates[side][0].grad:
            readout, rows = gates[side]
        elif side == "base":
            readout, rows = read(side, counted, objective.needs_target, wants=objective.formed)
        else:
            if not plain and branch.support != side:  # a pass for the other branch may have ended too early
                gates[side] = read(side, blocks.valid, objective.needs_target, wants=())
            weights = weigh(unread if plain else gates[side][0], blocks, objective, parts)[2]
            readout, rows = read(side, counted, objective.needs_target, wants=objective.formed, weigh=weights)
        terms = finish(readout, rows, blocks, objective, parts, heads[side].expansion)
        if side in gates:  # report all that was read of the branch: for the credits, and for the loss
            gate = gates[side][0]
            both = {name: torch.where(gate.evaluated, getattr(gate, name), getattr(readout, name)) for name in READ}
            both["evaluated"] = gate.evaluated | readout.evaluated
            terms = terms._replace(readout=gate._replace(**both, grad=None, order=None))
            if branch.support == side and objective.truncates:
                terms = terms._replace(survival=survival(terms.readout, blocks, objective, uniform))
        found[side] = terms
    share: dict[Side, float] = {"base": lam, "final": 1 - lam}
    mixed = found["final"]._replace(
        num=torch.cat([found[side].num for side in SIDES]),
        den=torch.cat([found[side].den for side in SIDES]),
        scale=torch.cat([share[side] * found[side].scale for side in SIDES]),
    )
    return TwoBranchTerms(mixed, found["base"], found["final"])


def _reading(
    objectives: Sequence[Objective], blocks: Blocks, cuts: Sequence[int] | None, uniform: Tensor | None
) -> dict[str, Any]:
    """How to read a branch for the credits of all `objectives`: left to right if every one of them truncates."""
    truncates = all(o.truncates for o in objectives)

    def survives(slots: Slots) -> Tensor:
        return torch.stack([o.survives(slots) for o in objectives]).any(0)

    return {
        "cuts": (cuts or default_cuts(blocks.valid.shape[-1])) if truncates else None,
        "survives": survives,
        "uniform": uniform,
        "temperature": temperature_of(objectives),
        "ranks": any("rank" in o.rule.needs for o in objectives),
    }


def temperature_of(objectives: Sequence[Objective]) -> float:
    """The temperature at which to read a branch for `objectives`, 1 if none names one. Raises `ValueError` on two."""
    found = {float(o.options["temperature"]) for o in objectives if "temperature" in o.options}
    if len(found) > 1:
        raise ValueError(f"two objectives read one branch at different temperatures, {sorted(found)}")
    return found.pop() if found else 1.0


class Shared:
    """Caches the rows of another source: each is computed once, however often it is requested."""

    def __init__(self, source: RowSource, like: Bool[Tensor, "b n k"]) -> None:
        self.source, self.at = source, torch.full(like.shape, -1, device=like.device)
        self.found: list[Tensor] = []
        self.count = 0

    def rows(self, todo: Bool[Tensor, "b n k"]) -> Float[Tensor, "rows h"]:
        new = todo & (self.at < 0)
        size = int(new.sum())
        if size or not self.found:
            self.at[new] = torch.arange(self.count, self.count + size, device=new.device)
            self.found.append(self.source.rows(new))
            self.count += size
        return torch.cat(self.found)[self.at[todo]]


def lambda_base(step: int, max_steps: int, start: float = 1.0, ratio: float = 1.0) -> float:
    """The base branch's share after `step` completed steps: linear from `start` to 0 over `ratio` of the steps.

    At ratio 0.5 the second half of a run trains the final branch alone, and the base branch's objective has no effect
    there.
    """
    return start * (1 - min(step / max(1, int(max_steps * ratio)), 1.0))
