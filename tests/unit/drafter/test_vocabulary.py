"""A reduced draft vocabulary: which tokens, how they are stored, and what of a checkpoint is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_geometry

from specauf.config import DrafterConfig
from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.drafter.vocabulary import coverage, draft_head, keep_tokens, kept_tokens, most_frequent
from specauf.objective.wavefront import Head
from specauf.strict import ConfigError, UserError
from specauf.target import Target

KEPT = torch.tensor([0, 3, 4, 17, 42, 60])


def make(target: Target, kept: torch.Tensor = KEPT) -> DFlash:
    drafter = DFlash(make_geometry(target, draft_vocab_size=len(kept)), seed=5)
    keep_tokens(drafter, kept)
    return drafter


def test_the_most_frequent_labels_are_kept_and_ties_go_to_the_lowest_id() -> None:
    labels = torch.tensor([7, 7, 7, 5, 5, 2, 9, 9, 4], dtype=torch.int32)
    assert most_frequent(labels, 4, 12).tolist() == [2, 5, 7, 9]  # 2 and 4 occur once each
    assert most_frequent(labels, 4, 12, always={11}).tolist() == [5, 7, 9, 11]
    assert most_frequent(labels, 8, 12, always={11}).tolist() == [0, 1, 2, 4, 5, 7, 9, 11], "filled up from below"
    kept = torch.zeros(12, dtype=torch.bool)
    kept[[7, 9]] = True
    assert coverage(labels, kept) == pytest.approx(5 / 9) and coverage(labels[:0], kept) == 1
    assert most_frequent(labels, 3, 12, always={1, 2, 3}).tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="no room for the 3 tokens"):
        most_frequent(labels, 2, 12, always={1, 2, 3})


def test_the_mapping_is_stored_as_speculators_stores_it(target: Target) -> None:
    drafter = make(target)
    assert drafter.t2d.dtype == torch.bool and drafter.t2d.nonzero().squeeze(1).tolist() == KEPT.tolist()
    assert drafter.d2t.dtype == torch.int64 and (torch.arange(6) + drafter.d2t).tolist() == KEPT.tolist()
    assert not any(p is drafter.t2d or p is drafter.d2t for p in drafter.parameters())
    assert drafter.double().d2t.dtype == torch.int64
    keep_tokens(drafter, 60 - KEPT.flip(0))
    assert torch.equal(kept_tokens(drafter), 60 - KEPT.flip(0)), "the old ones are forgotten"
    with pytest.raises(UserError, match="or not in ascending order"):
        keep_tokens(drafter, KEPT.flip(0))


def test_the_head_is_the_targets_rows_of_the_kept_tokens(target: Target) -> None:
    head = draft_head(make(target), Head(target.head_weight, torch.arange(61.0)))
    assert torch.equal(head.weight, target.head_weight[KEPT]) and head.bias is not None
    assert head.bias.tolist() == KEPT.tolist()
    assert head.rows_of is not None and head.rows_of[KEPT].tolist() == list(range(6)) and head.rows_of.max() == 5
    assert int((head.rows_of < 0).sum()) == 61 - 6
    capped = draft_head(make(target), Head(target.head_weight, None, 2.0))
    assert capped.softcap == 2.0 and 0 < capped.read(9 * torch.randn(2, 3, 32)).abs().max() <= 2
    logits = head.read(torch.randn(2, 3, 32))
    wide = head.spread(logits)
    assert torch.equal(wide[..., KEPT], logits) and int((wide == -torch.inf).sum()) == 2 * 3 * 55
    whole = draft_head(DFlash(make_geometry(target)), Head(target.head_weight))
    assert whole.weight is target.head_weight and whole.rows_of is None, "nothing is copied for the full vocabulary"
    assert whole.spread(logits) is logits


def test_a_checkpoint_keeps_the_vocabulary_and_is_read_strictly(target: Target, tmp_path: Path) -> None:
    save_drafter(make(target).bfloat16(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["draft_vocab_size"] == 6 and fields["vocab_size"] == 61 and fields["dtype"] == "bfloat16"
    again = load_drafter(tmp_path)
    assert torch.equal(kept_tokens(again), KEPT) and DFlashConfig.from_json(again.config.to_json()) == again.config
    tensors = {
        k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()
    }  # the file is written over below
    assert tensors["t2d"].dtype == torch.bool and tensors["d2t"].dtype == torch.int64

    def damaged(**changes: torch.Tensor | None) -> None:
        told = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file(told, tmp_path / "model.safetensors")

    damaged(d2t=None)
    with pytest.raises(UserError, match="missing tensors d2t"):
        load_drafter(tmp_path)
    damaged(t2d=tensors["t2d"].roll(1))
    with pytest.raises(UserError, match=r"model\.safetensors: .*name different tokens"):
        load_drafter(tmp_path)
    damaged(t2d=torch.zeros_like(tensors["t2d"]))
    with pytest.raises(UserError, match="has not been decided"):
        load_drafter(tmp_path)
    damaged()
    (tmp_path / "config.json").write_text(json.dumps({**fields, "draft_vocab_size": 61}))
    with pytest.raises(UserError, match="unexpected tensors d2t, t2d"):
        load_drafter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**fields, "draft_vocab_size": 62}))
    with pytest.raises(ConfigError, match=r"draft_vocab_size must be from 2 to 61, .* got 62"):
        load_drafter(tmp_path)


def test_a_vocabulary_as_large_as_the_targets_is_none(target: Target) -> None:
    assert make_geometry(target, draft_vocab_size=61) == make_geometry(target)
    assert kept_tokens(DFlash(make_geometry(target, draft_vocab_size=61))) is None


@pytest.mark.parametrize("size", [1, 0, 62, True])
def test_a_size_that_cannot_be_is_refused(target: Target, size: int) -> None:
    with pytest.raises(ConfigError, match="draft_vocab_size must be from 2 to 61"):
        make_geometry(target, draft_vocab_size=size)
    if size < 2:
        with pytest.raises(ConfigError, match="draft_vocab_size must be >= 2"):
            DrafterConfig(draft_vocab_size=size)


def test_dominos_correction_is_full_width() -> None:
    with pytest.raises(ConfigError, match=r"drafter\.kind=dflash"):
        DrafterConfig(draft_vocab_size=8, kind="domino")
