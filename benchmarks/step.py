"""A whole training step: batch, drafter forward, objective, backward, clipping, AdamW.

    python -m benchmarks.step                                    # AUF against the full block with its decay
    python -m benchmarks.step auf --block-size 16 --anchors 32   # one of the two alone, with the options of benchmarks.stepping

The trainer is the library's own. Tokens, cached features, embedding and head are random, since a step's cost depends on them
only through tau. Labels are made so that the drafter survives as it would at a stated tau_train: its own argmax up to a
failure drawn from a geometric distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import common, stepping
from benchmarks.common import Row, alternate
from benchmarks.objective import alpha_of
from benchmarks.stepping import Shape
from specauf.config import RunConfig, TargetConfig
from specauf.data.dataset import TokenDataset
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.objective import Blocks
from specauf.objective.wavefront import Head
from specauf.strict import from_dict
from specauf.target import Target
from specauf.train.batches import Batch, Batches
from specauf.train.loop import Trainer

TAU = 1.2
CONVERSATIONS = 8


class Lent(SimpleNamespace):
    """The embedding and head that stand in for a target."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.embed_weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head.read(hidden)

    @property
    def head(self) -> Head:
        return Head(self.head_weight)


def lent(shape: Shape) -> Any:
    weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.04
    return Lent(embed_weight=weight, head_weight=weight, head_bias=None, softcap=None)


class Stored:
    """A feature cache of random numbers, held in memory."""

    def __init__(self, shape: Shape) -> None:
        g = torch.Generator().manual_seed(1)
        wide = (CONVERSATIONS, shape.tokens, shape.taps * shape.hidden_size)
        self.features = torch.randn(wide, generator=g).bfloat16()

    def __len__(self) -> int:
        return len(self.features)

    def get(self, index: int, name: str) -> torch.Tensor:
        return self.features[index]


class Staged(Trainer):
    """A trainer whose blocks fail as at tau `TAU`: a label is the drafter's argmax, or another token where it is to fail."""

    made: dict[tuple[int, ...], torch.Tensor]

    def blocks_of(self, batch: Batch) -> Blocks:
        blocks, key = super().blocks_of(batch), (batch.epoch, *batch.uid.tolist())
        if key not in self.made:
            with torch.no_grad():
                self.made[key] = self._labels(batch, blocks)
        return blocks._replace(labels=self.made[key])

    def _labels(self, batch: Batch, blocks: Blocks) -> torch.Tensor:
        pending, said = self.hidden(batch, blocks), torch.zeros_like(blocks.labels)
        for n in range(0, said.shape[1], 8):
            todo = torch.zeros_like(blocks.valid)
            todo[:, n : n + 8] = True
            said[todo] = self.target.logits(pending.rows(todo)).argmax(-1)
        g = torch.Generator().manual_seed(batch.epoch)
        right = torch.rand(said.shape, generator=g) < alpha_of(TAU, said.shape[-1])
        return torch.where(right, said, (said + 1) % self.target.embed_weight.shape[0])


def build(shape: Shape, objective: str, target: Any = None, precision: str = "float32") -> Callable[[], object]:
    """A step of the trainer, features cached unless a `target` is there to compute them."""
    config = from_dict(
        RunConfig,
        {
            "drafter": {"block_size": shape.block_size, "num_hidden_layers": shape.layers},
            "objective": {"name": objective},
            "train": {
                **{"max_steps": 10**6, "batch_size": shape.sequences, "num_anchors": shape.anchors},
                **{"lr": 1e-12, "common_every": 10**6, "precision": precision},  # labels stay the drafter's argmax
            },
        },
    )
    drafter = DFlash(
        DFlashConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            num_target_layers=30,
            target_layer_ids=tuple(range(1, 1 + shape.taps)),
            mask_token_id=16,
            block_size=shape.block_size,
        )
    )
    ids = torch.randint(100, 40000, (CONVERSATIONS, shape.tokens), generator=torch.Generator().manual_seed(0)).int()
    data = TokenDataset.from_rows([(i, row, torch.ones_like(row).byte()) for i, row in enumerate(ids)], {})
    batches = Batches(data, None if target else Stored(shape), config.train)  # type: ignore[arg-type]
    trainer = Staged(config, drafter, target or lent(shape), batches)
    trainer.made = {}

    def step() -> None:
        trainer.step()
        trainer.done %= 2  # two batches in turn, whose labels exist by then

    for _ in range(4):  # makes the labels, and the survival estimate
        step()
    return step


def rows() -> Iterator[Row]:
    for block, layers, online, reach in (
        (8, 2, False, 1.8),
        (16, 2, False, 2.2),
        (8, 5, False, None),
        (16, 5, False, None),
        (8, 2, True, None),
        (16, 2, True, None),
    ):
        shape = replace(Shape(), block_size=block, layers=layers)
        target = Target.load(TargetConfig()) if online else None
        ways = {name: build(shape, name, target) for name in ("auf", "decay")}
        seconds = alternate(ways, rounds=7 if reach else 3)
        at = f"B={block}, {layers} layers, {shape.sequences} x {shape.tokens} tokens, {shape.anchors} anchors each, "
        at += f"tau_train {TAU}, " + ("the target's forward counted" if online else "features cached")
        note = f"{seconds['auf']:.2f} s against {seconds['decay']:.2f} s"
        yield Row("training step, AUF", "full block, decay", at, seconds["decay"] / seconds["auf"], reach, note=note)
    for layers in (2, 5):
        shape = replace(Shape(), block_size=8, layers=layers)
        ways = {name: build(shape, "auf", precision=name) for name in ("float32", "bfloat16")}
        seconds = alternate(ways, rounds=5)
        at = f"B=8, {layers} layers, features cached, the head in the target's float32"
        note = f"{seconds['bfloat16']:.2f} s against {seconds['float32']:.2f} s"
        yield Row("AUF, precision bfloat16", "float32", at, seconds["float32"] / seconds["bfloat16"], note=note)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        name = sys.argv.pop(1)
        stepping.main(f"specauf, {name}", lambda shape: build(shape, name))
    else:
        common.main(rows)
