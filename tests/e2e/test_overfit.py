"""The proof that training, replay and live decoding agree on alignment: memorise a tiny target's own greedy text.

Replay and live tau must both reach 0.95 of the block length; with labels shifted by one they must not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tests.conftest import make_dataset, make_geometry, make_target

from specauf.config import RunConfig, SamplingConfig
from specauf.data.dataset import TokenDataset
from specauf.decode.acceptance import summarise
from specauf.decode.generate import generate
from specauf.decode.propose import DrafterProposer, PromptLookup
from specauf.decode.replay import Trajectory, record, replay, trajectory_features
from specauf.drafter.checkpoint import build_drafter, load_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.objective import Blocks
from specauf.strict import from_dict
from specauf.target import Target
from specauf.train import loop
from specauf.train.batches import Batches
from specauf.train.loop import Trainer

BLOCK, LIMIT, STEPS = 5, 32, 180


@pytest.fixture(scope="module")
def chaotic() -> Target:
    """Scaled until its greedy text hardly repeats: prompt lookup must not be able to pass this test."""
    return make_target(seed=4, scale=4.0)


@pytest.fixture(scope="module")
def memorable(chaotic: Target) -> list[Trajectory]:
    g = torch.Generator().manual_seed(0)
    prompts = [(str(i), torch.randint(0, 58, (6,), generator=g).tolist()) for i in range(5)]
    return record(chaotic, prompts, limit=LIMIT, block_size=BLOCK, sampling=SamplingConfig())


def dataset_of(trajectories: list[Trajectory]) -> TokenDataset:
    rows = [
        (i, t.ids, [False] * (len(t.prompt) - 1) + [True] * (len(t.tokens) + 1)) for i, t in enumerate(trajectories)
    ]
    return make_dataset(rows, {})


def train(
    target: Target,
    trajectories: list[Trajectory],
    objective: str | dict[str, object],
    steps: int,
    out: Path,
    head: DominoHead | None = None,
) -> DFlash:
    config = from_dict(
        RunConfig,
        {
            "drafter": {"block_size": BLOCK, "kind": "domino" if head else "dflash"},
            "objective": {"name": objective} if isinstance(objective, str) else objective,
            "train": {
                "max_steps": steps,
                "batch_size": len(trajectories),
                "num_anchors": 32,
                "lr": 4e-3,
                "save_every": 10**6,
            },
        },
    )
    batches = Batches(dataset_of(trajectories), None, config.train)
    geometry = dataclasses.replace(make_geometry(target, BLOCK), domino=head)
    Trainer(config, build_drafter(geometry), target, batches, out).run()
    return load_drafter(out / "checkpoint")


def taus(target: Target, drafter: DFlash, trajectories: list[Trajectory], pool: int = 0) -> tuple[float, float]:
    """(replay, live), which must also agree round for round."""
    how = DrafterProposer(drafter, target, pool)
    features = trajectory_features(target, trajectories, how.layer_ids)
    replayed = replay(how, trajectories, features, LIMIT)
    live = generate(target, how, [t.prompt for t in trajectories], max_new_tokens=LIMIT)
    assert [g.rounds for g in live] == replayed
    assert [g.tokens for g in live] == [t.tokens[:LIMIT] for t in trajectories]
    lengths = [len(g.tokens) for g in live]
    return tuple(summarise(r, lengths, BLOCK - 1).tau for r in (replayed, [g.rounds for g in live]))  # type: ignore[return-value]


@pytest.mark.parametrize("objective", ["auf", "decay"])
def test_a_memorised_text_is_accepted_whole(
    chaotic: Target, memorable: list[Trajectory], objective: str, tmp_path: Path
) -> None:
    lookup = replay(PromptLookup(BLOCK), memorable, None, LIMIT)
    assert summarise(lookup, [LIMIT] * len(memorable), BLOCK - 1).tau < 2, (
        "the text repeats itself: memorising proves nothing"
    )
    by_replay, live = taus(chaotic, train(chaotic, memorable, objective, STEPS, tmp_path), memorable)
    assert by_replay >= 0.95 * BLOCK
    assert live >= 0.95 * BLOCK


@pytest.mark.parametrize(
    ("shift", "objective"),
    [
        (True, {"variant": "b-auf-d"}),
        (False, {"variant": "f-auf", "lambda_base_decay_ratio": 0.5}),
        (True, {"name": "auf", "final": "dpace", "support": "base"}),
    ],
    ids=["shifted", "unshifted", "mixed"],
)
def test_a_domino_drafter_memorises_it_too(
    chaotic: Target, memorable: list[Trajectory], shift: bool, objective: dict[str, object], tmp_path: Path
) -> None:
    drafter = train(chaotic, memorable, objective, STEPS, tmp_path, DominoHead(16, 16, 1, shift))
    by_replay, live = taus(chaotic, drafter, memorable)
    assert min(by_replay, live) >= 0.95 * BLOCK
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["lambda_base"] == 1 and rows[-1]["lambda_base"] < 0.01
    assert {"base_loss", "final_loss", "base_simulated_tau", "simulated_tau", "base_a_support"} <= rows[-10].keys()


def test_the_head_is_what_a_domino_drafter_proposes_with(
    chaotic: Target, memorable: list[Trajectory], tmp_path: Path
) -> None:
    """Half trained, so that rounds are of every length; with and without a candidate pool live is replay."""
    drafter = train(chaotic, memorable, {"variant": "decay-only"}, 60, tmp_path, DominoHead(16, 16))
    whole, _ = taus(chaotic, drafter, memorable)
    pooled, _ = taus(chaotic, drafter, memorable, pool=2)
    assert 1.1 < whole < 0.9 * BLOCK and pooled != whole
    assert isinstance(drafter, Domino)
    drafter.expansion.data.zero_()
    assert taus(chaotic, drafter, memorable)[0] != whole


def test_labels_shifted_by_one_fail_the_same_test(
    chaotic: Target, memorable: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.build_blocks

    def shifted(ids: torch.Tensor, mask: torch.Tensor, *rest: object) -> Blocks:
        return right(ids.roll(-1, 1), mask.roll(-1, 1), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "build_blocks", shifted)
    by_replay, live = taus(chaotic, train(chaotic, memorable, "auf", STEPS, tmp_path), memorable)
    assert max(by_replay, live) < 0.6 * BLOCK


def test_the_anchors_own_feature_reaches_nothing_in_training_replay_or_live(chaotic: Target) -> None:
    """A leak that memorising cannot show: poke the feature at the anchor, then the one before."""
    drafter = DFlash(make_geometry(chaotic, BLOCK), seed=3)
    how = DrafterProposer(drafter, chaotic)
    ids = torch.randint(0, 58, (1, 20), generator=torch.Generator().manual_seed(2))
    features = chaotic.run(ids, how.layer_ids).features
    anchor = 9
    anchors = torch.tensor([[anchor]])

    def teacher_forced(f: torch.Tensor) -> torch.Tensor:  # what training and replay compute
        return how.hidden(ids, anchors, drafter.context(f, torch.arange(20)[None]))

    def live(f: torch.Tensor) -> torch.Tensor:  # what decoding computes: everything observed, garbage at the anchor too
        how.start(1, 20)
        how.observe(f, torch.arange(20)[None])
        context = [type(kv)(kv.key[:, :, :anchor], kv.value[:, :, :anchor]) for kv in how._context]
        return how.hidden(ids, anchors, context)

    for compute in (teacher_forced, live):
        base = compute(features)
        for position, same in ((anchor, True), (anchor + 1, True), (anchor - 1, False)):
            poked = features.clone()
            poked[0, position] += 1
            assert torch.equal(compute(poked), base) == same, (compute.__name__, position)
