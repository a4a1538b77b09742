"""The optimizer step, readable from top to bottom, and the run around it.

Everything random is a function of counters and the learning rate a function of the global step. So the state of a run is
its weights, its optimizer moments, the step count and the running survival that plans the head's stages: on a CPU, a resumed
run is bitwise the run that was not interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specauf.config import RunConfig
from specauf.data.features import argmax_of
from specauf.drafter.dflash import DFlash, Pending
from specauf.drafter.domino import Corrected, Domino
from specauf.drafter.vocabulary import draft_head
from specauf.files import FULL, Journal, set_aside
from specauf.objective.blocks import (
    Blocks,
    before_labels,
    block_inputs,
    build_blocks,
    prefix_tokens,
    sample_anchors,
    slot_uniform,
)
from specauf.objective.branches import Shared, Side, lambda_base, two_branch_loss
from specauf.objective.loss import LossTerms, block_loss
from specauf.objective.metrics import block_metrics
from specauf.objective.wavefront import LAUNCH_ROWS, LAUNCH_ROWS_GPU, Head, RowSource, plan_cuts, read_head
from specauf.strict import ConfigError, UserError
from specauf.target import Target
from specauf.train import checkpoint
from specauf.train.batches import Batch, Batches, Prefetcher
from specauf.train.distributed import Ranks
from specauf.train.figures import Figures
from specauf.train.objectives import objectives_of, plugin_text
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


class View(NamedTuple):
    """One branch's loss in a step, and where to read more of its rows for the log."""

    terms: LossTerms
    rows: RowSource
    head: Head


class Trainer:
    """A drafter in training. `step()` makes one optimizer step; `run()` goes to the horizon and keeps state on disk."""

    def __init__(
        self,
        config: RunConfig,
        drafter: DFlash,
        target: Target,
        batches: Batches,
        out: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.drafter, self.target, self.batches = config, drafter, target, batches
        self.ranks = ranks or Ranks()
        self.out = out if self.ranks.main else None
        self.branches = objectives_of(config)
        self.plugin = plugin_text(config.objective.plugin)
        """The plugin's text as it was imported, not as it is at a later checkpoint."""
        self.loader = Prefetcher(batches, drafter.fc.weight.device, self.ranks.world)
        self.done = 0
        self.max_steps = config.train.max_steps
        self.seconds = 0.0
        self.survival: dict[str, list[float]] = {}
        """For each branch, the running share of the blocks that survive each slot. It plans the wavefront's stages."""
        self.optimizer = torch.optim.AdamW(
            drafter.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
        )

    @cached_property
    def head(self) -> Head:
        """The drafter's part of the target's LM head. Computed at the first step, when its vocabulary is settled."""
        return draft_head(self.drafter, self.target.head)

    @property
    def epochs(self) -> float:
        """Passes over the training conversations so far."""
        return self.done * self.config.train.accumulation * self.ranks.world / self.batches.per_epoch

    def blocks_of(self, batch: Batch) -> Blocks:
        train = self.config.train
        anchors, keep = sample_anchors(
            batch.loss_mask, batch.uid, train.num_anchors, seed=train.seed, epoch=batch.epoch
        )
        said = batch.argmax if self.config.objective.labels == "target" else None
        return build_blocks(batch.input_ids, batch.loss_mask, anchors, keep, self.drafter.config.num_trained + 1, said)

    def batch(self, index: int) -> Batch:
        """A micro-batch on the drafter's device. The target's part of it is computed here unless a cache holds it."""
        found = self.loader[index]
        if found.features is not None:
            return found
        features, final = self.target.run(found.input_ids, self.drafter.config.target_layer_ids)
        if self.config.objective.labels == "target":
            found = found._replace(argmax=torch.stack([argmax_of(self.target, row) for row in final]))
        return found._replace(features=features, final=final)

    def autocast(self) -> torch.autocast:
        """The drafter's precision, as train.precision says. It also holds for rows that are requested later."""
        wanted = self.config.train.precision
        on = wanted == "bfloat16" or (wanted == "auto" and self.device == "cuda")
        return torch.autocast(self.device, torch.bfloat16, on)

    @property
    def device(self) -> str:
        return self.drafter.fc.weight.device.type

    def hidden(self, batch: Batch, blocks: Blocks) -> Pending:
        """Conversation -> target features -> blocks -> the drafter's hidden states, of the slots that are requested later."""
        config, features = self.drafter.config, batch.features
        assert features is not None
        positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)
        embeds = self.target.embed(
            block_inputs(batch.input_ids, blocks.anchors, config.block_size, config.mask_token_id)
        )
        dtype = self.drafter.fc.weight.dtype
        with self.autocast():
            if not torch.is_autocast_enabled(self.device):  # otherwise the first product rounds them to 16 bits anyway
                features = features.to(dtype)
            context = self.drafter.context(features, positions)
            return self.drafter.pending(embeds.to(dtype), blocks.anchors, context)

    def loss(
        self,
        hidden: RowSource,
        batch: Batch,
        blocks: Blocks,
        lam: float = 1.0,
        cuts: Mapping[str, list[int]] | None = None,
    ) -> tuple[LossTerms, dict[str, View]]:
        """The loss, and its branches by the prefix of their figures in the log: `base_` for Domino's base, else empty."""
        size, train, cuts = self.drafter.config.num_trained + 1, self.config.train, cuts or {}
        target_hidden = uniform = None
        if any(b.objective.needs_target for b in self.branches):
            assert batch.final is not None
            target_hidden = before_labels(batch.final, blocks.anchors, size)
        if any("uniform" in b.objective.rule.needs for b in self.branches):
            uniform = slot_uniform(batch.uid, blocks.anchors, size, seed=train.seed, epoch=batch.epoch)
        rows_at_once = self.config.objective.logits_rows
        how: dict[str, Any] = {"target_hidden": target_hidden, "uniform": uniform, "logits_rows": rows_at_once}
        if not isinstance(self.drafter, Domino):
            terms = block_loss(hidden, blocks, self.branches[0].objective, self.head, cuts=cuts.get(""), **how)
            return terms, {"": View(terms, hidden, self.head)}
        rows, head = Shared(hidden, blocks.valid), self.head._replace(expansion=self.drafter.expansion)
        said = self.target.embed(prefix_tokens(batch.input_ids, blocks.anchors, size - 1))
        with self.autocast():
            corrected = Corrected(self.drafter, rows, said)
        stages: dict[Side, list[int]] = {s: cuts[p] for s, p in (("base", "base_"), ("final", "")) if p in cuts}  # type: ignore[misc]
        base, final = self.branches
        found = two_branch_loss(rows, corrected, blocks, base, final, lam, head, cuts=stages, **how)
        return found.terms, {"": View(found.final, corrected, head), "base_": View(found.base, rows, self.head)}

    def step(self) -> dict[str, Any]:
        """One optimizer step. Gradients are sums over the window divided by the window's denominator.

        Raises `UserError`, and changes no weight, when the gradient is not finite.
        """
        if self.max_steps is None:
            raise ConfigError("train.max_steps is not set: the learning rate has no horizon. Give it, or train.minutes")
        train = self.config.train
        rate = learning_rate(self.done, self.max_steps, train.lr, train.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        began, waited = time.perf_counter(), self.loader.waited
        window, figures = Window(list(self.drafter.parameters()), train.accumulation, self.ranks), Figures()
        # Planned once a step, from checkpointed state: a resumed run has the same cuts, and so the same rounding.
        launch = LAUNCH_ROWS if self.device == "cpu" else LAUNCH_ROWS_GPU
        cuts = {name: plan_cuts(s, train.batch_size * train.num_anchors, launch) for name, s in self.survival.items()}
        objective = self.config.objective
        lam = lambda_base(self.done, self.max_steps, objective.lambda_base_start, objective.lambda_base_decay_ratio)
        self.drafter.train()
        for micro in range(train.accumulation):
            batch = self.batch((self.done * train.accumulation + micro) * self.ranks.world + self.ranks.rank)
            blocks = self.blocks_of(batch)
            # Autocast keeps the copies it makes of weights until its outermost context ends: one copy for all stages.
            with torch.autocast(self.device, torch.bfloat16, enabled=False):
                hidden = self.hidden(batch, blocks)
                terms, views = self.loss(hidden, batch, blocks, lam, cuts)
            window.add(terms)
            figures.count(batch, blocks)
            for name, view in views.items():
                self._collect(figures, name, view, blocks, measure_common=self.done % train.common_every == 0)
        loss = window.close()
        parameters = [p for p in window.parameters if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip))
        if not math.isfinite(norm):  # the same on all ranks, which stop together
            raise UserError(
                f"step {self.done + 1}: the gradient's norm is {norm}. The last checkpoint stands. A target in float16 that "
                "overflows does this (target.dtype=bfloat16 does not), and so does a learning rate that is far too large"
            )
        self.optimizer.step()
        self.done += 1
        figures = self._pool(figures)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        return {
            "step": self.done,
            "loss": loss,
            "reduction": objective.reduction,
            "labels": objective.labels,
            **({"lambda_base": lam} if isinstance(self.drafter, Domino) else {}),
            "lr": rate,
            "grad_norm": norm,
            "clipped": norm > train.clip,
            "seconds": seconds,
            "data_seconds": self.loader.waited - waited,
            "elapsed": self.seconds,
            "tokens": figures.tokens,
            "blocks": figures.blocks,
            "tokens_per_second": figures.tokens / seconds,
            "epoch": self.epochs,
            **{f"{name}cuts": stages for name, stages in cuts.items()},
            **figures.row(self.drafter.config.block_size),
        }

    def _pool(self, figures: Figures) -> Figures:
        """What all ranks saw in this step, for every rank; survival is averaged, so that all plan alike."""
        everyone, pooled = self.ranks.gather((figures, self.survival)), Figures()
        for theirs, _ in everyone:
            pooled.merge(theirs)
        held = [survival for _, survival in everyone]
        self.survival = {k: [sum(s) / len(s) for s in zip(*(h[k] for h in held), strict=True)] for k in held[0]}
        return pooled

    def _collect(self, figures: Figures, name: str, view: View, blocks: Blocks, measure_common: bool) -> None:
        """Add a branch's figures to `figures`, over the predictions that are served; keep its survival for the next plan."""
        terms, served = view.terms, self.drafter.config.num_predictions
        if terms.survival is not None:
            now = terms.survival.tolist()
            self.survival[name] = [0.9 * a + 0.1 * b for a, b in zip(self.survival.get(name, now), now, strict=True)]
        found = block_metrics(terms.readout, blocks, terms.credit, served)
        if measure_common and not {"common_accuracy", "simulated_tau"} <= found.keys():
            # Most slots were left unread: read a sample of blocks in full, for the log alone.
            take = blocks.valid.any(-1).view(-1).nonzero().squeeze(1)
            take = take[:: max(1, len(take) // COMMON_BLOCKS)][:COMMON_BLOCKS]
            valid = torch.zeros_like(blocks.valid)
            valid.view(-1, valid.shape[-1])[take] = blocks.valid.flatten(0, 1)[take]
            readout = read_head(
                *(view.rows, blocks.labels, valid, view.head), logits_rows=self.config.objective.logits_rows, wants=()
            )
            found = block_metrics(readout, blocks._replace(valid=valid), terms.credit, served) | found
        if name or len(self.branches) > 1:
            found["loss"] = (float(terms.num[0].detach()), float(terms.den[0]))
        figures.add({f"{'final_' if key == 'loss' and not name else name}{key}": pair for key, pair in found.items()})

    def run(
        self,
        *,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        evaluate: Callable[[DFlash], dict[str, float]] | None = None,
    ) -> None:
        """Train to `max_steps`, logging every step.

        Ctrl-C or SIGTERM ends training after the current step, with the state saved; a second one ends it at once.
        """
        train, began = self.config.train, self.done
        # The log of a run whose checkpoint is gone, or which died before its first one; what --fresh set aside stays.
        if self.out and not self.done and not (self.out / "log.jsonl.before").exists():
            set_aside(self.out / "log.jsonl")
        journal = Journal(self.out / "log.jsonl", append=bool(self.done)) if self.out else None
        with contextlib.closing(journal) if journal else contextlib.nullcontext(), interrupts() as asked:
            try:
                while self.done < (self.max_steps or 0):
                    if any(self.ranks.gather(bool(asked))):  # every rank stops at the same step
                        raise KeyboardInterrupt
                    row = self.step()
                    if evaluate and train.eval_every and self.done % train.eval_every == 0:
                        row.update(evaluate(self.drafter))
                    if journal:
                        journal.write(json.dumps(row))
                    if on_step:
                        on_step(row)
                    if self.out and self.done % train.save_every == 0 and self.done != self.max_steps:
                        self._save_or_warn(self.out)
            except KeyboardInterrupt:
                if self.out and len(asked) < 2:
                    checkpoint.save(self, self.out)
                raise
        if self.out and self.done > began:
            checkpoint.save(self, self.out)
        if asked:  # during the last step: the run is complete, but nothing is to follow it
            raise KeyboardInterrupt

    def _save_or_warn(self, out: Path) -> None:
        """Save; a full disk is only a warning, as the next checkpoint may find room and the last one is still there."""
        try:
            checkpoint.save(self, out)
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.warning("step %d is not saved: %s; training goes on to the next checkpoint", self.done, error.strerror)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of ending by them, except for the second: a step is taken whole, or not at all."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    main, usual = threading.current_thread() is threading.main_thread(), (signal.default_int_handler, signal.SIG_DFL)
    found = zip((signal.SIGINT, signal.SIGTERM), usual, strict=True)
    # Not where somebody else handles it, or where it is ignored.
    ours = {number: before for number, before in found if main and signal.getsignal(number) is before}
    for number in ours:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, before in ours.items():
            signal.signal(number, before)
