"""SpecForge 0.2.0's own DFlash training step on random features: forward, backward, gradient clipping, AdamW.

    bash tests/interop/run.sh specforge     # builds the environment that has SpecForge
    .venv-interop-specforge/bin/python -m benchmarks.specforge_step --block-size 16 --anchors 32 [--gamma 7]

SpecForge's trainer core runs its own model, strategy and optimizer, assembled as in its single-process offline run: float32
on the CPU, scaled dot product attention. `--chunk-blocks 0` avoids recomputing the head, at the cost of memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
from specforge.modeling.draft.dflash import DFlashDraftModel
from specforge.optimizer import BF16Optimizer
from specforge.runtime.contracts import TrainBatch
from specforge.training.backend import FSDPTrainingBackend, ParallelConfig
from specforge.training.controller import TrainerCore
from specforge.training.strategies.base import DFlashTrainStrategy
from torch import nn
from transformers import Qwen3Config

from benchmarks.stepping import Shape, main, random_batch


def build(shape: Shape) -> Callable[[], object]:
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        attn_implementation="sdpa",
        block_size=shape.block_size,
        num_target_layers=30,
        dflash_config={"mask_token_id": shape.vocab_size - 1, "target_layer_ids": list(range(shape.taps))},
    )
    embedding = nn.Embedding(shape.vocab_size, shape.hidden_size).requires_grad_(False)
    nn.init.normal_(embedding.weight, std=0.04)  # about what a trained table has; the head's logits stay moderate
    head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
    head.weight = embedding.weight  # tied, as SmolLM2's
    model = OnlineDFlashModel(
        draft_model=DFlashDraftModel(config),
        target_lm_head=head,
        target_embed_tokens=embedding,
        mask_token_id=shape.vocab_size - 1,
        block_size=shape.block_size,
        attention_backend="sdpa",
        num_anchors=shape.anchors,
        loss_decay_gamma=shape.gamma,
        objective_chunk_blocks=shape.chunk_blocks,
    )
    backend = FSDPTrainingBackend(
        ParallelConfig(param_dtype=torch.float32),
        optimizer_factory=lambda draft: BF16Optimizer(draft, lr=6e-4, max_grad_norm=1.0, total_steps=10_000),
    )
    backend.prepare_model(model, wrap=False, optimizer_target=model.draft_model)
    core = TrainerCore(DFlashTrainStrategy(model), backend)
    batch = TrainBatch(sample_ids=["random"] * shape.sequences, strategy="dflash", tensors=random_batch(shape))
    return lambda: core.train_step(batch)


if __name__ == "__main__":
    main("specforge 0.2.0", build)
