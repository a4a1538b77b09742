"""What a study found, in sentences made from its numbers: each claim with its verdict, then what has not been run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specauf.report import study_index as index
from specauf.report.study_index import MACRO
from specauf.report.study_words import ABSENT, COMPARED, OUTCOMES, VERDICTS
from specauf.report.tables import Results
from specauf.report.words import clean, count, fixed, real, series


@dataclass(frozen=True)
class Finding:
    """A claim as the page shows it. `kind` is a word that a style sheet may name; `evidence` is a sentence or empty."""

    kind: str
    verdict: str
    claim: str
    source: str
    because: str
    evidence: str


def headline(results: Results) -> list[str]:
    """How many claims hold, then prompt lookup's average beside the best drafter's."""
    claims = results.get("claims") or []
    papers = [c for c in claims if str(c.get("source") or "").startswith("paper")]
    others = [c for c in claims if c not in papers]
    told = [_tally(named, some) for named, some in (("the paper's", papers), ("our own", others)) if some]
    first = f"Of {'; of '.join(told)}." if told else ""
    said_of_lookup = lookup_line(results)
    nothing = "" if said_of_lookup else "No claim has been put to the test yet."
    return [line for line in (first or nothing, said_of_lookup) if line]


def _tally(whose: str, claims: Sequence[dict[str, Any]]) -> str:
    """`the paper's 6 claims, 1 is reproduced here and 5 are undecided`."""
    tally = Counter(_verdict(c) for c in claims)
    said = ("reproduced here", "not reproduced", "undecided", "not run yet")
    counts = [
        f"{tally[v]} {'are' if tally[v] != 1 else 'is'} {words}"
        for v, words in zip(VERDICTS, said, strict=True)
        if tally[v]
    ]
    return f"{whose} {len(claims)} claim{'s' if len(claims) != 1 else ''}, {series(counts)}"


def lookup_line(results: Results) -> str:
    """The best drafter's average beside prompt lookup's in the first part that measured both, by point estimate."""
    for part in results["parts"]:
        for temperature in index.temperatures(results, part):
            taus = {
                n: real(index.score(results, part, temperature, n, MACRO).get("tau")) for n in index.rows(results, part)
            }
            free = [(v, n) for n, v in taus.items() if v is not None and index.is_lookup(results, n)]
            rivals = [(v, n) for n, v in taus.items() if v is not None and not index.is_lookup(results, n)]
            if free and rivals:
                (tau, name), (other, lookup) = max(rivals), max(free)
                best, free_label = index.label(results, name), index.label(results, lookup)
                asked = sum(not index.is_lookup(results, n) for n in taus)
                of = "drafters" if len(rivals) == asked else f"{len(rivals)} of {asked} drafters measured"
                of += f" of “{index.part_label(part)}”"
                most = f"{best} emits {fixed(tau)} tokens a round, the most of the {of}"
                if sum(fixed(v) == fixed(tau) for v, _ in rivals) > 1:
                    most = f"none of the {of} emits more than {fixed(tau)} tokens a round"
                return (
                    f"On the average of all benchmarks at T = {clean(temperature)}, {most}; without parameters, {free_label} "
                    f"emits {fixed(other)}."
                )
    return ""


def findings(results: Results) -> list[Finding]:
    """Every claim, in the order of the results: one that did not reproduce keeps its place."""
    found = []
    for claim in results.get("claims") or []:
        verdict = _verdict(claim)
        found.append(
            Finding(
                kind="".join(ch if ch.isalpha() else "-" for ch in verdict) if verdict in VERDICTS else "other",
                verdict=VERDICTS.get(verdict, clean(verdict)),
                claim=clean(claim["claim"]),
                source=clean(claim.get("source") or ""),
                because=clean(claim.get("because") or ""),
                evidence=evidence(results, claim),
            )
        )
    return found


def evidence(results: Results, claim: dict[str, Any]) -> str:
    """`12 comparisons: 10 better, 2 undecided`: those that the claim rests on. Indices out of range are skipped."""
    compared = results.get("comparisons") or []
    used = [compared[i] for i in claim.get("evidence") or [] if 0 <= i < len(compared)]
    tally = Counter(clean(index.standing(c) or "no verdict") for c in used)
    words = [*OUTCOMES, *sorted(set(tally) - set(OUTCOMES))]
    counts = ", ".join(f"{tally[w]} {w}" for w in words if tally[w])
    return f"{count(len(used))} comparison{'s' if len(used) > 1 else ''}: {counts}" if used else ""


def missing(results: Results) -> list[str]:
    """A line for every part with something left to do: cells to train, then places to measure; one line if none has."""
    lines = []
    for part in results["parts"]:
        absent = index.absent(results, part)
        told = []
        for kind, words in (
            ("missing", ABSENT),
            ("training", "in training"),
            ("unmeasured", "trained, not measured yet"),
        ):
            cells = [_cells(index.label(results, n), seeds, part) for n, seeds in absent[kind].items()]
            told += [f"{words}: {'; '.join(cells)}"] if cells else []
        told += [f"not measured yet at {where}: {'; '.join(names)}" for where, names in _gaps(results, part).items()]
        told = told if part.get("methods") else [*told, "it names no method"]
        if told:
            sentences = " ".join(f"{line[0].upper()}{line[1:]}." for line in told)
            lines.append(f"“{index.part_label(part)}”. {sentences}")
    if unchecked := results.get("unchecked"):
        lines.append(f"Not decoded live yet, to be compared with replay: {', '.join(map(clean, unchecked))}.")
    if not results["parts"]:
        return ["Nothing has been run yet: the study has no part."]
    return lines or ["Nothing is missing: every cell of every part has been trained and measured."]


def _gaps(results: Results, part: dict[str, Any]) -> dict[str, list[str]]:
    """`T = 0 and T = 1 on MBPP` -> labels of methods without a number there."""
    heats: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, temperature, without in index.unmeasured(results, part):
        heats.setdefault((name, tuple(without)), []).append(f"T = {clean(temperature)}")
    found: dict[str, list[str]] = {}
    for (name, tasks), at in heats.items():
        every = len(tasks) > len(index.tasks(results))
        where = "" if every else f" on {series([index.task_label(results, t) for t in tasks])}"
        found.setdefault(f"{series(at)}{where}", []).append(index.label(results, name))
    return found


def part_facts(results: Results, part: dict[str, Any]) -> str:
    """Seeds, prompts and length of a part in one line, and its budget as stated before it was run."""
    seeds = part.get("seeds") or []
    prompts = part.get("prompts")
    told = [index.seeds_of([str(s) for s in seeds]) or "no seed"]
    told.append("all prompts" if prompts is None else f"{count(prompts)} conversations a benchmark")
    told += [f"{count(part['max_new_tokens'])} new tokens"] if part.get("max_new_tokens") else []
    told += [f"baseline {index.label(results, part['baseline'])}"] if part.get("baseline") else []
    line = ", ".join(told)
    budget = clean(part.get("budget") or "").strip().rstrip(".")
    return f"{line[0].upper()}{line[1:]}. " + (
        f"Budget, stated before running: {budget}." if budget else "No budget was stated."
    )


def rule(results: Results) -> str:
    """How verdicts are reached, with the study's own margin."""
    margin = real(results.get("margin"))
    return COMPARED.format(margin="the margin" if margin is None else f"{margin:g}")


def _verdict(claim: dict[str, Any]) -> str:
    return str(claim.get("verdict") or "not run")


def _cells(name: str, seeds: list[str], part: dict[str, Any]) -> str:
    """`AUF`, or with its seeds when others of it have run or the part has several."""
    several = len(part.get("seeds") or []) > 1
    told = index.seeds_of(seeds) if several else ""
    return f"{name} ({told})" if told else name
