"""The optimizer step, readable from top to bottom, and the run around it.

Everything random is a function of counters and the learning rate a function of the global step, so the state of a run is
its weights, its optimizer moments and one integer: a resumed run is bitwise the run that was not interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specauf.config import ConfigError, RunConfig
from specauf.drafter.dflash import DFlash
from specauf.objective.blocks import Blocks, block_inputs, build_blocks, sample_anchors
from specauf.objective.loss import LossTerms, Objective, block_loss
from specauf.objective.metrics import block_metrics
from specauf.objective.wavefront import read_head
from specauf.target import Target
from specauf.train import checkpoint
from specauf.train.batches import Batch, Batches

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

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
    """The tensor-level objective of a run's configuration."""
    gamma = config.objective.decay_for(config.drafter.block_size)
    return Objective(config.objective.name, gamma, config.objective.reduction)  # type: ignore[arg-type]


class Trainer:
    """A drafter in training. `step()` makes one optimizer step; `run()` goes to the horizon and keeps state on disk."""

    def __init__(
        self, config: RunConfig, drafter: DFlash, target: Target, batches: Batches, out: Path | None = None
    ) -> None:
        self.config, self.drafter, self.target, self.batches, self.out = config, drafter, target, batches, out
        self.objective = objective_of(config)
        self.done = 0
        self.max_steps = config.train.max_steps
        self.seconds = 0.0
        self.optimizer = torch.optim.AdamW(
            drafter.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, betas=(0.9, 0.999)
        )

    def blocks_of(self, batch: Batch) -> Blocks:
        train = self.config.train
        anchors, keep = sample_anchors(
            batch.loss_mask, batch.uid, train.num_anchors, seed=train.seed, epoch=batch.epoch
        )
        return build_blocks(batch.input_ids, batch.loss_mask, anchors, keep, self.drafter.config.block_size)

    def hidden(self, batch: Batch, blocks: Blocks) -> Float[Tensor, "b n k h"]:
        """Conversation -> target features -> blocks -> the drafter's hidden states of the predicted slots."""
        config = self.drafter.config
        features = batch.features
        if features is None:
            features = self.target.run(batch.input_ids, config.target_layer_ids).features
        weight = self.drafter.fc.weight
        positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)
        embeds = self.target.embed(
            block_inputs(batch.input_ids, blocks.anchors, config.block_size, config.mask_token_id)
        )
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.device.type == "cuda"):
            context = self.drafter.context(features.to(weight.dtype), positions)
            out: Tensor = self.drafter(embeds.to(weight.dtype), blocks.anchors, context)
        return out[:, :, 1:]

    def step(self) -> dict[str, Any]:
        """One optimizer step. Gradients are sums over the window divided by the window's denominator."""
        if self.max_steps is None:
            raise ConfigError("train.max_steps is not set: the learning rate has no horizon. Give it, or train.minutes")
        train, device = self.config.train, self.drafter.fc.weight.device
        rate = learning_rate(self.done, self.max_steps, train.lr, train.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        began = time.perf_counter()
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        num = den = 0.0
        tokens = blocks_seen = 0
        self.drafter.train()
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(train.accumulation):
            batch = self.batches[self.done * train.accumulation + micro]
            batch = Batch(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in batch))
            blocks = self.blocks_of(batch)
            hidden = self.hidden(batch, blocks)
            terms = block_loss(
                hidden,
                blocks,
                self.objective,
                self.target.head_weight,
                self.target.head_bias,
                logits_rows=self.config.objective.logits_rows,
            )
            terms.num.backward()
            num, den = num + float(terms.num.detach()), den + float(terms.den)
            tokens += int(batch.loss_mask.sum())
            blocks_seen += int(blocks.keep.sum())
            self._collect(sums, terms, hidden, blocks, measure_common=self.done % train.common_every == 0)
        parameters = [p for p in self.drafter.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad.div_(max(den, 1e-12))  # type: ignore[union-attr]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip))
        self.optimizer.step()
        self.done += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        figures = {name: total / count for name, (total, count) in sums.items() if count}
        return {
            "step": self.done,
            "loss": num / max(den, 1e-12),
            "lr": rate,
            "grad_norm": norm,
            "clipped": norm > train.clip,
            "seconds": seconds,
            "elapsed": self.seconds,
            "tokens": tokens,
            "blocks": blocks_seen,
            "tokens_per_second": tokens / seconds,
            "epoch": self.done * train.accumulation / self.batches.per_epoch,
            **{k: v for k, v in figures.items() if not k.startswith("first_error")},
            "first_error": [figures.get(f"first_error_{k}", 0.0) for k in range(self.drafter.config.block_size)],
        }

    def _collect(
        self, sums: dict[str, list[float]], terms: LossTerms, hidden: Tensor, blocks: Blocks, measure_common: bool
    ) -> None:
        found = block_metrics(terms.readout, blocks, terms.credit)
        if "common_accuracy" not in found and measure_common:
            # The wavefront left most slots unread: read a sample of blocks in full, for the log alone.
            take = blocks.valid.any(-1).view(-1).nonzero().squeeze(1)
            take = take[:: max(1, len(take) // COMMON_BLOCKS)][:COMMON_BLOCKS]
            labels, valid = (t.flatten(0, 1)[take][None] for t in (blocks.labels, blocks.valid))
            sample = hidden.detach().flatten(0, 1)[take][None]
            weight, bias = self.target.head_weight, self.target.head_bias
            rows = self.config.objective.logits_rows
            readout = read_head(sample, labels, valid, weight, bias, logits_rows=rows, with_grad=False)
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
        ({k: v.clone() for k, v in t.drafter.state_dict().items()}, t.done, t.max_steps, t.seconds) for t in trainers
    ]
    for trainer in trainers:
        trainer.max_steps = trainer.max_steps or 10**6
    for turn in range(warmup + steps):
        for trainer, times in zip(trainers, seconds, strict=True):
            row = trainer.step()
            if turn >= warmup:
                times.append(row["seconds"])
    for trainer, (weights, done, max_steps, spent) in zip(trainers, kept, strict=True):
        trainer.drafter.load_state_dict(weights)
        trainer.done, trainer.max_steps, trainer.seconds = done, max_steps, spent
        trainer.optimizer.state.clear()
    return [sorted(times)[len(times) // 2] for times in seconds]
