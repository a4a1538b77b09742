"""Block attention alone, forward and backward, against dense-mask SDPA over all blocks at once.

    python -m benchmarks.attention

SmolLM2's heads (9 query, 3 key-value, d = 64), blocks of 16 on a context of 1024. SDPA gets every advantage: keys already
side by side, an additive mask built beforehand, and its own grouping of heads or repeated keys, whichever is faster.
On a machine with other work, prefix `OMP_WAIT_POLICY=passive`. Ours is many short parallel regions; at the end of each,
OpenMP's threads otherwise spin, for a whole time slice when one of them has lost its core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from benchmarks.common import Row, alternate, main, peak_mb
from specauf.drafter.attention import block_attention

HEADS, KV, DIM, SLOTS, CONTEXT = 9, 3, 64, 16, 1024
BLOCKS = (16, 64, 256)


def problem(n: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The five tensors of `block_attention` for one sequence, and its anchors: ascending, drawn as in training."""
    g = torch.Generator().manual_seed(0)
    block, context = (1, KV, n, SLOTS, DIM), (1, KV, CONTEXT, DIM)
    shapes = [(1, HEADS, n, SLOTS, DIM), block, block, context, context]
    anchors = (1 + torch.randperm(CONTEXT - 1, generator=g)[:n]).sort().values[None]
    return [torch.randn(shape, generator=g) for shape in shapes], anchors


def once(attend: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward, with the gradient of every leaf."""
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call() -> object:
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def make(way: str, n: int) -> Callable[[], object]:
    """ "ours", or SDPA: "grouped" heads, "repeated" keys."""
    given, anchors = problem(n)
    if way == "ours":
        return once(lambda *five: block_attention(*five, anchors), given)
    query, block_key, block_value, context_key, context_value = given
    far = torch.arange(CONTEXT) < anchors[0, :, None]
    near = torch.eye(n, dtype=torch.bool).repeat_interleave(SLOTS, 1)
    allowed = torch.cat([far, near], 1).repeat_interleave(SLOTS, 0)
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))[None, None]
    key, value = (
        torch.cat([c, t.flatten(2, 3)], 2) for c, t in ((context_key, block_key), (context_value, block_value))
    )

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if way == "grouped":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return once(sdpa, [query.flatten(2, 3), key, value])


def rows() -> Iterator[Row]:
    ways = {(way, n): make(way, n) for n in BLOCKS for way in ("ours", "grouped", "repeated")}
    seconds = alternate({f"{way} {n}": call for (way, n), call in ways.items()}, rounds=7)
    del ways
    ours = {n: seconds[f"ours {n}"] for n in BLOCKS}
    for n in BLOCKS:
        dense, which = min((seconds[f"{way} {n}"], way) for way in ("grouped", "repeated"))
        at = f"n={n} blocks of {SLOTS}, S={CONTEXT}, {HEADS} heads, {KV} of keys, d={DIM}"
        note = f"{1e3 * ours[n]:.0f} ms against {1e3 * dense:.0f} ms ({which})"
        yield Row("block attention", "dense-mask SDPA", at, dense / ours[n], 3.5 if n == 256 else None, note=note)
    # Three sizes evenly spaced in log n: the least-squares slope is the slope between the first and the last.
    first, last = BLOCKS[0], BLOCKS[-1]
    exponent = math.log(ours[last] / ours[first]) / math.log(last / first)
    yield Row("exponent of its time in n", "linear", f"n={first} to {last}", exponent, 1.1, below=True)
    mine, dense = (peak_mb(make, way, last) for way in ("ours", "grouped"))
    mask = 4 * (last * SLOTS) * (CONTEXT + last * SLOTS) / 1e6
    note = f"{mine:.0f} MB against {dense:.0f} MB and a mask of {mask:.0f} MB"
    yield Row("its extra memory", "dense-mask SDPA", f"n={last}", mine / (dense + mask), note=note)


if __name__ == "__main__":
    main(rows)
