"""A directory of rollouts is recognised by its metadata alone and read only where it fits."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import make_dataset

from specauf.config import DataConfig
from specauf.data.chat import template_hash, tokenizer_hash
from specauf.data.dataset import Prompt, write_heldout
from specauf.data.rollouts import SETTINGS, open_rollouts, rollout_meta
from specauf.data.sources import Ledger
from specauf.strict import UserError

SAMPLES = {"a": 2, "b": 1, "c": 3}


@pytest.fixture
def directory(tokenizer: Any, tmp_path: Path) -> Path:
    names = [name for name, count in SAMPLES.items() for _ in range(count)]
    meta = {
        "key": "k",
        "template_hash": template_hash(tokenizer),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "enable_thinking": False,
        "max_length": 64,
        "conversation_ids": names,
        "ledger": Ledger(records_in=4, kept=3, dropped={"held out": 1}).to_dict(),
        "rollout": {"target": "mine"},
    }
    data = make_dataset([(i, [5] * (i + 2), [False] + [True] * (i + 1)) for i in range(len(names))], meta)
    write_heldout(tmp_path, [Prompt("h", [{"role": "user", "content": "hello"}], 9)])
    data.save(tmp_path)
    return tmp_path


def target(tokenizer: Any, fingerprint: str = "mine") -> Any:
    return SimpleNamespace(name="tiny", require_tokenizer=lambda: tokenizer, fingerprint=lambda: fingerprint)


def config(directory: Path, **options: Any) -> DataConfig:
    return DataConfig(path=str(directory), **options)


def test_it_is_read_as_it_is(directory: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = open_rollouts(config(directory), target(tokenizer))
    assert len(found.train) == 6 and found.train[5].input_ids.tolist() == [5] * 7
    assert [p.id for p in found.heldout] == ["h"] and found.ledger.kept == 3 and not caplog.records


@pytest.mark.parametrize(("limit", "rows"), [(1, 2), (2, 3), (3, 6), (9, 6)])
def test_max_conversations_keeps_all_samples_of_the_first(
    directory: Path, tokenizer: Any, limit: int, rows: int
) -> None:
    found = open_rollouts(config(directory, max_conversations=limit), target(tokenizer))
    everything = open_rollouts(config(directory), target(tokenizer)).train
    assert [e.input_ids.tolist() for e in found.train] == [everything[i].input_ids.tolist() for i in range(rows)]  # type: ignore[attr-defined]
    assert len(found.train.meta["conversation_ids"]) == rows and found.ledger.kept == min(limit, 3)
    assert (found.train.meta["key"] == "k") == (rows == 6)
    found.ledger.check()


def test_what_does_not_fit_is_refused(directory: Path, tokenizer: Any, make_tokenizer: Any) -> None:
    other = make_tokenizer()
    other.chat_template += "{# changed #}"
    with pytest.raises(UserError, match="another chat template than tiny's"):
        open_rollouts(config(directory), target(other))
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(UserError, match="another tokenizer than tiny's"):
        open_rollouts(config(directory), target(other))
    with pytest.raises(UserError, match="enable_thinking=False: set it to that"):
        open_rollouts(config(directory, enable_thinking=True), target(tokenizer))
    with pytest.raises(UserError, match="max_length=64: set at least that"):
        open_rollouts(config(directory, max_length=63), target(tokenizer))
    (directory / "heldout.json").unlink()
    with pytest.raises(UserError, match=r"heldout\.json cannot be read"):
        open_rollouts(config(directory), target(tokenizer))


def test_another_targets_rollouts_are_warned_about(
    directory: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_rollouts(config(directory), target(tokenizer, "another"))
    assert "the rollouts were made by another target" in caplog.text


def test_only_rollouts_have_rollout_meta(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert (rollout_meta(str(directory)) or {})["rollout"] == {"target": "mine"}
    assert rollout_meta("sharegpt") is None and rollout_meta("/no/such.json") is None
    elsewhere = tmp_path_factory.mktemp("prepared")
    (elsewhere / "meta.json").write_text(json.dumps({"key": "x"}))
    assert rollout_meta(str(elsewhere)) is None
    (elsewhere / "meta.json").write_text("3")
    assert rollout_meta(str(elsewhere)) is None
    (elsewhere / SETTINGS).write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        rollout_meta(str(elsewhere))


def test_telling_rollouts_from_a_corpus_needs_no_torch() -> None:
    code = "import sys, specauf.data.rollouts as r; r.rollout_meta('x'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
