"""The accept rules one at a time, against loops: what each number decides, and what no number may bring about."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specauf.config import SamplingConfig
from specauf.decode.verify import (
    ACCEPT,
    PROPOSE,
    RESAMPLE,
    accept_drawn,
    accept_greedy,
    accept_sampled,
    draw,
    leftover,
    warp,
)
from specauf.objective.blocks import counter_uniform

V = 5


def inversion(weights: list[float], number: float) -> int:
    """The first token at which the sum of the weights is above `number` times their total."""
    total = 0.0
    for token, weight in enumerate(weights):
        total += weight
        if total > number * sum(weights):
            return token
    raise AssertionError("a number of [0, 1) draws something")


class Case:
    """Laws with zeros in them, over few tokens, so that drafts are accepted, rejected, and impossible."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.k = int(torch.randint(0, 4, (), generator=g))
        self.b = 6
        self.draft = torch.randint(0, V, (self.b, self.k), generator=g)
        self.target, self.proposal = (
            torch.rand(self.b, n, V, generator=g, dtype=torch.float64) ** 3
            * (torch.rand(self.b, n, V, generator=g) < 0.7)
            for n in (self.k + 1, self.k)
        )
        for law in (self.target, self.proposal):
            law[..., int(torch.randint(0, V, (), generator=g))] += 0.1
            law /= law.sum(-1, keepdim=True)
        self.accepting = torch.rand(self.b, self.k, generator=g, dtype=torch.float64)
        self.accepting *= torch.rand(self.b, self.k, generator=g) < 0.9  # zero is a number too
        self.ending = torch.rand(self.b, self.k + 1, generator=g, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_point_mass_is_accepted_with_its_probability_and_never_drawn_after_it_was_rejected(seed: int) -> None:
    c = Case(seed)
    accepted, ending = accept_sampled(c.draft, c.target, c.accepting, c.ending)
    for row in range(c.b):
        a = 0
        while a < c.k and c.accepting[row, a] < c.target[row, a, c.draft[row, a]]:
            a += 1
        law = c.target[row, a].tolist()
        if a < c.k:
            law[int(c.draft[row, a])] = 0.0
        assert int(accepted[row]) == a
        if sum(law) > 0:  # else the draft had probability one, and no number below one rejects it
            assert int(ending[row]) == inversion(law, float(c.ending[row, a]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_drawn_token_is_accepted_by_the_ratio_and_followed_by_what_is_left_over(seed: int) -> None:
    c = Case(seed)
    accepted, ending = accept_drawn(c.draft, c.target, c.proposal, c.accepting, c.ending)
    for row in range(c.b):
        a = 0
        while a < c.k:
            p, q = (float(law[row, a, c.draft[row, a]]) for law in (c.target, c.proposal))
            if not float(c.accepting[row, a]) * q < p:
                break
            a += 1
        law = c.target[row, a].tolist()
        if a < c.k:
            law = [max(p - q, 0.0) for p, q in zip(law, c.proposal[row, a].tolist(), strict=True)]
        assert int(accepted[row]) == a
        if sum(law) > 1e-12:
            assert int(ending[row]) == inversion(law, float(c.ending[row, a]))


def test_at_zero_temperature_the_argmax_decides_and_ends() -> None:
    target = torch.eye(V)[torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 2, 3]])]
    accepted, ending = accept_greedy(torch.tensor([[1, 2], [1, 4], [0, 2], [0, 2]]), target)
    assert accepted.tolist() == [2, 1, 0, 0] and ending.tolist() == [3, 2, 1, 4]


def test_where_nothing_is_left_over_the_targets_own_law_is_as_good() -> None:
    law = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0]])
    assert torch.equal(leftover(law, law), law)
    one = leftover(law, torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]))
    assert one.tolist() == [[0.0, 0.0, 0.5], [0.5, 0.5, 0.0]]


def test_no_number_draws_a_token_of_probability_zero() -> None:
    weights = torch.tensor([0.0, 0.3, 0.0, 0.4, 0.0])
    numbers = torch.tensor([0.0, 0.3 / 0.7 - 1e-6, 0.3 / 0.7 + 1e-6, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights, numbers).tolist() == [1, 1, 3, 3]


def test_the_rarest_tokens_are_drawn_in_double_precision() -> None:
    """Behind a token that is all but certain, a float32 sum takes a hundred of them for one."""
    rare, chance = 100_000, torch.tensor(1e-9)
    weights = torch.cat([torch.ones(1), chance.expand(rare)])
    wanted = torch.arange(0, rare, 977)
    numbers = (1 + (wanted.double() + 0.5) * float(chance)) / (1 + rare * float(chance))
    assert torch.equal(draw(weights, numbers), 1 + wanted)


def test_a_number_is_of_its_seed_stream_prompt_position_and_candidate() -> None:
    uid, position, candidate = torch.arange(3)[:, None, None], torch.arange(4)[:, None], torch.arange(5)
    streams = (ACCEPT, RESAMPLE, PROPOSE)  # of one position: what proposes a token may not accept or replace it
    drawn = torch.stack([counter_uniform(s, t, uid, position, candidate) for s in (0, 1) for t in streams])
    plain = torch.stack([counter_uniform(s, t, uid[..., 0], position[:, 0]) for s in (0, 1) for t in streams])
    everything = torch.cat([drawn.flatten(), plain.flatten()])
    assert len(everything.unique()) == 2 * 3 * 3 * 4 * (5 + 1)
    assert everything.min() >= 0 and everything.max() < 1


def slow_warp(logits: list[float], seen: set[int], how: SamplingConfig) -> list[float]:
    """The law of one slot, read literally: penalty, temperature, top-k, then top-p of what is left."""
    r = how.repetition_penalty
    z = torch.tensor([x if t not in seen else x / r if x > 0 else x * r for t, x in enumerate(logits)])
    p = (z.double() / how.temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    p[order[how.top_k or V :]] = 0.0
    p /= p.sum()
    mass = 0.0
    for token in order:
        p[token], mass = p[token] if mass < how.top_p else 0.0, mass + float(p[token])
    return (p / p.sum()).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.7, 1.0, 1.6]),
    st.sampled_from([0, 2, 3]),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.sampled_from([1.0, 1.7]),
)
def test_a_slots_law_is_warped_in_hugging_faces_order_by_what_stands_before_it(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    how = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ids, lengths = torch.randint(0, V, (3, 9), generator=g), torch.tensor([4, 9, 3])
    logits = 2 * torch.randn(3, 3, V, generator=g)
    found = warp(logits, ids, lengths, how).softmax(-1)
    for row in range(3):
        for slot in range(3):
            seen = set(ids[row, : int(lengths[row]) - 2 + slot].tolist())
            want = torch.tensor(slow_warp(logits[row, slot].tolist(), seen, how), dtype=torch.float32)
            torch.testing.assert_close(found[row, slot], want, rtol=1e-4, atol=1e-5)
