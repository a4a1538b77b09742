"""A drafter on disk: `config.json` and `model.safetensors`, as z-lab and SpecForge lay them out, read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.drafter.vocabulary import kept_tokens
from specauf.files import save_tensors
from specauf.strict import UserError

OLD_PREFIX = "logit_head."
"""The name prefix of a Domino head's tensors in SpecForge before 0.2.0."""


def build_drafter(config: DFlashConfig, seed: int = 0) -> DFlash:
    """The drafter that the configuration describes, with initial weights that depend on `seed` alone."""
    return Domino(config, seed) if config.domino else DFlash(config, seed)


def save_drafter(drafter: DFlash, directory: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `config.json` and `model.safetensors` in the z-lab layout, without a name prefix; atomic per file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    config = dataclasses.replace(drafter.config, extra={**drafter.config.extra, **(extra or {})}).to_json()
    config["dtype"] = str(drafter.fc.weight.dtype).removeprefix("torch.")
    save_tensors(tensors, directory / "model.safetensors.tmp", metadata={"format": "pt"})
    (directory / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    # safetensors makes files that only their owner can read.
    shutil.copymode(directory / "config.json.tmp", directory / "model.safetensors.tmp")
    os.replace(directory / "model.safetensors.tmp", directory / "model.safetensors")
    os.replace(directory / "config.json.tmp", directory / "config.json")
    return directory


def load_drafter(directory: str | Path, device: str | torch.device = "cpu") -> DFlash:
    """Load a drafter strictly. Raises `UserError` on a missing file, field or tensor, or on an unexpected one."""
    directory = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not a drafter checkpoint: {name} is missing")
    try:
        fields = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors", device=str(device))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{directory} is not a drafter checkpoint: {error}") from None
    config = DFlashConfig.from_json(fields, str(directory / "config.json"))
    with torch.device("meta"):
        drafter = build_drafter(config)
    tensors = {name.removeprefix(OLD_PREFIX): tensor for name, tensor in tensors.items()}
    wanted = {name: tuple(p.shape) for name, p in drafter.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for what, names in (
        ("missing", wanted.keys() - found.keys()),
        ("unexpected", found.keys() - wanted.keys()),
        ("misshapen", {n for n in wanted.keys() & found.keys() if wanted[n] != found[n]}),
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
