"""A study's results.json: everything that its report says, as numbers and words."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from specauf import provenance
from specauf.bench.compare import check_row
from specauf.bench.statistics import MARGIN
from specauf.bench.tasks import describe_task
from specauf.config import LOOKUP, RunConfig, digest
from specauf.data.dataset import Prepared
from specauf.files import read_rows
from specauf.run import settings_of
from specauf.strict import UserError, to_dict
from specauf.study.cells import progress
from specauf.study.claims import claims
from specauf.study.measuring import read_live
from specauf.study.recipe import Study
from specauf.study.recordings import chosen, describe
from specauf.study.records import subjects
from specauf.study.scores import Measured, comparisons, methods_of, scores
from specauf.study.training_log import at_common_steps, summary, thinned
from specauf.target import Target
from specauf.train.objectives import objectives_of


def collect(study: Study, target: Target, prepared: Prepared) -> dict[str, Any]:
    """The dict that the report reads. It names whatever has not run; nothing is left out."""
    box = provenance.for_report(digest(_recipe(study)))
    measured = Measured(study, target)
    checks, unchecked = _checks(study, target)
    results: dict[str, Any] = {
        "kind": "study",
        "title": study.title,
        "created": box["created"],
        "command": shlex.join(["specauf", *sys.argv[1:]]),
        "provenance": {
            **box,
            "target": {"name": target.display_name, "fingerprint": target.fingerprint()},
            "data": {"name": study.base.data.path, "fingerprint": prepared.train.meta["key"]},
            "config": _recipe(study),
        },
        "ledger": prepared.ledger.to_dict(),
        "settings": _settings(study),
        "margin": MARGIN,
        "primary": "macro-average tau at T=0",
        "tasks": {name: _task(study, target, name) for name in study.base.eval.tasks},
        "methods": [_method(study, name) for name in _used(study)] + _lookups(study),
        "training": {name: _training(study, name) for name in _used(study)},
        "parts": [_part(study, measured, key) for key in study.parts],
        "scores": scores(measured),
        "comparisons": comparisons(measured),
        "checks": checks,
        "unchecked": unchecked,
    }
    results["claims"] = claims(results)
    return results


def _recipe(study: Study) -> dict[str, Any]:
    base = to_dict(study.base)
    base.pop("out")
    methods = {name: to_dict(method) for name, method in study.methods.items()}
    parts = {key: to_dict(part) for key, part in study.parts.items()}
    return {"title": study.title, "base": base, "methods": methods, "parts": parts, "live": to_dict(study.live)}


def _settings(study: Study) -> dict[str, Any]:
    found = settings_of(study.base)
    for own in ("seed", "temperature", "new tokens", "reduction"):  # a part or a method decides these
        found.pop(own, None)
    return {**found, "steps": study.base.train.max_steps, "conversations": study.base.data.max_conversations}


def _used(study: Study) -> list[str]:
    """Methods that some part names, and those that they need, in the order of the recipe."""
    named = {m for part in study.parts.values() for m in part.methods}
    named |= {source for m in named for source in study.needs(m)}
    return [name for name in study.methods if name in named]


def _task(study: Study, target: Target, name: str) -> dict[str, Any]:
    known = describe_task(name, tasks_dir=study.base.eval.tasks_dir)
    shares, clusters = {}, list[int]()
    for t in sorted({t for part in study.parts.values() for t in part.temperatures}):
        wanted = [study.recording(key, t) for key, part in study.parts.items() if t in part.temperatures]
        about = next(filter(None, (describe(study, name, w, target) for w in wanted)), None)
        if about is not None:
            shares[f"{t:g}"] = about["repeated_share"]
            counts = [w.prompts for w in wanted]
            used = chosen(about["clusters"], None if None in counts else max(c for c in counts if c is not None))
            clusters = max(clusters, [about["clusters"][i] for i in used], key=len)
    return {
        "label": known.label,
        "family": known.family,
        "source": known.source,
        "licence": known.licence,
        "prompts": len(clusters),
        "clusters": len(set(clusters)),
        "repeated_share": shares,
        **({"note": known.note} if known.note else {}),
    }


def _method(study: Study, name: str) -> dict[str, Any]:
    method, seeds = study.methods[name], _seeds(study, name)
    config = study.config(name, seeds[0])
    return {
        "name": name,
        "label": method.label,
        "kind": config.drafter.kind,
        "block_size": config.drafter.block_size,
        "objective": _objective(config),
        "lr": config.train.lr,
        "note": _note(study, name),
        "cells": [_cell(study, name, seed) for seed in seeds],
    }


def _objective(config: RunConfig) -> dict[str, Any]:
    """The objective with every default filled in; as in the recipe while it cannot be built (its rollouts are not made)."""
    wanted = config.objective
    try:
        found = objectives_of(config)[0].objective
        gamma, options = found.gamma, dict(found.options)
    except UserError:
        gamma, options = wanted.gamma, dict(wanted.options)
    name = wanted.variant or wanted.name
    return {
        "name": name,
        "gamma": gamma,
        "reduction": wanted.reduction,
        "labels": wanted.labels,
        "options": options,
    }


def _note(study: Study, name: str) -> str:
    method = study.methods[name]
    said = [method.note] if method.note else []
    if method.start_from:
        said.append(f"starts from {study.methods[method.start_from].label}")
    if method.minutes_as:
        said.append(
            f"as many steps as fit in the training time of {study.methods[method.minutes_as].label}, calibrated"
        )
    return "; ".join(said)


def _seeds(study: Study, name: str) -> list[int]:
    users = [p for p in study.parts.values() if any(name in (m, *study.needs(m)) for m in p.methods)]
    return sorted({seed for part in users for seed in part.seeds})


def _cell(study: Study, name: str, seed: int) -> dict[str, Any]:
    out = study.cell_dir(name, seed)
    done, horizon = progress(out)
    log = read_rows(out / "log.jsonl")
    state = "done" if horizon is not None and done >= horizon else "training" if log else "missing"
    wanted = horizon or study.config(name, seed).train.max_steps
    where = str((out / "checkpoint").relative_to(study.out)) if horizon is not None else None
    return {"seed": seed, "state": state, "max_steps": wanted, "checkpoint": where, **summary(log)}


def _lookups(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "name": study.lookup(size),
            "label": "Prompt lookup" if study.lookup(size) == LOOKUP else f"Prompt lookup, B={size}",
            "kind": "lookup",
            "block_size": size,
            "objective": None,
            "lr": None,
            "note": "no parameters",
            "cells": [],
        }
        for size in study.block_sizes()
    ]


def _training(study: Study, name: str) -> dict[str, list[dict[str, Any]]]:
    logs = {seed: read_rows(study.cell_dir(name, seed) / "log.jsonl") for seed in _seeds(study, name)}
    every = {seed: study.config(name, seed).train.common_every for seed in logs}
    return {str(seed): thinned(at_common_steps(log, every[seed])) for seed, log in logs.items() if log}


def _part(study: Study, measured: Measured, key: str) -> dict[str, Any]:
    part = study.parts[key]
    missing = [
        f"{method}-s{seed}"
        for method in part.methods
        for seed in part.seeds
        if not all(measured.of(key, t, method, [seed]) for t in part.temperatures)
    ]
    return {
        "key": key,
        "title": part.title,
        "baseline": part.baseline,
        "methods": methods_of(study, key),
        "seeds": list(part.seeds),
        "temperatures": [f"{t:g}" for t in part.temperatures],
        "prompts": part.prompts,
        "max_new_tokens": part.max_new_tokens,
        "budget": part.budget,
        "missing": missing,
    }


def _checks(study: Study, target: Target) -> tuple[list[dict[str, Any]], list[str]]:
    """For the primary part's methods: live decoding of a sample against replay, task by task; and those not made yet."""
    key, part = next(iter(study.parts.items()))
    found, unchecked = [], []
    for subject in subjects(study, key, part.seeds[:1]):
        for task in study.base.eval.tasks if study.live.prompts else ():
            about = describe(study, task, study.live_recording(), target)
            if about is None or (check := read_live(study, subject, task, about)) is None:
                unchecked.append(f"{subject.name} on {task}")
                continue
            told = {key: check[key] for key in ("prompts", "rounds", "problems", "near_ties")}
            found.append(check_row(f"{subject.name}, {about['label']}", **told))
    return found, unchecked
