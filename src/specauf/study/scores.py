"""From records to the numbers of a report: scores of each method, comparisons with a baseline, verdicts.

Every array is [seeds, prompts]; a method without a seed (prompt lookup) is repeated for the seeds that it is compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specauf.bench.statistics import (
    MARGIN,
    Distribution,
    hierarchical_bootstrap,
    holm,
    macro,
    noise_floor,
    task_mean,
    verdict,
)
from specauf.config import LOOKUP
from specauf.strict import UserError
from specauf.study.claims import DOMINO, MACRO, PRIORS, standing
from specauf.study.recipe import Part, Study
from specauf.study.recordings import chosen, describe
from specauf.study.records import Place, Subject, cell_subject, load_records, lookup_subjects
from specauf.target import Target

NO_SEED = -1
"""Key of the only row of a method that is not trained."""
PAIRS = (
    *((name, "decay") for name in ("auf", "auf-time")),
    ("auf-decay", "auf"),
    *(("auf", prior) for prior in PRIORS),
    *((name, "decay-only") for name in DOMINO),
    *((base, other) for base, other in (("b-auf", "s-auf"), ("b-auf", "f-auf"))),
    *((base, other) for base, other in (("b-auf-d", "s-auf-d"), ("b-auf-d", "f-auf-d"))),
)
"""Methods that are also compared with each other, in a part that has both, because `claims` need it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """A method on a task at a temperature: rounds by accepted length, over the part's prompts."""

    seeds: tuple[int, ...]
    """The measured seeds; empty for a method without seeds."""
    accepted: Floats
    """[seeds, prompts, B]"""
    before_loop: Floats
    """[seeds, prompts, B]"""
    cut: Floats
    """[seeds, prompts] rounds that an EOS ended inside the draft"""
    tokens: Floats
    """[seeds, prompts]"""
    clusters: NDArray[np.int64]
    """[prompts]"""

    def tau(self, before_loop: bool = False) -> Floats:
        """[seeds, prompts], NaN where a prompt has no round."""
        counts = self.before_loop if before_loop else self.accepted
        rounds = counts.sum(-1)
        total = (counts * np.arange(counts.shape[-1])).sum(-1)
        return np.asarray(1 + np.divide(total, rounds, out=np.full_like(total, np.nan), where=rounds > 0))

    def survival(self) -> Floats:
        """[B-1]: S_k, the share of rounds with A >= k, averaged over the prompts that have rounds, and over seeds."""
        rounds = self.accepted.sum(-1)
        at_least = self.accepted[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]
        kept = (rounds > 0).all(axis=0)
        share = at_least[:, kept] / rounds[:, kept, None]
        return np.asarray(share.mean(axis=(0, 1)))

    def engine_tau(self) -> float:
        """Generated tokens over rounds, pooled; a prompt without a round is in neither."""
        rounds = self.accepted.sum(-1)
        return float(self.tokens[rounds > 0].sum() / rounds.sum())

    def of(self, seeds: Sequence[int]) -> Counts:
        """The counts of these seeds alone; a method without seeds is repeated for each."""
        rows = [self.seeds.index(s) for s in seeds] if self.seeds else [0] * len(seeds)
        return dataclasses.replace(
            self,
            seeds=tuple(seeds),
            accepted=self.accepted[rows],
            before_loop=self.before_loop[rows],
            cut=self.cut[rows],
            tokens=self.tokens[rows],
        )


ByTask = dict[str, Counts]


class Measured:
    """Everything measured of a study, read once from its directory."""

    def __init__(self, study: Study, target: Target) -> None:
        """Whatever was measured on recordings of another target or recipe counts as not measured."""
        self.study, self.target = study, target
        self._cache: dict[tuple[str, float, str, tuple[int, ...]], ByTask] = {}

    def of(self, key: str, temperature: float, method: str, seeds: Sequence[int] | None = None) -> ByTask:
        """The method's counts by task on the part's prompts, for those of `seeds` that are measured on every task.

        `seeds` are the part's when not given. Empty when no seed is measured so.
        """
        part = self.study.parts[key]
        seeds = tuple(part.seeds if seeds is None else seeds)
        at = (key, temperature, method, seeds)
        if at not in self._cache:
            self._cache[at] = self._load(key, part, temperature, method, seeds)
        return self._cache[at]

    def _load(self, key: str, part: Part, temperature: float, method: str, seeds: Sequence[int]) -> ByTask:
        if method.startswith(LOOKUP):
            lookups = {s.name: s for s in lookup_subjects(self.study, key)}
            subjects: dict[int, Subject | None] = {NO_SEED: lookups[method]}
        else:
            subjects = {seed: cell_subject(self.study, method, seed) for seed in seeds}
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        clusters: dict[str, list[int]] = {}
        for task in self.study.base.eval.tasks:
            about = describe(self.study, task, self.study.recording(key, temperature), self.target)
            if about is None:
                return {}
            numbers = chosen(about["clusters"], part.prompts)
            clusters[task] = [about["clusters"][i] for i in numbers]
            place = Place(task, temperature, part.max_new_tokens, about["key"])
            found[task] = {}
            for seed, subject in subjects.items():
                records = load_records(self.study, subject, place) if subject is not None else {}
                if records.keys() >= set(numbers):
                    found[task][seed] = [records[i] for i in numbers]
        everywhere = [s for s in subjects if all(s in by_seed for by_seed in found.values())]
        if not everywhere:
            return {}
        kept = tuple(s for s in everywhere if s != NO_SEED)
        return {task: _counts(kept, [rows[s] for s in everywhere], clusters[task]) for task, rows in found.items()}


def _counts(seeds: tuple[int, ...], rows: Sequence[Sequence[Mapping[str, Any]]], clusters: Sequence[int]) -> Counts:
    def array(name: str) -> Floats:
        return np.array([[record[name] for record in row] for row in rows], dtype=np.float64)

    return Counts(seeds, array("accepted"), array("before_loop"), array("cut"), array("tokens"), np.array(clusters))


def methods_of(study: Study, key: str) -> list[str]:
    """The part's methods, and prompt lookup at each of its block sizes."""
    return [*study.parts[key].methods, *(s.name for s in lookup_subjects(study, key))]


def scores(measured: Measured) -> list[dict[str, Any]]:
    """The `scores` of a study's results: part x temperature x method x (task | macro)."""
    rows = []
    for key, part in measured.study.parts.items():
        for temperature in part.temperatures:
            for method in methods_of(measured.study, key):
                by_task = measured.of(key, temperature, method)
                groups = {task: {task: counts} for task, counts in by_task.items()}
                for task, group in (groups | {MACRO: by_task}).items() if by_task else ():
                    at = {"part": key, "temperature": f"{temperature:g}", "method": method, "task": task}
                    rows.append(at | _score(group))
    return rows


def _score(by_task: ByTask) -> dict[str, Any]:
    first = next(iter(by_task.values()))
    taus = {task: counts.tau() for task, counts in by_task.items()}
    low, high = _bootstrap(by_task, taus, None).interval  # first: it says what is wrong when a task has no round
    early = {task: counts.tau(before_loop=True) for task, counts in by_task.items()}
    survival = np.mean([counts.survival() for counts in by_task.values()], axis=0)
    previous = np.concatenate([[1.0], survival[:-1]])
    rounds = {task: counts.accepted.sum() for task, counts in by_task.items()}
    return {
        "seeds": list(first.seeds),
        "tau": macro(taus),
        "interval": [max(1.0, low), min(high, float(first.accepted.shape[-1]))],  # few seeds give some beyond 1 and B
        "tau_before_loop": macro(early),
        "survival": survival.tolist(),
        "alpha": [float(s / p) if p > 0 else None for s, p in zip(survival, previous, strict=True)],
        "rounds": int(sum(rounds.values())),
        "prompts": sum(len(counts.clusters) for counts in by_task.values()),
        "cut_share": float(np.mean([counts.cut.sum() / rounds[task] for task, counts in by_task.items()])),
        "engine_tau": float(np.mean([counts.engine_tau() for counts in by_task.values()])),
        "seed_taus": {
            str(seed): macro({task: tau[i : i + 1] for task, tau in taus.items()}) for i, seed in enumerate(first.seeds)
        },
    }


def comparisons(measured: Measured) -> list[dict[str, Any]]:
    """The `comparisons` of a study's results: each method against its part's baseline, and `PAIRS`.

    A pair that is not a method and its baseline may stand there the other way round too.
    """
    rows: list[dict[str, Any]] = []
    for key, part in measured.study.parts.items():
        names = methods_of(measured.study, key)
        pairs = [(name, part.baseline) for name in names if name != part.baseline]
        pairs += [pair for pair in PAIRS if set(pair) <= set(names) and pair not in pairs]
        for temperature in part.temperatures:
            for a, b in pairs:
                for before_loop in (False, True):
                    rows += _family(measured, key, temperature, a, b, before_loop)
    return rows


def _family(
    measured: Measured, key: str, temperature: float, a: str, b: str, before_loop: bool
) -> list[dict[str, Any]]:
    """One comparison per task, with Holm's correction over them, and the macro average's, which is not corrected."""
    first, second = measured.of(key, temperature, a), measured.of(key, temperature, b)
    if not first or not second:
        return []
    own, others = (next(iter(side.values())).seeds for side in (first, second))
    seeds = [s for s in others if s in own or not own]  # b is trained, a may be prompt lookup
    if not seeds:
        return []
    first, second = ({t: c.of(seeds) for t, c in side.items()} for side in (first, second))
    taus_a, taus_b = ({t: c.tau(before_loop) for t, c in side.items()} for side in (first, second))
    found = {task: _bootstrap(first, {task: taus_a[task]}, {task: taus_b[task]}) for task in first}
    adjusted: dict[str, float | None] = dict(zip(found, holm([d.p for d in found.values()]), strict=True))
    found[MACRO], adjusted[MACRO] = _bootstrap(first, taus_a, taus_b), None
    rows = []
    for task, told in found.items():
        means = [macro(taus) if task == MACRO else task_mean(taus[task]) for taus in (taus_a, taus_b)]
        row = {
            "part": key,
            "temperature": f"{temperature:g}",
            "task": task,
            "a": a,
            "b": b,
            "before_loop": before_loop,
            "difference": told.estimate,
            "interval": list(told.interval),
            "ratio": float((means[0] - 1) / (means[1] - 1)) if means[1] > 1 else None,
            "p": told.p,
            "p_holm": adjusted[task],
            "verdict": verdict(told.interval, MARGIN, adjusted[task], told.equivalence_interval),
            "seeds": len(seeds),
            "noise_floor": floor(measured, key, temperature, task, before_loop) if len(seeds) <= 2 else None,
        }
        rows.append(row | {"standing": standing(row)})
    return rows


def floor(measured: Measured, key: str, temperature: float, task: str, before_loop: bool) -> float | None:
    """How far two seeds of one method lie apart on this part's prompts; None unless some part has several seeds measured.

    The spread is pooled over the methods of the first such part.
    """
    for part in measured.study.parts.values():
        if len(part.seeds) < 2:
            continue
        rows = []
        for method in part.methods:
            by_task = measured.of(key, temperature, method, part.seeds)
            if not by_task or len(next(iter(by_task.values())).seeds) < len(part.seeds):
                continue
            taus = {t: c.tau(before_loop) for t, c in by_task.items() if task in (t, MACRO)}
            rows.append([macro({t: tau[i : i + 1] for t, tau in taus.items()}) for i in range(len(part.seeds))])
        if rows:
            return noise_floor(np.array(rows))
    return None


def _bootstrap(by_task: ByTask, a: Mapping[str, Floats], b: Mapping[str, Floats] | None) -> Distribution:
    try:
        return hierarchical_bootstrap(a, b, {task: by_task[task].clusters for task in a})
    except ValueError as error:
        raise UserError(
            f"too little is measured for an interval: {error}. Give parts.*.prompts a larger number"
        ) from None
