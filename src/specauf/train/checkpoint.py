"""A run's state on disk: the drafter as engines load it, the optimizer's moments, and the run's counters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from specauf.config import RunConfig, digest, dump, load
from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.files import atomic_dir, atomic_file, recover_dir, save_tensors
from specauf.strict import UserError, differences, to_dict

if TYPE_CHECKING:
    from specauf.train.loop import Trainer


FREE = {"objective": ("logits_rows",), "train": ("save_every", "eval_every", "common_every")}
"""Settings that may change while a run is trained: they change no weight, but for rounding."""
DIVIDED = ("max_steps", "minutes", "shard_target", "accumulation")
"""Settings of `train` that `resume` looks at in other ways, or not at all."""


def identity(trainer: Trainer) -> dict[str, str]:
    """Digests of what must not change when a run is resumed.

    Free are where it is written, how long it is, `FREE`, whether the target is sharded, and how the micro-batches of a step
    are divided between accumulation and processes.
    """
    config, drafter = trainer.config, trainer.drafter.config
    meta, settled = trainer.batches.dataset.meta, _settled(config)
    parts = {
        "target": trainer.target.fingerprint(),
        "data": [dump(config.data), meta.get("key"), trainer.batches.examples],  # a path's data may be made anew
        "features": list(settled["features"].values()),
        "drafter": drafter.to_json() | {"specauf": drafter.extra.get("init_from", {}).get("weights")},
        "drafter.init_layers": config.drafter.init_layers,
        "objective": [settled["objective"], trainer.plugin],
        "train": settled["train"],
        "train.accumulation times processes": config.train.accumulation * trainer.ranks.world,
    }
    return {name: digest(part) for name, part in parts.items()}


def provenance_of(trainer: Trainer) -> dict[str, Any]:
    """What a drafter's `config.json` records of its training, under `specauf`."""
    config = trainer.config
    said: list[dict[str, Any]] = [
        {"objective": b.objective.name, "gamma": b.objective.gamma, "options": dict(b.objective.options)}
        for b in trainer.branches
    ]
    if len(said) > 1:
        said[0]["final"] = {**said[1], "support": trainer.branches[1].support}
        said[0]["variant"] = config.objective.variant
        said[0]["lambda_base"] = [config.objective.lambda_base_start, config.objective.lambda_base_decay_ratio]
    return {
        **said[0],
        "reduction": config.objective.reduction,
        "labels": config.objective.labels,
        "target": trainer.target.source,
        "target_dtype": config.target.dtype,
        "target_fingerprint": trainer.target.fingerprint(),
        "template_hash": trainer.batches.dataset.meta.get("template_hash"),
        "enable_thinking": config.data.enable_thinking,
        "data": _data_of(trainer),
        "steps": trainer.done,
        "max_steps": trainer.max_steps,
        "epochs": round(trainer.epochs, 2),
    }


def _data_of(trainer: Trainer) -> dict[str, Any]:
    """What the drafter was trained on.

    `kept_out` are the tasks whose prompts it never saw, and `split` is what held conversations out; None when not known.
    `rollouts` says how answers were drawn, and by which target (fingerprint); None when they are a corpus's own.
    """
    dataset, config, used = trainer.batches.dataset, trainer.config, trainer.batches.examples
    meta, rollouts = dataset.meta, dataset.meta.get("rollout")
    return {
        "path": config.data.path,
        "conversations": len(set(dataset.conversations[:used])),
        "supervised_tokens": int(dataset.mask[: dataset.offsets[used]].sum()),
        "max_length": config.data.max_length,
        "kept_out": meta.get("kept_out"),
        "split": meta.get("split"),
        "rollouts": rollouts
        and {
            "samples": rollouts["samples"],
            "temperature": rollouts["sampling"]["temperature"],
            "target": rollouts["target"],
        },
    }


def save(trainer: Trainer, out: Path) -> None:
    """Replace `out/checkpoint` as a whole: a kill at any moment leaves the old or the new one, where `resume` finds it."""
    with atomic_dir(out / "checkpoint") as directory:
        save_drafter(trainer.drafter, directory, provenance_of(trainer))
        names = {id(p): name for name, p in trainer.drafter.named_parameters()}
        moments = {
            f"{names[id(p)]}::{key}": value
            for p, state in trainer.optimizer.state.items()
            for key, value in state.items()
        }
        save_tensors(moments, directory / "optimizer.safetensors")
        state = {
            "step": trainer.done,
            "max_steps": trainer.max_steps,
            "seconds": trainer.seconds,
            "survival": trainer.survival,
            "identity": identity(trainer),
        }
        (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def resume(trainer: Trainer, out: Path) -> bool:
    """Continue from `out/checkpoint` if there is one; the main rank cuts the log back to the checkpoint's step.

    Raises `UserError` when the checkpoint was made with another target, data, drafter, objective, optimizer configuration
    or horizon, is damaged, or is no checkpoint of a run.
    """
    directory = out / "checkpoint"
    recover_dir(directory)
    if not (directory / "state.json").is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"{directory} has no state.json to resume from, and training would replace it: use --fresh")
        return False
    try:
        state = json.loads((directory / "state.json").read_text())
        before, done, horizon = dict(state["identity"]), int(state["step"]), state["max_steps"]
        moments = load_file(directory / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{directory} is damaged ({error}): restore its files, or train with --fresh") from None
    now = identity(trainer)
    if changed := [name for name, part in now.items() if before.get(name) != part]:
        raise _other(directory, ", ".join(changed), changed_settings(out, trainer.config))
    wanted = trainer.max_steps
    if wanted is not None and wanted != horizon:
        raise UserError(
            f"{directory} follows a learning rate that ends at step {horizon}, not {wanted}: go on with "
            f"train.max_steps={horizon}, or begin another `out` with drafter.init_from={directory}"
        )
    trainer.drafter.load_state_dict(load_drafter(directory).state_dict())
    named = dict(trainer.drafter.named_parameters())
    for key, value in moments.items():
        name, _, field = key.partition("::")
        trainer.optimizer.state[named[name]][field] = value.to(named[name].device)
    trainer.done, trainer.max_steps, trainer.seconds = done, horizon, state.get("seconds", 0.0)
    trainer.survival = state.get("survival", {})
    log = out / "log.jsonl"
    if log.is_file() and trainer.ranks.main:
        # A line at a time: a long run's log may have gigabytes.
        with log.open("rb") as lines, atomic_file(log) as kept, kept.open("wb") as file:
            file.writelines(line for line in lines if _step(line) <= done)
    return True


def require_same_recipe(out: Path, config: RunConfig) -> None:
    """Raise `UserError` when `resume` would refuse for what the recipe says, before anything is computed for it."""
    if (out / "checkpoint" / "state.json").is_file() and (told := changed_settings(out, config)):
        raise _other(out / "checkpoint", "recipe", told)


def changed_settings(out: Path, config: RunConfig) -> list[str]:
    """What differs from the run in `out`, of the sections that a resumed run must have word by word."""
    if not (path := out / "config.yaml").is_file():
        return []
    before = _settled(load(path))
    return [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(before, _settled(config))]


def _settled(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Those sections, without the settings that are free or compared in other ways."""
    free = {**FREE, "train": (*FREE["train"], *DIVIDED)}
    sections = {name: to_dict(getattr(run, name)) for name in ("data", "objective", "train")}
    return {"features": {"cache": run.features.cache, "dtype": run.features.cache and run.features.dtype}} | {
        name: {key: value for key, value in section.items() if key not in free.get(name, ())}
        for name, section in sections.items()
    }


def _other(directory: Path, what: str, told: Sequence[str]) -> UserError:
    settings = f" ({'; '.join(told)})" if told else ""
    return UserError(
        f"{directory} was trained with another {what}{settings}: resume with the same recipe, files and version, or choose "
        "another `out`"
    )


def _step(line: bytes) -> float:
    """The step that a line of the log is of; infinity for a line that a kill cut short, or that is not of the log."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
