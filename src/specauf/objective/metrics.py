"""The paper's training diagnostics and a few more, every figure as (sum, count).

Such pairs pool exactly over steps and ranks. The paper's figures are the active token ratio and the support accuracy
(section 4) and the common-token accuracy (section 5.1).
"""

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
    """A: the number of correct valid slots before the first wrong one. Holes neither count nor break the run."""
    return (exclusive_prefix(hit | ~valid) & hit & valid).sum(-1)


@torch.no_grad()
def block_metrics(
    readout: Readout, blocks: Blocks, credit: Float[Tensor, "b n k"], served: int | None = None
) -> dict[str, tuple[float, float]]:
    """Diagnostics over the blocks that have a valid slot. S is the set of slots with credit.

    - `r_active`: |S| / (B-1); `r_active_B`: |S| / B, as the paper writes it
    - `a_support`: the accuracy on S
    - `simulated_tau`: the leading run against the labels, teacher-forced, plus one (target labels end where it leaves
      the text)
    - `head_rows`: slots whose logits were formed, per block (F-AUF's final branch reads those of its support twice)
    - `common_accuracy`: the accuracy on all valid slots, only when all were evaluated
    - `outside`: the share of valid slots whose label is not in the draft vocabulary, where there is one; they are wrong in
      every figure
    - `first_error_k`: the share of blocks whose first failing slot is k (`first_error_0`: none failed)
    - `credit_k`: the mean credit of slot k = 1..B-1 (0 where it is invalid)

    `simulated_tau` and `first_error_k` are left out when some block was not read up to its first mistake. All but
    `head_rows` look at the first `served` predictions alone, since tau counts no others.
    """
    rows = float(readout.evaluated.sum())
    outside = torch.zeros_like(blocks.valid) if readout.outside is None else readout.outside
    known = readout.evaluated | outside  # a label outside the draft vocabulary is known to fail without being read
    valid, hit, known, outside, credit = (t[..., :served] for t in (blocks.valid, readout.hit, known, outside, credit))
    real = valid.any(-1)
    n, k = float(real.sum()), valid.shape[-1]
    support = credit > 0
    size = float(support.sum())
    out = {
        "r_active": (size, n * k),
        "r_active_B": (size, n * (k + 1)),
        "a_support": (float((hit & support).sum()), size),
        "head_rows": (rows, n),
    }
    if readout.outside is not None:
        out["outside"] = (float(outside.sum()), float(valid.sum()))
    if bool((known | ~valid).all()):
        out["common_accuracy"] = (float((hit & valid).sum()), float(valid.sum()))
    if not bool((exclusive_prefix(hit | ~valid) & valid & ~known).any()):
        out["simulated_tau"] = (float(leading_run(hit, valid)[real].sum()) + n, n)
        wrong = ~hit & valid & known
        first = torch.where(wrong.any(-1)[real], wrong[real].float().argmax(-1) + 1, 0)
        for slot, count in enumerate(first.bincount(minlength=k + 1).tolist()):
            out[f"first_error_{slot}"] = (float(count), n)
    for slot, total in enumerate(credit[real].sum(0).tolist(), 1):
        out[f"credit_{slot}"] = (total, n)
    return out
