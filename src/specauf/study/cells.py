"""A cell's directory: how far training has come, and whether it is still the cell that the recipe describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specauf.config import RunConfig, load
from specauf.files import read_json
from specauf.strict import ConfigError, differences, to_dict
from specauf.study.recipe import Cell
from specauf.train.checkpoint import FREE

NOT_IDENTITY = (
    *(("out",), ("eval",), ("target", "device"), ("target", "trust_remote_code"), ("features", "max_gb")),
    *((section, key) for section, keys in FREE.items() for key in keys),
)
"""Settings that may change once a cell's training has begun: none of them changes a weight, but for rounding."""


def progress(out: Path) -> tuple[int, int | None]:
    """(Steps in the last checkpoint, the horizon), (0, None) when there is none."""
    try:
        state = read_json(out / "checkpoint" / "state.json", f"delete {out} to train it again")
    except FileNotFoundError:  # also while the process that trains it replaces the checkpoint
        return 0, None
    return int(state["step"]), state["max_steps"]


def finished(out: Path) -> bool:
    """Whether training reached its horizon and its last checkpoint is there."""
    done, horizon = progress(out)
    return horizon is not None and done >= horizon


def identity(config: RunConfig) -> dict[str, Any]:
    """The configuration without `NOT_IDENTITY`. A cell that it starts from goes by name, since a study may be moved."""
    tree = to_dict(config)
    source, cells = tree["drafter"]["init_from"], Path(config.out).parent
    if source and Path(source).is_relative_to(cells):
        tree["drafter"]["init_from"] = str(Path(source).relative_to(cells))
    for *parents, last in NOT_IDENTITY:
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(last)
    return tree


def check_unchanged(cell: Cell) -> None:
    """Raise `ConfigError` with the keys that differ when the cell on disk was trained from another recipe."""
    path = cell.out / "config.yaml"
    if not path.is_file():
        return
    before, now = identity(load(path)), identity(cell.config)  # a field that did not exist then has its default
    changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(before, now)]
    if changed:
        raise ConfigError(
            f"{cell.out} was trained from another recipe ({'; '.join(changed)}). Change the recipe back, give the changed "
            "method another name, or delete that directory to train it again"
        )


def check_same_data(cell: Cell, data: str, target: str) -> None:
    """Raise `ConfigError` when the cell on disk was trained on other prepared data or another target than these keys name.

    The recipe may still be the same: the corpus or the target's files were changed in place, other prompts are to be kept
    out, or an earlier version of specauf read the corpus differently.
    """
    path = cell.out / "run.json"
    before = read_json(path, f"delete {cell.out} to train it again") if path.is_file() else {}
    for what, now in (("data", data), ("target", target)):
        if before.get(what, now) != now:
            raise ConfigError(
                f"{cell.out} was trained on another state of the {what} ({before[what]} then, {now} now): its neighbours would "
                "not be comparable. Restore the files, eval.tasks or specauf version of that time, or delete that directory"
            )
