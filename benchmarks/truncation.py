"""How many head rows eps-truncation saves, and how much credit it drops, on simulated drafters. Counted, not timed.

    python -m benchmarks.truncation

The drafter is calibrated: its confidence in its own token is drawn from a Beta distribution around alpha, and it is right
with that probability. Where it is wrong, the label has a uniformly drawn share of what is left. N = 15 predictions per block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.objective import SLOTS, alpha_of
from specauf.objective import Objective, Slots
from specauf.objective.credit import exclusive_prefix
from specauf.objective.registry import call
from specauf.objective.wavefront import plan_cuts

BLOCKS = 20_000
STEP = 128
"""Blocks in a training step, for which stages are planned."""
TAUS = (1.5, 2.6, 4.0)
NAMES = ("dpace", "soft-auf")
EPS = (0.01, 0.05, 0.1)


class Found(NamedTuple):
    rows: float
    """Head rows per block when the block is read slot by slot."""
    staged: float
    """The same in the stages that the trainer would plan."""
    dropped: float
    """Share of the exact credit that is lost, in kept and in dropped slots."""


def drafter(tau: float, blocks: int = BLOCKS, spread: float = 2.0) -> Slots:
    """The readouts of a calibrated drafter on `blocks` blocks, right as often as this tau implies."""
    g = torch.Generator().manual_seed(0)
    alpha = alpha_of(tau)
    shape = (blocks, SLOTS)
    sure = torch.distributions.Beta(spread * alpha, spread * (1 - alpha))
    torch.manual_seed(0)  # a distribution takes no generator
    confidence = sure.sample(shape)
    hit = torch.rand(shape, generator=g) < confidence
    prob = torch.where(hit, confidence, (1 - confidence) * torch.rand(shape, generator=g))
    return Slots(torch.ones(shape, dtype=torch.bool), hit, prob)


def truncated(name: str, slots: Slots, eps: float) -> Found:
    short, exact = Objective(name, options={"eps": eps}), Objective(name)
    on = short.survives(slots)
    survival = on.cumprod(-1).float().mean(0).tolist()
    alive, staged, start = [1.0, *survival], 0.0, 0
    for stop in plan_cuts(survival, STEP):
        staged, start = staged + (stop - start) * alive[start], stop
    whole = call(exact.rule.credit, slots, exact.options).sum()
    kept = call(short.rule.credit, slots, short.options).sum()
    return Found(float(exclusive_prefix(on).float().sum(-1).mean()), staged, float(1 - kept / whole))


def main() -> None:
    print(
        f"{SLOTS} rows a block are read without truncation; slot by slot (in planned stages; share of the credit dropped)"
    )
    print("| objective | tau on the training blocks | AUF reads | " + " | ".join(f"eps {e:g}" for e in EPS) + " |")
    print("|---" * (3 + len(EPS)) + "|")
    for name in NAMES:
        for tau in TAUS:
            slots = drafter(tau)
            auf = float(exclusive_prefix(slots.hit).float().sum(-1).mean())  # type: ignore[arg-type]
            cells = [
                f"{f.rows:.1f} ({f.staged:.1f}; {f.dropped:.1%})" for f in (truncated(name, slots, e) for e in EPS)
            ]
            print(f"| `{name}` | {tau:g} | {auf:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
