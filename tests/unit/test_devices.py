"""Training, decoding and replay mix no devices: the same numbers on a device that holds everything but what it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specauf.config import RunConfig, SamplingConfig
from specauf.data.features import extract
from specauf.decode.generate import generate
from specauf.decode.propose import DrafterProposer, LookupFirst
from specauf.decode.replay import record, replay, trajectory_features
from specauf.decode.select import Selection
from specauf.drafter import attention
from specauf.drafter.checkpoint import build_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.dflash import DFlash
from specauf.drafter.vocabulary import keep_tokens
from specauf.strict import from_dict
from specauf.target import Target
from specauf.train.batches import Batches
from specauf.train.loop import Trainer
from specauf.train.objectives import stored_extras
from tests.conftest import make_dataset, make_geometry, make_target
from tests.elsewhere import THERE, elsewhere, move  # noqa: F401

Kept = Callable[[Any], Any]
KINDS = ("dflash", "domino", "reduced")


def stay(module: Any) -> Any:
    return module


def target_on(place: Kept) -> Target:
    return Target(place(make_target().model), None, "tiny")


def drafter_on(place: Kept, target: Target, kind: str) -> DFlash:
    geometry = make_geometry(target, draft_vocab_size=30 if kind == "reduced" else None)
    drafter = build_drafter(dataclasses.replace(geometry, domino=DominoHead(16, 16) if kind == "domino" else None))
    if kind == "reduced":
        keep_tokens(drafter, torch.arange(30))
    found: DFlash = place(drafter)
    return found


def by_mask(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    """What FlexAttention computes, from the mask's own predicate."""
    b, _, q, d = query.shape
    at = (torch.arange(n, device=query.device) for n in (b, 1, q, key.shape[2]))
    seen = block_mask.mask_mod(*torch.meshgrid(*at, indexing="ij"))
    return (query @ key.mT / d**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that CUDA goes."""
    monkeypatch.setattr(attention, "_by_chunks", attention._flex)
    monkeypatch.setattr(attention, "_kernel", lambda device: by_mask)


def losses(place: Kept, kind: str, objective: dict[str, object]) -> list[float]:
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, n in enumerate(torch.randint(12, 30, (7,), generator=g).tolist()):
        rows.append(
            (1000 + i, torch.randint(0, 58, (n,), generator=g).tolist(), [j > 3 and j % 9 != 8 for j in range(n)])
        )
    train = {"max_steps": 9, "batch_size": 2, "num_anchors": 4, "lr": 1e-2, "accumulation": 2, "common_every": 2}
    drafter = {"block_size": 5, "kind": "domino" if kind == "domino" else "dflash"}
    config = from_dict(RunConfig, {"drafter": drafter, "objective": objective, "train": train})
    target = target_on(place)
    batches = Batches(make_dataset(rows), None, config.train, stored_extras(config))
    trainer = Trainer(config, drafter_on(place, target, kind), target, batches)
    return [trainer.step()["loss"] for _ in range(2)]


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("dflash", {"name": "auf"}),
        ("dflash", {"name": "sampled-auf", "labels": "target"}),
        ("dflash", {"name": "l2r-focal-separate"}),
        ("dflash", {"name": "griffin-exclusive", "reduction": "sequence"}),
        ("dflash", {"name": "lk-lambda"}),
        ("domino", {"variant": "b-auf-d"}),
        ("domino", {"variant": "f-auf"}),
        ("reduced", {"name": "auf"}),
    ],
    ids=str,
)
def test_training_on_a_device_takes_the_steps_of_the_cpu(
    kind: str, objective: dict[str, object], request: pytest.FixtureRequest
) -> None:
    want = losses(stay, kind, objective)
    request.getfixturevalue("elsewhere")
    assert losses(move, kind, objective) == pytest.approx(want, abs=1e-5)


def everything(place: Kept, kind: str) -> list[object]:
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 58, (n,), generator=g).tolist() for n in (5, 1)]
    target, found = target_on(place), list[object]()
    proposer = DrafterProposer(drafter_on(place, target, kind), target)
    warm = SamplingConfig(temperature=1.0, top_p=0.9, top_k=20, repetition_penalty=1.1)
    for sampling in (SamplingConfig(), warm, SamplingConfig(temperature=1.0, proposal="sampled")):
        made = generate(target, proposer, prompts, sampling=sampling, max_new_tokens=6, record_margins=True)
        found += [(m.tokens, m.rounds) for m in made]
    if kind == "dflash":
        found += [m.tokens for m in generate(target, proposer, prompts, selection=Selection(3), max_new_tokens=6)]
        found += [t["argmax"].tolist() for t in extract(target, [torch.tensor(p) for p in prompts], (1,), extras=True)]
    recorded = record(target, [(str(i), p) for i, p in enumerate(prompts)], limit=6, block_size=5, sampling=warm)
    features = trajectory_features(target, recorded, proposer.layer_ids)
    pooled = [DrafterProposer(proposer.drafter, target, 10)] if kind == "domino" else []
    for each in (proposer, LookupFirst(proposer, 2, 4), *pooled):
        found += replay(each, recorded, features, 6)
    return [*found, target.fingerprint()]


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_and_replay_on_a_device_make_the_rounds_of_the_cpu(kind: str, request: pytest.FixtureRequest) -> None:
    want = everything(stay, kind)
    request.getfixturevalue("elsewhere")
    assert everything(move, kind) == want


@pytest.mark.usefixtures("elsewhere")
def test_two_devices_do_not_mix() -> None:
    far = torch.arange(6, device=THERE).float()
    assert (far + 1).tolist() == [1, 2, 3, 4, 5, 6] and far[torch.tensor([2])].tolist() == [2]
    assert far.cpu().device.type == "cpu" and far.new_zeros(2).device == THERE
    for wrong in (lambda: far + torch.ones(6), lambda: torch.ones(6)[far.long()], lambda: far @ torch.ones(6)):
        with pytest.raises(RuntimeError, match="mixes devices"):
            wrong()
