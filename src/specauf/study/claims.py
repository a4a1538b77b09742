"""The paper's claims, each as a function of a study's results: reproduced here, not reproduced, undecided, or not run.

A comparison counts with its verdict in the table, with one exception. With one or two seeds a difference counts only when it
exceeds the noise floor, the spread of seeds, and not at all while that is unknown: its interval is about those runs, but a
claim is about the methods.

Methods are found by name: `decay`, `auf`, `auf-decay` on DFlash; `decay-only`, `b-auf`, `b-auf-d`, `s-auf`, ... on Domino.
The last two claims are not the paper's but what it leaves open: whether AUF beats fixed position priors (`PRIORS`), and
whether it wins at equal training time rather than equal steps (`auf-time`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy import stats

from specauf.strict import counted

Results = Mapping[str, Any]
MACRO = "macro"
TEMPERATURES = ("0", "1")
DOMINO = ("b-auf", "b-auf-d", "s-auf", "s-auf-d", "f-auf", "f-auf-d")
"""The paper's Table 3: AUF on the base branch alone (`b`), on both branches with the base's support (`s`), or on each with
its own (`f`); `-d` adds decay."""
PRIORS = ("uniform", "decay-g05", "decay-g1", "decay-g2", "first-1", "first-2")
"""Weights by position alone, which do not depend on what the drafter gets right."""
REACH = 0.3
"""r_active below which decay inside AUF has too few slots to act on, so that being inert there says nothing."""
TAIL = 0.2
"""Share of the training, at its end, over which a figure's end value is averaged."""


class Found(NamedTuple):
    """What the numbers say about a claim."""

    verdict: str
    because: str
    evidence: Sequence[int] = ()
    """Indices into the results' comparisons."""


def claims(results: Results) -> list[dict[str, Any]]:
    """The `claims` of a study's results: those about the methods of its parts."""
    rows = []
    asked = {name for part in results["parts"] for name in part["methods"]}
    for name, source, decide, about in CLAIMS:
        if not all(asked.intersection(names) for names in about):
            continue
        found = decide(results)
        told = {"verdict": found.verdict, "because": found.because, "evidence": list(found.evidence)}
        rows.append({"claim": name, "source": source, **told})
    return rows


def primary(results: Results) -> Found:
    """AUF above decay on the average: the one endpoint that a study passes or fails."""
    index = find(results, "auf", "decay", "0", MACRO)
    return _decide(results, [index], {"better"}, {"worse", "equivalent"}, "AUF against decay, macro average")


def everywhere(results: Results, temperature: str) -> Found:
    """AUF above decay on every benchmark, by Holm's adjusted p.

    The adjustment protects a claim about any single benchmark; one about all of them would need none. The verdict keeps the
    rule that was fixed before the run; its reason adds how many intervals are above zero without the adjustment.
    """
    indices = [find(results, "auf", "decay", temperature, task) for task in results["tasks"]]
    found = _decide(results, indices, {"better"}, {"worse", "equivalent"}, "AUF against decay")
    rows = [results["comparisons"][i] for i in found.evidence]
    if found.verdict == "not run" or any(row["seeds"] < 2 for row in rows):
        return found
    above = sum(row["interval"][0] > 0 for row in rows)
    return found._replace(
        because=f"{found.because}; without Holm's correction {above} of the 95 % intervals are above zero"
    )


def inert(results: Results) -> Found:
    """AUF with and without decay are equivalent, where there is room for a difference."""
    indices = [find(results, "auf-decay", "auf", t, MACRO) for t in _temperatures(results, "auf-decay", "auf")]
    found = _decide(results, indices, {"equivalent"}, {"better", "worse"}, "AUF + decay against AUF, macro average")
    if found.verdict in ("not run", "not reproduced"):  # a difference that is shown is one at any length of the support
        return found
    reach = [fmean(values.values()) for values in _end(results, "auf", "r_active").values()]
    if not reach:
        return found._replace(verdict="undecided", because=f"{found.because}, but r_active was not logged")
    if fmean(reach) < REACH:
        why = f"r_active ends at {fmean(reach):.2f}, below {REACH:g}: the support is too short for a decay to matter"
        return found._replace(verdict="undecided", because=f"{why} ({found.because})")
    return found._replace(because=f"{found.because}; r_active ends at {fmean(reach):.2f}")


def inversion(results: Results) -> Found:
    """Decay is more accurate over all valid slots, yet is accepted less."""
    index = find(results, "auf", "decay", "0", MACRO)
    read = {name: _end(results, name, "common_accuracy") for name in ("decay", "auf")}
    seeds = read["decay"].keys() & read["auf"].keys()
    # AUF's loss does not read all slots, so it logs this figure only at some steps; it is paired with decay's at those.
    steps = {seed: read["decay"][seed].keys() & read["auf"][seed].keys() for seed in seeds}
    if index is None:
        return Found("not run", "decay and AUF are not both trained and measured")
    if not steps or not all(steps.values()):
        return Found("not run", "no step near the end logs both accuracies (train.common_every)")
    differences = [fmean(read["decay"][seed][t] - read["auf"][seed][t] for t in steps[seed]) for seed in seeds]
    sure = _half_width(differences)
    mean = fmean(differences)
    verdict = standing(results["comparisons"][index])
    interval = f" ± {100 * sure:.1f}" if math.isfinite(sure) else ""
    because = (
        f"decay's common-token accuracy ends {100 * abs(mean):.1f}{interval} points {_side(mean)} AUF's "
        f"({counted(len(seeds), 'seeds')}, {counted(min(map(len, steps.values())), 'readings')} each at the same steps), "
        f"and {_told(results, index)}"
    )
    if verdict in ("worse", "equivalent") or sure < -mean:
        return Found("not reproduced", because, [index])
    shown = verdict == "better" and sure < mean
    return Found("reproduced" if shown else "undecided", because, [index])


def transfer(results: Results) -> Found:
    """Every AUF variant of Domino above its decay-only."""
    temperatures = _temperatures(results, "b-auf", "decay-only")
    indices = [find(results, name, "decay-only", t, MACRO) for t in temperatures for name in DOMINO]
    return _decide(results, indices, {"better"}, {"worse", "equivalent"}, "Domino's AUF variants against decay-only")


def base_branch(results: Results) -> Found:
    """AUF on the base branch is what helps: it beats decay-only, and adding AUF on the final branch gains nothing."""
    gain = [find(results, name, "decay-only", "0", MACRO) for name in ("b-auf", "b-auf-d")]
    found = _decide(results, gain, {"better"}, {"worse", "equivalent"}, "AUF on the base branch against decay-only")
    pairs = [(f"b-auf{d}", f"{other}-auf{d}") for d in ("", "-d") for other in ("s", "f")]
    indices = [find(results, a, b, "0", MACRO) for a, b in pairs]
    beside = _decide(results, indices, {"better", "equivalent"}, {"worse"}, "against AUF on both branches")
    if "not run" in (found.verdict, beside.verdict):
        return found if found.verdict == "not run" else beside
    order = ("not reproduced", "undecided", "reproduced")
    verdict = min(found.verdict, beside.verdict, key=order.index)
    return Found(verdict, f"{found.because}; {beside.because}", [*found.evidence, *beside.evidence])


def beyond_priors(results: Results) -> Found:
    """AUF above every fixed weighting of positions, including tuned ones and the first slots alone.

    Each is reported by name, since one that does as well says more than how many do not.
    """
    labels = {m["name"]: m.get("label", m["name"]) for m in results["methods"]}
    found = {name: find(results, "auf", name, "0", MACRO) for name in ("decay", *PRIORS)}
    known = {name: i for name, i in found.items() if i is not None}
    if not known:
        return Found("not run", "AUF is not compared with any weights by position")
    rows = {name: results["comparisons"][i] for name, i in known.items()}
    each = [f"{labels.get(n, n)} {_tau(row['difference'])} ({standing(row)})" for n, row in rows.items()]
    because = f"AUF's macro-average tau minus that of {', '.join(each)}"
    if floors := [row["noise_floor"] for row in rows.values() if row["seeds"] == 1 and row["noise_floor"]]:
        because += f"; two runs of one method may lie {max(floors):.3f} apart by their seeds alone"
    if absent := [labels.get(name, name) for name in found if name not in known]:
        because += f"; not run: {', '.join(absent)}"
    verdicts = {standing(row) for row in rows.values()}
    if verdicts & {"worse", "equivalent"}:
        return Found("not reproduced", because, list(known.values()))
    sure = verdicts == {"better"} and not absent
    return Found("reproduced" if sure else "undecided", because, list(known.values()))


def equal_time(results: Results) -> Found:
    """AUF above decay, with as many steps as fit in decay's training time."""
    indices = [find(results, "auf-time", "decay", "0", MACRO)]
    found = _decide(results, indices, {"better"}, {"worse", "equivalent"}, "AUF in decay's time against decay")
    spent = {name: _minutes(results, name) for name in ("auf-time", "decay")}
    if found.verdict == "not run" or not all(spent.values()):
        return found
    return found._replace(because=f"{found.because}; AUF trained {spent['auf-time']} min, decay {spent['decay']} min")


BOTH, VARIANTS = (("auf",), ("decay",)), (("decay-only",), DOMINO)
CLAIMS: tuple[tuple[str, str, Callable[[Results], Found], Sequence[Sequence[str]]], ...] = (
    ("AUF > decay on the average at T=0, the primary endpoint", "paper, Table 2", primary, BOTH),
    ("AUF > decay on every benchmark at T=0", "paper, Table 2", lambda results: everywhere(results, "0"), BOTH),
    ("AUF > decay on every benchmark at T=1", "paper, Table 2", lambda results: everywhere(results, "1"), BOTH),
    ("decay is inert inside AUF", "paper, section 5.1 and Table 2", inert, (("auf-decay",), ("auf",))),
    (
        "decay is more accurate on the common mask and decodes worse",
        "paper, section 5.1 and Figure 4",
        inversion,
        BOTH,
    ),
    (
        "support selection transfers to Domino: every AUF variant > decay-only",
        "paper, Table 4",
        transfer,
        VARIANTS,
    ),
    ("Domino's base branch carries the gain", "paper, section 5.2 and Table 4", base_branch, VARIANTS),
    (
        "AUF > every position prior: uniform, decay of any γ, first slots alone",
        "a control, not of the paper",
        beyond_priors,
        (("auf",), PRIORS),
    ),
    ("AUF > decay at equal training time", "not of the paper", equal_time, (("auf-time",), ("decay",))),
)
"""A claim, its source, the function that judges it, and groups of methods. Only a study whose parts name a method of every
group has the claim."""


def find(results: Results, a: str, b: str, temperature: str, task: str) -> int | None:
    """Index of the comparison of a with b over all rounds, in the first part with the most seeds; None if there is none."""
    wanted = {"a": a, "b": b, "temperature": temperature, "task": task}
    rows = [
        i
        for i, row in enumerate(results["comparisons"])
        if not row["before_loop"] and all(row[key] == value for key, value in wanted.items())
    ]
    return max(rows, key=lambda i: (results["comparisons"][i]["seeds"], -i), default=None)


def standing(row: Mapping[str, Any]) -> str:
    """The comparison's verdict as a claim may use it: with one or two seeds only beyond the noise floor.

    The bootstrap of two seeds is too narrow (docs/statistics.md). The floor is one of single runs, so it is wide for two.
    """
    if row["seeds"] > 2:
        return str(row["verdict"])
    noise = row["noise_floor"]
    if noise is None or row["verdict"] == "equivalent":  # two equivalent runs do not show equivalent methods
        return "undecided"
    return str(row["verdict"]) if abs(row["difference"]) > noise else "undecided"


def _decide(results: Results, indices: Iterable[int | None], good: set[str], bad: set[str], what: str) -> Found:
    """Reproduced when every comparison is good, not reproduced when one is bad, else undecided; not run when one is missing."""
    found = list(indices)
    known = [i for i in found if i is not None]
    if not found or len(known) < len(found):
        return Found("not run", f"{what}: {len(known)} of {len(found)} comparisons are measured", known)
    verdicts = [standing(results["comparisons"][i]) for i in known]
    told = ", ".join(
        f"{verdicts.count(v)} {v}" for v in ("better", "equivalent", "worse", "undecided") if v in verdicts
    )
    rows = [results["comparisons"][i] for i in known]
    low, high = (pick(row["difference"] for row in rows) for pick in (min, max))
    because = f"{what}: {told} (differences {_tau(low)} to {_tau(high)} tau)"
    if len(rows) == 1:
        interval = " to ".join(map(_tau, rows[0]["interval"]))
        because = f"{what}: {verdicts[0]} ({_tau(low)} tau, 95 % interval {interval})"
    few = [row for row in rows if row["verdict"] != standing(row)]
    if any(row["noise_floor"] is None for row in few):
        because += "; fewer than three seeds decide nothing while the noise floor is not known"
    elif few:
        because += "; fewer than three seeds decide nothing within the noise floor"
    if any(v in bad for v in verdicts):
        return Found("not reproduced", because, known)
    return Found("reproduced" if all(v in good for v in verdicts) else "undecided", because, known)


def _told(results: Results, index: int) -> str:
    row = results["comparisons"][index]
    gap = row["difference"]
    return f"AUF's macro-average tau is {abs(gap):.3f} {_side(gap)} decay's ({standing(row)})"


def _side(difference: float) -> str:
    return "above" if difference >= 0 else "below"


def _tau(difference: float) -> str:
    """With its sign, and with more than three decimals where three would read as zero."""
    digits = ".3f" if difference == 0 or abs(difference) >= 0.0005 else ".5f"
    return f"{difference:+{digits}}".replace("-", "−")


def _minutes(results: Results, method: str) -> str:
    """`12.2 to 18.9`: least and most over the method's finished cells; empty when none is logged."""
    cells: list[Mapping[str, Any]] = next((m["cells"] for m in results["methods"] if m["name"] == method), [])
    times = sorted(c["train_seconds"] / 60 for c in cells if c["state"] == "done" and c.get("train_seconds"))
    return " to ".join(dict.fromkeys(f"{t:.1f}" for t in times[:1] + times[-1:]))


def _temperatures(results: Results, a: str, b: str) -> list[str]:
    """Temperatures of the parts that have both methods; T=0 if there is none, so that a comparison counts as missing."""
    parts = [part for part in results["parts"] if {a, b} <= set(part["methods"])]
    return [t for t in TEMPERATURES if any(t in part["temperatures"] for part in parts)] or ["0"]


def _end(results: Results, method: str, figure: str) -> dict[str, dict[int, float]]:
    """Seed -> step -> the figure, over the last `TAIL` of training, of every seed that ran to its end and logged it."""
    states = {m["name"]: {str(c["seed"]): c["state"] for c in m["cells"]} for m in results["methods"]}
    found = {}
    for seed, log in results["training"].get(method, {}).items():
        last = log[-1]["step"]
        values = {row["step"]: row[figure] for row in log if figure in row and row["step"] > (1 - TAIL) * last}
        if values and states.get(method, {}).get(seed) == "done":
            found[seed] = values
    return found


def _half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean, by Student's t; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)))
