"""Our Domino drafter and two-branch loss against PyPI `specforge` 0.2.0's own model, gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from specforge.algorithms.common.dflash_family_model import OnlineDominoModel
from specforge.modeling.draft.domino import DominoDraftModel
from test_specforge import ANCHORS, BLOCK, DRAFT, HIDDEN, VOCAB
from torch import Tensor, nn
from transformers import AutoConfig

from specauf.drafter.config import DFlashConfig
from specauf.drafter.domino import Corrected, Domino
from specauf.objective import Head, Objective, block_inputs, build_blocks
from specauf.objective.blocks import prefix_tokens
from specauf.objective.branches import Branch, Shared, two_branch_loss
from specauf.objective.metrics import leading_run

HEAD = {"projector_type": "domino", "gru_hidden_dim": 10, "emb_dim": 6, "pure_draft_prefix_len": 1}


def build(shift: bool, gamma: float | None) -> OnlineDominoModel:
    torch.manual_seed(2)
    said = {**DRAFT, "architectures": ["DominoDraftModel"], "initializer_range": 0.3}
    said["dflash_config"] = {**DRAFT["dflash_config"], **HEAD, "shift_label": shift}  # type: ignore[dict-item]
    head, embedding = nn.Linear(HIDDEN, VOCAB, bias=False), nn.Embedding(VOCAB, HIDDEN)
    return OnlineDominoModel(
        draft_model=DominoDraftModel(AutoConfig.for_model(**said, attn_implementation="sdpa")),
        target_lm_head=head.requires_grad_(False),
        target_embed_tokens=embedding.requires_grad_(False),
        mask_token_id=VOCAB - 1,
        block_size=BLOCK,
        attention_backend="sdpa",
        num_anchors=ANCHORS,
        loss_decay_gamma=gamma,
        shift_label=shift,
    )


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 20)
    mask[1, 5:8] = mask[1, 14] = 0
    mask[2, 6:] = 0
    return {
        "input_ids": torch.randint(0, VOCAB - 1, (3, 20), generator=generator),
        "hidden_states": torch.randn(3, 20, 3 * HIDDEN, generator=generator),
        "loss_mask": mask,
    }


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("lam", [1.0, 0.3, 0.0])
def test_decay_only_is_specforges_loss(batch: dict[str, Tensor], shift: bool, gamma: float | None, lam: float) -> None:
    theirs = build(shift, gamma)
    torch.manual_seed(5)  # SpecForge draws its anchors from the global generator
    loss, _, metrics = theirs(**batch, lambda_base=lam)
    loss.backward()
    torch.manual_seed(5)
    anchors, keep, _ = theirs._forward_draft_blocks(**batch)

    said = theirs.draft_model.config.to_dict()
    said["architectures"] = ["DominoDraftModel"]
    ours = Domino(DFlashConfig.from_json(said))
    ours.load_state_dict(theirs.draft_model.state_dict(), strict=True)
    config, ids = ours.config, batch["input_ids"]
    blocks = build_blocks(ids, batch["loss_mask"].bool(), anchors, keep.bool(), config.num_trained + 1)
    embed, weight = theirs.embed_tokens, theirs.lm_head.weight
    context = ours.context(batch["hidden_states"], torch.arange(20).expand(3, -1))
    pending = ours.pending(embed(block_inputs(ids, anchors, BLOCK, VOCAB - 1)), anchors, context)
    rows = Shared(pending, blocks.valid)
    corrected = Corrected(ours, rows, embed(prefix_tokens(ids, anchors, config.num_trained)))
    objective = Objective("uniform") if gamma is None else Objective("decay", gamma)
    pair = Branch(objective, "base"), Branch(objective, "final")
    found = two_branch_loss(rows, corrected, blocks, *pair, lam, Head(weight, expansion=ours.expansion))
    found.terms.loss.backward()

    torch.testing.assert_close(found.terms.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.base.loss, metrics["base_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.final.loss, metrics["final_loss"], rtol=1e-5, atol=0)
    real = blocks.valid.any(-1)
    for terms, name in ((found.base, "base_accept_len"), (found.final, "accept_len")):
        tau = (leading_run(terms.readout.hit, blocks.valid)[real] + 1.0).mean()
        torch.testing.assert_close(tau, metrics[name], rtol=1e-5, atol=0)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.draft_model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name].grad, want, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
