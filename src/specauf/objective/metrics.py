"""What a training step tells about itself, every figure as (sum, count) so that it pools exactly over steps and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specauf.objective.credit import exclusive_prefix

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from specauf.objective.blocks import Blocks
    from specauf.objective.wavefront import Readout


def leading_run(hit: Bool[Tensor, "... k"], valid: Bool[Tensor, "... k"]) -> Int[Tensor, ...]:
    """A: how many valid slots are right before the first valid one that is wrong. Holes neither count nor break."""
    return (exclusive_prefix(hit | ~valid) & hit & valid).sum(-1)


@torch.no_grad()
def block_metrics(readout: Readout, blocks: Blocks, credit: Float[Tensor, "b n k"]) -> dict[str, tuple[float, float]]:
    """Diagnostics of the paper's section 4 over the blocks that have a valid slot.

    `r_active` is |S| / (B-1), `r_active_B` is |S| / B (the paper writes B), S the slots with credit; `a_support` the
    accuracy on S; `simulated_tau` the leading run plus one against the data, teacher-forced; `head_rows` the rows put
    through the LM head per block; `common_accuracy` the accuracy on all valid slots, only when all were evaluated;
    `first_error_k` the share of blocks whose first failing slot is k (`first_error_0`: none failed).
    """
    real = blocks.valid.any(-1)
    n, k = float(real.sum()), blocks.valid.shape[-1]
    support = credit > 0
    size = float(support.sum())
    run = leading_run(readout.hit, blocks.valid)[real]
    out = {
        "r_active": (size, n * k),
        "r_active_B": (size, n * (k + 1)),
        "a_support": (float((readout.hit & support).sum()), size),
        "simulated_tau": (float(run.sum()) + n, n),
        "head_rows": (float(readout.evaluated.sum()), n),
    }
    if bool((readout.evaluated | ~blocks.valid).all()):
        out["common_accuracy"] = (float((readout.hit & blocks.valid).sum()), float(blocks.valid.sum()))
    wrong = ~readout.hit & blocks.valid & readout.evaluated
    failed = wrong.any(-1)[real]
    first = torch.where(failed, wrong[real].float().argmax(-1) + 1, 0)
    for slot, count in enumerate(first.bincount(minlength=k + 1).tolist()):
        out[f"first_error_{slot}"] = (float(count), n)
    return out
