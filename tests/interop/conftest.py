"""Targets and drafters for the comparison with the reference implementation of DFlash (PyPI `dflash` 0.1.0)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash.model import DFlashDraftModel
from transformers.utils import logging as transformers_logging

from specauf import assets
from specauf.config import TargetConfig
from specauf.drafter.config import DFlashConfig
from specauf.drafter.dflash import DFlash, save_drafter
from specauf.target import Target

transformers_logging.disable_progress_bar()

TINY_VOCAB, TINY_MASK, TINY_EOS = 96, 95, 1


MEASURED: list[str] = []


def note(line: str) -> None:
    """Print a measurement below the test results."""
    MEASURED.append(line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section("measured against dflash 0.1.0")
        terminalreporter.write_line("\n".join(MEASURED))


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
    if path is None and os.environ.get("SPECAUF_OFFLINE", "") not in ("", "0"):
        pytest.skip("the embedded target is not in the cache and SPECAUF_OFFLINE forbids fetching it")
    return Target.load(TargetConfig(path=str(path or assets.smollm2()), device="cpu"))


@pytest.fixture(scope="session", params=["llama", "qwen3", "embedded"])
def target(request: pytest.FixtureRequest) -> Target:
    return embedded_target() if request.param == "embedded" else tiny_target(request.param)


@pytest.fixture(autouse=True)
def cpu_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference stops its clock with torch.cuda.synchronize(), which a CPU build refuses."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    yield


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
