"""The recording stage: the target's own trajectories on every task, once per temperature, shared by all cells.

A recording is as long and has as many prompts as any part asks for; a part that asks for less reads its beginning. A small
file describes each recording, so that the report reads no recorded text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specauf.bench.runner import Recorded, recorded
from specauf.bench.tasks import BenchPrompt, describe_task, load_task, render_prompts
from specauf.config import EvalConfig, digest
from specauf.console import Console
from specauf.decode.acceptance import repeated_share
from specauf.decode.replay import Dialogue, check_reach
from specauf.files import atomic_write_text, read_json
from specauf.locks import claim
from specauf.run import data_dir
from specauf.strict import UserError, to_dict
from specauf.study.recipe import Recording, Study
from specauf.target import Target


def describe(study: Study, task: str, wanted: Recording, target: Target) -> dict[str, Any] | None:
    """What is recorded of a task, if `wanted` can be read out of it: enough conversations, tokens and slots; else None.

    Also None when it is a recording of another target, or of other prompts or sampling than the recipe's.
    Keys: `key` (digest of the tokens), `recording` (the fields of `Recording`), `made_of` (digest of target, EOS ids,
    prompts and sampling), `label`, `clusters` (conversation number of each trajectory), `repeated_share`.
    """
    path = _path(study, task, wanted.temperature)
    if not path.is_file():
        return None
    found = read_json(path, "delete it, and it is made again")
    fits = Recording(**found["recording"]).covers(wanted, len(set(found["clusters"])))
    return found if fits and found["made_of"] == _made_of(study, target, _prompts(study, task), wanted) else None


def check_tasks(study: Study, target: Target, recordings: Sequence[Recording]) -> None:
    """Raise `UserError`, before hours of training, when a task cannot be recorded or gives no interval."""
    for task in study.base.eval.tasks:
        prompts, label = _prompts(study, task), describe_task(task, tasks_dir=study.base.eval.tasks_dir).label
        if len(prompts) < 2:
            held = f"eval.tasks: {label} has {len(prompts) or 'no'} conversation"
            raise UserError(f"{held}, and an interval needs two or more: add some, or leave it out")
        for wanted in recordings:
            rendered = _rendered(study, target, prompts)[: wanted.prompts]
            check_reach(target, rendered, wanted.max_new_tokens + wanted.block_size - 1)


def chosen(clusters: Sequence[int], conversations: int | None) -> list[int]:
    """Numbers of the trajectories of the first `conversations` conversations (None: of all)."""
    first = set(sorted(set(clusters))[:conversations])
    return [i for i, cluster in enumerate(clusters) if cluster in first]


def record_all(study: Study, target: Target, recordings: Sequence[Recording], console: Console) -> list[str]:
    """Record whatever is missing and not being recorded by another process. Returns what is left to others."""
    left = []
    for wanted in recordings:
        for task in study.base.eval.tasks:
            if describe(study, task, wanted, target):
                continue
            with claim(_path(study, task, wanted.temperature).with_suffix("")) as mine:
                if not mine:
                    left.append(f"{task} at T={wanted.temperature:g}")
                elif not describe(study, task, wanted, target):
                    _record(study, target, task, _prompts(study, task), wanted, console)
    return left


def open_recorded(study: Study, target: Target, task: str, recording: Recording) -> Recorded:
    """The trajectories of a recording that `describe` knows.

    Raises `UserError` when they have changed since: no measurement may go by the name of another recording.
    """
    about = describe(study, task, recording, target)
    found = _open(study, target, task, _prompts(study, task), recording, None) if about else None
    if about is None or found is None or about["key"] != _key(found):
        raise UserError(f"the recording of {task} changed while it was measured: run the same command again")
    return found


def _record(
    study: Study, target: Target, task: str, prompts: list[BenchPrompt], wanted: Recording, console: Console
) -> None:
    count = len(prompts[: wanted.prompts])
    label = describe_task(task, tasks_dir=study.base.eval.tasks_dir).label
    with console.progress(f"recording the target on {label}, T={wanted.temperature:g}", count) as advance:
        made = _open(study, target, task, prompts, wanted, advance)
    about = {
        "key": _key(made),
        "recording": dataclasses.asdict(wanted),
        "made_of": _made_of(study, target, prompts, wanted),
        "label": made.label,
        "clusters": made.clusters,
        "repeated_share": repeated_share(made.texts()),
    }
    atomic_write_text(_path(study, task, wanted.temperature), json.dumps(about) + "\n")


def _key(recorded: Recorded) -> str:
    return digest([[t.id, t.prompt, t.tokens] for t in recorded.trajectories])


def _open(
    study: Study,
    target: Target,
    task: str,
    prompts: list[BenchPrompt],
    wanted: Recording,
    on_progress: Callable[[int], None] | None,
) -> Recorded:
    where, rendered = study.out / "trajectories", _rendered(study, target, prompts)
    label = describe_task(task, tasks_dir=study.base.eval.tasks_dir).label
    return recorded(
        target, label, rendered[: wanted.prompts], _settings(study, wanted), wanted.block_size, where, on_progress
    )


def _settings(study: Study, wanted: Recording) -> EvalConfig:
    sampling = dataclasses.replace(study.base.eval.sampling, temperature=wanted.temperature)
    return dataclasses.replace(study.base.eval, sampling=sampling, max_new_tokens=wanted.max_new_tokens)


def _made_of(study: Study, target: Target, prompts: list[BenchPrompt], wanted: Recording) -> str:
    sampling = to_dict(_settings(study, wanted).sampling)
    thinking = study.base.data.enable_thinking
    return digest([target.fingerprint(), sorted(target.eos_ids()), [list(p) for p in prompts], sampling, thinking])


def _rendered(study: Study, target: Target, prompts: list[BenchPrompt]) -> list[Dialogue]:
    return render_prompts(target, prompts, study.base.data.enable_thinking)


def _prompts(study: Study, task: str) -> list[BenchPrompt]:
    return load_task(task, tasks_dir=study.base.eval.tasks_dir, data_dir=data_dir(study.base))


def _path(study: Study, task: str, temperature: float) -> Path:
    return study.out / "recorded" / f"{task}-t{temperature:g}.json"
