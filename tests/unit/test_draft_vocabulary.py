"""A run with a reduced draft vocabulary: decided once, kept with the checkpoint, told of in the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specauf.config import RunConfig
from specauf.data.dataset import Prepared
from specauf.data.sources import Ledger
from specauf.drafter.checkpoint import load_drafter
from specauf.drafter.vocabulary import kept_tokens
from specauf.run import new_drafter, open_run
from specauf.strict import ConfigError, from_dict
from specauf.target import Target
from specauf.train.loop import Trainer
from tests.conftest import make_dataset

SIZE = 20


def prepared(seed: int = 0) -> Prepared:
    """Labels of which some are much more frequent than others; the prompts' tokens are another matter."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(6):
        ids = (58 * torch.rand(24, generator=g) ** 3).long().tolist()
        rows.append((100 + i, [57, 57, 57, *ids], [j > 2 for j in range(27)]))
    return Prepared(make_dataset(rows, {"key": "k", "template_hash": "t"}), [], Ledger(), False)


def config(out: Path, steps: int = 4, objective: str = "auf", **drafter: Any) -> RunConfig:
    return from_dict(
        RunConfig,
        {
            "out": str(out),
            "drafter": {
                "block_size": 5,
                "num_taps": 2,
                "mask_token_id": 59,
                "draft_vocab_size": SIZE,
                **drafter,
            },
            "objective": {"name": objective},
            "train": {"max_steps": steps, "batch_size": 2, "num_anchors": 4, "lr": 1e-2},
        },
    )


def opened(target: Target, out: Path, data: Prepared | None = None, **changes: Any) -> Trainer:
    return open_run(config(out, **changes), target, data or prepared(), None)


def test_the_vocabulary_is_that_of_the_supervised_labels_and_is_told_of(target: Target, tmp_path: Path) -> None:
    trainer = opened(target, tmp_path)
    data = trainer.batches.dataset
    labels = data.ids[data.mask.bool()].tolist()
    order = sorted(range(61), key=lambda t: (-labels.count(t), t))
    order.remove(60)
    assert kept_tokens(trainer.drafter).tolist() == sorted([60, *order[: SIZE - 1]]), "60 ends a text"  # type: ignore[union-attr]
    told = json.loads((tmp_path / "run.json").read_text())["draft_vocabulary"]
    inside = sum(t in {60, *order[: SIZE - 1]} for t in labels) / len(labels)
    assert told == {"size": SIZE, "coverage": pytest.approx(inside)} and 0.6 < inside < 1
    row = trainer.step()
    assert 0 < row["outside"] < 1 and row["simulated_tau"] >= 1 and row["grad_norm"] > 0


def test_a_resumed_run_keeps_its_vocabulary_and_is_bitwise_the_uninterrupted_one(
    target: Target, tmp_path: Path
) -> None:
    whole = opened(target, tmp_path / "whole")
    whole.run()
    first = opened(target, tmp_path / "cut")
    first.max_steps = 4
    with pytest.raises(KeyboardInterrupt):
        first.run(on_step=lambda row: (_ for _ in ()).throw(KeyboardInterrupt) if row["step"] == 2 else None)
    other = prepared(1)
    assert kept_tokens(opened(target, tmp_path / "new", other).drafter).tolist() != (  # type: ignore[union-attr]
        kept := kept_tokens(whole.drafter).tolist()  # type: ignore[union-attr]
    )
    again = opened(target, tmp_path / "cut")
    assert again.done == 2
    again.run()
    for name, tensor in whole.drafter.state_dict().items():
        assert torch.equal(tensor, again.drafter.state_dict()[name]), name
    kept_on = opened(target, tmp_path / "cut", other)  # the data's frequencies have changed: nothing is decided again
    assert kept_tokens(kept_on.drafter).tolist() == kept  # type: ignore[union-attr]
    assert kept_tokens(load_drafter(tmp_path / "cut" / "checkpoint")).tolist() == kept  # type: ignore[union-attr]
    warm = opened(target, tmp_path / "warm", other, init_from=str(tmp_path / "cut" / "checkpoint"))
    assert kept_tokens(warm.drafter).tolist() == kept, "a warm start brings its own"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="draft_vocab_size=20, the recipe needs None"):
        new_drafter(config(tmp_path, draft_vocab_size=None, init_from=str(tmp_path / "cut" / "checkpoint")), target)


@pytest.mark.parametrize("objective", ["decay", "dpace", "lk-alpha", "pard2", "griffin-exclusive"])
def test_objectives_train_on_it(target: Target, tmp_path: Path, objective: str) -> None:
    row = opened(target, tmp_path, objective=objective).step()
    assert row["grad_norm"] > 0 and row["loss"] == row["loss"] and row["outside"] > 0
    assert row["head_rows"] <= 4 * (1 - row["outside"]) + 1e-9


def test_a_vocabulary_larger_than_the_targets_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="draft_vocab_size must be from 2 to 61"):
        new_drafter(config(tmp_path, draft_vocab_size=62), target)
    assert new_drafter(config(tmp_path, draft_vocab_size=61), target).config.draft_vocab_size is None
