"""examples/specforge_auf.py inside PyPI `specforge` 0.2.0: its own model classes, reduction, trainer and checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import cross_entropy, decay, supported
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
from specforge.modeling.draft.dflash import DFlashDraftModel
from specforge_auf import STRATEGY, AUFDFlashModel, main
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, HIDDEN, BLOCK, ANCHORS, TAPS = 7, 24, 6, 9, (0, 2, 3)
"""Seven words, so that an untrained drafter is often right and supports of every length occur."""
DRAFT = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "block_size": BLOCK,
    "num_target_layers": 6,
    "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": list(TAPS)},
}
Losses = tuple[Tensor, Tensor, dict[str, Any]]


def build(kind: type[OnlineDFlashModel], **options: Any) -> OnlineDFlashModel:
    torch.manual_seed(2)
    config = AutoConfig.for_model(**{**DRAFT, "initializer_range": 0.3}, attn_implementation="sdpa")
    head, embedding = nn.Linear(HIDDEN, VOCAB, bias=False), nn.Embedding(VOCAB, HIDDEN)
    model = kind(
        draft_model=DFlashDraftModel(config),
        target_lm_head=head.requires_grad_(False),
        target_embed_tokens=embedding.requires_grad_(False),
        mask_token_id=VOCAB - 1,
        block_size=BLOCK,
        attention_backend="sdpa",
        num_anchors=ANCHORS,
        **options,
    )
    # What left the drafter, with its gradient: the last norm is applied once.
    model.draft_model.norm.register_forward_hook(lambda *call: keep(model, call[-1]))
    return model


def keep(model: OnlineDFlashModel, hidden: Tensor) -> None:
    model.last_hidden = hidden
    if hidden.requires_grad:
        hidden.retain_grad()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three sequences: one full, one whose mask has holes, one with fewer anchors than the others (dropped blocks)."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 20)
    mask[1, 5:8] = mask[1, 14] = 0
    mask[2, 6:] = 0
    return {
        "input_ids": torch.randint(0, VOCAB - 1, (3, 20), generator=generator),
        "hidden_states": torch.randn(3, 20, len(TAPS) * HIDDEN, generator=generator),
        "loss_mask": mask,
    }


def run(model: OnlineDFlashModel, batch: dict[str, Tensor]) -> Losses:
    torch.manual_seed(5)  # SpecForge draws its anchors from the global generator
    model.zero_grad()
    loss, accuracy, metrics = model(**batch)
    loss.backward()
    return loss.detach(), accuracy, metrics


def gradients(model: OnlineDFlashModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: OnlineDFlashModel, batch: dict[str, Tensor], gamma: float | None) -> tuple[Tensor, Tensor]:
    """SpecForge's ratio sum(w ce) / sum(w) with AUF's support in w, and which hidden states that support holds."""
    torch.manual_seed(5)
    anchors, real, hidden = model._forward_draft_blocks(**batch)
    logits = model.lm_head(hidden).view(*anchors.shape, BLOCK, VOCAB)
    support = torch.zeros(*anchors.shape, BLOCK, dtype=torch.bool)
    num, den = torch.zeros((), dtype=torch.float64), 0.0
    for b, n in real.nonzero().tolist():
        slots = [k for k in range(1, BLOCK) if anchors[b, n] + k < batch["input_ids"].shape[1]]
        at = [int(anchors[b, n]) + k for k in slots]
        labels = [int(batch["input_ids"][b, i]) for i in at]
        hits = [int(logits[b, n, k].argmax()) == label for k, label in zip(slots, labels, strict=True)]
        for k, label, kept in zip(
            slots, labels, supported(hits, batch["loss_mask"][b, at].bool().tolist()), strict=True
        ):
            if kept:
                num = num + decay(k, gamma) * cross_entropy(logits[b, n, k], label)
                den += decay(k, gamma)
                support[b, n, k] = True
    return num / den, support.view(hidden.shape[:2])


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("chunk", [0, 4, 128])
def test_loss_and_gradients_are_auf_by_hand(batch: dict[str, Tensor], gamma: float | None, chunk: int) -> None:
    model = build(AUFDFlashModel, loss_decay_gamma=gamma, objective_chunk_blocks=chunk)
    loss, _, metrics = run(model, batch)
    ours = gradients(model)
    model.zero_grad()
    expected, support = by_hand(model, batch, gamma)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    num, den = metrics["loss_terms"]  # what the trainer accumulates; the loss is only shown
    torch.testing.assert_close((num / den).double(), expected.detach(), rtol=1e-6, atol=0)
    assert ours.keys() == gradients(model).keys() and len(ours) > 20
    for name, theirs in gradients(model).items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-6, msg=name)
    lengths = support.view(-1, BLOCK).sum(-1).tolist()
    assert len(set(lengths)) >= 4, f"the supports are too alike to tell anything: {lengths}"


def test_nothing_after_the_breaker_nor_at_the_anchor_is_pushed(batch: dict[str, Tensor]) -> None:
    model = build(AUFDFlashModel)
    run(model, batch)
    pushed = model.last_hidden.grad.abs().sum(-1) > 0
    _, support = by_hand(model, batch, None)
    assert torch.equal(pushed, support)
    assert not pushed[:, ::BLOCK].any() and pushed.any() and not pushed.all()


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_with_the_uniform_credit_it_is_specforges_own_loss(
    batch: dict[str, Tensor], gamma: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = build(OnlineDFlashModel, loss_decay_gamma=gamma)
    loss, accuracy, metrics = run(theirs, batch)
    auf = run(build(AUFDFlashModel, loss_decay_gamma=gamma), batch)
    assert not torch.isclose(auf[0], loss, rtol=1e-3) and torch.equal(auf[1], accuracy), "AUF changes the loss alone"
    monkeypatch.setattr(AUFDFlashModel, "credit", staticmethod(lambda slots: torch.ones(slots.valid.shape)))
    ours = build(AUFDFlashModel, loss_decay_gamma=gamma)
    same = run(ours, batch)
    torch.testing.assert_close(same[0], loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(same[2]["loss_terms"], metrics["loss_terms"], rtol=1e-6, atol=0)
    assert torch.equal(same[1], accuracy)
    for name, grad in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """SpecForge's offline training of three steps on eight feature files; its last checkpoint."""
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))  # torchrun's part
    target = {k: v for k, v in DRAFT.items() if k not in ("architectures", "block_size", "dflash_config")}
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**target, "num_hidden_layers": 6})).save_pretrained(
        tmp_path / "target"
    )
    (tmp_path / "draft.json").write_text(json.dumps(DRAFT))
    (tmp_path / "features").mkdir()
    for i in range(8):
        sample = {"input_ids": torch.randint(0, VOCAB - 1, (16,)), "loss_mask": torch.ones(16)}
        sample["hidden_states"] = torch.randn(16, len(TAPS) * HIDDEN)
        torch.save(sample, tmp_path / "features" / f"{i}.ckpt")

    def run_to_the_end(name: str, **training: Any) -> dict[str, Any]:
        options = {"strategy": STRATEGY, "max_steps": 3, "save_interval": 1, "batch_size": 2, "num_anchors": ANCHORS}
        options |= {"attention_backend": "sdpa", "fsdp_sharding": "NO_SHARD", "learning_rate": 0.01, **training}
        config = {
            "model": {
                "target_model_path": str(tmp_path / "target"),
                "draft_model_config": str(tmp_path / "draft.json"),
                "torch_dtype": "float32",
            },
            "data": {"hidden_states_path": str(tmp_path / "features"), "dataloader_num_workers": 0},
            "training": options,
            "run_id": "run",
            "output_dir": str(tmp_path / name),
        }
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        main(str(tmp_path / "run.yaml"))
        return torch.load(tmp_path / name / "run-step3" / "training_state.pt", weights_only=False)

    return run_to_the_end


def test_the_strategy_trains_and_resumes_in_specforges_own_trainer(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    whole, dense = train("whole"), train("dense", strategy="dflash")
    assert whole["strategy"] == STRATEGY and whole["global_step"] == 3
    weights = whole["draft_state_dict"]
    assert weights.keys() == dense["draft_state_dict"].keys(), "the drafter's checkpoint is DFlash's"
    assert any(not torch.equal(weights[name], tensor) for name, tensor in dense["draft_state_dict"].items())
    resumed = train("resumed", resume_from=str(tmp_path / "whole" / "run-step1"))["draft_state_dict"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match="written by strategy"):
        train("crossed", strategy="dflash", resume_from=str(tmp_path / "whole" / "run-step1"))


def test_a_loss_type_beside_the_strategy_is_refused(train: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="loss_type"):
        train("refused", loss_type="dpace")


def test_the_page_quotes_the_examples() -> None:
    root = Path(__file__).parents[2]
    examples = "".join((root / "examples" / f"{name}_auf.py").read_text() for name in ("specforge", "speculators"))
    quoted = re.findall(r"```python\n(.*?)```", (root / "docs" / "integrations.md").read_text(), re.DOTALL)
    assert len(quoted) == 4 and all(block in examples for block in quoted)
