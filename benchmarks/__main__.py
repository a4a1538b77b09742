"""`make bench`: every benchmark, one after the other; writes results/bench.json and results/bench.md.

python -m benchmarks [names]
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Row, machine, table
from specauf import provenance
from specauf.files import atomic_write_text

NAMES = ("objective", "attention", "step", "against_specforge", "extraction", "decoding")


def markdown(rows: Sequence[Row], about: str) -> str:
    lines = ["| what | against | at | ratio | promised | measured |", "|---|---|---|---|---|---|"]
    for row in rows:
        promise = "–" if row.reach is None else f"{'≤' if row.below else '≥'} {row.reach:.3g}"
        verdict = "" if row.reached is None else " reached" if row.reached else " **not reached**"
        lines.append(f"| {row.what} | {row.against} | {row.at} | {row.ratio:.2f} | {promise}{verdict} | {row.note} |")
    return f"{about}\n\n" + "\n".join(lines) + "\n"


def run(names: Sequence[str]) -> int:
    began, found = time.perf_counter(), []
    for name in names:
        print(f"== {name}", flush=True)
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            print(table([row]), flush=True)
            found.append(row)
    minutes = (time.perf_counter() - began) / 60
    box = {**provenance.collect(), "machine": machine(), "minutes": minutes}
    if tuple(names) == NAMES:
        record = {"provenance": box, "rows": [{**dataclasses.asdict(row), "reached": row.reached} for row in found]}
        atomic_write_text(Path("results/bench.json"), json.dumps(record, indent=1) + "\n")
        m = box["machine"]
        about = f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {minutes:.0f} minutes, {time.strftime('%d %B %Y')}"
        atomic_write_text(Path("results/bench.md"), markdown(found, about))
    missed = [row for row in found if row.reached is False]
    print(f"{len(found)} figures in {minutes:.1f} minutes, {len(missed)} short of what was promised")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:] or NAMES))
