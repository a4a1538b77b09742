"""The training log of a cell, thinned for a figure and summed up for a table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ROWS = 200
"""At most this many rows per cell."""
FIGURES = (
    "loss",
    "r_active",
    "a_support",
    "common_accuracy",
    "simulated_tau",
    "grad_norm",
    "lr",
    "replay_tau",
    "credit",
)


def at_common_steps(log: Sequence[Mapping[str, Any]], every: int) -> list[dict[str, Any]]:
    """The log with common-token accuracy at every `every`-th step alone.

    A loss that reads all slots has it at each step, one that stops early at these only; they are compared at the same steps.
    """
    return [{k: v for k, v in row.items() if k != "common_accuracy" or (row["step"] - 1) % every == 0} for row in log]


def thinned(log: Sequence[Mapping[str, Any]], rows: int = ROWS) -> list[dict[str, Any]]:
    """At most `rows` rows, each the mean of its window, named for the window's last step.

    A figure that no row of the window has (common-token accuracy, replay tau) is missing there, as it is in the log.
    """
    count = min(rows, len(log))
    edges = [round(i * len(log) / count) for i in range(count + 1)] if count else []
    windows = [log[a:b] for a, b in itertools.pairwise(edges)]
    return [{"step": window[-1]["step"], **means(window)} for window in windows]


def means(window: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of every figure over the rows that have it; of a list, slot by slot."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [row[name] for row in window if row.get(name) is not None]
        if values and isinstance(values[0], list):
            found[name] = [statistics.fmean(column) for column in zip(*values, strict=True)]
        elif values:
            found[name] = statistics.fmean(values)
    return found


def summary(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the training took and saw. `seconds_per_step` is the median, `tokens_seen` counts supervised tokens."""
    if not log:
        return {"steps": 0}
    return {
        "steps": log[-1]["step"],
        "seconds_per_step": statistics.median(row["seconds"] for row in log),
        "train_seconds": sum(row["seconds"] for row in log),
        "tokens_seen": sum(row["tokens"] for row in log),
        "blocks_seen": sum(row["blocks"] for row in log),
        "epochs": log[-1]["epoch"],
        "clipped_share": statistics.fmean(row["clipped"] for row in log),
        "head_rows_per_block": statistics.fmean(row["head_rows"] for row in log),
    }
