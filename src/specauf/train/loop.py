"""The optimizer step, readable from top to bottom, and the run around it.

Everything random is a function of counters and the learning rate a function of the global step, so the state of a run is
its weights, its optimizer moments and one integer: a resumed run is bitwise the run that was not interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from specauf.config import ConfigError, RunConfig
from specauf.data.features import extras_of
from specauf.data.rollouts import rollout_meta
from specauf.drafter.dflash import DFlash, Pending
from specauf.objective.blocks import Blocks, before_labels, block_inputs, build_blocks, sample_anchors, slot_uniform
from specauf.objective.loss import LossTerms, Objective, block_loss
from specauf.objective.metrics import block_metrics
from specauf.objective.registry import rule_of
from specauf.objective.wavefront import RowSource, plan_cuts, read_head
from specauf.target import Target
from specauf.train import checkpoint
from specauf.train.batches import Batch, Batches, Prefetcher
from specauf.train.window import Window

log = logging.getLogger(__name__)

COMMON_BLOCKS = 16
"""Blocks on which common-token accuracy is measured where the wavefront does not evaluate every slot."""


def learning_rate(step: int, max_steps: int, base: float, warmup: float) -> float:
    """Linear warm-up over int(warmup * max_steps) steps, then cosine to zero; `step` counts completed steps."""
    ramp = int(warmup * max_steps)
    if step < ramp:
        return base * (step + 1) / ramp
    return base * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, max_steps - ramp)))


def objective_of(config: RunConfig) -> Objective:
    """The tensor-level objective of a run's configuration. Raises `ConfigError` on whatever it cannot be."""
    wanted = config.objective
    if wanted.plugin is not None:
        _import(wanted.plugin)
    try:
        own = isinstance(rule_of(wanted.name).gamma, float | None)
        gamma = wanted.gamma if own else wanted.decay_for(config.drafter.block_size)
        objective = Objective(wanted.name, gamma, wanted.reduction, wanted.options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from None
    if "rollouts" in objective.rule.needs and rollout_meta(config.data.path) is None:
        raise ConfigError(
            f"objective {wanted.name!r} is trained on the target's own continuations: make them with `specauf rollout` and "
            f"give their directory as data.path, which is {config.data.path!r}"
        )
    reads_target = objective.needs_teacher or wanted.labels == "target"
    if reads_target and config.features.cache and not config.features.extras:
        raise ConfigError(
            f"objective {wanted.name!r} with labels={wanted.labels!r} reads what the target says, which the feature cache "
            "holds only with features.extras=true (or set features.cache=false)"
        )
    return objective


def stored_extras(config: RunConfig) -> tuple[str, ...]:
    """What a feature cache must hold beyond the features, for this objective and these labels."""
    teacher, target = objective_of(config).needs_teacher, config.objective.labels == "target"
    return ("final",) * teacher + ("argmax",) * target


def _import(plugin: str) -> None:
    """Import a module by name, or a file by path, for what it registers."""
    path = Path(plugin)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        else:
            importlib.import_module(plugin)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"objective.plugin: cannot import {plugin!r}: {error}") from None


class Trainer:
    """A drafter in training. `step()` makes one optimizer step; `run()` goes to the horizon and keeps state on disk."""

    def __init__(
        self, config: RunConfig, drafter: DFlash, target: Target, batches: Batches, out: Path | None = None
    ) -> None:
        self.config, self.drafter, self.target, self.batches, self.out = config, drafter, target, batches, out
        self.objective = objective_of(config)
        self.loader = Prefetcher(batches, drafter.fc.weight.device)
        self.done = 0
        self.max_steps = config.train.max_steps
        self.seconds = 0.0
        self.survival: list[float] = []
        """Running share of the blocks that survive each slot, from which the wavefront's stages are planned."""
        self.optimizer = torch.optim.AdamW(
            drafter.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, betas=(0.9, 0.999)
        )

    def blocks_of(self, batch: Batch) -> Blocks:
        train = self.config.train
        anchors, keep = sample_anchors(
            batch.loss_mask, batch.uid, train.num_anchors, seed=train.seed, epoch=batch.epoch
        )
        said = batch.argmax if self.config.objective.labels == "target" else None
        return build_blocks(batch.input_ids, batch.loss_mask, anchors, keep, self.drafter.config.block_size, said)

    def batch(self, index: int) -> Batch:
        """A micro-batch on the drafter's device, with the target's part of it computed where no cache holds it."""
        found = self.loader[index]
        if found.features is not None:
            return found
        features, final = self.target.run(found.input_ids, self.drafter.config.target_layer_ids)
        if self.config.objective.labels == "target":
            told = [extras_of(self.target, *row)["argmax"] for row in zip(final, found.input_ids, strict=True)]
            found = found._replace(argmax=torch.stack(told).to(found.input_ids.device))
        return found._replace(features=features, final=final)

    def hidden(self, batch: Batch, blocks: Blocks) -> Pending:
        """Conversation -> target features -> blocks -> the drafter's hidden states, of the slots that will be asked for."""
        config, features = self.drafter.config, batch.features
        assert features is not None
        weight = self.drafter.fc.weight
        positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)
        embeds = self.target.embed(
            block_inputs(batch.input_ids, blocks.anchors, config.block_size, config.mask_token_id)
        )
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.device.type == "cuda"):
            context = self.drafter.context(features.to(weight.dtype), positions)
            return self.drafter.pending(embeds.to(weight.dtype), blocks.anchors, context)

    def loss(self, hidden: RowSource, batch: Batch, blocks: Blocks, cuts: list[int] | None = None) -> LossTerms:
        """The objective, with what else it asks for."""
        size, train = self.drafter.config.block_size, self.config.train
        teacher = uniform = None
        if self.objective.needs_teacher:
            assert batch.final is not None
            teacher = before_labels(batch.final, blocks.anchors, size)
        if "uniform" in self.objective.rule.needs:
            uniform = slot_uniform(batch.uid, blocks.anchors, size, seed=train.seed, epoch=batch.epoch)
        head, bias, rows = self.target.head_weight, self.target.head_bias, self.config.objective.logits_rows
        return block_loss(
            *(hidden, blocks, self.objective, head, bias),
            teacher=teacher,
            uniform=uniform,
            softcap=self.target.softcap,
            logits_rows=rows,
            cuts=cuts,
        )

    def step(self) -> dict[str, Any]:
        """One optimizer step. Gradients are sums over the window divided by the window's denominator."""
        if self.max_steps is None:
            raise ConfigError("train.max_steps is not set: the learning rate has no horizon. Give it, or train.minutes")
        train = self.config.train
        rate = learning_rate(self.done, self.max_steps, train.lr, train.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        began, waited = time.perf_counter(), self.loader.waited
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        window = Window(list(self.drafter.parameters()), train.accumulation)
        tokens = blocks_seen = 0
        # Planned once a step, from what is in the checkpoint: a resumed run cuts, and so rounds, as it would have.
        cuts = plan_cuts(self.survival, train.batch_size * train.num_anchors) if self.survival else None
        self.drafter.train()
        for micro in range(train.accumulation):
            batch = self.batch(self.done * train.accumulation + micro)
            blocks = self.blocks_of(batch)
            hidden = self.hidden(batch, blocks)
            terms = self.loss(hidden, batch, blocks, cuts)
            window.add(terms)
            if terms.survival is not None:
                now = terms.survival.tolist()
                self.survival = [0.9 * a + 0.1 * b for a, b in zip(self.survival or now, now, strict=True)]
            tokens += int(batch.loss_mask.sum())
            blocks_seen += int(blocks.keep.sum())
            self._collect(sums, terms, hidden, blocks, measure_common=self.done % train.common_every == 0)
        loss = window.close()
        parameters = [p for p in window.parameters if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip))
        self.optimizer.step()
        self.done += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        figures = {name: total / count for name, (total, count) in sums.items() if count}
        return {
            "step": self.done,
            "loss": loss,
            "reduction": self.objective.reduction,
            "labels": self.config.objective.labels,
            "lr": rate,
            "grad_norm": norm,
            "clipped": norm > train.clip,
            "seconds": seconds,
            "data_seconds": self.loader.waited - waited,
            "elapsed": self.seconds,
            "tokens": tokens,
            "blocks": blocks_seen,
            "tokens_per_second": tokens / seconds,
            "epoch": self.done * train.accumulation / self.batches.per_epoch,
            "cuts": cuts,
            **{k: v for k, v in figures.items() if not k.startswith("first_error")},
            "first_error": [figures.get(f"first_error_{k}", 0.0) for k in range(self.drafter.config.block_size)],
        }

    def _collect(
        self, sums: dict[str, list[float]], terms: LossTerms, hidden: RowSource, blocks: Blocks, measure_common: bool
    ) -> None:
        found = block_metrics(terms.readout, blocks, terms.credit)
        if "common_accuracy" not in found and measure_common:
            # The wavefront left most slots unread: read a sample of blocks in full, for the log alone.
            take = blocks.valid.any(-1).view(-1).nonzero().squeeze(1)
            take = take[:: max(1, len(take) // COMMON_BLOCKS)][:COMMON_BLOCKS]
            valid = torch.zeros_like(blocks.valid)
            valid.view(-1, valid.shape[-1])[take] = blocks.valid.flatten(0, 1)[take]
            readout = read_head(
                *(hidden, blocks.labels, valid, self.target.head_weight, self.target.head_bias),
                softcap=self.target.softcap,
                logits_rows=self.config.objective.logits_rows,
                wants=(),
            )
            found["common_accuracy"] = (float((readout.hit & valid).sum()), float(valid.sum()))
        for name, (total, count) in found.items():
            sums[name][0] += total
            sums[name][1] += count

    def run(
        self,
        *,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        evaluate: Callable[[DFlash], dict[str, float]] | None = None,
    ) -> None:
        """Train to `max_steps`, logging every step; on Ctrl-C the state is saved before the interrupt goes on."""
        train = self.config.train
        journal = (self.out / "log.jsonl").open("a") if self.out else contextlib.nullcontext()
        with journal as file:
            try:
                while self.done < (self.max_steps or 0):
                    row = self.step()
                    if evaluate and train.eval_every and self.done % train.eval_every == 0:
                        row.update(evaluate(self.drafter))
                    if file:
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                    if on_step:
                        on_step(row)
                    if self.out and self.done % train.save_every == 0:
                        checkpoint.save(self, self.out)
            except KeyboardInterrupt:
                if self.out:
                    checkpoint.save(self, self.out)
                raise
        if self.out:
            checkpoint.save(self, self.out)


def calibrate(trainers: Sequence[Trainer], steps: int = 6, warmup: int = 2) -> list[float]:
    """Median seconds per step of each trainer, the steps alternating between them so that they share the machine's mood.

    Weights, moments and counters are put back afterwards: calibration leaves no trace in a run.
    """
    seconds: list[list[float]] = [[] for _ in trainers]
    kept = [
        ({k: v.clone() for k, v in t.drafter.state_dict().items()}, t.done, t.max_steps, t.seconds, t.survival)
        for t in trainers
    ]
    for trainer in trainers:
        trainer.max_steps = trainer.max_steps or 10**6
    for turn in range(warmup + steps):
        for trainer, times in zip(trainers, seconds, strict=True):
            row = trainer.step()
            if turn >= warmup:
                times.append(row["seconds"])
    for trainer, (weights, *rest) in zip(trainers, kept, strict=True):
        trainer.drafter.load_state_dict(weights)
        trainer.done, trainer.max_steps, trainer.seconds, trainer.survival = rest
        trainer.optimizer.state.clear()
    return [sorted(times)[len(times) // 2] for times in seconds]
