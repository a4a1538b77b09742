"""A training run from its configuration: the pieces that `train`, `eval` and `demo` put together the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specauf import assets, provenance
from specauf.bench.runner import measure, recorded
from specauf.bench.tasks import load_task, render_prompts, task_texts
from specauf.config import ConfigError, RunConfig, UserError, digest, dump, to_dict
from specauf.data.dataset import Prepared, prepare
from specauf.data.features import FeatureCache, build_features
from specauf.decode.propose import DrafterProposer
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.files import atomic_write_text
from specauf.target import Target
from specauf.train import checkpoint
from specauf.train.batches import Batches
from specauf.train.loop import Trainer, calibrate

Tick = Callable[[int], None]


def corpus_path(config: RunConfig) -> Path:
    """The corpus on disk; `sharegpt` is the embedded one."""
    if config.data.path == "sharegpt":
        return assets.sharegpt()
    path = Path(config.data.path).expanduser()
    if not path.is_file():
        raise UserError(f"data.path: no such file: {path}. Give a JSON, JSONL or parquet file, or 'sharegpt'")
    return path


def data_dir(config: RunConfig) -> Path:
    """Where prepared data lives: in the cache, shared by runs with the same data section."""
    key = {"data": to_dict(config.data), "target": config.target.path, "tasks": list(config.eval.tasks)}
    return assets.cache_dir() / "prepared" / digest(key)


def prepare_data(config: RunConfig, target: Target) -> Prepared:
    """Tokens, held-out prompts and the ledger, reused when nothing changed."""
    excluded = task_texts(config.eval.tasks, config.eval.tasks_dir)
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer")
    return prepare(
        config.data, target.tokenizer, data_dir(config), source=corpus_path(config), excluded_prompts=excluded
    )


def new_drafter(config: RunConfig, target: Target) -> DFlash:
    """A drafter that fits the target, with initial weights that depend on train.seed alone."""
    wanted = config.drafter
    geometry = DFlashConfig.for_target(
        target.config,
        block_size=wanted.block_size,
        num_hidden_layers=wanted.num_hidden_layers,
        mask_token_id=target.mask_token_id(wanted.mask_token_id),
        target_layer_ids=wanted.target_layer_ids,
        num_taps=wanted.num_taps,
        intermediate_size=wanted.intermediate_size,
    )
    return DFlash(geometry, seed=config.train.seed).to(target.device)


def require_unused_mask(prepared: Prepared, mask_token_id: int) -> None:
    """MASK must be a row that text never uses, or the drafter learns to read it as that text."""
    if bool((prepared.train.ids == mask_token_id).any()):
        raise ConfigError(
            f"mask_token_id {mask_token_id} occurs in the training data: set drafter.mask_token_id to an unused row"
        )


@dataclass
class Run:
    """One training run, ready to go on from wherever it stands."""

    config: RunConfig
    target: Target
    prepared: Prepared
    features: FeatureCache | None
    trainer: Trainer


def open_run(
    config: RunConfig, target: Target, prepared: Prepared, features: FeatureCache | None, *, resume: bool = True
) -> Run:
    """Build the trainer and continue from `config.out` if a checkpoint is there. Writes config.yaml and run.json."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    drafter = new_drafter(config, target)
    require_unused_mask(prepared, drafter.config.mask_token_id)
    trainer = Trainer(config, drafter, target, Batches(prepared.train, features, config.train), out)
    if resume:
        checkpoint.resume(trainer, out)
    atomic_write_text(out / "config.yaml", dump(config))
    provenance.write(
        out / "run.json",
        {"config_hash": digest(config), "target": target.fingerprint(), "data": prepared.train.meta["key"]},
    )
    return Run(config, target, prepared, features, trainer)


def feature_cache(
    config: RunConfig, target: Target, prepared: Prepared, examples: int | None = None, on_progress: Tick | None = None
) -> FeatureCache | None:
    """The cache, when the recipe asks for one."""
    if not config.features.cache:
        return None
    ids = new_drafter(config, target).config.target_layer_ids
    where = assets.cache_dir() / "features"
    return build_features(
        target, prepared.train, where, ids, config.features, examples=examples, on_progress=on_progress
    )


def set_horizon(trainer: Trainer) -> str:
    """Turn train.minutes into `max_steps`, once; a resumed run keeps the horizon it has. Returns what was decided."""
    if trainer.max_steps is None:
        minutes = trainer.config.train.minutes
        if minutes is None:
            raise ConfigError("set train.max_steps or train.minutes: the learning-rate schedule needs a horizon")
        seconds = calibrate([trainer])[0]
        trainer.max_steps = max(1, int(minutes * 60 / seconds))
        return f"{minutes:g} minutes at {seconds:.2f} s a step: max_steps {trainer.max_steps}, frozen"
    return f"max_steps {trainer.max_steps}"


def heldout_evaluator(config: RunConfig, target: Target, prepared: Prepared) -> Callable[[DFlash], dict[str, float]]:
    """Replay tau on held-out prompts, for the training log."""
    where = Path(config.out) / "trajectories"
    prompts = render_prompts(
        target, load_task("heldout", data_dir=data_dir(config))[: config.eval.prompts], config.data.enable_thinking
    )
    tasks = {"heldout": recorded(target, "Held-out chat", prompts, config.eval, config.drafter.block_size, where)}

    def evaluate(drafter: DFlash) -> dict[str, float]:
        found, _ = measure(target, {"drafter": DrafterProposer(drafter, target)}, tasks)
        drafter.train()
        return {"replay_tau": found["heldout"]["methods"]["drafter"]["tau"]}

    return evaluate


def training_log(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The few settings a reader of a report looks for first."""
    return {
        "block size": config.drafter.block_size,
        "draft layers": config.drafter.num_hidden_layers,
        "conversations per step": config.train.batch_size * config.train.accumulation,
        "anchors per conversation": config.train.num_anchors,
        "learning rate": config.train.lr,
        "reduction": config.objective.reduction,
        "max length": config.data.max_length,
        "new tokens": config.eval.max_new_tokens,
        "temperature": config.eval.sampling.temperature,
        "seed": config.train.seed,
    }
