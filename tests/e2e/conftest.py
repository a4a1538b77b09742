"""A world to type commands in: a target directory, a corpus, a task and a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A target directory, a corpus, a task and a recipe."""
    root = write_world(
        tmp_path_factory.mktemp("world"), make_tokenizer(), conversations=40, words=12, tasks={"birds": 1}
    )
    (root / "recipe.yaml").write_text(
        f"""
out: {root}/run
target: {{path: {root}/target}}
data: {{path: {root}/chat.jsonl, max_length: 64, heldout: 0.2}}
drafter: {{block_size: 4, num_hidden_layers: 1, num_taps: 2}}
train: {{max_steps: 6, batch_size: 4, num_anchors: 8, eval_every: 3}}
eval: {{tasks: [birds, heldout], tasks_dir: {root}/tasks, prompts: 3, max_new_tokens: 12}}
"""
    )
    return root


@pytest.fixture
def own_cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECAUF_CACHE", str(world / "cache"))
    monkeypatch.setenv("SPECAUF_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
