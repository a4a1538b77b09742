"""A training run from its configuration: the pieces that `train`, `eval` and `demo` put together the same way."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specauf import assets, provenance
from specauf.bench.runner import measure, recorded
from specauf.bench.server import require_target
from specauf.bench.tasks import describe_task, load_task, render_prompts, task_texts
from specauf.config import RunConfig, digest, dump
from specauf.data.dataset import Prepared, Prompts, TokenDataset, prepare, read_prompts
from specauf.data.features import FeatureCache, build_features
from specauf.data.records import corpus_files
from specauf.data.rollouts import RolloutConfig, open_rollouts, rollout_meta
from specauf.decode.generate import undecodable
from specauf.decode.propose import DrafterProposer
from specauf.decode.replay import Dialogue, check_reach
from specauf.decode.roller import Roller
from specauf.decode.rollout import Advance, begin_all, rollout
from specauf.decode.server import Server
from specauf.drafter.checkpoint import build_drafter, load_drafter, weights_hash
from specauf.drafter.config import DFlashConfig, DominoHead
from specauf.drafter.dflash import DFlash
from specauf.drafter.vocabulary import coverage, keep_tokens, most_frequent
from specauf.drafter.warm import copy_layers, start_from
from specauf.files import at_home, atomic_write_text, make_dir, recover_dir, set_aside
from specauf.strict import ConfigError, UserError, counted, to_dict
from specauf.target import Target
from specauf.train import checkpoint
from specauf.train.batches import Batches, require_batch
from specauf.train.calibration import calibrate
from specauf.train.distributed import Ranks
from specauf.train.loop import Trainer
from specauf.train.objectives import stored_extras

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def corpus_path(config: RunConfig) -> Path:
    """The corpus on disk; `sharegpt` is the embedded one."""
    if config.data.path == "sharegpt":
        return assets.sharegpt()
    path = at_home(config.data.path)
    if rollout_meta(config.data.path):
        raise UserError(f"data.path: {path} holds rollouts already: give the corpus whose prompts are to be answered")
    try:
        corpus_files(path)
    except UserError as error:
        raise UserError(
            f"data.path: {error}. Give JSON, JSONL, parquet, a directory of them, rollouts, or 'sharegpt'"
        ) from None
    return path


def data_dir(config: RunConfig) -> Path:
    """Where prepared data lives: the directory of rollouts, or one in the cache, shared by runs with the same data section.

    A file is identified by its absolute path, not as the recipe spells it: another project's `chats.jsonl` is another file.
    """
    if rollout_meta(config.data.path):
        return at_home(config.data.path)

    def place(path: str | None) -> str | None:
        return os.path.realpath(at_home(path)) if path and at_home(path).exists() else path

    data = to_dict(config.data) | {"path": place(config.data.path)}
    tasks = [list(config.eval.tasks), place(config.eval.tasks_dir)]
    key = {"data": data, "target": place(config.target.path), "tasks": tasks}
    return assets.cache_dir() / "prepared" / digest(key)


def prepare_data(config: RunConfig, target: Target) -> Prepared:
    """Tokens, held-out prompts and the ledger, reused when nothing changed. Rollouts are read as they are."""
    if not rollout_meta(config.data.path):
        return prepare_corpus(config, target.require_tokenizer())
    prepared = open_rollouts(config.data, target)
    kept_out = prepared.train.meta.get("kept_out")
    if exposed := [label for label in _kept_out(config) if kept_out is not None and label not in kept_out]:
        log.warning(
            "%s: the prompts of %s were not kept out of these rollouts: what trains on them is not measured fairly there",
            *(config.data.path, ", ".join(exposed)),
        )
    return prepared


def prepare_corpus(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`prepare_data` for a corpus, which needs the tokenizer alone."""
    return prepare(config.data, tokenizer, data_dir(config), **_corpus(config))


def _corpus(config: RunConfig) -> dict[str, Any]:
    return {
        "source": corpus_path(config),
        "excluded_prompts": task_texts(config.eval.tasks, config.eval.tasks_dir),
        "kept_out": _kept_out(config),
    }


def _kept_out(config: RunConfig) -> list[str]:
    """Labels of the tasks whose prompts are kept out of training; the split already keeps held-out conversations out."""
    return [
        describe_task(name, tasks_dir=config.eval.tasks_dir).label for name in config.eval.tasks if name != "heldout"
    ]


def require_heldout(config: RunConfig, prepared: Prepared) -> None:
    """Raise `UserError`, before an hour of features, when training would replay held-out prompts and there are none."""
    if not config.train.eval_every or prepared.heldout:
        return
    raise UserError(
        f"train.eval_every={config.train.eval_every} replays held-out prompts, and there are none "
        f"({told_heldout(prepared)}): set train.eval_every=0, or prepare a corpus with a larger data.heldout"
    )


def told_heldout(prepared: Prepared) -> str:
    """What became of the held-out conversations, in words."""
    return ", ".join(counted(n, what.replace("_", " ")) for what, n in prepared.train.meta["heldout"].items())


def rollout_prompts(config: RunConfig, target: Target) -> Prompts:
    """The corpus as far as `make_rollouts` reads it. Raises `UserError` when data.path is no corpus."""
    return read_prompts(config.data, target.require_tokenizer(), **_corpus(config))


def make_rollouts(
    config: RunConfig,
    target: Target,
    source: Prompts,
    plan: RolloutConfig,
    out: Path,
    drafter: Path | None = None,
    on_progress: Advance = lambda samples, tokens, seconds: None,
    server: Server | None = None,
) -> TokenDataset:
    """The target's own answers to the training prompts of `source`.

    A `drafter` speeds up decoding, which stays exact. A `server` decodes in the target's place, if it serves the target.
    """
    if server and drafter:
        raise ConfigError("--drafter is for decoding here: start the server with it")
    if plan.sampling.proposal == "sampled" and not drafter:
        raise ConfigError("--proposal sampled draws from a drafter, and none is given: give --drafter, or leave it out")
    proposer = DrafterProposer(load_drafter(drafter).to(target.embed_weight), target) if drafter else None
    roller = Roller(target, config.data, plan, target.mask_token_id(config.drafter.mask_token_id), proposer, server)
    if server:
        begun = [samples[0] for _, samples in islice(begin_all(roller, source.train), 64) if samples]
        require_target(server, target, [sample.pending for sample in begun[:4]])
    drafted_by = weights_hash(drafter) if drafter else None
    return rollout(roller, source, out, drafter=drafted_by, on_progress=on_progress)


def geometry_of(config: RunConfig, target: Target) -> DFlashConfig:
    """The geometry of the recipe's drafter for this target."""
    wanted = config.drafter
    return DFlashConfig.for_target(
        target.config,
        block_size=wanted.block_size,
        num_hidden_layers=wanted.num_hidden_layers,
        mask_token_id=target.mask_token_id(wanted.mask_token_id),
        target_layer_ids=wanted.target_layer_ids,
        num_taps=wanted.num_taps,
        intermediate_size=wanted.intermediate_size,
        domino=_head(config, target),
        draft_vocab_size=wanted.draft_vocab_size,
    )


def new_drafter(config: RunConfig, target: Target) -> DFlash:
    """A drafter that fits the target. Its initial weights come from drafter.init_from or drafter.init_layers, or are random
    from train.seed."""
    wanted, geometry = config.drafter, geometry_of(config, target)
    if wanted.init_from is not None:
        return start_from(at_home(wanted.init_from), geometry, config.train.seed).to(target.device)
    if wanted.init_layers is None:
        return build_drafter(geometry, seed=config.train.seed).to(target.device)
    origin = {"init_layers": list(wanted.init_layers)}
    drafter = build_drafter(dataclasses.replace(geometry, extra=origin), seed=config.train.seed)
    copy_layers(drafter, target.layers, target.final_norm, wanted.init_layers)
    return drafter.to(target.device)


def _head(config: RunConfig, target: Target) -> DominoHead | None:
    """Domino's head. By default its widths have the ratio to the target's that the shipped head has (Qwen3-8B: 1024, 256)."""
    wanted, hidden = config.drafter, int(target.config.hidden_size)
    if wanted.kind != "domino":
        return None
    width, rank = wanted.gru_hidden_dim or max(256, hidden // 4), wanted.emb_dim or max(128, hidden // 16)
    return DominoHead(width, rank, wanted.pure_draft_prefix_len, wanted.shift_label)


def require_trainable(config: RunConfig, target: Target, prepared: Prepared, *, resume: bool = False) -> None:
    """Raise `UserError`, before hours go into features, when training could not begin or would stop at some text.

    MASK must be an embedding row that text never uses, or the drafter learns to read it as that text.
    """
    if os.path.realpath(at_home(config.data.path)) == os.path.realpath(config.out):
        raise ConfigError(f"out: {config.out} holds the data, whose run.json this run would replace: choose another")
    out = make_dir(Path(config.out))
    mask_token_id = target.mask_token_id(config.drafter.mask_token_id)
    data = prepared.train
    if bool((held := data.ids == mask_token_id).any()):
        found = [i for i, part in enumerate(held.split(data.offsets.diff().tolist())) if part.any()]
        names = data.meta.get("conversation_ids", range(len(data)))
        raise ConfigError(
            f"mask_token_id {mask_token_id} occurs in the training data, in {len(found):,} of {len(data):,} conversations "
            f"(first: {', '.join(str(names[i]) for i in found[:3])}): set drafter.mask_token_id to an unused row, or remove "
            f"them from {config.data.path}"
        )
    rows, most = target.embed_weight.shape[0], int(prepared.train.ids.max())
    if most >= rows:
        raise UserError(
            f"the training data holds the token {most}, and {target.name}'s embedding has {rows} rows: its tokenizer does "
            "not belong to its weights"
        )
    target.require_reach(int(prepared.train.offsets.diff().max()), "lower data.max_length")
    require_batch(len(prepared.train), config.train)
    require_heldout(config, prepared)
    why = undecodable(target)
    if config.train.eval_every:
        if why:
            raise UserError(f"{why}. It can be trained for with train.eval_every=0")
        if config.eval.sampling.proposal != "greedy":
            raise ConfigError("train.eval_every replays, which needs eval.sampling.proposal=greedy")
        prompts = [Dialogue(p.id, [0] * p.tokens) for p in prepared.heldout[: config.eval.prompts]]
        check_reach(target, prompts, config.eval.max_new_tokens + config.drafter.block_size - 1)
    if resume:
        checkpoint.require_same_recipe(out, config)
    if why:
        log.warning("%s: a drafter can be trained, and is neither measured nor run here", why)


def open_run(
    config: RunConfig,
    target: Target,
    prepared: Prepared,
    features: FeatureCache | None,
    *,
    resume: bool = True,
    ranks: Ranks | None = None,
    horizon: int | None = None,
) -> Trainer:
    """Build the trainer and continue from `config.out` if a checkpoint is there. Writes config.yaml and run.json.

    `horizon` overrides `train.max_steps`. Without `resume`, an existing checkpoint is set aside as `checkpoint.before`.
    """
    ranks = ranks or Ranks()
    out = make_dir(Path(config.out))
    drafter = new_drafter(config, target)
    batches = Batches(prepared.train, features, config.train, stored_extras(config))
    trainer = Trainer(config, drafter, target, batches, out, ranks)
    trainer.max_steps = horizon or trainer.max_steps
    if resume:
        checkpoint.resume(trainer, out)
    elif ranks.main:
        recover_dir(out / "checkpoint")  # or a later resume would bring back a discarded checkpoint
        # Without a checkpoint an earlier --fresh may have been killed, and the log is not that of what was set aside.
        if (out / "checkpoint").exists():
            set_aside(out / "log.jsonl")
            set_aside(out / "checkpoint")
    if len(set(ranks.gather(trainer.done))) > 1:
        raise UserError(f"the processes see different checkpoints in {out}: `out` has to be on a disk that they share")
    known = draft_vocabulary(drafter, target, prepared.train)
    if ranks.main and trainer.done != trainer.max_steps:  # a finished run stays what it was
        atomic_write_text(out / "config.yaml", dump(config))
        made_from = {
            "config_hash": digest(config),
            "target": target.fingerprint(),
            "data": prepared.train.meta["key"],
            "ledger": prepared.ledger.to_dict(),
        }
        processes = {"processes": ranks.world} if ranks.world > 1 else {}
        provenance.write(out / "run.json", {**made_from, **processes, **known}, from_step=trainer.done)
    return trainer


def draft_vocabulary(drafter: DFlash, target: Target, data: TokenDataset) -> dict[str, Any]:
    """Choose the reduced vocabulary of a drafter that is to have one, unless its checkpoint already did.

    It is the most frequent supervised tokens of `data`, and every token that ends a text. Returns its size and coverage (the
    share of the supervised tokens that are in it); an empty dict for a drafter with the target's vocabulary.
    """
    size = drafter.config.draft_vocab_size
    if size is None:
        return {}
    labels = data.ids[data.mask.bool()]
    if not drafter.t2d.any():
        keep_tokens(drafter, most_frequent(labels, size, drafter.config.vocab_size, target.eos_ids()).to(target.device))
    return {"draft_vocabulary": {"size": size, "coverage": coverage(labels, drafter.t2d.cpu())}}


def feature_cache(
    config: RunConfig,
    target: Target,
    prepared: Prepared,
    examples: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
    ranks: Ranks | None = None,
) -> FeatureCache | None:
    """The cache if the recipe asks for one, else None. Each rank extracts its share of what is missing."""
    if not config.features.cache:
        return None
    ranks = ranks or Ranks()
    return build_features(
        target,
        prepared.train,
        assets.cache_dir() / "features",
        geometry_of(config, target).target_layer_ids,
        config.features,
        examples=examples,
        on_progress=on_progress,
        share=(ranks.rank, ranks.world),
        wait=ranks.wait,
    )


def set_horizon(trainer: Trainer) -> str:
    """Turn train.minutes into `max_steps`, once; a resumed run keeps its horizon. Returns a line about the decision.

    Where several ranks train, the main one's clock decides.
    """
    minutes = trainer.config.train.minutes
    if trainer.max_steps is None:
        if minutes is None:
            raise ConfigError("set train.max_steps or train.minutes: the learning-rate schedule needs a horizon")
        seconds = trainer.ranks.agree(calibrate([trainer])[0])
        trainer.max_steps = max(1, int(minutes * 60 / seconds))
        return f"{minutes:g} minutes at {seconds:.2f} s a step: max_steps {trainer.max_steps}, frozen"
    finished = trainer.done == trainer.max_steps
    told = (
        f"already trained: step {trainer.done} of {trainer.max_steps}" if finished else f"max_steps {trainer.max_steps}"
    )
    if minutes is None or (trainer.done and trainer.config.train.max_steps is not None):
        return told
    if trainer.done:
        return f"{told}, frozen when the run began: for another train.minutes choose another `out`"
    return f"{told}; train.minutes={minutes:g} is not used (it would be with train.max_steps=null)"


def heldout_evaluator(config: RunConfig, target: Target, alone: bool = True) -> Callable[[DFlash], dict[str, float]]:
    """A function that replays a drafter over held-out prompts and returns tau, for the training log.

    The drafter runs in the target's dtype, as `specauf eval` runs it. The ranks of a sharded target are not `alone`: each
    records for itself and keeps no file, since they have to run the target equally often and would write the same files.
    """
    prompts = render_prompts(
        target, load_task("heldout", data_dir=data_dir(config))[: config.eval.prompts], config.data.enable_thinking
    )
    with contextlib.nullcontext(config.out) if alone else tempfile.TemporaryDirectory() as out:
        where = Path(out) / "trajectories"
        tasks = {"heldout": recorded(target, "Held-out chat", prompts, config.eval, config.drafter.block_size, where)}
    tasks["heldout"].keep_features = True

    def evaluate(drafter: DFlash) -> dict[str, float]:
        served = drafter
        if drafter.fc.weight.dtype != target.embed_weight.dtype:
            served = copy.deepcopy(drafter).to(target.embed_weight)
        found, _ = measure(target, {"drafter": DrafterProposer(served, target)}, tasks)
        drafter.train()
        return {"replay_tau": found["heldout"]["methods"]["drafter"]["tau"]}

    return evaluate


def step_note(row: dict[str, Any]) -> str:
    """A step's progress in a few words. A branch that is read only on another branch's support has no tau of its own."""
    tau = f", simulated tau {row['simulated_tau']:.3f}" if "simulated_tau" in row else ""
    return f"loss {row['loss']:.3f}{tau}"


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
