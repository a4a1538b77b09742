"""examples/speculators_auf.py inside PyPI `speculators` 0.9.0: its own model, losses, reduction and command line.

Its trainer stops without an accelerator, so the step is called as the trainer calls it: `model(**batch, **kwargs)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import cross_entropy, decay, supported
from speculators import SpeculatorModel
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.train.cli import main
from speculators.train.config import TrainConfig
from speculators_auf import AUFDFlashDraftModel, auf_over_support
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, HIDDEN, BLOCK, ANCHORS, LENGTH, TAPS = 4, 24, 6, 40, 64, [0, 2, 3]
"""Four words, so that an untrained drafter is often right and supports of every length occur."""
DECODER: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "initializer_range": 0.3,
    "pad_token_id": None,
}


def build(kind: type[DFlashDraftModel], sample_from_anchor: bool = False) -> DFlashDraftModel:
    torch.manual_seed(2)
    config = DFlashSpeculatorConfig(
        transformer_layer_config=AutoConfig.for_model(**DECODER, attn_implementation="eager"),
        draft_vocab_size=VOCAB,
        block_size=BLOCK,
        aux_hidden_state_layer_ids=TAPS,
        mask_token_id=VOCAB - 1,
        sample_from_anchor=sample_from_anchor,
    )
    model = kind(config)
    for frozen in (model.embed_tokens, model.lm_head, model.verifier_lm_head):  # the verifier's, NaN until loaded
        torch.nn.init.normal_(frozen.weight)
    model.norm.register_forward_hook(lambda *call: keep(model, call[-1]))
    return model


def keep(model: DFlashDraftModel, hidden: Tensor) -> None:
    """What left the drafter, with its gradient: the last norm is applied once."""
    model.last_hidden = hidden
    if hidden.requires_grad:
        hidden.retain_grad()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two packed documents, a mask with holes, and fewer places for an anchor than anchors (padded blocks)."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, 5:20] = mask[:, 24:27] = mask[:, 34] = mask[:, 51] = 0
    return {
        "hidden_states": torch.randn(1, LENGTH, len(TAPS) * HIDDEN, generator=generator),
        "input_ids": torch.randint(0, VOCAB - 1, (1, LENGTH), generator=generator),
        "loss_mask": mask,
        "verifier_last_hidden_states": torch.randn(1, LENGTH, HIDDEN, generator=generator),
        "document_ids": (torch.arange(LENGTH) >= 20).long()[None],
    }


def options(loss: str = "ce", gamma: float = torch.inf, weight: str = "fixed-exp-decay") -> dict[str, Any]:
    train, _ = AUFDFlashDraftModel.get_trainer_kwargs(
        loss_fn=loss,
        loss_implementation="eager",  # the fused losses are Triton kernels
        dflash_decay_gamma=gamma,
        max_anchors=ANCHORS,
        per_position_loss_weight=weight,
    )
    return train


def run(model: DFlashDraftModel, batch: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # speculators draws its anchors from the global generator
    model.zero_grad()
    _, loss, metrics = model(**batch, **options(**kwargs))
    loss.backward()
    return loss.detach(), metrics


def gradients(model: DFlashDraftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: DFlashDraftModel, batch: dict[str, Tensor], gamma: float | None) -> tuple[Tensor, Tensor]:
    """speculators' sum(mask w ce) / (sum(mask) + 1e-5) with AUF's support in w, and which hidden states it holds."""
    torch.manual_seed(5)
    _, logits, _, mask, position = model._backbone_forward(**batch, max_anchors=ANCHORS)
    # A label is what the verifier says after the token before it; the mask is that of the label's own place.
    first = 0 if model.config.sample_from_anchor else 1
    labels = model.verifier_lm_head(model.verifier_norm(batch["verifier_last_hidden_states"][0])).argmax(-1)
    support, num = torch.zeros(position.shape, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(position), BLOCK):
        slots = list(range(start + first, start + BLOCK))
        wanted = [int(labels[position[t] - first]) for t in slots]
        hits = [int(logits[0, t].argmax()) == label for t, label in zip(slots, wanted, strict=True)]
        for t, label, kept in zip(slots, wanted, supported(hits, mask[0, slots].bool().tolist()), strict=True):
            if kept:
                num = num + decay(t - start + 1 - first, gamma) * cross_entropy(logits[0, t], label)
                support[t] = True
    return num / (mask.sum() + 1e-5), support


@pytest.mark.parametrize("sample_from_anchor", [False, True])
@pytest.mark.parametrize("gamma", [None, 2.0])
def test_loss_and_gradients_are_auf_by_hand(
    batch: dict[str, Tensor], gamma: float | None, sample_from_anchor: bool
) -> None:
    model = build(AUFDFlashDraftModel, sample_from_anchor)
    loss, metrics = run(model, batch, gamma=gamma or torch.inf)
    ours = gradients(model)
    model.zero_grad()
    expected, support = by_hand(model, batch, gamma)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    assert torch.equal(metrics["loss_sum"], loss), "what is logged is what is trained"
    assert ours.keys() == gradients(model).keys() and len(ours) > 20
    for name, theirs in gradients(model).items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-6, msg=name)
    lengths = support.view(-1, BLOCK).sum(-1).tolist()
    assert len(set(lengths)) >= 4, f"the supports are too alike to tell anything: {lengths}"


def test_nothing_after_the_breaker_nor_at_the_anchor_is_pushed(batch: dict[str, Tensor]) -> None:
    model = build(AUFDFlashDraftModel)
    run(model, batch)
    pushed = model.last_hidden.grad[0].abs().sum(-1) > 0
    _, support = by_hand(model, batch, None)
    assert torch.equal(pushed, support)
    assert not pushed[::BLOCK].any() and pushed.any() and not pushed.all()


@pytest.mark.parametrize("loss", ["ce", "kl_div", '{"ce": 0.1, "tv": 0.9}'])
@pytest.mark.parametrize("gamma", [torch.inf, 2.0])
def test_with_the_uniform_credit_it_is_speculators_own_loss(
    batch: dict[str, Tensor], loss: str, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = build(DFlashDraftModel)
    value, metrics = run(theirs, batch, loss=loss, gamma=gamma)
    auf, logged = run(build(AUFDFlashDraftModel), batch, loss=loss, gamma=gamma)
    assert auf < 0.9 * value, "fewer terms over the same denominator"
    assert all(torch.equal(logged[name], metrics[name]) for name in metrics if "loss" not in name)
    monkeypatch.setattr(AUFDFlashDraftModel, "credit", staticmethod(lambda slots: torch.ones(slots.valid.shape)))
    ours = build(AUFDFlashDraftModel)
    same, logged = run(ours, batch, loss=loss, gamma=gamma)
    assert torch.equal(same, value) and all(torch.equal(logged[name], metrics[name]) for name in metrics)
    assert all(torch.equal(gradients(ours)[name], grad) for name, grad in gradients(theirs).items())


def test_the_support_can_be_the_denominator(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AUFDFlashDraftModel, "credit", staticmethod(auf_over_support))
    model = build(AUFDFlashDraftModel)
    loss, _ = run(model, batch)
    over_valid, support = by_hand(model, batch, None)
    torch.manual_seed(5)
    _, _, _, mask, _ = model._backbone_forward(**batch, max_anchors=ANCHORS)
    torch.testing.assert_close(loss.double(), over_valid.detach() * mask.sum() / support.sum(), rtol=1e-5, atol=0)


def test_d_pace_beside_auf_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="per-position-loss-weight fixed-exp-decay"):
        build(AUFDFlashDraftModel)(**batch, **options(weight="dpace"))


def test_the_command_line_builds_it_and_what_it_saves_is_a_dflash_drafter(tmp_path: Path) -> None:
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**DECODER, "num_hidden_layers": 6}))
    target.save_pretrained(tmp_path / "target")
    said = {
        "speculator-type": "auf-dflash",
        "loss-fn": "ce",
        "dflash-decay-gamma": "inf",
        "num-layers": 2,
        "block-size": BLOCK,
        "mask-token-id": VOCAB - 1,
        "target-layer-ids": "0 2 3",
        "draft-attn-impl": "eager",
        "hidden-states-dtype": "float32",
        "verifier-name-or-path": tmp_path / "target",
        "data-path": tmp_path,
        "save-path": tmp_path / "drafter",
    }
    words = [word for flag, value in said.items() for word in (f"--{flag}", *str(value).split())]
    with pytest.warns(UserWarning, match="settings are ignored"):  # they are not: it counts built-in types only
        config = TrainConfig.resolve([*words, "--dry-run"])
    train, _ = AUFDFlashDraftModel.get_trainer_kwargs(**config.flatten())
    assert train["gamma"] == torch.inf and train["per_position_loss_weight"] == "fixed-exp-decay"
    main(config)
    back = SpeculatorModel.from_pretrained(tmp_path / "drafter")
    assert type(back) is DFlashDraftModel and back.config.speculators_model_type == "dflash"
    assert back.config.block_size == BLOCK and back.target_layer_ids == TAPS
