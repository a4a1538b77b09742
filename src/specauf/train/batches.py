"""Which conversations a step sees: a function of (seed, step), so that a resumed run sees those it would have seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from specauf.config import TrainConfig
from specauf.data.dataset import TokenDataset
from specauf.data.features import FeatureCache
from specauf.objective.blocks import counter_hash
from specauf.strict import UserError

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
    final: Float[Tensor, "b s h"] | None = None
    """The target's final hidden states, when the objective reads its distribution and a cache holds them."""
    argmax: Int[Tensor, "b s"] | None = None
    """The target's argmax after each position, when the labels are the target's and a cache holds it."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        fields: Any = (change(x) if isinstance(x, torch.Tensor) else x for x in self)
        return Batch(*fields)


def require_batch(examples: int, config: TrainConfig) -> None:
    """Raise `UserError` when `examples` conversations do not fill a batch."""
    if examples < config.batch_size:
        raise UserError(f"{examples} training conversations are fewer than train.batch_size={config.batch_size}")


@dataclass
class Batches:
    """Micro-batches of a dataset, by global index."""

    dataset: TokenDataset
    features: FeatureCache | None
    config: TrainConfig
    extras: tuple[str, ...] = ()
    """What else to take from the cache, of `final` and `argmax`."""

    def __post_init__(self) -> None:
        self.examples = len(self.features) if self.features is not None else len(self.dataset)
        require_batch(self.examples, self.config)
        self._lengths = self.dataset.offsets[: self.examples + 1].diff()
        self._uids = self.dataset.uid[: self.examples]
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
        ids = pad_sequence([e.input_ids for e in examples], batch_first=True)
        mask = pad_sequence([e.loss_mask for e in examples], batch_first=True)
        batch = Batch(ids, mask, torch.tensor([e.uid for e in examples]), epoch, None)
        if (cache := self.features) is None:
            return batch
        stored: dict[str, Any] = {
            name: pad_sequence([cache.get(i, name) for i in chosen], batch_first=True)
            for name in ("features", *self.extras)
        }
        return batch._replace(**stored)


@dataclass
class Prefetcher:
    """Batches; a thread puts the next one together while this one is trained on.

    What a batch holds depends on its index alone, so reading ahead changes nothing, and a wrong guess only costs time.
    """

    batches: Batches
    device: torch.device
    stride: int = 1
    """How far the next index lies from this one."""
    waited: float = 0.0
    """Seconds that training has waited for data, in all."""
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "batches"))
    _ahead: tuple[int, Future[Batch]] | None = None

    def __getitem__(self, index: int) -> Batch:
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = index, self._worker.submit(self._load, index)
        found = self._ahead[1].result()
        self._ahead = index + self.stride, self._worker.submit(self._load, index + self.stride)
        batch = found.map(lambda t: t.to(self.device, non_blocking=True))
        self.waited += time.perf_counter() - began
        return batch

    def _load(self, index: int) -> Batch:
        found = self.batches[index]
        if self.device.type == "cuda":  # only pinned memory is copied while the device works
            found = found.map(torch.Tensor.pin_memory)
        return found
