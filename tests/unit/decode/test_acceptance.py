"""Rounds to numbers: the identities of the metric, and what looping text does to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specauf.decode.acceptance import (
    before_loop,
    bootstrap,
    compare,
    loop_onset,
    prompt_taus,
    repeated_share,
    summarise,
    tau_interval,
)
from specauf.decode.generate import Round
from specauf.strict import UserError

runs = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=6)


def as_rounds(lengths: list[int]) -> list[Round]:
    return [Round(i, a) for i, a in enumerate(lengths)]


@settings(max_examples=50, deadline=None)
@given(runs)
def test_tau_is_one_plus_survival_and_survival_the_product_of_alpha(lengths: list[list[int]]) -> None:
    found = summarise([as_rounds(x) for x in lengths], [10] * len(lengths), 4)
    assert found.tau == pytest.approx(1 + sum(found.survival))
    assert found.tau == pytest.approx(np.mean([1 + np.mean(x) for x in lengths]))
    product = 1.0
    for s, a in zip(found.survival, found.alpha, strict=True):
        product *= a or 0.0
        assert product == pytest.approx(s)
    low, high = found.interval
    assert np.isnan([low, high]).all() if len(lengths) == 1 else low - 1e-9 <= found.tau <= high + 1e-9


def test_a_prompt_without_rounds_is_left_out() -> None:
    assert np.isnan(prompt_taus([[], as_rounds([1])])[0])
    found = summarise([[], as_rounds([1, 0])], [1, 5], 4)
    assert found.prompts == 1 and found.rounds == 2 and found.tau == 1.5 and found.engine_tau == 2.5


def test_answers_without_a_round_are_named() -> None:
    with pytest.raises(UserError, match="there is no round to measure"):
        summarise([[], []], [1, 1], 3)


def test_what_a_round_and_a_token_count_for() -> None:
    """By hand: two prompts of three rounds and one; a share and an engine's tau are over rounds, tau over prompts."""
    rounds = [[Round(0, 2), Round(3, 0), Round(4, 3, cut=True)], [Round(0, 1)]]
    found = summarise(rounds, [8, 3], 3)
    assert found.cut_share == 1 / 4 and found.engine_tau == 11 / 4
    assert found.tau == pytest.approx(1 + (5 / 3 + 1) / 2)
    assert found.survival == pytest.approx([(2 / 3 + 1) / 2, 1 / 3, 1 / 6])


def test_only_prompts_that_both_have_a_round_of_are_compared() -> None:
    a, b = ([as_rounds(x) for x in side] for side in ([[3], [1], [], [4]], [[1], [2], [9], []]))
    found = compare(a, b)
    assert found.difference == (2 - 1) / 2 and found.ratio == pytest.approx(2 / 1.5)
    swapped = compare(b, a)
    assert swapped.difference == -found.difference and swapped.ratio == pytest.approx(1.5 / 2)
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_intervals_know_which_prompts_are_turns_of_one_conversation() -> None:
    lengths = np.random.default_rng(1).integers(0, 5, 30)
    turns, owner = [as_rounds([int(x)]) for x in np.repeat(lengths, 2)], np.repeat(np.arange(30), 2).tolist()
    nothing = [as_rounds([0])] * 60
    alone = summarise([as_rounds([int(x)]) for x in lengths], [9] * 30, 4).interval
    assert summarise(turns, [9] * 60, 4, owner).interval == pytest.approx(alone)
    low, high = compare(turns, nothing, owner).interval
    assert (1 + low, 1 + high) == pytest.approx(alone)
    assert bootstrap(lengths.astype(float)) == bootstrap(lengths.astype(float)), "the same figures every time"


def test_comparison_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 3, 40)  # prompts differ far more than the drafters do
    a = compare([as_rounds([int(h) + 1]) for h in hard], [as_rounds([int(h)]) for h in hard])
    assert a.difference == 1 and a.interval == (1, 1) and a.ratio == pytest.approx((hard.mean() + 1) / hard.mean())


def test_a_loop_sets_in_where_eight_tokens_first_repeat() -> None:
    text = [*range(20), *([7] * 20)]
    assert loop_onset(text) == 28  # nineteen 7s hold the first eight twice after nine of them
    assert loop_onset(list(range(50))) == 50
    assert before_loop([[Round(3, 0), Round(27, 1), Round(29, 7)]], [loop_onset(text)]) == [[Round(3, 0), Round(27, 1)]]
    assert before_loop([[Round(28, 1)]], [loop_onset(text)]) == [[]], "the text repeats itself with its first token"
    assert repeated_share([[1] * 16, list(range(25))]) == pytest.approx(8 / 27), "of all n-grams, not of all texts"
    assert repeated_share([list(range(50))]) == repeated_share([[1, 1]]) == 0
    assert repeated_share([[1] * 16]) == pytest.approx(8 / 9)


def test_one_conversation_has_no_interval_and_nothing_accepted_no_ratio() -> None:
    assert np.isnan(bootstrap(np.array([1.0, 2.0]), [0, 0])).all()
    one = compare([as_rounds([1])], [as_rounds([0])])
    assert one.difference == 1 and np.isnan(one.interval).all() and np.isnan(one.ratio)


@pytest.mark.parametrize("prompts", [2, 3, 8, 32])
def test_few_prompts_do_not_make_an_interval_too_narrow(prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    worlds = 400
    missed = 0
    for values in rng.normal(2, 1, (worlds, prompts)):
        low, high = bootstrap(values, resamples=1000)
        missed += not low <= 2 <= high
    assert missed / worlds < 0.05 + 3 * np.sqrt(0.05 * 0.95 / worlds)  # the plain percentile bootstrap: 0.5 at two
    assert missed / worlds > 0.01 or prompts < 8, "nor too wide"


@pytest.mark.parametrize(("prompts", "held"), [(8, 0.90), (32, 0.93)])
def test_skewed_prompts_cost_as_much_coverage_as_the_docs_say(prompts: int, held: float) -> None:
    worlds = np.random.default_rng(prompts).exponential(1, (800, prompts))
    intervals = [bootstrap(values, resamples=500) for values in worlds]
    assert np.mean([low <= 1 <= high for low, high in intervals]) == pytest.approx(held, abs=0.03)
    assert np.mean([high < 1 for _, high in intervals]) > 4 * np.mean([low > 1 for low, _ in intervals])
    assert np.mean([high + low for low, high in intervals]) > 2.02 * worlds.mean(), "it leans to where the long tail is"


def test_an_interval_of_tau_stays_between_one_and_the_block_size() -> None:
    assert tau_interval(np.array([1.1, 1.5]), 2) == (1.0, 2.0)
    low, high = bootstrap(np.array([1.1, 1.5]))
    assert low < 1 and high > 2 and tau_interval(np.array([1.1, 1.5]), 8) == (1.0, high)
    assert np.isnan(tau_interval(np.array([1.5]), 8)).all()
    inside = np.array([1.4, 1.5, 1.5, 1.6])
    assert tau_interval(inside, 2) == bootstrap(inside) and 1 < bootstrap(inside)[0] < bootstrap(inside)[1] < 2
    few = summarise([as_rounds([3, 0]), as_rounds([3, 3])], [8, 8], 3)  # blocks of four
    assert few.interval == (1.0, 4.0)


def test_turns_of_a_conversation_are_drawn_together() -> None:
    conversations = np.random.default_rng(0).normal(2, 1, 60)
    turns = np.repeat(conversations, 2)  # the second turn says what the first did: nothing new
    low, high = bootstrap(turns, np.repeat(np.arange(60), 2).tolist())
    assert (low, high) == pytest.approx(bootstrap(conversations), rel=1e-9)
    alone = bootstrap(turns)
    assert alone[1] - alone[0] == pytest.approx((high - low) / np.sqrt(2), rel=0.06)
    missing = np.append(turns, np.nan)
    assert bootstrap(missing, [*np.repeat(np.arange(60), 2), 60]) == (low, high), "a prompt without a round is nobody's"
