"""`make bench`: every benchmark, one after the other; writes results/bench.json and results/bench.md.

    python -m benchmarks [names]

With names, only those are run, and their results replace the earlier ones in both files. --help lists them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Row, machine, table
from specauf import provenance
from specauf.files import atomic_write_text

NAMES = ("objective", "attention", "step", "against_specforge", "extraction", "decoding")
JSON, MARKDOWN = Path("results/bench.json"), Path("results/bench.md")


def markdown(found: Mapping[str, Any]) -> str:
    lines = []
    for name in (n for n in NAMES if n in found):
        part = found[name]
        m, rows = part["machine"], [Row(**row) for row in part["rows"]]
        took = f"{part['minutes']:.1f} minutes, " if part["minutes"] else ""
        where = f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}"
        lines += [f"## {name}", "", f"{where}; {took}{part['date']}, commit {part['commit'][:7]}"]
        lines += ["", "| what | against | at | ratio | goal | measured |", "|---|---|---|---|---|---|"]
        for row in rows:
            goal = "–" if row.reach is None else f"{'≤' if row.below else '≥'} {row.reach:.3g}"
            verdict = "" if row.reached is None else " reached" if row.reached else " **not reached**"
            lines.append(f"| {row.what} | {row.against} | {row.at} | {row.ratio:.2f} | {goal}{verdict} | {row.note} |")
        lines.append("")
    return "\n".join(["# Benchmarks", "", "`make bench`; docs/performance.md says what they mean.", "", *lines])


def run(names: Sequence[str]) -> int:
    found: dict[str, Any] = json.loads(JSON.read_text()) if JSON.is_file() else {}
    missed = count = 0
    start = time.perf_counter()
    for name in names:
        print(f"== {name}", flush=True)
        began, rows = time.perf_counter(), []
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            print(table([row]), flush=True)
            rows.append(row)
        if not rows:  # the other library is not installed: the figures of another day stay
            print(f"{name}: nothing to measure here; `make interop` installs what it is measured against", flush=True)
            continue
        missed, count = missed + sum(row.reached is False for row in rows), count + len(rows)
        found[name] = {
            "date": time.strftime("%d %B %Y %H:%M UTC", time.gmtime()),
            "commit": str(provenance.collect()["git"]["commit"]),
            "machine": machine(),
            "minutes": (time.perf_counter() - began) / 60,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        atomic_write_text(JSON, json.dumps(found, indent=1) + "\n")
        atomic_write_text(MARKDOWN, markdown(found))
    print(f"{count} figures in {(time.perf_counter() - start) / 60:.1f} minutes, {missed} short of their goals")
    return 0


def main(names: Sequence[str]) -> int:
    if unknown := [name for name in names if name not in NAMES]:
        asked = {*unknown} & {"-h", "--help"}
        said = "" if asked else f"unknown: {', '.join(unknown)}\n"
        print(
            f"{said}usage: python -m benchmarks [names]\nnames: {', '.join(NAMES)}", file=None if asked else sys.stderr
        )
        return 0 if asked else 2
    return run(names or NAMES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
