"""Several processes, one run: every rank adds its micro-batches to the same optimizer window.

R ranks with accumulation A take the step that one process with accumulation R A would. Rank r trains on every R-th
micro-batch, and gradients and denominators are summed over the ranks before the division. An average of the ranks' ratios
would weight a rank by how early its blocks failed.

    torchrun --nproc-per-node 8 -m specauf.cli train recipes/x.yaml

Every rank keeps the whole drafter (a billion parameters at most) and its moments. A target that is too large for every rank
to keep is spread over the ranks with `train.shard_target` (FSDP2).
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from specauf.strict import ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(hours=2)
"""How long ranks wait for one that prepares data or measures on held-out prompts."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. By default it is alone, and nothing is communicated."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether it prints, measures and writes."""
        return self.rank == 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """The main rank runs the block before the others, which then find on disk what it wrote.

        Only the main rank tells the user about an error; the others exit silently.
        """
        if not self.main:
            if self.agree(None):
                raise SystemExit(2)
            yield
            return
        try:
            yield
        except BaseException:
            self.agree(True)
            raise
        self.agree(False)

    def require_own_device(self, device: str) -> None:
        """Raise `ConfigError` when `device` (target.device) is one GPU for all processes of a run."""
        if self.world > 1 and device.startswith("cuda:"):
            raise ConfigError(
                f"target.device: {device} would put all {self.world} processes on one GPU; with cuda each takes its own"
            )

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world == 1:
            return [value]
        held: list[Any] = [None] * self.world
        dist.all_gather_object(held, value)
        return held

    def add(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The sum over the ranks of each tensor, in place where there is one; None stays where no rank has one.

        `like` gives shape and dtype where this rank has none but another does.
        """
        if self.world == 1:
            return list(tensors)
        held = torch.tensor([t is not None for t in tensors], dtype=torch.int32, device=like[0].device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        summed: list[Tensor | None] = []
        for tensor, model, any_has in zip(tensors, like, held.tolist(), strict=True):
            value = torch.zeros_like(model) if tensor is None and any_has else tensor
            if value is not None:
                dist.all_reduce(value)
            summed.append(value)
        return summed


@contextmanager
def ranks_of_run() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. One GPU per rank, by LOCAL_RANK; without GPUs, gloo.

    Raises `UserError` when there are fewer GPUs than processes on this machine, or WORLD_SIZE is set and torchrun's other
    variables are not. Of an error its peers may know nothing: the rank says what happened and is gone, and torchrun ends
    them. To take NCCL's group down would wait for them instead.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks()
        return
    backend, local = "gloo", int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun started a process {local}, this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    importlib.import_module("torch.distributed.nn.functional")  # see _forget_groups
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except ValueError as error:
        raise UserError(f"WORLD_SIZE={world} is set, and {error}. Start with torchrun, or unset it") from None
    try:
        yield Ranks(dist.get_rank(), world)
    except (SystemExit, KeyboardInterrupt):  # all ranks come here, but for one that has told the user why
        _leave()
        raise
    except BaseException as error:
        atexit.register(_vanish, 2 if isinstance(error, UserError) else 1)
        raise
    else:
        _leave()


def _leave() -> None:
    dist.destroy_process_group()
    _forget_groups()


def _vanish(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _forget_groups() -> None:
    """Drop what still refers to a destroyed group: its threads would live on and might abort the process when Python exits.

    `torch.distributed.nn.functional` binds the group of its first import as a default argument, and torch._dynamo imports
    it. Imported before there is a group, it binds none. FSDP2's mesh stays in DTensor's caches, more of them with each release.
    """
    from torch.distributed.tensor import debug

    planners = sys.modules.get("torch.distributed.tensor._redistribute")
    for module, clear in ((debug, "_clear_sharding_prop_cache"), (planners, "clear_redistribute_planner_cache")):
        getattr(module, clear, lambda: None)()
    for kept in gc.get_objects():
        # type(), as isinstance asks torch's deprecated objects for their class, and they warn
        if type(kept) is functools._lru_cache_wrapper and str(kept.__module__).startswith("torch.distributed."):
            kept.cache_clear()
    gc.collect()
