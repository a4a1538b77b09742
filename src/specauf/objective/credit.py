"""The credit c_i of each slot: how much its cross entropy counts. Every function here is detached by construction.

All objectives are one weighted cross entropy, L = sum m c l / sum m c (paper, equation 1), and differ only in c. A credit
function takes the drafter's readout of the block (which slots its argmax got right) and returns c with the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def position_decay(num_predictions: int, gamma: float | None) -> Float[Tensor, " k"]:
    """exp(-(i-1)/gamma) for i = 1..N in float64; ones when gamma is None. The first prediction always has weight 1."""
    steps = torch.arange(num_predictions, dtype=torch.float64)
    return torch.ones_like(steps) if gamma is None else torch.exp(-steps / gamma)


def exclusive_prefix(ok: Bool[Tensor, "... k"]) -> Bool[Tensor, "... k"]:
    """True at i when `ok` holds at every slot before i."""
    before = torch.ones_like(ok)
    before[..., 1:] = ok[..., :-1].cumprod(-1).bool()
    return before


@torch.no_grad()
def accept_until_fail(hit: Bool[Tensor, "... k"], valid: Bool[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """AUF: 1[i <= j*], j* the first valid slot whose argmax is wrong (paper section 4). Invalid slots are passed over."""
    return exclusive_prefix(hit | ~valid).float()


@torch.no_grad()
def full_block(hit: Bool[Tensor, "... k"], valid: Bool[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Uniform cross entropy: every slot counts 1."""
    return torch.ones_like(valid, dtype=torch.float32)


CREDITS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "uniform": (full_block, False),
    "decay": (full_block, False),
    "auf": (accept_until_fail, True),
    "auf-decay": (accept_until_fail, True),
}
"""name -> (support, does it end at the first failure?). Truncating supports go through the wavefront. The position decay
multiplies any of them."""
