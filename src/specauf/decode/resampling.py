"""The bootstrap of a mean, corrected for few units: the intervals of `specauf eval` and of studies are made of it.

`bench/statistics.py` gives the reason, and the share of such intervals that hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK = 1000
"""Resamples whose indices are in memory at a time."""
Floats = NDArray[np.float64]


def deviations(sums: Floats, sizes: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """[resamples]: resampled mean (sum of sums over sum of sizes) minus the observed one, scaled to an unbiased variance."""
    n, means = len(sums), np.empty(resamples)
    for start in range(0, resamples, CHUNK):
        drawn = rng.integers(0, n, (min(CHUNK, resamples - start), n))
        means[start : start + CHUNK] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    observed = float(sums.sum() / sizes.sum())
    return (means - observed) * math.sqrt(n / (n - 1))


def grouped(values: Floats, groups: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> tuple[Floats, int]:
    """A level for `student`: the deviations of the mean of `values` when groups, numbered from 0, are drawn whole."""
    sizes, sums = np.bincount(groups).astype(np.float64), np.bincount(groups, weights=values).astype(np.float64)
    return deviations(sums, sizes, resamples, rng), len(sizes)


def student(levels: Sequence[tuple[Floats, int]], rng: np.random.Generator) -> Floats:
    """[resamples]: the sum of the levels' deviations, with Student's tails for each level's number of units."""
    total: Floats = np.sum([moved for moved, _ in levels], axis=0)
    variances = np.array([np.mean(moved**2) for moved, _ in levels])
    if not variances.any():
        return total  # no spread at all: a method against itself
    shares = variances / variances.sum()
    freedom = 1 / np.sum(shares**2 / np.array([n - 1 for _, n in levels]))
    scale: Floats = np.sqrt(freedom / rng.chisquare(freedom, len(total)))
    return total * scale
