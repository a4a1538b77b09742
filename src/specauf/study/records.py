"""What is kept of a replay: one record per trajectory, from which every number of the report is a sum.

A record says how many rounds accepted 0, 1, ... tokens, with and without those that start after the text began to loop. A part
that later asks for more prompts adds records, as far as they were recorded; a larger recording is replayed from the start.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specauf.decode.acceptance import before_loop, loop_onset
from specauf.decode.generate import Round
from specauf.decode.replay import Trajectory
from specauf.drafter.checkpoint import weights_hash
from specauf.files import atomic_write_text, read_json
from specauf.study.cells import finished
from specauf.study.recipe import Study

Records = dict[int, dict[str, Any]]
"""By the trajectory's number: `accepted` and `before_loop` (rounds that accepted 0..B-1 tokens), `cut`, `tokens`."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a finished cell, or prompt lookup at a block size."""

    name: str
    """Name of its directory under `measured`."""
    block_size: int
    weights: str
    """Digest of the drafter, so that numbers of another one are not taken for its own."""
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Place:
    """What a subject is measured on."""

    task: str
    temperature: float
    limit: int
    recording: str
    """Digest of the trajectories."""

    def path(self, study: Study, subject: Subject) -> Path:
        return study.out / "measured" / subject.name / f"{self.task}-t{self.temperature:g}-n{self.limit}.json"


def cell_subject(study: Study, method: str, seed: int) -> Subject | None:
    """A cell as something to measure; None until it is finished."""
    where = study.cell_dir(method, seed)
    if not finished(where):
        return None
    checkpoint = where / "checkpoint"
    stamp = (checkpoint / "model.safetensors").stat().st_mtime_ns
    return Subject(where.name, study.block_size(method), _weights(checkpoint, stamp), checkpoint)


def subjects(study: Study, part: str, seeds: Sequence[int]) -> list[Subject]:
    """What there is of a part to measure: its finished cells of these seeds, then prompt lookup."""
    cells = [cell_subject(study, method, seed) for seed in seeds for method in study.parts[part].methods]
    return [*filter(None, cells), *lookup_subjects(study, part)]


def lookup_subjects(study: Study, part: str) -> list[Subject]:
    # Lookup has no weights: its rule stands for them, under another name whenever its proposals change.
    return [Subject(study.lookup(size), size, f"lookup-{size}-round") for size in study.block_sizes(part)]


@functools.cache
def _weights(checkpoint: Path, stamp: int) -> str:
    return weights_hash(checkpoint)


def records(
    rounds: Sequence[Sequence[Round]], trajectories: Sequence[Trajectory], limit: int, block_size: int
) -> list[dict[str, Any]]:
    """One record per trajectory."""
    texts = [t.tokens[:limit] for t in trajectories]
    early = before_loop(rounds, [loop_onset(text) for text in texts])
    return [
        {
            "accepted": _histogram(row, block_size),
            "before_loop": _histogram(some, block_size),
            "cut": sum(r.cut for r in row),
            "tokens": len(text),
        }
        for row, some, text in zip(rounds, early, texts, strict=True)
    ]


def _histogram(rounds: Sequence[Round], block_size: int) -> list[int]:
    counts = [0] * block_size
    for r in rounds:
        counts[r.accepted] += 1
    return counts


def load_records(study: Study, subject: Subject, place: Place) -> Records:
    """The records of this subject on this recording; empty when those stored are of other weights or another recording."""
    path = place.path(study, subject)
    found = read_json(path, "delete it, and it is measured again") if path.is_file() else {}
    if (found.get("recording"), found.get("weights")) != (place.recording, subject.weights):
        return {}
    return {int(number): record for number, record in found["records"].items()}


def add_records(study: Study, subject: Subject, place: Place, found: Mapping[int, dict[str, Any]]) -> None:
    """Add `found` to the stored records, over any of the same number. The caller holds the task and temperature's claim."""
    known = load_records(study, subject, place) | dict(found)
    content = {
        "recording": place.recording,
        "weights": subject.weights,
        "records": {str(number): known[number] for number in sorted(known)},
    }
    atomic_write_text(place.path(study, subject), json.dumps(content, separators=(",", ":")) + "\n")
