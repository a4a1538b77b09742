"""A warm start: from another drafter, or with layers that begin as the target's.

A DFlash layer has the shape of the target's layers. A copied one reads the target's own last tap as its context and knows
before the first step which tokens follow each other; it has to learn to do without the layers that were left out. The paper
begins with random weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from specauf.drafter.checkpoint import build_drafter, load_drafter, origin
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash, Layer
from specauf.drafter.domino import Domino
from specauf.strict import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

log = logging.getLogger(__name__)

PROJECTIONS = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)

NOT_GEOMETRY = (
    *("extra", "initializer_range", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "block_size"),
)
"""Fields of a drafter's configuration on which the shape of no weight depends."""


def start_from(directory: Path, geometry: DFlashConfig, seed: int) -> DFlash:
    """A drafter of this geometry with the weights of a checkpoint, whose origin it records.

    No weight depends on the block size, so that may differ: longer blocks pay once tau has grown. And where both label
    their slots alike, Domino may begin as a DFlash drafter, with a head from `seed` that corrects nothing before the first
    step, or a DFlash drafter as Domino's body without its head.

    Raises `ConfigError` naming what differs, and `UserError` for a directory that holds no drafter.
    """
    found = load_drafter(directory)
    one_head = (found.config.domino is None) != (geometry.domino is None)
    if one_head and found.config.first_slot != geometry.first_slot:
        raise ConfigError(
            f"drafter.init_from: slot {found.config.first_slot} of {directory} predicts the token after the anchor, slot "
            f"{geometry.first_slot} in the recipe: only drafter.shift_label=false joins Domino to DFlash"
        )
    for name in (f.name for f in dataclasses.fields(DFlashConfig) if f.name not in NOT_GEOMETRY):
        have, want = getattr(found.config, name), getattr(geometry, name)
        if have != want and not (one_head and name == "domino"):
            raise ConfigError(f"drafter.init_from: {directory} has {name}={have}, the recipe needs {want}")
    drafter = build_drafter(dataclasses.replace(geometry, extra={"init_from": origin(directory, found)}), seed=seed)
    drafter.load_state_dict(found.state_dict(), strict=not one_head)
    if one_head and isinstance(drafter, Domino):
        nn.init.zeros_(drafter.expansion)
    elif one_head:
        log.warning("drafter.init_from: the head of %s, a Domino drafter, is left behind", directory)
    return drafter


@torch.no_grad()
def copy_layers(drafter: DFlash, layers: nn.ModuleList, final_norm: nn.Module, ids: Sequence[int]) -> None:
    """Begin the drafter's layers as copies of `layers[i]` for i in `ids`, its norm as the target's, `fc` as the last tap.

    The drafter normalises queries and keys. If the target does not, the norm's gain becomes the root mean square that they
    would have on unit-variance input. Raises `ConfigError` for an id or a shape that is not the drafter's.
    """
    for own, i in zip(drafter.layers, ids, strict=True):
        if not 0 <= i < len(layers):
            raise ConfigError(f"drafter.init_layers: the target has layers 0 to {len(layers) - 1}, not {i}")
        assert isinstance(own, Layer)
        _copy(own, layers[i], i)
    hidden = drafter.config.hidden_size
    noise = drafter.fc.weight * 0.1  # the other taps begin small
    drafter.fc.weight.copy_(noise)
    drafter.fc.weight[:, -hidden:] += torch.eye(hidden)
    drafter.hidden_norm.weight.copy_(_gain(layers[ids[-1]].get_submodule("input_layernorm"), hidden))
    drafter.norm.weight.copy_(_gain(final_norm, hidden))


def _copy(own: Layer, theirs: nn.Module, number: int) -> None:
    found, hidden = dict(theirs.named_parameters()), own.input_layernorm.weight.numel()
    layer = f"drafter.init_layers: layer {number} of the target has"
    if sandwiched := [name for name in found if name.startswith(("pre_feedforward", "post_feedforward"))]:
        told = "its norms stand elsewhere than the drafter's: leave init_layers out"
        raise ConfigError(f"{layer} {sandwiched[0]}, {told}")
    norms = {name for name in found if name.startswith("self_attn.") and "norm" in name}
    if unknown := sorted(norms - {f"self_attn.{side}_norm.weight" for side in "qk"}):
        raise ConfigError(f"{layer} {unknown[0]}, the drafter none: leave it out")
    for name in PROJECTIONS:
        parameter = own.get_parameter(name)
        if name not in found or found[name].shape != parameter.shape:
            has = f"{tuple(found[name].shape)}" if name in found else "none"
            needs = f"the drafter needs {tuple(parameter.shape)}: leave init_layers out, and intermediate_size"
            raise ConfigError(f"{layer} {has} for {name}, {needs}")
        parameter.copy_(found[name])
        if (bias := name.replace("weight", "bias")) in found:
            raise ConfigError(f"{layer} {bias}, the drafter none: leave it out")
    ours, its = _probe(own.mlp, hidden), _probe(theirs.get_submodule("mlp"), hidden)
    if (ours - its).norm() > 0.05 * its.norm():
        log.warning("drafter.init_layers: layer %d of the target has another activation: its MLP is no copy", number)
    for name in ("input_layernorm", "post_attention_layernorm"):
        if f"{name}.weight" not in found:
            raise ConfigError(f"{layer} no {name}: leave init_layers out")
        own.get_submodule(name).weight.copy_(_gain(theirs.get_submodule(name), hidden))  # type: ignore[operator]
    for side in ("q", "k"):
        norm, name = own.self_attn.get_parameter(f"{side}_norm.weight"), f"self_attn.{side}_norm.weight"
        if name in found:
            norm.copy_(found[name])
        else:
            seen = own.get_parameter(f"self_attn.{side}_proj.weight") * own.input_layernorm.weight
            norm.fill_(seen.square().sum(1).mean().sqrt())


def _probe(mlp: nn.Module, hidden: int) -> Float[Tensor, " h"]:
    """What the MLP makes of one input that is the same for all, in float32 on the CPU."""
    row = torch.linspace(-10, 10, hidden).to(next(mlp.parameters()))
    out: Tensor = mlp(row[None, None])
    return out.flatten().float().cpu()


def _gain(norm: nn.Module, hidden: int) -> Float[Tensor, " h"]:
    """The factor an RMSNorm multiplies by, however it is stored (some store it less one)."""
    where, *more = norm.parameters()
    gain: Tensor = norm(torch.ones(1, hidden, dtype=where.dtype, device=where.device))[0]
    if more or not gain.any():  # a LayerNorm turns ones into zeros
        raise ConfigError(
            f"drafter.init_layers: {type(norm).__name__} of the target is no RMSNorm: leave init_layers out"
        )
    return gain
