"""From a run's configuration to its objectives, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specauf.config import RunConfig
from specauf.data.rollouts import rollout_meta
from specauf.objective.branches import VARIANTS, Branch, temperature_of
from specauf.objective.loss import Objective
from specauf.objective.registry import rule_of
from specauf.strict import ConfigError


def objectives_of(config: RunConfig) -> tuple[Branch, ...]:
    """The run's objective, or one for each of Domino's branches, with the branch that gives its support.

    Raises `ConfigError` on a choice that cannot be trained.
    """
    wanted = config.objective
    if wanted.plugin is not None:
        _import(wanted.plugin)
    if config.drafter.kind == "domino":
        base, final, side = VARIANTS.get(
            wanted.variant or "", (wanted.name, wanted.final or wanted.name, wanted.support)
        )
        shared = wanted.final is None  # then the options are for both
        found: tuple[Branch, ...] = (
            Branch(_objective(config, base, wanted.options), "base"),
            Branch(_objective(config, final, wanted.options if shared else wanted.final_options), side),
        )
    else:
        found = (Branch(_objective(config, wanted.name, wanted.options), "base"),)
    if wanted.gamma is not None and all(b.objective.gamma is None for b in found):
        names = " and ".join(dict.fromkeys(b.objective.name for b in found))
        raise ConfigError(f"objective.gamma is given, and {names} has no position decay; <name>-decay does")
    for side in ("base", "final"):
        read = [b.objective for b in found if b.support == side and not b.prior]
        try:
            temperature_of(read)
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from None
    for objective, _ in found:
        if "rollouts" in objective.rule.needs and rollout_meta(config.data.path) is None:
            raise ConfigError(
                f"objective {objective.name!r} is trained on the target's own continuations: make them with `specauf "
                f"rollout` and give their directory as data.path, which is {config.data.path!r}"
            )
        reads_target = objective.needs_target or wanted.labels == "target"
        if reads_target and config.features.cache and not config.features.extras:
            raise ConfigError(
                f"objective {objective.name!r} with labels={wanted.labels!r} reads what the target says, which the feature "
                "cache holds only with features.extras=true (or set features.cache=false)"
            )
    return found


def _objective(config: RunConfig, name: str, options: Mapping[str, Any]) -> Objective:
    wanted = config.objective
    try:
        default = rule_of(name).gamma
        gamma = None if default is None else wanted.gamma
        if isinstance(default, str):
            gamma = wanted.decay_for(config.drafter.block_size)
        return Objective(name, gamma, wanted.reduction, options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from None


def stored_extras(config: RunConfig) -> tuple[str, ...]:
    """What a feature cache must hold beyond the features, for the run's objectives and labels."""
    final = any(branch.objective.needs_target for branch in objectives_of(config))
    return ("final",) * final + ("argmax",) * (config.objective.labels == "target")


def plugin_text(plugin: str | None) -> str:
    """The text of a plugin's file, as part of the objective; empty for a module, whose version is not looked into."""
    return Path(plugin).read_text(encoding="utf-8") if plugin is not None and plugin.endswith(".py") else ""


def _import(plugin: str) -> None:
    """Import a module by name, or a file by path, for what it registers."""
    path = Path(plugin)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(f"specauf_plugin_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            # Dataclasses look themselves up in sys.modules.
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        elif plugin.startswith("."):  # a relative import, of no package
            raise ImportError("the name of a file ends in .py")
        else:
            importlib.import_module(plugin)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"objective.plugin: cannot import {plugin!r}: {error}") from None
