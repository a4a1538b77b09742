"""AUF as loops in float64, sharing no code with specauf or the frameworks it is tried in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """One row, in float64."""
    row = logits.double()
    return torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[label]


def supported(hits: Sequence[bool], valid: Sequence[bool]) -> list[bool]:
    """Which slots of one block AUF keeps: the valid ones up to the first valid one that is wrong, that one included."""
    kept, broken = [], False
    for hit, counts in zip(hits, valid, strict=True):
        kept.append(counts and not broken)
        broken = broken or (counts and not hit)
    return kept


def decay(prediction: int, gamma: float | None) -> float:
    """exp(-(i-1)/gamma) of the i-th prediction, counted from 1."""
    return 1.0 if gamma is None else math.exp(-(prediction - 1) / gamma)
