"""The mean of drafters that went on from one checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_geometry

from specauf.drafter.average import average_weights
from specauf.drafter.checkpoint import build_drafter, histories, load_drafter, save_drafter, weights_hash
from specauf.drafter.vocabulary import keep_tokens
from specauf.export import export
from specauf.strict import UserError
from specauf.target import Target

FROM = {"path": "runs/first", "weights": "ba9876543210", "block_size": 5, "trained": {"init_layers": [0, 1]}}


def branch(target: Target, where: Path, seed: int, **extra: Any) -> Path:
    told = {"objective": "auf", "steps": seed, "target_fingerprint": "f", "init_from": FROM, **extra}
    return save_drafter(build_drafter(make_geometry(target), seed=seed), where, told)


def test_every_weight_is_the_mean_and_the_others_are_on_record(target: Target, tmp_path: Path) -> None:
    data = {"path": "runs/own", "conversations": 9, "max_length": 64, "kept_out": ["GSM8K"], "rollouts": None}
    paths = [branch(target, tmp_path / str(i), i, data=data) for i in (1, 2, 3)]
    each = [load_drafter(path).state_dict() for path in paths]
    mean = average_weights(paths)
    for name, found in mean.state_dict().items():
        assert torch.equal(found, (sum(w[name].double() for w in each) / 3).float()), name
    assert [o["weights"] for o in mean.config.extra["averaged_with"]] == [weights_hash(p) for p in paths[1:]]
    assert [past.get("steps") for past in histories(mean.config.extra)] == [1, None, 2, 3], (
        "they share what they went on from"
    )

    export(paths[0], tmp_path / "out", average_with=paths[1:], dtype="float32")
    read = load_drafter(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in mean.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| averaged with | 2, model.safetensors {weights_hash(paths[1])}, 2 steps of auf, trained on 9 conv" in card
    assert f"| averaged with (2) | 3, model.safetensors {weights_hash(paths[2])}, 3 steps of auf" in card


def test_a_mean_of_one_drafter_with_itself_is_that_drafter(target: Target, tmp_path: Path) -> None:
    path = branch(target, tmp_path / "a", 1)
    mean, own = average_weights([path, path]).state_dict(), load_drafter(path).state_dict()
    assert all(torch.equal(mean[name], tensor) for name, tensor in own.items())


def test_the_mean_is_not_rounded_to_what_the_first_was_stored_in(target: Target, tmp_path: Path) -> None:
    one, other = (branch(target, tmp_path / str(i), i) for i in (1, 2))
    save_drafter(load_drafter(one).bfloat16(), one, load_drafter(one).config.extra)
    ab, ba = (average_weights(pair).state_dict() for pair in ([one, other], [other, one]))
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, ba[name]) for name, tensor in ab.items())


def test_the_mean_of_means_is_a_branch_too(target: Target, tmp_path: Path) -> None:
    paths = [branch(target, tmp_path / str(i), i) for i in (1, 2)]
    merged = save_drafter(average_weights(paths), tmp_path / "merged")
    assert average_weights([merged, paths[1]]).config.extra["averaged_with"][0]["path"] == str(paths[1])
    later = branch(target, tmp_path / "later", 3, init_from={**FROM, "weights": "1", "trained": {"init_from": FROM}})
    (record,) = average_weights([paths[0], later]).config.extra["averaged_with"]
    assert record["trained"]["init_from"]["weights"] == "1", "what the two do not share is told"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_from": None}, r"do not go on from one checkpoint \(drafter.init_from\)"),
        ({"init_from": {**FROM, "weights": "0"}}, "do not go on from one checkpoint"),
        ({"target_fingerprint": "g"}, "was trained with target_fingerprint g"),
    ],
)
def test_what_has_no_mean_is_refused(target: Target, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    paths = [branch(target, tmp_path / "a", 1), branch(target, tmp_path / "b", 2, **change)]
    with pytest.raises(UserError, match=message):
        export(paths[0], tmp_path / "out", average_with=paths[1:])
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_refused(target: Target, tmp_path: Path) -> None:
    path, other = branch(target, tmp_path / "a", 1), tmp_path / "b"
    told = json.loads((path / "config.json").read_text())["specauf"]
    save_drafter(build_drafter(dataclasses.replace(make_geometry(target), block_size=4)), other, told)
    with pytest.raises(UserError, match=r"b has block_size=4, .*a has 5"):
        average_weights([path, other])


def test_other_vocabularies_are_refused(target: Target, tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        drafter = build_drafter(make_geometry(target, draft_vocab_size=16), seed=seed)
        keep_tokens(drafter, torch.arange(seed, seed + 16))
        paths.append(save_drafter(drafter, tmp_path / str(seed), {"init_from": FROM}))
    with pytest.raises(UserError, match=r"know other tokens \(drafter.draft_vocab_size\)"):
        average_weights(paths)
    mean = average_weights([paths[0], paths[0]])
    assert all(torch.equal(t, load_drafter(paths[0]).state_dict()[n]) for n, t in mean.state_dict().items())
