"""What a step tells the log: figures as (sum, count), added up over micro-batches and ranks and divided at the end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specauf.objective.blocks import Blocks, covered
from specauf.train.batches import Batch

PER_SLOT = re.compile("(first_error|credit)_[0-9]+$")


@dataclass
class Figures:
    tokens: int = 0
    """Supervised tokens."""
    blocks: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, found: Mapping[str, tuple[float, float] | list[float]]) -> None:
        for name, (total, count) in found.items():
            held = self.sums.setdefault(name, [0.0, 0.0])
            held[0] += total
            held[1] += count

    def count(self, batch: Batch, blocks: Blocks) -> None:
        """Count a micro-batch."""
        supervised, length = int(batch.loss_mask.sum()), batch.loss_mask.shape[1]
        self.tokens += supervised
        self.blocks += int(blocks.keep.sum())
        self.add({"covered": (covered(blocks, length), supervised)})

    def merge(self, other: Figures) -> None:
        self.tokens += other.tokens
        self.blocks += other.blocks
        self.add(other.sums)

    def row(self, block_size: int) -> dict[str, Any]:
        """The means; the slots of each diagnostic that has one for every slot as a list."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return {
            **{name: mean for name, mean in means.items() if not PER_SLOT.search(name)},
            "first_error": [means.get(f"first_error_{k}", 0.0) for k in range(block_size)],
            "credit": [means.get(f"credit_{k}", 0.0) for k in range(1, block_size)],
        }
