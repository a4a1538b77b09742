"""The feature cache: refused before it is too large, resumable, keyed, and equal to what the target says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.conftest import make_dataset, make_target

from specauf.config import FeaturesConfig
from specauf.data import features
from specauf.data.dataset import TokenDataset
from specauf.data.features import build_features, estimate_gb
from specauf.strict import UserError
from specauf.target import Target


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> TokenDataset:
    monkeypatch.setattr(features, "SHARD_TOKENS", 20)
    monkeypatch.setattr(features.shard_plan, "__defaults__", (20,))
    g = torch.Generator().manual_seed(0)
    rows = [
        (i, torch.randint(0, 58, (n,), generator=g).tolist(), [True] * n) for i, n in enumerate((9, 14, 5, 8, 19, 3))
    ]
    return make_dataset(rows, {})


def test_cached_features_are_the_targets(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    cache = build_features(target, dataset, tmp_path, (1, 3), FeaturesConfig(dtype="float32", extras=True))
    assert len(cache) == len(dataset)
    for i in range(len(dataset)):
        ids = dataset[i].input_ids
        tapped = target.run(ids[None], (1, 3))
        torch.testing.assert_close(cache[i], tapped.features[0])
        torch.testing.assert_close(cache.get(i, "final"), tapped.final[0])
        logits = target.logits(tapped.final[0])
        assert torch.equal(cache.get(i, "argmax").long(), logits.argmax(-1))


def test_a_cache_over_budget_is_refused_before_a_byte_is_written(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"max_gb=1e-06"):
        build_features(target, dataset, tmp_path, (1, 3), FeaturesConfig(max_gb=1e-6))
    assert not list(tmp_path.iterdir())
    assert estimate_gb(1000, (1, 3), 32, FeaturesConfig()) == 1000 * 2 * 32 * 2 / 1e9


def test_a_killed_build_goes_on_at_the_first_missing_shard(
    target: Target, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = features.extract, []

    def dying(*args: object, **options: object) -> list[dict[str, torch.Tensor]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "extract", dying)
    with pytest.raises(KeyboardInterrupt):
        build_features(target, dataset, tmp_path, (1, 3), FeaturesConfig())
    cache = build_features(target, dataset, tmp_path, (1, 3), FeaturesConfig())
    assert len(calls) == len(cache.meta["shards"]) + 1, "a finished shard was computed again"
    assert all(len(cache[i]) == len(dataset[i].input_ids) for i in range(len(dataset)))


def test_another_target_or_other_layers_never_share_a_cache(
    target: Target, dataset: TokenDataset, tmp_path: Path
) -> None:
    one = build_features(target, dataset, tmp_path, (1, 3), FeaturesConfig())
    for other in (
        build_features(make_target(seed=9), dataset, tmp_path, (1, 3), FeaturesConfig()),
        build_features(target, dataset, tmp_path, (1, 2), FeaturesConfig()),
    ):
        assert other.directory != one.directory


def test_extras_that_were_not_written_are_a_clear_error(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    cache = build_features(target, dataset, tmp_path, (1,), FeaturesConfig())
    with pytest.raises(UserError, match=r"features\.extras"):
        cache.get(0, "argmax")


def test_features_beyond_float16_are_refused(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    large = copy.deepcopy(target)
    large.model.model.embed_tokens.weight.data[:, 3] += 1e5
    config = FeaturesConfig(cache=True, dtype="float16")
    with pytest.raises(UserError, match=r"not finite as float16: set features\.dtype=bfloat16"):
        build_features(large, dataset, tmp_path, (1, 2), config)
    assert not list(tmp_path.rglob("shard-*"))


def test_a_damaged_shard_is_named(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    cache = build_features(target, dataset, tmp_path, (1, 2), FeaturesConfig(cache=True))
    path, want = cache.directory / "shard-00000.safetensors", cache[0].clone()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged .* delete it"):
        build_features(target, dataset, tmp_path, (1, 2), FeaturesConfig(cache=True))
    path.unlink()
    again = build_features(target, dataset, tmp_path, (1, 2), FeaturesConfig(cache=True))
    assert torch.equal(again[0], want)


def test_processes_that_do_not_share_a_cache_are_told(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no shard 1: all processes of a run share SPECAUF_CACHE"):
        build_features(target, dataset, tmp_path, (1, 2), FeaturesConfig(cache=True), share=(0, 2), wait=lambda: None)


def test_several_processes_write_a_share_each(target: Target, dataset: TokenDataset, tmp_path: Path) -> None:
    config, written = FeaturesConfig(dtype="float32"), list[int]()

    def the_other() -> None:
        written.append(len(list(tmp_path.rglob("shard-*.safetensors"))))
        build_features(target, dataset, tmp_path, (1, 3), config, share=(0, 2))

    cache = build_features(target, dataset, tmp_path, (1, 3), config, share=(1, 2), wait=the_other)
    assert written == [len(cache.meta["shards"]) // 2]
    torch.testing.assert_close(cache[5], target.run(dataset[5].input_ids[None], (1, 3)).features[0])
