"""A world to type commands in: a target directory, a corpus, a task and a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.conftest import make_target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A target directory, a corpus, a task and a recipe."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    target = make_target(vocab=len(tokenizer) + 8)
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = tokenizer.eos_token_id
    target.model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "in", "two", "green", "trees"]
    rng = random.Random(0)
    with (root / "chat.jsonl").open("w") as file:
        for i in range(40):
            turns = [
                {"from": who, "value": " ".join(rng.choices(words, k=12))} for who in ("human", "gpt", "human", "gpt")
            ]
            file.write(json.dumps({"id": f"c{i}_0", "conversations": turns}) + "\n")
    (root / "tasks").mkdir()
    with (root / "tasks" / "birds.jsonl").open("w") as file:
        for i in range(3):
            file.write(json.dumps({"id": f"birds/{i}", "turns": [" ".join(rng.choices(words, k=6))]}) + "\n")
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
