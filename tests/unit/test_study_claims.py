"""The paper's claims on results made by hand: every verdict for the right reason."""

from __future__ import annotations

import math
from typing import Any

import pytest

from specauf.files import read_rows
from specauf.study.claims import CLAIMS, DOMINO, PRIORS, _decide, _half_width, claims, find, standing
from specauf.study.training_log import at_common_steps, summary, thinned

TASKS = ("gsm8k", "alpaca")
NAMES = ("primary", "T=0", "T=1", "inert", "inversion", "transfer", "base", "priors", "time")


def comparison(a: str, b: str, temperature: str, task: str, verdict: str, **changes: Any) -> dict[str, Any]:
    size = {"better": 0.1, "worse": -0.1, "equivalent": 0.001, "undecided": 0.01}[verdict]
    row = {"part": "a", "temperature": temperature, "task": task, "a": a, "b": b, "before_loop": False}
    row |= {"difference": size, "interval": [size - 0.05, size + 0.05]}
    return row | {"verdict": verdict, "seeds": 3, "noise_floor": None} | changes


def study(**verdicts: str) -> dict[str, Any]:
    """Results in which every claim reproduces, but for the verdicts given: `auf_decay_1_alpaca="worse"`."""
    rows = []
    for t in ("0", "1"):
        rows += [comparison("auf", "decay", t, task, "better") for task in (*TASKS, "macro")]
        rows += [comparison("auf-decay", "auf", t, task, "equivalent") for task in (*TASKS, "macro")]
        rows += [comparison(name, "decay-only", t, "macro", "better") for name in DOMINO]
        rows += [
            comparison(f"b-auf{d}", f"{other}-auf{d}", t, "macro", "equivalent") for d in ("", "-d") for other in "sf"
        ]
    rows += [comparison("auf", name, "0", "macro", "better") for name in PRIORS]
    rows += [comparison("auf-time", "decay", "0", "macro", "better")]
    for key, verdict in verdicts.items():
        a, b, t, task = key.split("__")
        found = [
            i
            for i, r in enumerate(rows)
            if (r["a"], r["b"], r["temperature"], r["task"]) == (dash(a), dash(b), t, task)
        ]
        assert len(found) == 1, key
        rows[found[0]] = comparison(dash(a), dash(b), t, task, verdict)
    accuracy = {"decay": 0.30, "auf": 0.20, "auf-decay": 0.2}
    return {
        "tasks": {task: {} for task in TASKS},
        "parts": [
            {"methods": ["decay", "auf", "auf-decay", "prompt-lookup"], "temperatures": ["0", "1"]},
            {"methods": [*PRIORS, "auf-time"], "temperatures": ["0"]},
            {"methods": ["decay-only", *DOMINO], "temperatures": ["0", "1"]},
        ],
        "methods": [{"name": n, "cells": [{"seed": s, "state": "done"} for s in range(3)]} for n in accuracy],
        "training": {
            name: {
                str(seed): [{"step": s, "r_active": 0.4, "common_accuracy": value + 0.001 * seed} for s in range(1, 11)]
                for seed in range(3)
            }
            for name, value in accuracy.items()
        },
        "comparisons": rows,
    }


def dash(name: str) -> str:
    return name.replace("_", "-")


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    return {name: row["verdict"] for name, row in zip(NAMES, claims(results), strict=True)}


def only(**changed: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, "reproduced") | changed


def test_all_of_them_reproduce_and_say_why() -> None:
    results = study()
    assert verdicts(results) == only()
    rows = claims(results)
    assert [row["claim"] for row in rows] == [name for name, *_ in CLAIMS]
    assert rows[0]["because"] == "AUF against decay, macro average: better (+0.100 tau, 95 % interval +0.050 to +0.150)"
    assert rows[1]["because"] == (
        "AUF against decay: 2 better (differences +0.100 to +0.100 tau); "
        "without Holm's correction 2 of the 95 % intervals are above zero"
    )
    assert [results["comparisons"][i]["task"] for i in rows[1]["evidence"]] == list(TASKS)
    assert "ends 10.0 ± 0.0 points above AUF's (3 seeds, 2 readings each at the same steps)" in rows[4]["because"]
    assert "AUF's macro-average tau is 0.100 above decay's (better)" in rows[4]["because"]
    assert rows[3]["because"].endswith("tau); r_active ends at 0.40")


@pytest.mark.parametrize(
    ("key", "verdict", "changed"),
    [
        ("auf__decay__0__alpaca", "undecided", {"T=0": "undecided"}),
        ("auf__decay__0__alpaca", "equivalent", {"T=0": "not reproduced"}),
        ("auf__decay__1__gsm8k", "worse", {"T=1": "not reproduced"}),
        ("auf_decay__auf__1__macro", "undecided", {"inert": "undecided"}),
        ("auf_decay__auf__0__macro", "better", {"inert": "not reproduced"}),
        (
            "auf__decay__0__macro",
            "undecided",
            {"primary": "undecided", "inversion": "undecided", "priors": "undecided"},
        ),
        (
            "auf__decay__0__macro",
            "worse",
            {"primary": "not reproduced", "inversion": "not reproduced", "priors": "not reproduced"},
        ),
        ("f_auf__decay_only__1__macro", "undecided", {"transfer": "undecided"}),
        ("s_auf_d__decay_only__0__macro", "equivalent", {"transfer": "not reproduced"}),
        ("b_auf__f_auf__0__macro", "worse", {"base": "not reproduced"}),
        ("b_auf__f_auf__0__macro", "undecided", {"base": "undecided"}),
        ("b_auf_d__s_auf_d__0__macro", "better", {}),  # nothing is added there, and something lost
        ("auf__first_1__0__macro", "worse", {"priors": "not reproduced"}),
        ("auf__decay_g2__0__macro", "undecided", {"priors": "undecided"}),
        ("auf_time__decay__0__macro", "equivalent", {"time": "not reproduced"}),
        ("b_auf__decay_only__0__macro", "undecided", {"transfer": "undecided", "base": "undecided"}),
    ],
)
def test_one_verdict_decides_its_claims_alone(key: str, verdict: str, changed: dict[str, str]) -> None:
    assert verdicts(study(**{key: verdict})) == only(**changed)


def test_a_position_prior_that_does_as_well_is_named() -> None:
    results = study(auf__first_1__0__macro="undecided")
    results["comparisons"] = [r for r in results["comparisons"] if r["b"] != "decay-g2"]
    for row in results["comparisons"]:
        if row["b"] in PRIORS:
            row |= {"seeds": 1, "noise_floor": 0.06 if row["b"] == "uniform" else 0.05}
        if row["b"] == "decay":
            row |= {"seeds": 2, "noise_floor": 0.09}
    told = claims(results)[7]
    assert told["verdict"] == "undecided" and len(told["evidence"]) == 6
    assert (
        "first-1 +0.010 (undecided)" in told["because"]
        and "may lie 0.060 apart by their seeds alone" in told["because"]
    )
    assert told["because"].endswith("; not run: decay-g2")
    results = study()
    results["comparisons"] = [r for r in results["comparisons"] if r["b"] != "decay-g2"]
    assert claims(results)[7]["verdict"] == "undecided", "all of those that were run, but not all"


def test_a_claim_about_nothing_is_not_run() -> None:
    assert _decide(study(), [], {"better"}, {"worse"}, "nothing").verdict == "not run"


def test_missing_comparisons_are_not_run() -> None:
    results = study()
    results["comparisons"] = [r for r in results["comparisons"] if r["temperature"] == "0" and r["a"] != "f-auf"]
    told = {"T=1": "not run", "inert": "not run", "transfer": "not run"}
    assert verdicts(results) == only(**told)
    assert claims(results)[2]["because"] == "AUF against decay: 0 of 2 comparisons are measured"
    results["comparisons"] = [r for r in results["comparisons"] if r["b"] != "s-auf"]
    assert claims(results)[6]["because"] == "against AUF on both branches: 3 of 4 comparisons are measured"
    results["comparisons"] = []
    assert set(verdicts(results).values()) == {"not run"}


def test_a_study_of_other_methods_asks_nothing() -> None:
    results = study()
    results["parts"] = [{"methods": ["decay", "random", "prompt-lookup"], "temperatures": ["0"]}]
    assert claims(results) == []
    results["parts"] = [{"methods": ["decay", "auf"], "temperatures": ["0"]}]
    assert [row["claim"][:11] for row in claims(results)] == ["AUF > decay"] * 3 + ["decay is mo"]


def test_a_part_that_asks_for_one_temperature_is_judged_by_it() -> None:
    results = study()
    results["comparisons"] = [r for r in results["comparisons"] if r["temperature"] == "0"]
    for part in results["parts"]:
        part["temperatures"] = ["0"]
    assert verdicts(results) == only(**{"T=1": "not run"})


def test_temperatures_are_those_of_any_part_that_has_both_methods() -> None:
    results = study(auf_decay__auf__1__macro="undecided")
    one, *others = results["parts"]
    results["parts"] = [one | {"temperatures": ["0"]}, one | {"methods": ["auf-decay", "decay"]}, *others]
    assert verdicts(results)["inert"] == "reproduced", "at T=1 no part has both"
    results["parts"] = [one | {"temperatures": ["0"]}, one | {"methods": ["auf", "auf-decay"]}, *others]
    assert verdicts(results)["inert"] == "undecided", "one part is enough"


def test_decay_cannot_be_called_inert_on_a_short_support() -> None:
    results = study()
    for rows in results["training"]["auf"].values():
        for row in rows:
            row["r_active"] = 0.29 if row["step"] > 8 else 0.9  # the end counts
    assert verdicts(results) == only(inert="undecided")
    assert "r_active ends at 0.29" in claims(results)[3]["because"]
    results["comparisons"][find(results, "auf-decay", "auf", "0", "macro") or 0]["verdict"] = "better"
    assert verdicts(results)["inert"] == "not reproduced", "a difference is one at any length"
    results = study()
    for rows in results["training"]["auf"].values():
        rows[:] = [{"step": row["step"]} for row in rows]
    assert verdicts(results) == only(inert="undecided", inversion="not run")
    assert claims(results)[3]["because"].endswith("tau), but r_active was not logged")


def test_the_inversion_needs_all_seeds_to_agree() -> None:
    results = study()
    for row in results["training"]["decay"]["2"]:
        row["common_accuracy"] = 0.15
    assert verdicts(results) == only(inversion="undecided")
    results = study()
    for rows in results["training"]["decay"].values():
        for row in rows:
            row["common_accuracy"] = 0.1
    assert verdicts(results) == only(inversion="not reproduced")
    results["training"]["decay"] = results["training"]["auf"]
    assert verdicts(results) == only(inversion="undecided"), "alike to the last digit"
    results = study()
    for method in results["methods"]:
        method["cells"][1]["state"] = method["cells"][2]["state"] = "training"
    assert verdicts(results)["inversion"] == "undecided", "one finished seed shows no spread"
    assert "ends 10.0 points above AUF's (1 seed, " in claims(results)[4]["because"]
    results = study(auf__decay__0__macro="worse")
    assert "AUF's macro-average tau is 0.100 below decay's (worse)" in claims(results)[4]["because"]


def test_the_inversion_pairs_readings_of_the_same_steps() -> None:
    results = study()
    for rows in results["training"]["auf"].values():
        rows[:] = [row if row["step"] == 9 else {"step": row["step"], "r_active": 0.4} for row in rows]
    for rows in results["training"]["decay"].values():
        for row in rows:
            row["common_accuracy"] = 0.9 if row["step"] == 10 else row["common_accuracy"]  # AUF has none there
    assert "ends 10.0 ± 0.0 points above AUF's (3 seeds, 1 reading each" in claims(results)[4]["because"]
    del results["training"]["decay"]["1"][8]["common_accuracy"]
    assert verdicts(results)["inversion"] == "not run", "one seed's readings are of different steps"
    for rows in results["training"]["auf"].values():
        rows[8].pop("common_accuracy")
    assert verdicts(results)["inversion"] == "not run"
    assert claims(results)[4]["because"].startswith("no step near the end logs both"), "both are trained and measured"
    results = study()
    for rows in results["training"]["auf"].values():
        rows[8]["common_accuracy"] += 0.04  # the mean of the end's two readings moves by half of it
    assert "ends 8.0 ± 0.0 points above AUF's" in claims(results)[4]["because"]


def test_equal_time_says_what_each_took() -> None:
    results = study()
    for cell, seconds in zip(results["methods"][0]["cells"], (1134, 750, 732), strict=True):
        cell["train_seconds"] = seconds
    assert "trained" not in claims(results)[8]["because"]
    results["methods"].append({"name": "auf-time", "cells": [{"seed": 0, "state": "done", "train_seconds": 990}]})
    told = "; AUF trained 16.5 min, decay 12.2 to 18.9 min"
    assert claims(results)[8]["because"].endswith(told)
    results["methods"][-1]["cells"].append({"seed": 1, "state": "training", "train_seconds": 60})
    assert claims(results)[8]["because"].endswith(told), "a run that goes on has not taken its time yet"
    results["comparisons"] = []
    assert "trained" not in claims(results)[8]["because"]


def test_small_differences_do_not_read_as_zero() -> None:
    results = study()
    for row in results["comparisons"]:
        if row["a"] == "auf-decay":
            row["difference"] = -0.00004
    assert "(differences −0.00004 to −0.00004 tau)" in claims(results)[3]["because"]
    for row in results["comparisons"]:
        row["difference"] = 0.0 if row["b"] == "decay" else 0.0005
    assert "(differences +0.000 to +0.000 tau)" in claims(results)[1]["because"]
    assert "(differences +0.001 to +0.001 tau)" in claims(results)[3]["because"]


def test_single_runs_count_beyond_the_noise_floor_alone() -> None:
    def told(verdict: str, floor: float | None, difference: float = 0.1) -> str:
        return standing(comparison("a", "b", "0", "macro", verdict, seeds=1, noise_floor=floor, difference=difference))

    assert told("better", 0.05) == "better" and told("worse", 0.05, -0.1) == "worse"
    assert told("better", 0.15) == told("better", 0.1) == told("better", None) == "undecided"
    assert told("equivalent", 0.001, 0.01) == "undecided", "two equivalent runs do not show equivalent methods"
    results = study()
    for row in results["comparisons"]:
        row["seeds"], row["noise_floor"] = 1, 0.2
    found = claims(results)
    assert {row["verdict"] for row in found} == {"undecided"}
    assert "fewer than three seeds decide nothing within the noise floor" in found[0]["because"]
    assert "Holm" not in found[1]["because"], "single runs have none of it"
    for row in results["comparisons"]:
        row["seeds"], row["noise_floor"] = 2, None
    found = claims(results)
    assert {row["verdict"] for row in found} == {"undecided"}
    assert "fewer than three seeds decide nothing while the noise floor is not known" in found[0]["because"]
    assert "Holm's correction 2 of" in found[1]["because"]
    for row in results["comparisons"][1:]:
        row["seeds"] = 1
    assert "Holm" not in claims(results)[1]["because"]
    two = {"seeds": 2, "noise_floor": 0.2}
    assert standing(comparison("a", "b", "0", "macro", "better", difference=0.3, **two)) == "better", "as of one"
    assert standing(comparison("a", "b", "0", "macro", "better", difference=0.1, **two)) == "undecided"


def test_the_part_with_most_seeds_speaks() -> None:
    results = study()
    results["comparisons"].insert(0, comparison("auf", "decay", "0", "gsm8k", "worse", part="c", seeds=1))
    index = find(results, "auf", "decay", "0", "gsm8k")
    assert index is not None and results["comparisons"][index]["part"] == "a"
    assert find(results, "auf", "nothing", "0", "gsm8k") is None


def test_rounds_before_the_loop_and_later_parts_do_not_speak() -> None:
    results = study()
    row = next(r for r in results["comparisons"] if (r["a"], r["b"], r["task"]) == ("auf", "decay", "gsm8k"))
    results["comparisons"].insert(0, {**row, "before_loop": True, "seeds": 9})
    results["comparisons"].append({**row, "part": "z"})
    assert find(results, "auf", "decay", "0", "gsm8k") == results["comparisons"].index(row) == 1


def test_the_spread_of_few_seeds_is_students() -> None:
    """Of three differences: t with two degrees of freedom, 4.303, times sd / sqrt(3)."""
    assert _half_width([1.0, 2.0, 4.0]) == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    assert _half_width([2.0, 2.0]) == 0 and _half_width([1.0]) == math.inf


def test_a_lower_accuracy_of_decay_counts_when_its_seeds_agree_alone() -> None:
    for values, told in (((0.1, 0.1, 0.1), "not reproduced"), ((0.05, 0.35, 0.05), "undecided")):
        results = study()
        for value, rows in zip(values, results["training"]["decay"].values(), strict=True):
            for row in rows:
                row["common_accuracy"] = value
        assert verdicts(results) == only(inversion=told)
    assert "accuracy ends 5.1 ± 43.0 points below AUF's" in claims(results)[4]["because"]
    for row in results["training"]["decay"].values():
        for at in row:
            at["common_accuracy"] = 0.3
    del results["training"]["auf"]["2"]  # not logged: the others are compared
    assert "(2 seeds, " in claims(results)[4]["because"]


def log_row(step: int, **more: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "loss": float(step),
        "seconds": 1.0 + (step == 1),
        "tokens": 10,
        "blocks": 4,
        "epoch": step / 5,
    }
    return row | {"clipped": step == 1, "head_rows": 2.0} | more


def test_logs_are_thinned_to_means_of_windows() -> None:
    log = [log_row(s, **({"replay_tau": 1.5} if s == 3 else {})) for s in range(1, 11)]
    rows = thinned(log, 5)
    assert [(r["step"], r["loss"]) for r in rows] == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5)]
    assert [r.get("replay_tau") for r in rows] == [None, 1.5, None, None, None]
    with_credit = thinned([log_row(s, credit=[1.0, s / 10]) for s in (1, 3)], 1)
    assert with_credit[0]["credit"] == [1.0, pytest.approx(0.2)]
    assert thinned([]) == [] and len(thinned(log, 200)) == 10


def test_a_summary_counts_what_training_saw(tmp_path: Any) -> None:
    found = summary([log_row(s) for s in range(1, 6)])
    assert (found["steps"], found["seconds_per_step"], found["train_seconds"]) == (5, 1.0, 6.0)
    assert (found["tokens_seen"], found["blocks_seen"], found["epochs"], found["clipped_share"]) == (50, 20, 1.0, 0.2)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}] and summary([]) == {"steps": 0}


def test_accuracy_that_is_logged_at_every_step_is_read_at_the_others_steps() -> None:
    """500 steps in 200 windows: a window of decay's is two or three readings, of AUF's one at the most."""
    often = [{"step": s, "common_accuracy": float(s % 10 == 1), "loss": 1.0} for s in range(1, 501)]
    seldom = [row for row in often if row["step"] % 10 == 1]
    rows = thinned(at_common_steps(often, 10))
    assert [r["common_accuracy"] for r in rows if "common_accuracy" in r] == [1.0] * 50
    blank = [row if row in seldom else {"step": row["step"], "loss": 1.0} for row in often]
    assert rows == thinned(at_common_steps(blank, 10)), "what both log, both are read at"
