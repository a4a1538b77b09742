"""From rounds to numbers: A, tau, alpha_k, and paired bootstrap intervals over prompts.

tau = 1 + mean A. Survival S_k = share of rounds with A >= k, per prompt, then averaged over prompts; alpha_k = S_k / S_{k-1},
so that tau = 1 + sum_k S_k holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specauf.decode.generate import Round
from specauf.decode.resampling import grouped, student
from specauf.strict import UserError

NGRAM = 8
"""Tokens that occur a second time where a text repeats itself."""


@dataclass(frozen=True)
class Acceptance:
    """One drafter on one task. Prompts weigh equally."""

    tau: float
    interval: tuple[float, float]
    """95 %, over prompts."""
    survival: list[float]
    """S_1 .. S_{B-1}."""
    alpha: list[float | None]
    """alpha_1 .. alpha_{B-1}; None where no round survived that far."""
    rounds: int
    cut_share: float
    """Share of rounds that an EOS token inside the draft ended."""
    engine_tau: float
    """Generated tokens over rounds, prefill token included, as engines report it."""
    prompts: int


def prompt_taus(rounds: Sequence[Sequence[Round]]) -> NDArray[np.float64]:
    """1 + mean A of each prompt; NaN, which is left out later, for a prompt without a round (its first token was EOS)."""
    return np.array([1 + np.mean([r.accepted for r in row]) if row else np.nan for row in rounds])


def summarise(
    rounds: Sequence[Sequence[Round]],
    tokens: Sequence[int],
    num_predictions: int,
    clusters: Sequence[int] | None = None,
) -> Acceptance:
    """Acceptance of one drafter. `rounds[i]` and `tokens[i]` are prompt i's rounds and number of generated tokens.

    `clusters` are as in `bootstrap`. Raises `UserError` when no prompt has a round.
    """
    taus = prompt_taus(rounds)
    kept = [row for row in rounds if row]
    if not kept:
        raise UserError("no answer has a second token, so there is no round to measure: more prompts, or other ones")
    runs = [np.array([r.accepted for r in row]) for row in kept]
    survival = [float(np.mean([(a >= k).mean() for a in runs])) for k in range(1, num_predictions + 1)]
    alpha = [s / p if p > 0 else None for s, p in zip(survival, [1.0, *survival], strict=False)]
    count = sum(len(row) for row in kept)
    return Acceptance(
        tau=1 + sum(survival),
        interval=tau_interval(taus, num_predictions + 1, clusters),
        survival=survival,
        alpha=alpha,
        rounds=count,
        cut_share=sum(r.cut for row in kept for r in row) / count,
        engine_tau=sum(n for n, row in zip(tokens, rounds, strict=True) if row) / count,
        prompts=len(kept),
    )


def bootstrap(
    values: NDArray[np.float64], clusters: Sequence[int] | None = None, resamples: int = 10_000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of one value per prompt, corrected for few prompts. NaN values are left out.

    `clusters[i]` is the conversation that prompt i is a turn of: conversations are drawn, with all their turns. Without
    `clusters` every prompt is its own. One cluster says nothing of others: NaN. Without spread the interval is one point.
    """
    kept = ~np.isnan(values)
    values, mean = values[kept], float(values[kept].mean())
    owners = np.arange(len(kept)) if clusters is None else np.asarray(clusters)
    owner = np.unique(owners[kept], return_inverse=True)[1]
    if owner.max() == 0:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return mean, mean
    rng = np.random.default_rng(0)
    moved = student([grouped(values, owner, resamples, rng)], rng)
    low, high = np.quantile(mean + moved, [0.025, 0.975]).tolist()
    return low, high


def tau_interval(
    taus: NDArray[np.float64], block_size: int, clusters: Sequence[int] | None = None
) -> tuple[float, float]:
    """`bootstrap` of the mean of tau, its ends at least 1 and at most the block size, which tau never leaves."""
    low, high = bootstrap(taus, clusters)
    return 1.0 if low < 1 else low, float(block_size) if high > block_size else high


@dataclass(frozen=True)
class Comparison:
    difference: float
    """Mean over prompts of tau_a - tau_b."""
    interval: tuple[float, float]
    """95 %, paired, over prompts or their clusters."""
    ratio: float
    """(tau_a - 1) / (tau_b - 1), of the means; NaN where b accepted nothing."""


def compare(
    a: Sequence[Sequence[Round]], b: Sequence[Sequence[Round]], clusters: Sequence[int] | None = None
) -> Comparison:
    """Two drafters over the same trajectories, prompt by prompt; `clusters` as in `bootstrap`."""
    first, second = prompt_taus(a), prompt_taus(b)
    both = ~(np.isnan(first) | np.isnan(second))
    gained, base = float(first[both].mean() - 1), float(second[both].mean() - 1)
    ratio = gained / base if base > 0 else math.nan
    return Comparison(float((first - second)[both].mean()), bootstrap(first - second, clusters), ratio)


def _ngrams(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]


def loop_onset(tokens: Sequence[int]) -> int:
    """Index of the token that completes the first repeated n-gram: where a loop sets in. The length when none does."""
    seen: set[tuple[int, ...]] = set()
    for start, gram in enumerate(_ngrams(tokens)):
        if gram in seen:
            return start + NGRAM - 1
        seen.add(gram)
    return len(tokens)


def before_loop(rounds: Sequence[Sequence[Round]], onsets: Sequence[int]) -> list[list[Round]]:
    """The rounds that start before the text begins to repeat itself. `onsets[i]` is the `loop_onset` of prompt i's answer.

    Small targets loop, and a drafter that echoes one token is then accepted whole: one such prompt can carry a mean.
    """
    return [[r for r in row if r.start < onset] for row, onset in zip(rounds, onsets, strict=True)]


def repeated_share(sequences: Sequence[Sequence[int]]) -> float:
    """Share of n-grams that occurred before in the same sequence: how much of the text repeats itself."""
    found = [_ngrams(tokens) for tokens in sequences]
    total = sum(map(len, found))
    return (total - sum(len(set(grams)) for grams in found)) / total if total else 0.0
