"""Targets and drafters for the comparison with the reference implementation of DFlash (PyPI `dflash` 0.1.0)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import DFlashDraftModel
from torch import Tensor
from transformers.utils import logging as transformers_logging

from specauf import assets
from specauf.config import TargetConfig
from specauf.drafter.checkpoint import save_drafter
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash
from specauf.target import Target

transformers_logging.disable_progress_bar()

TOLERANCE = 1e-4
"""Largest difference of any hidden state or logit, in float32."""
TINY_VOCAB, TINY_MASK, TINY_EOS = 96, 95, 1


MEASURED: list[str] = []


def note(line: str) -> None:
    """Print a measurement below the test results."""
    MEASURED.append(line)


def tiny_target(family: str) -> Target:
    """A random target of 8 layers. Untied head; head_dim is not hidden_size / heads, so that mixing them up shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=TINY_VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 3e4},
        rms_norm_eps=1e-5,
        initializer_range=0.25,  # wide enough that greedy text does not settle on one token
        bos_token_id=0,
        eos_token_id=TINY_EOS,
        pad_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(11)
    return Target(AutoModelForCausalLM.from_config(config, dtype=torch.float32), None, f"tiny-{family}")


def embedded_target() -> Target:
    """The directory in SPECAUF_INTEROP_TARGET, else the embedded default, which is fetched and converted if need be."""
    path = os.environ.get("SPECAUF_INTEROP_TARGET") or assets.cached_smollm2()
    if path is None and assets.offline():
        pytest.skip(
            "compares on the real target, which is not cached, and SPECAUF_OFFLINE was set to forbid its download"
        )
    target = Target.load(TargetConfig(path=str(path or assets.smollm2()), device="cpu"))
    target.name = Path(target.name).name
    return target


def drafter_config(target: Target, *, layers: int = 2, num_taps: int = 3, **rest: Any) -> DFlashConfig:
    rest.setdefault("block_size", 8)
    mask = TINY_MASK if target.tokenizer is None else target.mask_token_id()
    return DFlashConfig.for_target(
        target.config, num_hidden_layers=layers, mask_token_id=mask, num_taps=num_taps, **rest
    )


def shake(drafter: DFlash, seed: int = 5) -> DFlash:
    """Random norm weights and biased matrices: a fresh drafter's unit norms would hide a norm that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * 2 * parameter.shape[1] ** -0.5)
    return drafter


def reload_theirs(drafter: DFlash, directory: Path) -> DFlashDraftModel:
    """Our checkpoint in the reference's class, loaded strictly."""
    save_drafter(drafter, directory)
    model, info = DFlashDraftModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def block_ids(tokens: Tensor, anchors: Tensor, drafter: DFlash) -> Tensor:
    """Anchor token, then MASK: [b, n, B]. Written out here rather than taken from the code under test."""
    ids = torch.full((*anchors.shape, drafter.config.block_size), drafter.config.mask_token_id)
    ids[..., 0] = tokens.gather(1, anchors)
    return ids


@torch.no_grad()
def our_hidden(drafter: DFlash, target: Target, tokens: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
    """All blocks of all sequences in one call: [b, n, B, h]."""
    positions = torch.arange(features.shape[1]).expand(features.shape[:2])
    context = drafter.context(features, positions)
    return drafter(target.embed(block_ids(tokens, anchors, drafter)), anchors, context)


@torch.no_grad()
def their_hidden(
    drafter: DFlash, theirs: DFlashDraftModel, target: Target, tokens: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    """One sequence and one block at a time; its context is cut to the positions before the anchor: [b, n, B, h]."""
    ids, rows = block_ids(tokens, anchors, drafter), []
    for i, j in [(i, j) for i in range(anchors.shape[0]) for j in range(anchors.shape[1])]:
        a = int(anchors[i, j])
        rows.append(
            theirs(
                position_ids=torch.arange(a + drafter.config.block_size)[None],
                noise_embedding=target.model.get_input_embeddings()(ids[i : i + 1, j]),
                target_hidden=features[i : i + 1, :a],
            )
        )
    return torch.cat(rows).view(*ids.shape, -1)
