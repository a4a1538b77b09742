"""Intervals, verdicts and the noise floor of a study: training seeds matter as much as prompts.

One method on one task is an array tau [seeds, prompts], the mean emitted length of every prompt. Prompts weigh equally in a
task, tasks equally in the macro average, seeds equally in both. Two methods are compared by their difference in every
(seed, prompt) cell: they share the recorded text, and the seed's initial weights, anchors and data order. Tasks are a fixed
list, not a sample: no interval speaks of other tasks, another target or another corpus.

**The resampling.** There are two crossed levels, and each resample draws both with replacement:

1. within each task, on its own, as many *clusters* of prompts as it has (the turns of a conversation are one cluster), for the
   tau averaged over seeds; the task's mean is then the sum of what was drawn over its size;
2. as many *seeds* as there are, one draw for all tasks, for the macro average of each seed. With one seed this level is left
   out, and the interval speaks of that training run and not of the method.

The deviations of the two from the estimate add up. As both levels contain the seed-by-prompt interaction, it is counted
twice: intervals are a little too wide where it dominates. (Drawing rows and columns of the same array at once would count it
three times: Owen, 2007, "The pigeonhole bootstrap".)

**Few seeds.** The percentile bootstrap of few values is anti-conservative: its variance is (n-1)/n of the unbiased one, two
thirds at three seeds, and it takes the spread as known, where Student's t has 4.30 in place of 1.96. (Three values have
ten different resampled means, none outside their range.) Both are mended, at every level alike:

- the deviations of a level with n units are multiplied by sqrt(n/(n-1)), so that their variance is unbiased;
- the sum of the deviations is multiplied by sqrt(f/chi2_f), drawn anew for each resample, which turns a normal into a t.
  Here f = (sum V_l)^2 / sum(V_l^2/(n_l - 1)), Welch and Satterthwaite's degrees of freedom, with V_l the variance of level l.
  It is n-1 = 2 where three seeds decide, and in the hundreds where prompts do.

Simulated coverage of the 95 % interval where there is no difference, and the share of p below 0.05/6, Holm's first hurdle at
six tasks, which ought to be 0.8; both in percent. One task of 100 prompts, normal effects, 3,000 worlds of 1,000 resamples,
standard errors up to 0.6; `ratio` is the seeds' part of the standard error over the prompts' (`coverage` in this module's
tests). Skewed effects do worse: docs/statistics.md has their figures.

    ratio                     0         0.5           1           2           5
    1 seed            95.1, 0.7
    2 seeds                      95.1,  1.1  93.2,  1.9  89.6,  5.0  87.5,  8.2
    3 seeds           94.6, 0.9  94.1,  0.8  93.4,  1.8  92.1,  2.9  92.6,  3.2
    3 seeds, unmended            92.4,  1.3  90.1,  3.1  84.5,  7.5  77.0, 15.7
    5 seeds                                  94.1,  1.3              93.3,  2.0

So at three seeds 95 % means 92 to 95 %, and where the seeds decide, a per-task claim errs up to four times as often as Holm
promises, because f is estimated from the same few values. A separate t for each level would keep both promises, but make
intervals at Holm's level about 1.7 times as wide at ratio 0.5 and 2.3 times at 1; the scheme here is the compromise. Two
seeds are too few for a claim.

**Reading it.** `interval` is the 95 % percentile interval, `equivalence_interval` the 90 % one, and `p` twice the smaller share
of resamples on either side of zero, so that p < 0.05 and an interval without zero are one statement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from specauf.decode.resampling import deviations, grouped, student

MARGIN = 0.02
"""In tau: a smaller difference is not worth a claim. Fixed before any study was run."""

LEVEL = 0.05
NEAR = (0.003, 0.065)
"""Range of p from 10,000 resamples that is near 0.05 or Holm's first hurdle of six, so that chance could decide the verdict."""
REFINED = 200_000
"""Resamples in that range. At the first hurdle they leave p a standard error of 0.0003, and 10,000 leave it 0.0013."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Distribution:
    """An estimate in tau and how far it may be off."""

    estimate: float
    interval: tuple[float, float]
    """95 %."""
    equivalence_interval: tuple[float, float]
    """90 %: inside the margin, two one-sided tests at 5 % reject a difference as large as the margin."""
    p: float
    """Two-sided, of no difference. Says nothing about a single method."""


def task_mean(tau: Floats) -> float:
    """Mean of tau [seeds, prompts] over the prompts that have a number in every seed.

    A prompt whose first token ends the text has no round under any drafter, so nothing measured is left out.
    Raises `ValueError` when no prompt is left.
    """
    return float(tau[:, _complete(tau)].mean())


def macro(taus: Mapping[str, Floats]) -> float:
    """Tasks weigh equally, whatever their number of prompts."""
    return float(np.mean([task_mean(taus[task]) for task in sorted(taus)]))


def hierarchical_bootstrap(
    taus_a: Mapping[str, Floats],
    taus_b: Mapping[str, Floats] | None,
    clusters: Mapping[str, Ints],
    resamples: int = 10_000,
    seed: int = 0,
) -> Distribution:
    """Macro average of a - b, or of a alone, by the scheme at the top of this file; one task: a mapping with one entry.

    A difference whose p is in `NEAR` is drawn again with `REFINED` resamples.

    `taus_a[task]`, `taus_b[task]` [seeds, prompts], row s of both from the same training seed, column p the same prompt, NaN
    where it has no round; `clusters[task]` [prompts]. The order of the tasks does not matter.
    Raises `ValueError` when shapes disagree or a task has fewer than two clusters: one shows no spread.
    """
    tasks = sorted(taus_a)
    if taus_b is not None and sorted(taus_b) != tasks:
        raise ValueError(f"both methods need the same tasks: {', '.join(tasks)} against {', '.join(sorted(taus_b))}")
    values = {task: _difference(task, taus_a, taus_b, clusters) for task in tasks}
    if len({len(cells) for cells, _ in values.values()}) != 1:
        raise ValueError(f"give at least one task, and every task the same seeds: {', '.join(tasks) or 'none given'}")
    per_seed = np.mean([cells.mean(axis=1) for cells, _ in values.values()], axis=0)
    rng = np.random.default_rng(seed)
    levels: list[tuple[Floats, int]] = []
    for cells, groups in values.values():
        moved, units = grouped(cells.mean(axis=0), groups, resamples, rng)
        levels.append((moved / len(tasks), units))
    if len(per_seed) > 1:
        levels.append((deviations(per_seed, np.ones_like(per_seed), resamples, rng), len(per_seed)))
    estimate = float(per_seed.mean())
    found = _distribution(estimate, estimate + student(levels, rng))
    if taus_b is not None and resamples < REFINED and NEAR[0] < found.p < NEAR[1]:
        return hierarchical_bootstrap(taus_a, taus_b, clusters, REFINED, seed)
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: below 0.05, the family-wise error is at most 5 %.

    Holds for any dependence between the tests. Raises `ValueError` unless all p lie in [0, 1].
    """
    if not all(0 <= value <= 1 for value in p):
        raise ValueError(f"p-values lie in [0, 1], got {list(p)}")
    adjusted, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def verdict(
    interval: tuple[float, float],
    margin: float = MARGIN,
    p_adjusted: float | None = None,
    equivalence_interval: tuple[float, float] | None = None,
) -> Verdict:
    """What the interval of a - b says of a.

    *equivalent*: the 90 % interval lies strictly inside +-margin; without one, the wider 95 % interval must. It is checked
    first: a difference that is surely not zero but surely below what was agreed to matter is not worth a claim.
    *better*, *worse*: the 95 % interval leaves zero out and the adjusted p, if given, is below 0.05.
    *undecided*: the rest. An interval that merely contains zero has shown nothing, and neither has one with NaN.
    """
    low, high = equivalence_interval or interval
    if -margin < low and high < margin:
        return "equivalent"
    if p_adjusted is None or p_adjusted < LEVEL:
        if interval[0] > 0:
            return "better"
        if interval[1] < 0:
            return "worse"
    return "undecided"


def noise_floor(tau_by_seed: Floats) -> float:
    """How far two runs of one method that differ in their seed alone lie apart, 95 times in 100: t sd sqrt(2).

    `tau_by_seed` [seeds], or [methods, seeds] for the mean variance within methods. t has seeds - 1 degrees of freedom however
    many methods there are: they share their seeds, which move them alike, so three methods say little more than one. The
    measure is ISO 5725's repeatability limit. It is for unpaired runs; the difference of two that share a seed is steadier.
    Raises `ValueError` below two seeds.
    """
    rows = np.atleast_2d(np.asarray(tau_by_seed, dtype=np.float64))
    seeds = rows.shape[1]
    if seeds < 2 or np.isnan(rows).any():
        raise ValueError(f"the spread of seeds needs two or more measured seeds, got {rows.tolist()}")
    spread = np.sqrt(rows.var(axis=1, ddof=1).mean())
    return float(stats.t.ppf(1 - LEVEL / 2, seeds - 1) * spread * np.sqrt(2))


def _complete(tau: Floats) -> NDArray[np.bool_]:
    """[prompts]: measured in every seed."""
    kept = ~np.isnan(tau).any(axis=0)
    if not kept.any():
        raise ValueError("no prompt has a verify round in every seed")
    return np.asarray(kept)


def _difference(
    task: str, taus_a: Mapping[str, Floats], taus_b: Mapping[str, Floats] | None, clusters: Mapping[str, Ints]
) -> tuple[Floats, Ints]:
    """a - b [seeds, prompts] without the prompts that have no round, and their clusters numbered from 0."""
    cells, groups = np.asarray(taus_a[task], dtype=np.float64), np.asarray(clusters[task])
    other = np.zeros_like(cells) if taus_b is None else np.asarray(taus_b[task], dtype=np.float64)
    if other.shape != cells.shape or groups.shape != cells.shape[1:]:
        raise ValueError(f"{task}: shapes {cells.shape}, {other.shape} and clusters {groups.shape} do not fit together")
    cells = cells - other
    kept = _complete(cells)
    numbers = np.unique(groups[kept], return_inverse=True)[1]
    if numbers.max() == 0:
        raise ValueError(f"{task}: an interval needs two or more conversations with a verify round")
    return cells[:, kept], numbers


def _distribution(estimate: float, resampled: Floats) -> Distribution:
    low, low90, high90, high = np.quantile(resampled, [LEVEL / 2, LEVEL, 1 - LEVEL, 1 - LEVEL / 2]).tolist()
    # Counting the observed value among the resamples keeps p above zero: finitely many resamples cannot show p = 0.
    side = 1 + min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * side / (len(resampled) + 1))
    return Distribution(estimate, (low, high), (low90, high90), p)
