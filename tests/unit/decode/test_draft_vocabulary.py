"""A drafter that knows part of the vocabulary proposes nothing else, and what comes out is still the target's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import make_geometry
from tests.unit.decode.test_law import law, p_value, sample, tiny  # noqa: F401

from specauf.config import SamplingConfig
from specauf.decode.generate import generate
from specauf.decode.propose import DrafterProposer
from specauf.decode.replay import record, replay, trajectory_features
from specauf.decode.select import Selection
from specauf.decode.verify import draw
from specauf.drafter.dflash import DFlash
from specauf.drafter.vocabulary import keep_tokens
from specauf.target import Target


def reduced(target: Target, kept: list[int], **geometry: Any) -> DrafterProposer:
    drafter = DFlash(make_geometry(target, draft_vocab_size=len(kept), **geometry), seed=1)
    keep_tokens(drafter, torch.tensor(kept))
    return DrafterProposer(drafter, target)


def test_greedy_output_is_the_targets_and_replay_makes_the_live_rounds(
    target: Target, prompts: list[list[int]]
) -> None:
    plain = generate(target, None, prompts, max_new_tokens=24, eos_ids=frozenset())
    said = sorted({t for g in plain for t in g.tokens})
    how = reduced(target, said[::2])  # half of what the target says is out of reach
    live = generate(target, how, prompts, max_new_tokens=24)
    assert [g.tokens for g in live] == [g.tokens for g in generate(target, None, prompts, max_new_tokens=24)]
    recorded = record(
        target,
        [(str(i), p) for i, p in enumerate(prompts)],
        limit=24,
        block_size=5,
        sampling=SamplingConfig(),
        batch_size=4,
    )
    features = trajectory_features(target, recorded, how.layer_ids)
    assert replay(how, recorded, features, 24) == [g.rounds for g in live]
    accepted = sum(r.accepted for g in live for r in g.rounds)
    assert accepted > 0, "nothing is ever accepted: the test would prove nothing"


def test_nothing_but_the_vocabulary_is_proposed(target: Target, prompts: list[list[int]]) -> None:
    kept = [2, 3, 30, 59]
    how = reduced(target, kept)
    ids, anchors = torch.tensor([prompts[1], prompts[1]]), torch.tensor([6, 4])
    how.start(2, 20)
    how.observe(target.run(ids, how.layer_ids).features, torch.arange(7).expand(2, -1))
    logits = how.logits(ids, anchors)
    assert logits.shape == (2, 4, 61) and (logits.isfinite().sum(-1) == 4).all()
    assert logits[..., kept].isfinite().all()
    assert torch.equal(how.propose(ids, anchors), logits.argmax(-1))
    drawn, chance = how.sample(ids, anchors, 1.0, torch.rand(2, 4, dtype=torch.float64))
    assert set(drawn.flatten().tolist()) <= set(kept)
    torch.testing.assert_close(chance, logits.softmax(-1))
    numbers = torch.rand(2, 4, dtype=torch.float64)
    drawn, chance = how.sample(ids, anchors, 0.01, numbers)
    torch.testing.assert_close(chance, (logits / 0.01).softmax(-1))
    assert torch.equal(drawn, draw(chance, numbers[..., None]).squeeze(-1)), (
        "from the very law that verification is told"
    )


@pytest.mark.parametrize(
    ("proposal", "selection"), [("greedy", None), ("sampled", None), ("greedy", Selection(3, 1.5))]
)
def test_samples_have_the_targets_law(tiny: Target, proposal: Any, selection: Selection | None) -> None:  # noqa: F811
    how = reduced(tiny, [0, 2, 4], block_size=3, layers=1, taps=1)
    sampling = SamplingConfig(temperature=1.0, seed=21, proposal=proposal)
    counts = sample(tiny, how, 5000, sampling, batch=5000, length=3, selection=selection)
    assert p_value(counts, law(tiny, sampling, 3)) > 1e-3
