"""Block attention: every slot sees the context before its anchor and its own block, under one softmax.

Costs O(n B (S + B)) for n blocks of B slots over S context positions. The n blocks of a sequence share the context's keys
and values, and no block looks at another, so neither the (nB)^2 products of a dense mask nor the mask itself is formed.

There are two implementations: FlexAttention on CUDA, and elsewhere dense products over a few blocks at a time. The dense
one recomputes the probabilities in the backward pass instead of keeping them, so that memory does not grow with n B S.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

SCORES = 2**21
"""Scores formed at a time, but at least one block of each sequence. 8 MB in float32; the backward pass holds three."""
TILE = 128
"""Side of FlexAttention's tiles, in rows and in keys."""
NARROWEST = 16
"""The narrowest heads that FlexAttention's kernels take."""


def block_attention(
    query: Float[Tensor, "b heads n q d"],
    block_key: Float[Tensor, "b kv n slots d"],
    block_value: Float[Tensor, "b kv n slots d"],
    context_key: Float[Tensor, "b kv s d"],
    context_value: Float[Tensor, "b kv s d"],
    anchors: Int[Tensor, "b n"],
) -> Float[Tensor, "b heads n q d"]:
    """Softmax attention over [context positions < anchor ; the slots of the same block], bidirectional in the block.

    Index s of the context is the absolute position. Some slots of a block may query (q of them); all are keys. Grouped
    heads share keys. Anchors may come in any order, though ascending ones cost half; anchor 0 sees its own block only.
    """
    kv = context_key.shape[1]
    # Under autocast the norms leave queries and keys in float32.
    query, block_key, context_key = (t.to(block_value.dtype) for t in (query, block_key, context_key))
    # Heads that share keys become further rows of a block: b kv n (group q) d.
    rows = query.unflatten(1, (kv, -1)).transpose(2, 3)
    attend = _flex if query.device.type == "cuda" and query.shape[-1] >= NARROWEST else _by_chunks
    out = attend(rows.flatten(3, 4), block_key, block_value, context_key, context_value, anchors)
    return out.reshape(rows.shape).transpose(2, 3).flatten(1, 2)


def _by_chunks(
    rows: Tensor, block_key: Tensor, block_value: Tensor, context_key: Tensor, context_value: Tensor, anchors: Tensor
) -> Tensor:
    given = (rows * rows.shape[-1] ** -0.5, block_key, block_value, context_key, context_value)
    ends = anchors.clamp(0, context_key.shape[2]).repeat_interleave(rows.shape[1], 0)
    return _Chunked.apply(*(t.flatten(0, 1) for t in given), ends)


class _Chunked(torch.autograd.Function):
    """The dense implementation, over scaled rows. Sequences and their heads form one batch axis x:

    rows [x n r d], block_key and block_value [x n k d], context_key and context_value [x s d], anchors [x n].
    """

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        rows, block_key, block_value, context_key, context_value, anchors = given
        out = torch.empty_like(rows)
        for at, low, high in _chunks(rows, context_key, anchors):
            scores = _products(rows[:, at], block_key[:, at], context_key[:, :high])
            weight = _softmax(scores, anchors[:, at], low, high)
            out[:, at] = _mix(weight, block_value[:, at], context_value[:, :high])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, block_key, block_value, context_key, context_value, anchors = ctx.saved_tensors
        to_rows, to_block_key, to_block_value = (torch.empty_like(t) for t in (rows, block_key, block_value))
        # Sums over all chunks; in 16 bits every chunk would round them.
        to_key, to_value = (
            torch.zeros_like(t, dtype=torch.float32) if t.dtype.itemsize < 4 else torch.zeros_like(t)
            for t in (context_key, context_value)
        )
        for at, low, high in _chunks(rows, context_key, anchors):
            asked, came = rows[:, at], grad[:, at]
            scores = _products(asked, block_key[:, at], context_key[:, :high])
            weight = _softmax(scores, anchors[:, at], low, high)
            slope = _products(came, block_value[:, at], context_value[:, :high])  # with respect to the weights
            slope.sub_((slope * weight).sum(-1, keepdim=True)).mul_(weight)  # now to the scores
            to_rows[:, at] = _mix(slope, block_key[:, at], context_key[:, :high])
            for matrix, side, near, far in (
                (weight, came, to_block_value, to_value),
                (slope, asked, to_block_key, to_key),
            ):
                near[:, at] = matrix[..., high:].mT @ side
                far[:, :high] += matrix.flatten(1, 2)[..., :high].mT @ side.flatten(1, 2)
        return to_rows, to_block_key, to_block_value, to_key.to(rows.dtype), to_value.to(rows.dtype), None


def _chunks(rows: Tensor, context: Tensor, anchors: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Runs of blocks with their lowest and highest anchor: masked from the lowest on, unread from the highest.

    At least four runs, since every block of a run pays for the highest anchor in it.
    """
    x, n, r, _ = rows.shape
    size = max(1, min(-(-n // 4), SCORES // (x * r * max(1, context.shape[1]))))
    for start in range(0, n, size):
        at = slice(start, start + size)
        low, high = anchors[:, at].aminmax()
        yield at, int(low), int(high)


def _products(rows: Tensor, block: Tensor, context: Tensor) -> Tensor:
    """[x c r d] with [x c k d] and [x s d] -> [x c r s+k]: every row with the context, then with its own block."""
    far = rows.flatten(1, 2) @ context.mT
    return torch.cat([far.view(*rows.shape[:3], context.shape[1]), rows @ block.mT], -1)


def _softmax(scores: Tensor, anchors: Tensor, low: int, high: int) -> Tensor:
    """In place, over [context positions < anchor ; own block]. Slots see themselves, so no row is empty."""
    hidden = torch.arange(low, high, device=anchors.device) >= anchors[..., None]  # x c high-low
    scores[..., low:high].masked_fill_(hidden[:, :, None], float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _mix(weight: Tensor, block: Tensor, context: Tensor) -> Tensor:
    """The transpose of `_products`: [x c r s+k] with [x c k d] and [x s d] -> [x c r d]."""
    s = context.shape[1]
    far = weight.flatten(1, 2)[..., :s] @ context
    return far.view(*weight.shape[:3], block.shape[-1]) + weight[..., s:] @ block


def _flex(
    rows: Tensor, block_key: Tensor, block_value: Tensor, context_key: Tensor, context_value: Tensor, anchors: Tensor
) -> Tensor:
    key, value = (
        torch.cat([c, t.flatten(2, 3)], 2) for c, t in ((context_key, block_key), (context_value, block_value))
    )
    mask = _mask_of(anchors, rows.shape[3], block_key.shape[3], context_key.shape[2])
    return _kernel(rows.device.type)(rows.flatten(2, 3), key, value, block_mask=mask)


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    """Compiled once, on first use; uncompiled on a CPU, where only the tests use it."""
    kernel: Callable[..., Any] = flex_attention
    if device != "cuda":
        return kernel
    # Gradients or none, every dtype and sizes of one have a graph each. Training, replay and live decoding need more than
    # the eight that dynamo allows, and beyond those it runs unfused, which holds all scores of a call at once.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # A loss of several parts goes backward more than once, and the kernel would give its buffers away the first time.
    torch._functorch.config.donated_buffer = False
    return torch.compile(kernel, fullgraph=True)  # beyond the limit an error says so


_latest: dict[str, Any] = {}


def _mask_of(anchors: Tensor, *sizes: int) -> BlockMask:
    """`flex_mask`, made once for all layers of a forward pass, which ask for the same anchors one after the other.

    A mask takes some 70 small operations, and decoding waits for each of them to be launched.
    """
    if anchors.is_inference():  # these keep no version, and may have moved
        return flex_mask(anchors.clamp(0, sizes[2]), *sizes)
    made = anchors._version, sizes  # decoding moves its anchors in place
    if not _latest or _latest["anchors"]() is not anchors or _latest["made"] != made:
        mask = flex_mask(anchors.clamp(0, sizes[2]), *sizes)
        _latest.update(anchors=weakref.ref(anchors), made=made, mask=mask)
    found: BlockMask = _latest["mask"]
    return found


def flex_mask(anchors: Int[Tensor, "b n"], rows: int, slots: int, s: int) -> BlockMask:
    """The mask of n blocks' rows over [s context positions ; n blocks' slots], built tile by tile, never entry by entry.

    The predicate captures tensors alone, so that no length is compiled into it.
    """
    block = torch.arange(anchors.shape[1], device=anchors.device)
    reach = anchors.repeat_interleave(rows, 1)  # b n*rows: what a row sees of the context
    asks = block.repeat_interleave(rows)
    answers = torch.cat([block.new_full((s,), -1), block.repeat_interleave(slots)])  # -1: the context, no block's

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column < reach[batch, row]) | (answers[column] == asks[row])

    row, column = _tiles(asks), _tiles(answers)
    sees = _tiles(F.pad(reach, (0, -len(asks) % TILE)))  # a row that fills the last tile up sees nothing
    start = torch.arange(0, len(answers), TILE, device=anchors.device)
    near = (row[:, :1] <= column[:, -1]) & (column[:, 0] <= row[:, -1:])
    some = near | (start < sees.amax(-1)[..., None])
    full: tuple[Tensor | None, Tensor | None] = None, None
    if len(asks) > TILE:  # decoding has one row of tiles, and waits for small operations more than for the predicate
        whole = start + TILE <= sees.amin(-1)[..., None]  # context that every row sees: in training six tiles of seven
        some, full = some & ~whole, _listed(whole)
    return BlockMask.from_kv_blocks(
        *_listed(some), *full, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(len(asks), len(answers))
    )


def _listed(tiles: Bool[Tensor, "b rows columns"]) -> tuple[Tensor, Tensor]:
    """How many tiles of each row of tiles are true, and their columns, which come first."""
    some = tiles[:, None].int()
    return some.sum(-1, dtype=torch.int32), some.argsort(dim=-1, descending=True, stable=True).int()


def _tiles(x: Int[Tensor, "*batch length"]) -> Int[Tensor, "*batch tiles tile"]:
    """Split the last axis into tiles; the last tile is padded with the last entry."""
    missing = -x.shape[-1] % TILE
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1).unflatten(-1, (-1, TILE))
