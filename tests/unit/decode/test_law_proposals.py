"""The chi-square of test_law.py for the other two proposals: selected by the target, and drawn from the drafter.

Each has a counterpart that breaks the one thing its exactness rests on, and must fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.decode.test_law import law, p_value, proposer, sample, tiny  # noqa: F401

from specauf.config import SamplingConfig
from specauf.decode import generate, select, verify
from specauf.decode.propose import Proposer
from specauf.decode.select import Selection
from specauf.decode.verify import ACCEPT
from specauf.objective.blocks import counter_uniform
from specauf.target import Target

KINDS: dict[str, tuple[dict[str, Any], Selection | None]] = {
    "selected": ({"seed": 11}, Selection(3, 1.5)),
    "drawn": ({"seed": 12, "proposal": "sampled"}, None),
    "drawn by domino": ({"seed": 13, "proposal": "sampled"}, None),
}


def drafter(tiny: Target, kind: str) -> Proposer:  # noqa: F811
    return proposer(tiny, "domino" if "domino" in kind else "drafter")


@pytest.mark.parametrize("kind", KINDS)
def test_forty_thousand_batched_samples_have_the_targets_law(tiny: Target, kind: str) -> None:  # noqa: F811
    options, selection = KINDS[kind]
    sampling = SamplingConfig(temperature=1.0, **options)
    counts = sample(tiny, drafter(tiny, kind), 40_000, sampling, batch=5000, selection=selection)
    assert p_value(counts, law(tiny, sampling)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_samples_at_batch_1_have_the_targets_law(tiny: Target, kind: str) -> None:  # noqa: F811
    options, selection = KINDS[kind]
    sampling = SamplingConfig(temperature=1.0, **options)
    counts = sample(tiny, drafter(tiny, kind), 200, sampling, batch=1, length=3, selection=selection)
    assert p_value(counts, law(tiny, sampling, 3)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_warped_sampling_has_the_warped_targets_law(tiny: Target, kind: str) -> None:  # noqa: F811
    options, selection = KINDS[kind]
    sampling = SamplingConfig(temperature=1.3, top_k=4, top_p=0.9, repetition_penalty=1.5, **options)
    counts = sample(tiny, drafter(tiny, kind), 5000, sampling, batch=5000, length=3, selection=selection)
    assert p_value(counts, law(tiny, sampling, 3)) > 1e-3


def test_the_test_fails_when_the_choice_sees_what_accepts(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The candidate that will be accepted furthest is the best of all choices, and a wrong one."""
    options, selection = KINDS["selected"]
    sampling, accepting = SamplingConfig(temperature=1.0, **options), torch.empty(0)

    def note(logits: Any, how: Any, seed: int, uid: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        nonlocal accepting
        accepting = counter_uniform(seed, ACCEPT, uid[:, None], anchors[:, None] + torch.arange(1, 3))
        return select.sample_candidates(logits, how, seed, uid, anchors)

    def peek(draft: torch.Tensor, target: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
        chance = target[:, :-1].softmax(-1).gather(2, draft[..., None]).squeeze(2)
        return (accepting < chance).int().cumprod(1).sum(1)

    monkeypatch.setattr(generate, "sample_candidates", note)
    monkeypatch.setattr(select, "score", peek)
    counts = sample(tiny, proposer(tiny), 10_000, sampling, batch=5000, length=3, selection=selection)
    assert p_value(counts, law(tiny, sampling, 3)) < 1e-6


def test_the_test_fails_when_nothing_is_taken_from_the_leftover(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(verify, "leftover", lambda target, proposal: target)
    sampling = SamplingConfig(temperature=1.0, **KINDS["drawn"][0])
    counts = sample(tiny, proposer(tiny), 10_000, sampling, batch=5000, length=3)
    assert p_value(counts, law(tiny, sampling, 3)) < 1e-6
