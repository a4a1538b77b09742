"""The training stage: data and features once, then every cell that no other process is training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from specauf.config import RunConfig, digest
from specauf.console import Console
from specauf.data.dataset import Prepared
from specauf.data.features import FeatureCache
from specauf.data.records import corpus_files
from specauf.data.rollouts import rollout_meta
from specauf.drafter.checkpoint import load_drafter, weights_hash
from specauf.files import at_home, atomic_write_text, read_json
from specauf.locks import claim, turn
from specauf.run import (
    draft_vocabulary,
    feature_cache,
    geometry_of,
    heldout_evaluator,
    new_drafter,
    open_run,
    prepare_data,
    require_trainable,
    step_note,
)
from specauf.strict import ConfigError, UserError, to_dict
from specauf.study.cells import finished, identity, progress
from specauf.study.recipe import Cell, Study
from specauf.target import Target
from specauf.train.batches import Batches
from specauf.train.calibration import calibrate
from specauf.train.loop import Trainer
from specauf.train.objectives import stored_extras

CALIBRATION = "calibration.json"


@dataclass
class Corpus:
    """Prepared data and feature caches, opened once per process and written once per machine."""

    study: Study
    target: Target
    console: Console
    _prepared: dict[str, Prepared] = field(default_factory=dict)
    _features: dict[str, FeatureCache | None] = field(default_factory=dict)

    def prepared(self, config: RunConfig) -> Prepared:
        key = digest(to_dict(config.data))
        if key not in self._prepared:
            with self._turn("data"):
                self._prepared[key] = prepare_data(config, self.target)
            self._require_kept_out(self._prepared[key], config)
            if not self._prepared[key].reused:
                for line in self._prepared[key].ledger.lines():
                    self.console.say("  " + line)
        return self._prepared[key]

    def _require_kept_out(self, found: Prepared, config: RunConfig) -> None:
        """Rollouts settled what was kept out when they were made, but no cell may train on what all are measured by."""
        meta, base = found.train.meta, self.study.base
        if "rollout" not in meta or config.data == base.data:
            return
        ours = self.prepared(base).train.meta
        seen = [label for label in ours["kept_out"] if label not in (meta["kept_out"] or ())]
        if seen and meta["excluded_prompts"] != ours["excluded_prompts"]:
            raise UserError(
                f"data.path: the prompts of {', '.join(seen)} were not kept out of {config.data.path}, and the study measures "
                "by them: make the rollouts again with its eval.tasks (--set eval.tasks=...)"
            )
        measured = "heldout" in base.eval.tasks or config.train.eval_every
        if measured and meta.get("split") not in (None, ours["split"]):
            raise UserError(
                f"data.path: {config.data.path} holds out other conversations (data.seed, data.heldout) than the study, which "
                f"measures by its own: make the rollouts again with {ours['split']}, here they have {meta['split']}"
            )

    def features(self, config: RunConfig) -> FeatureCache | None:
        """The cache that the run asks for; cells with the same data and taps share one."""
        if not config.features.cache:
            return None
        prepared, drafter = self.prepared(config), config.drafter
        key = digest([to_dict(config.data), to_dict(config.features), drafter.target_layer_ids, drafter.num_taps])
        if key not in self._features:
            with self._turn("features"), self.console.progress("features", float(len(prepared.train.ids))) as advance:
                self._features[key] = feature_cache(config, self.target, prepared, on_progress=advance)
        return self._features[key]

    def _turn(self, what: str) -> AbstractContextManager[None]:
        """A lock: two processes would write the same files; the second finds them instead."""
        told = f"another process is preparing the {what}: waiting for it"
        return turn(self.study.out / what, lambda: self.console.say(told))


def check_source(study: Study, cell: Cell) -> None:
    """Raise `ConfigError` when a trained cell was made from other weights than now stand where it began.

    That is a cell that was retrained since, or a drafter (`drafter.init_from`) that another one has replaced.
    """
    method, path = study.methods[cell.method], cell.out / "checkpoint" / "config.json"
    if not path.is_file():
        return
    calibrated = _calibrations(study).get(cell.method, {})
    made_from = read_json(path, f"delete {cell.out} to train it again")["specauf"].get("init_from", {}).get("weights")
    for source, seed, then in (
        (method.start_from, cell.seed, made_from),
        (method.minutes_as, calibrated.get("seed"), calibrated.get("weights_of_other")),
    ):
        if source is None or then is None:
            continue
        there = study.cell_dir(source, seed)
        if finished(there) and weights_hash(there / "checkpoint") != then:
            raise ConfigError(
                f"{cell.out} was made from an earlier training of {there.name}: delete {cell.out} to train it again"
            )
    began = cell.config.drafter.init_from if method.start_from is None else None
    if began and (at_home(began) / "model.safetensors").is_file() and weights_hash(at_home(began)) != made_from:
        raise ConfigError(
            f"{cell.out} began with other weights than {began} holds now: put those back, or delete {cell.out}"
        )


def train_cells(
    study: Study, target: Target, corpus: Corpus, cells: Sequence[Cell], console: Console
) -> tuple[list[str], list[str]]:
    """Train every cell that is neither finished nor another process's.

    Returns the names of the cells that are not trained, and of those among them whose training failed. A cell whose data is
    not made yet, or that needs another cell that is not trained yet, is left out. Goes over the list again as long as it
    tried something, since another process may have died meanwhile.
    """
    waiting = {cell.name: why for cell in cells if (why := _awaits(study, cell))}
    for cell in cells:  # all of them first: an impossible objective is refused before an hour is spent
        if cell.name not in waiting and not finished(cell.out):
            try:
                stored_extras(cell.config)
                geometry_of(cell.config, target)
            except UserError as error:
                raise ConfigError(f"methods.{cell.method}: {error}") from None
    for name, why in waiting.items():
        console.say(f"{name} waits: {why}")
    left, failed = list[str](), list[str]()
    working = True
    while working:
        working, left = False, []
        for cell in cells:
            if finished(cell.out):
                continue
            early = not all(finished(study.cell_dir(other, cell.seed)) for other in study.needs(cell.method))
            if cell.name in (*waiting, *failed) or early:
                left.append(cell.name)
                continue
            with claim(cell.out) as mine:
                if not mine:
                    left.append(cell.name)
                elif not finished(cell.out):  # another process may have finished it meanwhile
                    try:
                        _train(study, target, corpus, cell, console)
                    except UserError as error:  # one that diverges, say: the others are worth training all the same
                        failed.append(cell.name)
                        console.say(f"{cell.name} failed: {error}")
                    working = True
    return left, failed


def _awaits(study: Study, cell: Cell) -> str | None:
    """Why a method's own data cannot be read yet, None if it can: it is made by hand and perhaps later."""
    path = cell.config.data.path
    if path in (study.base.data.path, "sharegpt") or finished(cell.out):
        return None
    try:
        rollout_meta(path) or corpus_files(at_home(path))
    except UserError as error:
        return f"data.path: {error}"
    return None


def _train(study: Study, target: Target, corpus: Corpus, cell: Cell, console: Console) -> None:
    config = cell.config
    horizon = progress(cell.out)[1] or steps_of(study, target, corpus, cell, console)
    prepared = corpus.prepared(config)
    require_trainable(config, target, prepared)
    trainer = open_run(config, target, prepared, corpus.features(config), horizon=horizon)
    evaluate = None
    if config.train.eval_every:  # the held-out recordings are the study's: every cell replays the same
        with turn(
            study.out / "heldout", lambda: console.say("another process records the held-out prompts: waiting for it")
        ):
            evaluate = heldout_evaluator(dataclasses.replace(config, out=str(study.out)), target)
    steps = trainer.max_steps or 0
    with console.progress(f"training {cell.name}, {steps} steps", steps, trainer.done) as advance:
        trainer.run(on_step=lambda row: advance(1, step_note(row)), evaluate=evaluate)


def steps_of(study: Study, target: Target, corpus: Corpus, cell: Cell, console: Console) -> int:
    """The cell's horizon: the recipe's, or as many steps as fit in another method's training time.

    The two are calibrated once, with alternating steps at the other's final weights, since the time of a truncating
    objective's step grows with tau. `calibration.json` keeps the result; the report has the seconds that both cells really
    took.
    """
    method = study.methods[cell.method]
    if method.minutes_as is None:
        assert cell.config.train.max_steps is not None
        return cell.config.train.max_steps
    with turn(study.out / "calibration", lambda: console.say("another process is calibrating: waiting for it")):
        known, other = _calibrations(study).get(cell.method, {}), study.config(method.minutes_as, cell.seed)
        there = study.cell_dir(method.minutes_as, cell.seed)
        of = digest([identity(study.config(name, 0)) for name in (cell.method, method.minutes_as)])
        before = known.get("seed") == cell.seed and known["weights_of_other"] != weights_hash(there / "checkpoint")
        if known.get("of") != of or before:
            console.say(f"calibrating {cell.method} against {method.minutes_as}: alternating steps, undone afterwards")
            trainers = [_bare_trainer(target, corpus, config) for config in (cell.config, other)]
            mine, theirs = calibrate(trainers, steps=10, weights=load_drafter(there / "checkpoint").state_dict())
            steps = progress(there)[0]
            known = {
                "as": method.minutes_as,
                "of": of,
                "seed": cell.seed,
                "weights_of_other": weights_hash(there / "checkpoint"),
                "seconds_per_step": mine,
                "seconds_per_step_of_other": theirs,
                "steps_of_other": steps,
                "max_steps": max(1, round(steps * theirs / mine)),
            }
            found = _calibrations(study) | {cell.method: known}
            atomic_write_text(study.out / CALIBRATION, json.dumps(found, indent=2) + "\n")
    return int(known["max_steps"])


def _calibrations(study: Study) -> dict[str, Any]:
    path = study.out / CALIBRATION
    return read_json(path, "delete it, and steps are timed again") if path.is_file() else {}


def _bare_trainer(target: Target, corpus: Corpus, config: RunConfig) -> Trainer:
    """A trainer that writes nothing."""
    data, drafter = corpus.prepared(config).train, new_drafter(config, target)
    draft_vocabulary(drafter, target, data)
    return Trainer(config, drafter, target, Batches(data, corpus.features(config), config.train, stored_extras(config)))
