"""A drafter on disk: `config.json` and `model.safetensors`, as z-lab and SpecForge lay them out, read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.drafter.vocabulary import kept_tokens
from specauf.files import atomic_file, save_tensors
from specauf.strict import UserError

OLD_PREFIX = "logit_head."
"""The name prefix of a Domino head's tensors in SpecForge before 0.2.0."""


def build_drafter(config: DFlashConfig, seed: int = 0) -> DFlash:
    """The drafter that the configuration describes, with initial weights that depend on `seed` alone."""
    return Domino(config, seed) if config.domino else DFlash(config, seed)


def save_drafter(drafter: DFlash, directory: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `config.json` and `model.safetensors` in the z-lab layout, without a name prefix; atomic per file."""
    directory = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    config = dataclasses.replace(drafter.config, extra={**drafter.config.extra, **(extra or {})}).to_json()
    config["dtype"] = str(drafter.fc.weight.dtype).removeprefix("torch.")
    with atomic_file(directory / "config.json") as text, atomic_file(directory / "model.safetensors") as weights:
        save_tensors(tensors, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(config, indent=2) + "\n")
    return directory


def load_drafter(directory: str | Path, device: str | torch.device = "cpu") -> DFlash:
    """Load a drafter strictly. Raises `UserError` on a missing file, field or tensor, or on an unexpected one."""
    directory = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            inside = directory / "checkpoint"  # where `train` puts it in its run's directory
            hint = f": give {inside}" if (inside / name).is_file() else ""
            raise UserError(f"{directory} is not a drafter checkpoint: {name} is missing{hint}")
    try:
        fields = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors", device=str(device))
    except (ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{directory} is not a drafter checkpoint: {error}") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error}") from None
    config = DFlashConfig.from_json(fields, str(directory / "config.json"))
    if (layers := config.num_hidden_layers) > len(tensors):  # too many could not even be built
        raise UserError(f"{directory}/model.safetensors: {len(tensors)} tensors, too few for {layers} layers")
    with torch.device("meta"):
        drafter = build_drafter(config)
    tensors = {name.removeprefix(OLD_PREFIX): tensor for name, tensor in tensors.items()}
    kept = drafter.state_dict()
    wanted = {name: tuple(p.shape) for name, p in kept.items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    both = wanted.keys() & found.keys()
    for what, names in (
        ("missing", wanted.keys() - found.keys()),
        ("unexpected", found.keys() - wanted.keys()),
        ("misshapen", {n for n in both if wanted[n] != found[n]}),
        ("mistyped", {n for n in both if tensors[n].is_floating_point() != kept[n].is_floating_point()}),
    ):
        if names:
            raise UserError(f"{directory}/model.safetensors: {what} tensors {', '.join(sorted(names)[:5])}")
    drafter.load_state_dict(tensors, strict=True, assign=True)
    try:
        kept_tokens(drafter)
    except UserError as error:
        raise UserError(f"{directory}/model.safetensors: {error}") from None
    return drafter


def fingerprint(drafter: DFlash) -> str:
    """Twelve hex digits of the weights rounded to bfloat16: a checkpoint and its exports agree (not those in float16)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(drafter.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def weights_hash(directory: Path) -> str:
    """Twelve hex digits of a drafter's weights as they are on disk."""
    with (directory / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def origin(directory: Path, drafter: DFlash) -> dict[str, Any]:
    """What a drafter that is made from this one, read from `directory`, records of it."""
    return {
        "path": str(directory),
        "weights": weights_hash(directory),
        "block_size": drafter.config.block_size,
        "trained": dict(drafter.config.extra),
    }


def histories(extra: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A checkpoint's record of its training, and those of all that it was made from."""
    yield extra
    for source in (extra.get("init_from"), *extra.get("averaged_with", ())):
        if trained := (source or {}).get("trained"):
            yield from histories(trained)
