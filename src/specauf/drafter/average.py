"""The mean of several drafters' weights.

Branches that went on from one checkpoint, on different data, lie in one basin: the mean of their weights is a drafter too, and
often better than each (Wortsman et al. 2022, arXiv 2203.05482). Training them needs no connection between the machines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specauf.drafter.checkpoint import histories, load_drafter, origin
from specauf.drafter.dflash import DFlash
from specauf.strict import UserError


@torch.no_grad()
def average_weights(checkpoints: Sequence[Path]) -> DFlash:
    """The drafter whose every weight is the mean, summed in float64, of those in `checkpoints`.

    It is in float32, has the first one's configuration, and records the others under `averaged_with`. Raises `UserError` when
    two differ in configuration or target, or do not go on from one checkpoint.
    """
    first, *others = [load_drafter(path) for path in checkpoints]
    for path, other in zip(checkpoints[1:], others, strict=True):
        _require_branches(checkpoints[0], first, path, other)
    mean = {
        name: torch.stack([tensor.double(), *(o.state_dict()[name].double() for o in others)]).mean(0).float()
        for name, tensor in first.state_dict().items()
        if tensor.is_floating_point()
    }
    first.float().load_state_dict(mean, strict=False)
    record = [origin(path, other) for path, other in zip(checkpoints[1:], others, strict=True)]
    for trained in (o["trained"] for o in record):  # an ancestry that all share is told once
        if trained.get("init_from") == first.config.extra.get("init_from"):
            trained.pop("init_from", None)
    first.config = dataclasses.replace(first.config, extra={**first.config.extra, "averaged_with": record})
    return first


def _require_branches(path: Path, drafter: DFlash, other_path: Path, other: DFlash) -> None:
    for field in dataclasses.fields(drafter.config):
        ours, theirs = getattr(drafter.config, field.name), getattr(other.config, field.name)
        if field.name != "extra" and ours != theirs:
            raise UserError(f"{other_path} has {field.name}={theirs}, {path} has {ours}: these have no mean")
    known = other.state_dict()
    if any(not t.is_floating_point() and not torch.equal(t, known[n]) for n, t in drafter.state_dict().items()):
        raise UserError(f"{path} and {other_path} know other tokens (drafter.draft_vocab_size): these have no mean")
    for key in ("target_fingerprint", "template_hash"):
        if (theirs := other.config.extra.get(key)) != (ours := drafter.config.extra.get(key)):
            raise UserError(f"{other_path} was trained with {key} {theirs}, {path} with {ours}: these have no mean")
    if not _ancestors(drafter) & _ancestors(other):
        raise UserError(
            f"{path} and {other_path} do not go on from one checkpoint (drafter.init_from), so the mean of their weights "
            "is no drafter"
        )


def _ancestors(drafter: DFlash) -> set[Any]:
    return {past["init_from"]["weights"] for past in histories(drafter.config.extra) if past.get("init_from")}
