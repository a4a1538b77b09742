"""Block attention: every slot sees the context before its anchor and its own block, under one softmax.

Costs O(n B (S + B)) for n blocks of B slots over S context positions. The n blocks of a sequence share the context's keys
and values, and no block looks at another, so the (nB)^2 product of a dense mask is never formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def block_attention(
    query: Float[Tensor, "b heads n slots d"],
    block_key: Float[Tensor, "b kv n slots d"],
    block_value: Float[Tensor, "b kv n slots d"],
    context_key: Float[Tensor, "b kv s d"],
    context_value: Float[Tensor, "b kv s d"],
    anchors: Int[Tensor, "b n"],
) -> Float[Tensor, "b heads n slots d"]:
    """Softmax attention over [context positions < anchor ; the slots of the same block], bidirectional in the block.

    Index s of the context is the absolute position. Grouped heads share keys. An anchor of 0 sees its own block only.
    """
    b, heads, n, slots, d = query.shape
    kv, s = context_key.shape[1:3]
    group = heads // kv
    query = query * d**-0.5
    rows = query.reshape(b, kv, group * n * slots, d)
    far = (rows @ context_key.transpose(-1, -2)).view(b, kv, group, n, slots, s)
    hidden = torch.arange(s, device=query.device) >= anchors[..., None]  # b n s
    far = far.masked_fill(hidden[:, None, None, :, None, :], float("-inf"))
    near = query.view(b, kv, group, n, slots, d) @ block_key[:, :, None].transpose(-1, -2)  # b kv group n slots slots
    weight = torch.cat([far, near], -1).softmax(-1)
    far, near = weight.split([s, block_key.shape[3]], -1)
    out = (far.reshape(b, kv, group * n * slots, s) @ context_value).view(b, kv, group, n, slots, d)
    out = out + near @ block_value[:, :, None]
    return out.reshape(b, heads, n, slots, d)
