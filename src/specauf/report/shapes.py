"""What a results file must hold, so that whoever edits one by hand is told what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specauf.strict import UserError, nearest

SHAPES: dict[str, type] = {
    "title": str, "created": str, "command": str, "provenance": dict, "settings": dict, "ledger": dict, "methods": list,
    "evaluation": dict, "comparisons": list, "training": dict, "checks": list, "speedups": list, "live": list,
    "selection": list,
}  # fmt: skip
NEEDED = ("title", "methods", "evaluation")
RECORDS = {  # what every record of a list must have
    "methods": ("name",), "comparisons": ("task", "a", "b"), "checks": ("name",), "speedups": ("name",), "live": (),
    "selection": ("name", "task", "how"),
}  # fmt: skip


def demander(where: str, command: str) -> Callable[[bool, str, str], None]:
    """A function (holds, key, expected) that raises `UserError` when `holds` is false, naming `command` as the remedy."""

    def demand(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise UserError(f"{where}: {key} must be {expected}. Write the file again with `{command}`")

    return demand


def check_run(results: Any, where: str, command: str = "specauf eval") -> None:
    """Raise `UserError` naming `where` and the key unless `results` has the shape that a run's report reads."""
    demand = demander(where, command)
    for key in NEEDED:
        demand(key in results, repr(key), f"there (the least is {', '.join(NEEDED)})")
    for key, kind in SHAPES.items():
        value = results.get(key)
        demand(isinstance(value, kind) or (value is None and key not in NEEDED), repr(key), f"a {kind.__name__}")
    for key, fields in RECORDS.items():
        for i, record in enumerate(results.get(key) or []):
            demand(isinstance(record, dict), f"{key}[{i}]", "an object")
            for field in fields:
                demand(isinstance(record.get(field), str), f"{key}[{i}].{field}", "a string")
    names = [method["name"] for method in results["methods"]]
    demand(len(set(names)) == len(names), "'methods'", "a list of different names")
    for task, facts in results["evaluation"].items():
        demand(
            isinstance(facts, dict) and isinstance(facts.get("methods"), dict),
            f"evaluation.{task}.methods",
            "an object",
        )
        for name, scores in facts["methods"].items():
            demand(name in names, f"evaluation.{task}.methods.{name}", f"listed in methods{nearest(name, names)}")
            demand(isinstance(scores, dict), f"evaluation.{task}.methods.{name}", "an object")
            for key in ("alpha", "survival"):
                demand(isinstance(scores.get(key) or [], list), f"evaluation.{task}.methods.{name}.{key}", "a list")
    for name, log in (results.get("training") or {}).items():
        demand(isinstance(log, list) and all(isinstance(r, dict) for r in log), f"training.{name}", "a list of objects")
    for key in ("dropped", "changed"):
        demand(isinstance((results.get("ledger") or {}).get(key) or {}, dict), f"ledger.{key}", "an object")
    demand(isinstance((results.get("ledger") or {}).get("warnings") or [], list), "ledger.warnings", "a list")
    for key in ("target", "data", "machine"):
        demand(isinstance((results.get("provenance") or {}).get(key) or {}, dict), f"provenance.{key}", "an object")
    for i, sample in enumerate(results.get("live") or []):
        pieces = sample.get("segments") or []
        whole = isinstance(pieces, list) and all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in pieces)
        demand(whole, f"live[{i}].segments", 'a list of {"text", "kind"}')
