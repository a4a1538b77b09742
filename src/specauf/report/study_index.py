"""Access to a study's results dict for the report: checked shapes, labels, scores by key, what has not run.

A part names methods, seeds and temperatures, whether or not they were measured. Every function here goes by the part's own
list, so that what is missing keeps its row and is reported as missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from specauf.config import LOOKUP
from specauf.report.shapes import check_run, demander
from specauf.report.tables import Results
from specauf.report.words import clean, real, series

MACRO = "macro"
"""The name of the average over benchmarks, in place of a task's."""
FAMILIES = ("MATH", "CODE", "CHAT")
SHARED = ("title", "created", "command", "provenance", "settings", "ledger", "checks", "methods")
"""Keys that mean in a study what they mean in a run's results."""
RECORDS = {
    "methods": ("name",), "parts": ("key",), "scores": ("part", "temperature", "method", "task"),
    "comparisons": ("part", "temperature", "task", "a", "b"), "claims": ("claim",),
}  # fmt: skip
LISTS: dict[str, dict[str, type]] = {
    "methods": {"cells": dict}, "parts": {"methods": str, "temperatures": str, "seeds": int, "missing": str},
    "scores": {"alpha": object, "survival": object, "seeds": int}, "claims": {"evidence": int}, "comparisons": {},
}  # fmt: skip


def check(results: Results, where: str = "results") -> None:
    """Raise `UserError` naming `where` and the key unless `results` has the shape that a study's report reads."""
    demand = demander(where, "specauf study")
    demand("parts" in results, "'parts'", "there")
    check_run({k: results[k] for k in SHARED if k in results} | {"evaluation": {}}, where, "specauf study")
    for key, fields in RECORDS.items():
        records = results.get(key)
        demand(isinstance(records, list) or (records is None and key != "parts"), repr(key), "a list")
        for i, record in enumerate(records or []):
            demand(isinstance(record, dict), f"{key}[{i}]", "an object")
            for field in fields:
                demand(isinstance(record.get(field), str), f"{key}[{i}].{field}", "a string")
            for field, kind in LISTS[key].items():
                values = record.get(field)
                whole = values is None or (isinstance(values, list) and all(isinstance(v, kind) for v in values))
                demand(whole, f"{key}[{i}].{field}", f"a list of {NAMES[kind]}")
    keys = [part["key"] for part in results["parts"]]
    demand(len(set(keys)) == len(keys), "'parts'", "a list of different keys")
    for key in ("tasks", "training"):
        held = results.get(key) or {}
        demand(isinstance(held, dict) and all(isinstance(v, dict) for v in held.values()), repr(key), "of objects")
    for name, seeds in (results.get("training") or {}).items():
        for seed, log in seeds.items():
            whole = isinstance(log, list) and all(isinstance(row, dict) for row in log)
            demand(whole, f"training.{name}.{seed}", "a list of objects")
    for i, score in enumerate(results.get("scores") or []):
        demand(isinstance(score.get("seed_taus") or {}, dict), f"scores[{i}].seed_taus", "an object")
    for name, task in (results.get("tasks") or {}).items():
        demand(isinstance(task.get("repeated_share") or {}, dict), f"tasks.{name}.repeated_share", "an object")


NAMES = {dict: "objects", str: "strings", int: "whole numbers", object: "values"}


def method(results: Results, name: str) -> dict[str, Any]:
    """The record of a method; one with nothing but a name when a part names a method that is not listed."""
    found: dict[str, Any] = next((m for m in results["methods"] if m["name"] == name), {"name": name})
    return found


def is_lookup(results: Results, name: str) -> bool:
    return method(results, name).get("kind") == "lookup" or name == LOOKUP


def label(results: Results, name: str) -> str:
    return clean(method(results, name).get("label") or ("Prompt lookup" if name == LOOKUP else name))


def labels(results: Results, names: Iterable[str]) -> dict[str, str]:
    return {name: label(results, name) for name in names}


def part_label(part: dict[str, Any]) -> str:
    return clean(part.get("title") or f"Part {part['key']}")


def task_label(results: Results, task: str) -> str:
    return "average" if task == MACRO else clean((results.get("tasks") or {}).get(task, {}).get("label") or task)


def families(results: Results) -> list[tuple[str, list[str]]]:
    """Tasks under their family: MATH, CODE, CHAT as in the paper, then any other; tasks that only scores name are kept."""
    tasks = dict(results.get("tasks") or {})
    for score in results.get("scores") or []:
        if score["task"] != MACRO:
            tasks.setdefault(score["task"], {})
    groups: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, facts in tasks.items():
        groups.setdefault(clean(facts.get("family") or "OTHER"), []).append(name)
    return [(family, names) for family, names in groups.items() if names]


def tasks(results: Results) -> list[str]:
    return [name for _, names in families(results) for name in names]


def scores(results: Results, part: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in results.get("scores") or [] if s["part"] == part["key"]]


def rows(results: Results, part: dict[str, Any]) -> list[str]:
    """Methods of a part in its order, then scored ones that it does not name, then prompt lookup, scored or not."""
    scored = [s["method"] for s in scores(results, part)]
    named = list(dict.fromkeys([*(part.get("methods") or []), *scored]))
    lookups = [name for name in named if is_lookup(results, name)]
    known = [m["name"] for m in results["methods"] if is_lookup(results, m["name"])]
    return [name for name in named if name not in lookups] + (lookups or known or [LOOKUP])


def temperatures(results: Results, part: dict[str, Any]) -> list[str]:
    """Temperatures as the scores write them, "0" and "1"."""
    scored = [s["temperature"] for s in scores(results, part)]
    return list(dict.fromkeys([*(part.get("temperatures") or []), *scored]))


def score(results: Results, part: dict[str, Any], temperature: str, name: str, task: str) -> dict[str, Any]:
    """The score of one method at one place, empty when it has not been measured."""
    place = temperature, name, task
    found = (s for s in scores(results, part) if (s["temperature"], s["method"], s["task"]) == place)
    return next(found, {})


def comparisons(results: Results, part: dict[str, Any], before_loop: bool = False) -> list[dict[str, Any]]:
    return [
        c
        for c in results.get("comparisons") or []
        if c["part"] == part["key"] and bool(c.get("before_loop")) == before_loop
    ]


def standing(comparison: dict[str, Any]) -> str:
    """What a comparison says about its methods; for single runs, less than the verdict from their interval."""
    return str(comparison.get("standing") or comparison.get("verdict") or "")


def noise_floor(results: Results, part: dict[str, Any], temperature: str, name: str, task: str) -> float | None:
    """How far two runs that differ in nothing but the seed may lie apart, from the comparisons at this place.

    Those of the method itself go first; any other of the same part, temperature and task has the same floor.
    """
    here = [c for c in comparisons(results, part) if c["temperature"] == temperature and c["task"] == task]
    ranked = sorted(here, key=lambda c: name not in (c["a"], c["b"]))
    return next((floor for c in ranked if (floor := real(c.get("noise_floor"))) is not None), None)


def drafters(results: Results, part: dict[str, Any]) -> list[str]:
    return [name for name in rows(results, part) if not is_lookup(results, name)]


def table_of(results: Results, part: dict[str, Any]) -> int | None:
    """2 or 4 when the part's drafters are those of the paper's table of that number, else None."""
    records = [method(results, name) for name in drafters(results, part)]
    objectives = [(m.get("objective") or {}).get("name") for m in records]
    if records and all(m.get("kind") == "domino" for m in records):
        return 4
    dflash = bool(records) and all(m.get("kind") == "dflash" for m in records)
    return 2 if dflash and sorted(map(str, objectives)) == ["auf", "auf-decay", "decay"] else None


def paper_parts(results: Results) -> dict[int, dict[str, Any]]:
    """The first part for each of the paper's two tables, where there is one."""
    found: dict[int, dict[str, Any]] = {}
    for part in results["parts"]:
        number = table_of(results, part)
        if number is not None:
            found.setdefault(number, part)
    return found


def slugs(results: Results) -> dict[str, str]:
    """Part key -> its name in file names and ids: plain letters, all different."""
    found: dict[str, str] = {}
    for i, part in enumerate(results["parts"]):
        name = re.sub(r"[^a-z0-9]+", "-", part["key"].lower()).strip("-")[:24] or f"part-{i + 1}"
        while name in found.values():
            name += f"-{i + 1}"
        found[part["key"]] = name
    return found


def absent(results: Results, part: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Kind of absence -> method -> seeds of this part: `missing` and `training` cells, and `unmeasured` trained ones."""
    states = {
        (name, str(cell.get("seed"))): cell.get("state") or "missing"
        for name in drafters(results, part)
        for cell in method(results, name).get("cells") or []
    }
    wanted = [(name, str(seed)) for name in part.get("methods") or [] for seed in part.get("seeds") or []]
    wanted = [place for place in wanted if not is_lookup(results, place[0]) and states.get(place) != "done"]
    for cell in part.get("missing") or []:
        name, _, seed = cell.rpartition("-s")
        wanted.append((name or cell, seed if name else ""))
    found: dict[str, dict[str, list[str]]] = {"missing": {}, "training": {}, "unmeasured": {}}
    # Measured somewhere; `unmeasured` says where not.
    begun = {(s["method"], str(seed)) for s in scores(results, part) for seed in s.get("seeds") or []}
    for name, seed in dict.fromkeys(wanted):
        state = states.get((name, seed), "missing")
        if state == "done" and (name, seed) in begun:
            continue
        kind = {"done": "unmeasured", "training": "training"}.get(state, "missing")
        found[kind].setdefault(name, []).append(seed)
    return found


def unmeasured(results: Results, part: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(method, temperature, tasks) without a tau, except for methods of which `absent` names every seed."""
    seeds, gaps = set(map(str, part.get("seeds") or [])), []
    named = absent(results, part).values()
    for name in rows(results, part):
        if seeds and seeds <= {seed for kind in named for seed in kind.get(name, [])}:
            continue
        for temperature in temperatures(results, part):
            places = [*tasks(results), MACRO]
            gap = [t for t in places if real(score(results, part, temperature, name, t).get("tau")) is None]
            if gap:
                gaps.append((name, temperature, gap))
    return gaps


def seeds_of(values: Sequence[str]) -> str:
    """`seed 0`, `seeds 0 and 1`, or nothing when none is named."""
    kept = [clean(v) for v in values if v]
    return f"seed{'s' if len(kept) > 1 else ''} {series(kept)}" if kept else ""
