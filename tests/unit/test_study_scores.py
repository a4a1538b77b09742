"""From rounds to a study's numbers, against loops over every round: what is averaged over what, and which rounds count."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from specauf.bench.statistics import holm, noise_floor, verdict
from specauf.decode.generate import Round
from specauf.decode.replay import Trajectory
from specauf.study import recipe
from specauf.study.records import records
from specauf.study.scores import NO_SEED, ByTask, Counts, Measured, _counts, _score, comparisons, scores

CLUSTERS = {"birds": [0, 1, 2, 3], "pairs": [0, 0, 1, 1, 2, 2]}
LIMIT, LOOP = 30, [7] * 40
"""A text that loops from its ninth token: rounds that start at 8 or later are after the loop set in."""
SILENT = ("birds", 2)
"""A prompt whose first token ended the text."""
BRIEF = ("birds", 1)
"""One whose second token did: a single round."""

Rounds = list[Round]
World = dict[tuple[str, int], dict[str, list[Rounds]]]


def study(tmp_path: Path, *more: str) -> recipe.Study:
    part = {"temperatures": [0.0], "max_new_tokens": LIMIT}
    parts = {
        "a": {"title": "a", "methods": ["decay", "auf", *more], "baseline": "decay", "seeds": [0, 1, 2], **part},
        "b": {"title": "b", "methods": ["auf", "wide"], "baseline": "auf", "seeds": [0], **part},
    }
    methods = {
        "decay": {"label": "d", "set": ["objective.name=decay"]},
        "auf": {"label": "a", "set": ["objective.name=auf"]},
        "wide": {"label": "w", "set": ["objective.name=auf", "drafter.block_size=6"]},
    }
    methods |= {name: {"label": name, "set": [f"objective.name={name}"]} for name in more}
    base = {"drafter": {"block_size": 4}, "train": {"max_steps": 4}, "eval": {"tasks": ["birds", "pairs"]}}
    live = {"prompts": 0}
    content = {"title": "t", "out": str(tmp_path), "base": base, "methods": methods, "parts": parts, "live": live}
    return recipe.study_of(content, "test")


def text(task: str, prompt: int) -> list[int]:
    return LOOP[: {SILENT: 1, BRIEF: 2}.get((task, prompt), LIMIT)]


def world(made: recipe.Study, seed: int) -> World:
    """Rounds of every method, seed, task and prompt."""
    rng, found = random.Random(seed), World()
    for method, seeds in (("decay", 3), ("auf", 3), ("wide", 1), ("prompt-lookup", 0), ("prompt-lookup-b6", 0)):
        most = 5 if method in ("wide", "prompt-lookup-b6") else 3
        for s in range(seeds) or [NO_SEED]:
            found[method, s] = {}
            for task, clusters in CLUSTERS.items():
                found[method, s][task] = []
                for prompt in range(len(clusters)):
                    at, row = 0, list[Round]()
                    while at < len(text(task, prompt)) - 1:
                        a = rng.randint(0, most) if rng.random() < 0.4 + 0.2 * (at > 8) else 0
                        row.append(Round(at, a, cut=rng.random() < 0.1))
                        at += a + 1
                    found[method, s][task].append(row)
    return found


class Known(Measured):
    """Has measured what it is told."""

    def __init__(self, made: recipe.Study, rounds: World) -> None:
        super().__init__(made, None)  # type: ignore[arg-type]
        self.rounds = rounds

    def _load(self, key: str, part: recipe.Part, temperature: float, method: str, seeds: Sequence[int]) -> ByTask:
        numbered = [NO_SEED] if method.startswith("prompt-lookup") else [s for s in seeds if (method, s) in self.rounds]
        if not numbered:
            return {}
        size = 6 if method in ("wide", "prompt-lookup-b6") else 4
        out = {}
        for task, clusters in CLUSTERS.items():
            answers = [Trajectory("", [1], text(task, p), False) for p in range(len(clusters))]
            rows = [[*enumerate(records(self.rounds[method, s][task], answers, LIMIT, size))] for s in numbered]
            kept = tuple(s for s in numbered if s != NO_SEED)
            out[task] = _counts(kept, [[record for _, record in row] for row in rows], clusters)
        return out


def early(row: Rounds, before_loop: bool) -> Rounds:
    return [r for r in row if r.start < 8 or not before_loop]


def tau(by_task: list[list[Rounds]], before_loop: bool = False) -> float:
    """Of one task: prompts and seeds alike; `by_task[seed][prompt]`."""
    return fmean(
        fmean(1 + fmean(r.accepted for r in early(row, before_loop)) for row in prompts if row) for prompts in by_task
    )


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_plain_loops(tmp_path: Path, seed: int) -> None:
    made = study(tmp_path)
    rounds = world(made, seed)
    rows = scores(Known(made, rounds))
    assert {(r["part"], r["method"], r["task"]) for r in rows} == {
        (part, method, task)
        for part, methods in (("a", ["decay", "auf", ""]), ("b", ["auf", "wide", "", "-b6"]))
        for method in (m if m and not m.startswith("-") else f"prompt-lookup{m}" for m in methods)
        for task in (*CLUSTERS, "macro")
    }
    for row in rows:
        seeds = [s for (m, s) in rounds if m == row["method"] and (row["part"] == "a" or s in (0, NO_SEED))]
        tasks = list(CLUSTERS) if row["task"] == "macro" else [row["task"]]
        each = {task: [rounds[row["method"], s][task] for s in seeds] for task in tasks}
        flat = {task: [r for prompts in found for x in prompts for r in x] for task, found in each.items()}
        assert row["tau"] == pytest.approx(fmean(map(tau, each.values())))
        assert row["tau_before_loop"] == pytest.approx(fmean(tau(found, True) for found in each.values()))
        assert row["tau_before_loop"] != pytest.approx(row["tau"]), "the case shows nothing"
        for k, survived in enumerate(row["survival"], 1):
            share = [fmean(fmean(r.accepted >= k for r in x) for p in found for x in p if x) for found in each.values()]
            assert survived == pytest.approx(fmean(share))
        before = [1.0, *row["survival"][:-1]]
        alpha = [s / p if p else None for s, p in zip(row["survival"], before, strict=True)]
        assert row["alpha"] == pytest.approx(alpha)
        assert row["rounds"] == sum(map(len, flat.values())) and row["prompts"] == sum(len(CLUSTERS[t]) for t in tasks)
        assert row["cut_share"] == pytest.approx(fmean(fmean(r.cut for r in found) for found in flat.values()))
        texts = {t: [text(t, p) for p in range(len(CLUSTERS[t])) if (t, p) != SILENT] for t in tasks}
        spoken = {t: len(seeds) * sum(map(len, texts[t])) for t in tasks}
        assert row["engine_tau"] == pytest.approx(fmean(spoken[t] / len(flat[t]) for t in tasks))
        assert row["seeds"] == [s for s in seeds if s != NO_SEED] == [int(s) for s in row["seed_taus"]]
        for s, alone in row["seed_taus"].items():
            mine = [tau([rounds[row["method"], int(s)][task]]) for task in tasks]
            assert alone == pytest.approx(fmean(mine))


@pytest.mark.parametrize("seed", range(3))
def test_comparisons_are_paired_by_seed_and_of_the_rounds_they_say(tmp_path: Path, seed: int) -> None:
    made = study(tmp_path)
    rounds = world(made, seed)
    rows = comparisons(Known(made, rounds))
    told = {(r["part"], r["a"], r["b"], r["before_loop"], r["task"]): r for r in rows}
    assert len(told) == len(rows) == (2 + 3) * 2 * 3
    assert {key[1:3] for key in told if key[0] == "a"} == {("auf", "decay"), ("prompt-lookup", "decay")}

    def of(method: str, seeds: list[int], tasks: list[str], before_loop: bool) -> float:
        numbered = [NO_SEED] if method.startswith("prompt-lookup") else seeds
        return fmean(tau([rounds[method, s][task] for s in numbered], before_loop) for task in tasks)

    for (part, a, b, before_loop, task), row in told.items():
        seeds, tasks = [0, 1, 2] if part == "a" else [0], list(CLUSTERS) if task == "macro" else [task]
        mine, theirs = (of(method, seeds, tasks, before_loop) for method in (a, b))
        assert row["difference"] == pytest.approx(mine - theirs)
        assert row["ratio"] == pytest.approx((mine - 1) / (theirs - 1)) and row["seeds"] == len(seeds)
        family = [told[part, a, b, before_loop, t]["p"] for t in CLUSTERS]
        adjusted = None if task == "macro" else holm(family)[list(CLUSTERS).index(task)]
        assert row["p_holm"] == adjusted
        assert row["verdict"] in (verdict(tuple(row["interval"]), p_adjusted=adjusted), "equivalent")
        floor = None
        if part == "b":  # of one seed: how far those of the part that has several lie apart
            floor = noise_floor([[of(m, [s], tasks, before_loop) for s in (0, 1, 2)] for m in ("decay", "auf")])  # type: ignore[arg-type]
        assert row["noise_floor"] == (floor if floor is None else pytest.approx(floor))


def test_methods_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    made = study(tmp_path)
    rounds = world(made, 5)
    del rounds["auf", 1]
    rows = comparisons(Known(made, rounds))
    row = next(r for r in rows if (r["part"], r["task"], r["before_loop"]) == ("a", "macro", False))
    both = [fmean(tau([rounds[m, s][task] for s in (0, 2)]) for task in CLUSTERS) for m in ("auf", "decay")]
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(both[0] - both[1])
    single = next(r for r in rows if (r["part"], r["a"], r["task"]) == ("b", "wide", "macro"))
    want = noise_floor([[fmean(tau([rounds["decay", s][t]]) for t in CLUSTERS) for s in (0, 1, 2)]])  # type: ignore[arg-type]
    assert single["noise_floor"] == pytest.approx(want), "of the methods that have all seeds"
    assert row["noise_floor"] == single["noise_floor"], "of two seeds as of one"
    del rounds["auf", 0], rounds["decay", 2]
    seeds = {(r["part"], r["a"]): r["seeds"] for r in comparisons(Known(made, rounds))}
    assert ("a", "auf") not in seeds and ("b", "wide") not in seeds and seeds["a", "prompt-lookup"] == 2


def test_what_claims_ask_for_is_compared_beside_the_baseline_and_nothing_twice(tmp_path: Path) -> None:
    made = study(tmp_path, "auf-decay")
    rounds = world(made, 7)
    rounds |= {("auf-decay", s): rounds["decay", s] for s in range(3)}
    for s in range(3):
        none = {t: [[Round(i, 0) for i, _ in enumerate(x)] for x in p] for t, p in rounds["decay", s].items()}
        rounds["decay", s] = none
    rows = [r for r in comparisons(Known(made, rounds)) if (r["part"], r["task"]) == ("a", "macro")]
    told = sorted((r["a"], r["b"]) for r in rows if not r["before_loop"])
    assert told == [("auf", "decay"), ("auf-decay", "auf"), ("auf-decay", "decay"), ("prompt-lookup", "decay")]
    assert {r["ratio"] is None for r in rows if r["b"] == "decay"} == {True}, "decay accepts nothing here"


def test_an_interval_of_tau_stays_between_one_and_the_block_size() -> None:
    accepted = np.zeros((2, 5, 4))
    accepted[0, :, 0] = accepted[1, :, 3] = 1  # nothing with one seed, everything with the other
    counts = Counts((0, 1), accepted, accepted, np.zeros((2, 5)), np.ones((2, 5)), np.arange(5))
    assert _score({"t": counts})["interval"] == [1, 4]
    accepted[1] = accepted[0]
    assert _score({"t": counts})["interval"] == [1, 1] and _score({"t": counts})["alpha"] == [0, None, None]


def test_clusters_reach_the_interval(tmp_path: Path) -> None:
    """Turns that repeat each other are no news: the interval is that of half as many conversations."""
    made = study(tmp_path)
    rounds = world(made, 6)
    for by_task in rounds.values():
        by_task["pairs"] = [by_task["pairs"][i // 2 * 2] for i in range(6)]
    apart = Known(made, rounds)
    kept: dict[str, Any] = dict(CLUSTERS)

    def width(clusters: list[int]) -> float:
        CLUSTERS["pairs"] = clusters
        try:
            rows = scores(apart)
        finally:
            CLUSTERS["pairs"] = kept["pairs"]
            apart._cache.clear()
        row = next(r for r in rows if (r["part"], r["method"], r["task"]) == ("b", "auf", "pairs"))
        return float(row["interval"][1] - row["interval"][0])

    assert width(kept["pairs"]) > 1.3 * width(list(range(6)))
