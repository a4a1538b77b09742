"""The measuring stage: every finished cell, and prompt lookup, replayed over the recordings; a sample decoded live."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specauf.bench.runner import Recorded, check_live
from specauf.config import digest
from specauf.console import Console
from specauf.decode.generate import Generation
from specauf.decode.propose import DrafterProposer, PromptLookup
from specauf.decode.replay import Replayable, replay
from specauf.drafter.checkpoint import load_drafter
from specauf.files import atomic_write_text, read_json
from specauf.locks import claim
from specauf.study.recipe import Recording, Study
from specauf.study.recordings import chosen, describe, open_recorded
from specauf.study.records import Place, Subject, add_records, load_records, records, subjects
from specauf.target import Target

CHUNK = 16
"""Trajectories whose features are in memory at once, for all cells; also what a kill can cost."""
AT_ONCE = 8
"""Drafters on the target's device at once. The features are computed again for the next ones."""

Missing = dict[tuple[Subject, Place], set[int]]
"""Numbers of the trajectories to replay."""


def measure_all(
    study: Study, target: Target, parts: Sequence[str], recordings: Sequence[Recording], console: Console
) -> tuple[list[str], list[str]]:
    """Measure everything else and return (what is left to another process, what is not recorded as a part needs it)."""
    left, unrecorded = [], []
    for wanted in recordings:
        for task in study.base.eval.tasks:
            t, told = wanted.temperature, f"{task} at T={wanted.temperature:g}"
            asked = [key for key in parts if t in study.parts[key].temperatures]
            found = {key: describe(study, task, study.recording(key, t), target) for key in asked}
            usable = {key: about for key, about in found.items() if about}
            if len(usable) < len(asked):
                unrecorded.append(told)
            if not usable:
                continue
            about = next(iter(usable.values()))  # there is one recording
            if not _missing(study, task, about, usable):
                continue
            with claim(study.out / "measured" / f".{task}-t{wanted.temperature:g}") as mine:
                if not mine:
                    left.append(told)
                elif todo := _missing(study, task, about, usable):
                    _measure(study, target, task, about, todo, console)
    return left, unrecorded


def _missing(study: Study, task: str, about: Mapping[str, Any], parts: Iterable[str]) -> Missing:
    missing: Missing = defaultdict(set)
    for key in parts:
        part = study.parts[key]
        place = Place(task, about["recording"]["temperature"], part.max_new_tokens, about["key"])
        for subject in subjects(study, key, part.seeds):
            have = load_records(study, subject, place)
            missing[subject, place] |= set(chosen(about["clusters"], part.prompts)) - have.keys()
    return {key: numbers for key, numbers in missing.items() if numbers}


def _proposer(subject: Subject, target: Target) -> Replayable:
    if subject.checkpoint is None:
        return PromptLookup(subject.block_size)
    return DrafterProposer(load_drafter(subject.checkpoint).to(target.embed_weight), target)


def _measure(
    study: Study, target: Target, task: str, about: Mapping[str, Any], todo: Missing, console: Console
) -> None:
    recording = Recording(**about["recording"])
    opened = open_recorded(study, target, task, recording)
    names = list(dict.fromkeys(subject for subject, _ in todo))
    label = f"replaying {len(names)} drafters on {about['label']}, T={recording.temperature:g}"
    with console.progress(label, sum(len(numbers) for numbers in todo.values())) as advance:
        for first in range(0, len(names), AT_ONCE):
            group = names[first : first + AT_ONCE]
            _replay(study, target, opened, {key: todo[key] for key in todo if key[0] in group}, advance)


def _replay(
    study: Study,
    target: Target,
    recorded: Recorded,
    todo: Missing,
    advance: Callable[[float, str], None],
) -> None:
    proposers = {subject: _proposer(subject, target) for subject, _ in todo}
    for chunk in recorded.chunks(CHUNK):
        for (subject, place), numbers in todo.items():
            now = [i for i in chunk if i in numbers]
            if not now:
                continue
            proposer = proposers[subject]
            features = recorded.features_of(target, proposer.layer_ids, chunk)
            some = [recorded.trajectories[i] for i in now]
            rounds = replay(proposer, some, [features[i - chunk.start] for i in now], place.limit)
            found = records(rounds, some, place.limit, subject.block_size)
            add_records(study, subject, place, dict(zip(now, found, strict=True)))
            advance(len(now), subject.name)


def check_live_all(study: Study, target: Target, part: str, console: Console) -> list[str]:
    """Decode the first prompts of every task live with each method of a part, at T=0.

    Returns what is left to other processes.
    """
    left, plain = list[str](), dict[str, list[Generation]]()
    for subject in subjects(study, part, study.parts[part].seeds[:1]):
        for task in study.base.eval.tasks if study.live.prompts else ():
            about = describe(study, task, study.live_recording(), target)
            if about is None or read_live(study, subject, task, about):
                continue
            with claim(study.out / "measured" / subject.name) as mine:
                if mine:
                    plain[task] = _check_live(study, target, subject, task, about, plain.get(task, ()), console)
                else:
                    left.append(f"{subject.name} live on {task}")
    return left


def read_live(study: Study, subject: Subject, task: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """`prompts`, `rounds`, `problems` and `near_ties` of a live check of this drafter; None when there was none."""
    path = _live_path(study, subject, task)
    found = read_json(path, "delete it, and it is made again") if path.is_file() else {}
    return found if found.get("key") == _live_key(study, subject, about) else None


def _live_path(study: Study, subject: Subject, task: str) -> Path:
    return study.out / "measured" / subject.name / f"live-{task}.json"


def _live_key(study: Study, subject: Subject, about: Mapping[str, Any]) -> str:
    return digest([about["key"], subject.weights, study.live.prompts, study.live.tokens])


def _check_live(
    study: Study,
    target: Target,
    subject: Subject,
    task: str,
    about: Mapping[str, Any],
    plain: Sequence[Generation],
    console: Console,
) -> list[Generation]:
    """Returns the prompts' plain decodings, which the next method needs too."""
    recorded = open_recorded(study, target, task, Recording(**about["recording"])).trajectories
    some = [recorded[i] for i in chosen(about["clusters"], study.live.prompts)]
    with console.progress(f"decoding for real: {subject.name}, {about['label']}", len(some)) as advance:
        check = check_live(
            target,
            _proposer(subject, target),
            some,
            study.live.tokens,
            sampling=dataclasses.replace(study.base.eval.sampling, temperature=0.0),
            plain=plain,
            on_done=advance,
        )
    found = {
        "key": _live_key(study, subject, about),
        "prompts": len(some),
        "rounds": sum(len(g.rounds) for g in check.generations),
        "problems": check.problems,
        "near_ties": check.near_ties,
    }
    atomic_write_text(_live_path(study, subject, task), json.dumps(found) + "\n")
    return check.plain
