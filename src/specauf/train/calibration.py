"""How long trainers take a step, measured side by side: the budget of runs that train for the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from specauf.train.loop import Trainer

if TYPE_CHECKING:
    from torch import Tensor


def calibrate(
    trainers: Sequence[Trainer], steps: int = 6, warmup: int = 2, weights: Mapping[str, Tensor] | None = None
) -> list[float]:
    """Median seconds per step of each trainer, with alternating steps so that all meet the same machine conditions.

    A truncating objective's step takes longer as tau grows. So `weights`, those of a trained drafter, stand in for those of
    every trainer whose geometry they fit. Weights and counters are put back afterwards, and the optimizers' moments cleared:
    for trainers that have not taken a step, calibration leaves no trace.
    """
    seconds: list[list[float]] = [[] for _ in trainers]
    before = [{k: v.clone() for k, v in t.drafter.state_dict().items()} for t in trainers]
    counters = [(t.done, t.max_steps, t.seconds, dict(t.survival)) for t in trainers]
    for trainer, kept in zip(trainers, before, strict=True):
        trainer.max_steps = trainer.max_steps or 10**6
        if weights and {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in weights.items()}:
            trainer.drafter.load_state_dict(weights)
    for turn in range(warmup + steps):
        for trainer, times in zip(trainers, seconds, strict=True):
            row = trainer.step()
            if turn >= warmup:
                times.append(row["seconds"])
    for trainer, kept, counted in zip(trainers, before, counters, strict=True):
        trainer.drafter.load_state_dict(kept)
        trainer.done, trainer.max_steps, trainer.seconds, trainer.survival = counted
        trainer.optimizer.state.clear()
    return [sorted(times)[len(times) // 2] for times in seconds]
