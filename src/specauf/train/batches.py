"""Which conversations a step sees: a function of (seed, step), so that a resumed run sees what it would have seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from specauf.config import TrainConfig, UserError
from specauf.data.dataset import TokenDataset
from specauf.data.features import FeatureCache
from specauf.objective.blocks import counter_hash

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

ORDER, BUCKET = 11, 12
"""Streams of the counter hash: the permutation of an epoch, and the order of its batches."""
WINDOW = 16
"""Batches whose conversations are sorted by length together, so that little of a batch is padding."""


class Batch(NamedTuple):
    input_ids: Int[Tensor, "b s"]
    loss_mask: Bool[Tensor, "b s"]
    """False on padding."""
    uid: Int[Tensor, " b"]
    epoch: int
    features: Float[Tensor, "b s taps_h"] | None
    """From the cache, in its dtype; None when the target runs online."""


@dataclass
class Batches:
    """Micro-batches of a dataset, by global index."""

    dataset: TokenDataset
    features: FeatureCache | None
    config: TrainConfig

    def __post_init__(self) -> None:
        self.examples = len(self.features) if self.features is not None else len(self.dataset)
        if self.examples < self.config.batch_size:
            raise UserError(
                f"{self.examples} training conversations are fewer than train.batch_size={self.config.batch_size}"
            )
        self._lengths = torch.tensor([len(self.dataset[i].input_ids) for i in range(self.examples)])
        self._uids = torch.tensor([self.dataset[i].uid for i in range(self.examples)])
        self._epoch: tuple[int, list[list[int]]] | None = None

    @property
    def per_epoch(self) -> int:
        return self.examples // self.config.batch_size

    def order(self, epoch: int) -> list[list[int]]:
        """The epoch's micro-batches: shuffled, bucketed by length within a window, shuffled again. Drops the remainder."""
        if self._epoch is None or self._epoch[0] != epoch:
            size, seed = self.config.batch_size, self.config.seed
            shuffled = counter_hash(seed, ORDER, epoch, self._uids).argsort()[: self.per_epoch * size]
            windows = [w[self._lengths[w].argsort(stable=True)] for w in shuffled.split(WINDOW * size)]
            parts = [part for window in windows for part in window.split(size)]
            key = counter_hash(seed, BUCKET, epoch, torch.arange(len(parts)))
            self._epoch = epoch, [parts[i].tolist() for i in key.argsort().tolist()]
        return self._epoch[1]

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self.per_epoch)
        chosen = self.order(epoch)[place]
        examples = [self.dataset[i] for i in chosen]
        longest = max(len(e.input_ids) for e in examples)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros(len(chosen), longest, dtype=torch.bool)
        features = None
        for row, example in enumerate(examples):
            n = len(example.input_ids)
            ids[row, :n], mask[row, :n] = example.input_ids, example.loss_mask
        if self.features is not None:
            first = self.features[chosen[0]]
            features = first.new_zeros(len(chosen), longest, first.shape[1])
            for row, i in enumerate(chosen):
                features[row, : len(examples[row].input_ids)] = self.features[i]
        return Batch(ids, mask, torch.tensor([e.uid for e in examples]), epoch, features)
