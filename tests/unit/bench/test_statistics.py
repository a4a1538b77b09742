"""A study's intervals against plain loops, textbook formulas, and worlds whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specauf.bench import statistics as made
from specauf.bench.statistics import (
    NEAR,
    REFINED,
    Distribution,
    hierarchical_bootstrap,
    holm,
    macro,
    noise_floor,
    task_mean,
    verdict,
)

NAN = math.nan


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def single(a: Any, b: Any = None, clusters: Any = None, **options: Any) -> made.Distribution:
    """One task; every prompt its own cluster if nothing else is said."""
    a = np.asarray(a, dtype=float)
    groups = np.arange(a.shape[1]) if clusters is None else np.asarray(clusters)
    return hierarchical_bootstrap(
        {"t": a}, None if b is None else {"t": np.asarray(b, dtype=float)}, {"t": groups}, **options
    )


def slow_mean(tau: list[list[float]]) -> float:
    total, count = 0.0, 0
    for prompt in range(len(tau[0])):
        column = [row[prompt] for row in tau]
        if not any(math.isnan(x) for x in column):
            total, count = total + sum(column) / len(column), count + 1
    return total / count


def slow_macro(taus: dict[str, list[list[float]]]) -> float:
    return sum(slow_mean(tau) for tau in taus.values()) / len(taus)


# --- point estimates ---


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_estimates_are_those_of_plain_loops(seed: int, seeds: int, holes: bool) -> None:
    rng = np.random.default_rng(seed)
    a = {task: rng.uniform(1, 5, (seeds, prompts)) for task, prompts in (("x", 3), ("y", 7), ("z", 4))}
    b = {task: rng.uniform(1, 5, tau.shape) for task, tau in a.items()}
    if holes:
        a["x"][:, 1] = b["x"][:, 1] = a["y"][0, 2] = b["y"][0, 2] = NAN
    clusters = {task: np.arange(tau.shape[1]) for task, tau in a.items()}
    for tau in a.values():
        assert task_mean(tau) == pytest.approx(slow_mean(tau.tolist()))
    slow = {name: slow_macro({t: v.tolist() for t, v in taus.items()}) for name, taus in (("a", a), ("b", b))}
    assert macro(a) == pytest.approx(slow["a"])
    assert hierarchical_bootstrap(a, None, clusters, resamples=10).estimate == pytest.approx(slow["a"])
    assert hierarchical_bootstrap(a, b, clusters, resamples=10).estimate == pytest.approx(slow["a"] - slow["b"])


def test_tasks_weigh_equally_whatever_their_number_of_prompts() -> None:
    assert macro({"small": np.full((2, 3), 2.0), "large": np.full((2, 200), 4.0)}) == 3


# --- the interval ---


def test_one_seed_and_many_prompts_give_the_textbook_interval() -> None:
    difference = np.random.default_rng(0).normal(0.1, 0.3, (1, 400))
    found = single(difference)
    half = 1.96 * difference.std() / math.sqrt(400)
    assert found.interval == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.05 * half)
    assert width(found.equivalence_interval) == pytest.approx(width(found.interval) * 1.645 / 1.96, rel=0.05)


@pytest.mark.parametrize("z", [-1.5, 0.5, 2.5])
def test_p_is_two_sided(z: float) -> None:
    noise = np.random.default_rng(0).normal(0, 1, (1, 400))
    difference = (noise - noise.mean()) / noise.std() + z / math.sqrt(400)
    assert single(difference).p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.1)


def test_pairing_cancels_what_the_prompts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(3, 1, 100)  # prompts differ far more than the methods do
    a, b = (mean + hard + rng.normal(0, 0.1, (3, 100)) for mean in (0.2, 0.0))
    paired = single(a, b)
    apart = math.hypot(width(single(a).interval), width(single(b).interval))
    assert width(paired.interval) < apart / 4
    assert verdict(paired.interval) == "better" and paired.p < 0.01


def test_turns_of_a_conversation_are_drawn_together() -> None:
    conversations = np.random.default_rng(2).normal(0, 0.3, (1, 60))
    turns = np.repeat(conversations, 2, axis=1)  # the second turn repeats the first: no new information
    together = single(turns, clusters=np.repeat(np.arange(60), 2))
    independent = single(turns)
    assert width(together.interval) == pytest.approx(width(single(conversations).interval), rel=1e-9)
    assert width(independent.interval) == pytest.approx(width(together.interval) / math.sqrt(2), rel=0.06)


def test_a_cluster_weighs_by_its_prompts() -> None:
    found = single([[0.0, 0.0, 0.0, 3.0]], clusters=[5, 5, 5, 9])
    assert found.estimate == 0.75
    assert found.interval[0] < 0.75 < found.interval[1]
    alike = single(np.full((1, 9), 2.0), clusters=[0, 0, 0, 0, 0, 0, 1, 2, 3])
    assert alike.interval == (2, 2)  # many turns drawn, many turns divided by


def test_all_tasks_share_the_draw_of_seeds() -> None:
    effect = np.array([[-0.1], [0.0], [0.1]])
    rng = np.random.default_rng(3)
    tasks = {f"t{i}": effect + rng.normal(0, 0.02, 50) for i in range(6)}
    groups = {task: np.arange(50) for task in tasks}
    many = hierarchical_bootstrap(tasks, None, groups)
    one = hierarchical_bootstrap({"t0": tasks["t0"]}, None, {"t0": groups["t0"]})
    assert width(many.interval) == pytest.approx(width(one.interval), rel=0.1)  # not smaller by sqrt(6)


def test_prompts_of_different_tasks_are_drawn_apart() -> None:
    rng = np.random.default_rng(4)
    tasks = {f"t{i}": rng.normal(0, 0.3, (1, 50)) for i in range(4)}
    groups = {task: np.arange(50) for task in tasks}
    many = width(hierarchical_bootstrap(tasks, None, groups).interval)
    singles = [width(hierarchical_bootstrap({t: v}, None, {t: groups[t]}).interval) for t, v in tasks.items()]
    assert many == pytest.approx(math.sqrt(sum(w**2 for w in singles)) / 4, rel=0.06)


def test_disagreeing_seeds_widen_the_interval_and_agreeing_ones_do_not() -> None:
    prompts = np.random.default_rng(5).normal(0.1, 0.2, 80)
    alone, agree = single(prompts[None]), single(np.stack([prompts] * 3))
    disagree = single(prompts + np.array([[-0.1], [0.0], [0.1]]))
    assert width(agree.interval) == pytest.approx(width(alone.interval), rel=0.05)
    few = prompts[:4]  # Student's tails are those of the prompts, whatever the seeds have none of
    assert width(single(np.stack([few] * 3)).interval) == pytest.approx(width(single(few[None]).interval), rel=0.1)
    assert width(disagree.interval) > 2 * width(alone.interval)


def test_prompts_without_a_round_change_nothing() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.uniform(1, 3, (2, 3, 20))
    groups = np.repeat(np.arange(10), 2)
    holes = np.insert(
        np.arange(20.0), (0, 7, 7), NAN
    )  # one before, two in the middle; the last has a cluster of its own
    spread = [np.where(np.isnan(holes), NAN, x[:, np.nan_to_num(holes).astype(int)]) for x in (a, b)]
    wider = np.insert(groups, (0, 7, 7), (0, 3, 99))
    assert single(*spread, clusters=wider) == single(a, b, clusters=groups)
    spread[1][0, 3] = NAN  # a pair needs both
    assert single(*spread, clusters=wider).estimate != single(a, b, clusters=groups).estimate


def test_a_method_against_itself_is_exactly_zero() -> None:
    a = np.random.default_rng(7).uniform(1, 3, (3, 20))
    found = single(a, a)
    assert (found.estimate, found.interval, found.p) == (0, (0, 0), 1)
    assert verdict(found.interval, equivalence_interval=found.equivalence_interval) == "equivalent"


def test_swapping_the_methods_mirrors_the_result() -> None:
    a, b = np.random.default_rng(8).uniform(1, 3, (2, 3, 30))
    here, there = single(a, b), single(b, a)
    assert there.interval == pytest.approx((-here.interval[1], -here.interval[0])) and there.p == here.p


def test_results_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    tasks = {"x": rng.uniform(1, 3, (3, 20)), "y": rng.uniform(1, 3, (3, 30))}
    groups = {task: np.arange(tau.shape[1]) for task, tau in tasks.items()}
    first = hierarchical_bootstrap(tasks, None, groups, resamples=1000)
    assert first == hierarchical_bootstrap(dict(reversed(tasks.items())), None, groups, resamples=1000)
    assert first != hierarchical_bootstrap(tasks, None, groups, resamples=1000, seed=1)
    monkeypatch.setattr("specauf.decode.resampling.CHUNK", 77)
    assert first == hierarchical_bootstrap(tasks, None, groups, resamples=1000)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-0.5, 0.5))
def test_p_below_five_percent_is_an_interval_without_zero(seed: int, shift: float) -> None:
    found = single(np.random.default_rng(seed).normal(shift, 1, (2, 12)), resamples=499)
    assert 0 < found.p <= 1
    if abs(found.p - 0.05) > 0.01:
        assert (found.p < 0.05) == (found.interval[0] > 0 or found.interval[1] < 0)


@pytest.mark.parametrize(
    ("a", "b", "clusters", "told"),
    [
        ({"t": np.ones((2, 3))}, {"t": np.ones((2, 4))}, {"t": np.arange(3)}, "shapes"),
        ({"t": np.ones((2, 3))}, {"t": np.ones((1, 3))}, {"t": np.arange(3)}, "do not fit together"),
        ({"t": np.ones((2, 3))}, None, {"t": np.arange(4)}, "shapes"),
        ({"t": np.ones((2, 3))}, None, {"t": np.zeros(3)}, "two or more conversations"),
        ({"t": np.full((2, 3), NAN)}, None, {"t": np.arange(3)}, "no prompt"),
        ({"t": np.ones((2, 3)), "u": np.ones((1, 3))}, None, {"t": np.arange(3), "u": np.arange(3)}, "same seeds"),
        ({"t": np.ones((2, 3))}, {"u": np.ones((2, 3))}, {"t": np.arange(3)}, "same tasks"),
        ({}, None, {}, "at least one task"),
    ],
)
def test_what_cannot_be_resampled_is_refused(a: Any, b: Any, clusters: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        hierarchical_bootstrap(a, b, clusters, resamples=10)


# --- coverage: in worlds whose true difference is zero, 95 of 100 intervals contain it ---


def coverage(
    seeds: int, ratio: float, interaction: float = 0, prompts: int = 40, worlds: int = 300, resamples: int = 300
) -> tuple[float, float]:
    """(Share of 95 % intervals that contain the truth, share of p below 0.05/6, Holm's first hurdle at six tasks).

    Normal effects: prompts of variance 1, seed-by-prompt of `interaction`, seeds so that their part of the standard error is
    `ratio` times the rest.
    """
    rng, found = np.random.default_rng(10), []
    seed_sd = ratio * math.sqrt(seeds * (1 + interaction / seeds) / prompts)
    for world in range(worlds):
        cells = rng.normal(0, math.sqrt(interaction), (seeds, prompts)) + rng.normal(0, 1, prompts)
        found.append(single(cells + rng.normal(0, seed_sd, (seeds, 1)), resamples=resamples, seed=world))
    return float(np.mean([d.interval[0] <= 0 <= d.interval[1] for d in found])), float(
        np.mean([d.p < 0.05 / 6 for d in found])
    )


@pytest.mark.parametrize(
    ("seeds", "ratio", "interaction"),
    [
        (1, 0, 0),  # a single run, asked about that run
        (3, 0.5, 1),
        (3, 1, 0),  # seeds and prompts about alike
        (3, 5, 0),  # seeds decide
        (3, 0, 3),  # little but the interaction
        (2, 1, 0),
    ],
)
def test_intervals_cover_at_least_ninety_of_a_hundred(seeds: int, ratio: float, interaction: float) -> None:
    covered, _ = coverage(seeds, ratio, interaction)
    assert covered >= 0.90


def test_without_the_mending_three_seeds_would_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(levels: Any, _: Any) -> Any:
        return np.sum([deviations * math.sqrt(1 - 1 / n) for deviations, n in levels], axis=0)

    monkeypatch.setattr(made, "student", plain)
    assert coverage(3, 5)[0] < 0.85


# --- Holm ---


def test_holm_by_hand() -> None:
    # sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1; the last is lifted to its predecessor
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.5, 0.6]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 7), st.floats(0, 1))
def test_holm_is_monotone_and_lies_between_p_and_bonferroni(p: list[float], index: int, higher: float) -> None:
    adjusted = holm(p)
    for x, y in zip(p, adjusted, strict=True):
        assert x <= y <= min(1, len(p) * x)
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
    index %= len(p)
    raised = [max(x, higher) if i == index else x for i, x in enumerate(p)]
    assert all(y >= x for x, y in zip(adjusted, holm(raised), strict=True))
    assert holm(p[::-1]) == adjusted[::-1]


@pytest.mark.parametrize("p", [[-0.1], [1.1], [NAN]])
def test_holm_refuses_what_is_no_p(p: list[float]) -> None:
    with pytest.raises(ValueError, match="lie in"):
        holm(p)


# --- verdicts ---


@pytest.mark.parametrize(
    ("interval", "p", "narrow", "expected"),
    [
        ((0.01, 0.09), None, None, "better"),
        ((0.01, 0.09), 0.01, (0.02, 0.08), "better"),
        ((0.01, 0.09), 0.05, (0.02, 0.08), "undecided"),  # lost to the other benchmarks of the family
        ((-0.09, -0.01), None, None, "worse"),
        ((-0.09, -0.01), 0.049, None, "worse"),
        ((-0.09, -0.01), 0.2, None, "undecided"),
        ((-0.05, 0.05), None, (-0.04, 0.04), "undecided"),  # contains zero and shows nothing
        ((-0.001, 0.05), None, None, "undecided"),
        ((-0.015, 0.015), None, None, "equivalent"),
        ((-0.022, 0.018), None, (-0.018, 0.014), "equivalent"),  # by the 90 % interval
        ((-0.022, 0.018), None, None, "undecided"),  # which is not made up where it is missing
        ((0.002, 0.018), 0.001, (0.004, 0.016), "equivalent"),  # surely above zero, and surely too little to matter
        ((-0.018, -0.002), 0.001, (-0.016, -0.004), "equivalent"),
        ((0.0, 0.09), 0.04, None, "undecided"),  # zero itself is not left out
        ((-0.02, 0.01), None, None, "undecided"),  # the margin itself is not inside
        ((-0.01, 0.02), None, None, "undecided"),
        ((0.0, 0.0), 1.0, (0.0, 0.0), "equivalent"),
        ((NAN, NAN), None, None, "undecided"),
    ],
)
def test_verdicts(interval: Any, p: Any, narrow: Any, expected: str) -> None:
    assert verdict(interval, p_adjusted=p, equivalence_interval=narrow) == expected


def test_the_margin_decides_what_is_equivalent() -> None:
    assert verdict((0.002, 0.018), margin=0.02) == "equivalent"
    assert verdict((0.002, 0.018), margin=0.01) == "better"
    assert verdict((-0.002, 0.018), margin=0.01) == "undecided"
    assert verdict((0.0, 0.0), margin=0.0) == "undecided"


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_an_interval_that_contains_zero_and_leaves_the_margin_is_undecided(
    low: float, reach: float, margin: float
) -> None:
    interval = (min(low, 0.0), max(low + reach, 0.0))
    if interval[0] <= -margin or interval[1] >= margin:
        assert verdict(interval, margin=margin) == "undecided"


def test_a_p_near_a_hurdle_is_drawn_finely_and_no_other() -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(3, 60))
    zeros, groups = {"t": np.zeros((3, 60))}, {"t": np.arange(60)}

    def found(shift: float, **options: Any) -> Distribution:
        return hierarchical_bootstrap({"t": 0.1 * noise + shift}, zeros, groups, **options)

    near, far = found(0.03), found(0.3)
    assert NEAR[0] < near.p < NEAR[1] and near == found(0.03, resamples=REFINED)
    assert far.p == 2 / 10_001 and far == found(0.3, resamples=10_000) and far != found(0.3, resamples=REFINED)


# --- the noise floor ---


def test_noise_floor_is_the_textbook_formula() -> None:
    taus = [1.30, 1.34, 1.29]
    mean = sum(taus) / 3
    sd = math.sqrt(sum((x - mean) ** 2 for x in taus) / 2)
    assert noise_floor(np.array(taus)) == pytest.approx(4.302653 * sd * math.sqrt(2), rel=1e-6)
    assert noise_floor(np.array([1.3, 1.4])) == pytest.approx(12.706205 * 0.1, rel=1e-6)  # of two: sd is 0.1 / sqrt(2)


def test_noise_floor_pools_the_spread_within_methods() -> None:
    rows = np.array([[1.30, 1.34, 1.29], [2.00, 2.02, 2.07], [1.5, 1.5, 1.5]])
    squares = sum((x - sum(row) / 3) ** 2 for row in rows.tolist() for x in row)
    assert noise_floor(rows) == pytest.approx(4.302653 * math.sqrt(squares / 6) * math.sqrt(2), rel=1e-6)


def test_noise_floor_holds_two_runs_apart_by_chance_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(11)
    inside = [abs(rng.normal() - rng.normal()) <= noise_floor(rng.normal(size=3)) for _ in range(1000)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("taus", [[1.3], [1.3, NAN], [[1.3], [1.4]]])
def test_one_seed_has_no_noise_floor(taus: Any) -> None:
    with pytest.raises(ValueError, match="two or more"):
        noise_floor(np.array(taus))
