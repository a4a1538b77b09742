"""The command line where tyro alone would lose what was typed, or not say what to type instead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import tyro

from specauf.strict import ConfigError, require

LISTS = ("--set", "--average-with", "--results", "--eval.tasks", "--stage", "--parts")
"""Options that take several values."""


def parse(verbs: Any, given: Sequence[str], description: str | None) -> Any:
    """The verb that `given` names, of a union of dataclasses. Raises `ConfigError`, or exits as tyro does."""
    bare = any(flag == "--set" and value.startswith("-") for flag, value in pairwise([*given, "-"]))
    require(not bare, "--set has nothing behind it: write --set section.key=value, or leave it out")
    arguments = list(given)
    for flag in LISTS:
        arguments = gathered(arguments, flag)
    options: dict[str, Any] = {"args": arguments, "prog": "specauf", "description": description}
    try:
        verb, unknown = tyro.cli(verbs, **options, return_unknown_args=True)
    except ConfigError:  # a value that does not fit the others, perhaps for want of one behind an unknown option
        return tyro.cli(verbs, **options)
    changes = " ".join(item for item in unknown if "=" in item and not item.startswith("-"))
    require(not changes or not hasattr(verb, "set"), f"unrecognized: {changes}; write --set {changes}")
    return tyro.cli(verbs, **options) if unknown else verb  # it names the unknown ones, and the nearest options


def gathered(arguments: Sequence[str], flag: str) -> list[str]:
    """Rewrite `flag a flag b` as `flag a b`: argparse would silently keep only the last."""
    rest: list[str] = []
    values: list[str] = []
    found, inside = 0, False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == flag:  # tyro takes either
            found, inside = found + 1, True
            values += [value] if value else []
        elif inside and not argument.startswith("-"):
            values.append(argument)
        else:
            inside = False
            rest.append(argument)
    return [*rest, flag, *values] if found > 1 else list(arguments)
