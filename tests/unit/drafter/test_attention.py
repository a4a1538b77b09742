"""Block attention against dense attention with an explicit mask, in float64: forward, gradients, and both ways of it."""

from __future__ import annotations

import functools
import shutil
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from specauf.drafter import attention
from specauf.drafter.attention import block_attention, flex_mask


class Case(NamedTuple):
    b: int
    heads: int
    kv: int
    n: int
    q: int
    slots: int
    s: int
    d: int

    def tensors(self, g: torch.Generator, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        b, heads, kv, n, q, slots, s, d = self
        shapes = [(b, heads, n, q, d), (b, kv, n, slots, d), (b, kv, n, slots, d), (b, kv, s, d), (b, kv, s, d)]
        return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]

    def anchors(self, g: torch.Generator) -> torch.Tensor:
        """In no order, with repeats wherever n > s + 1; the first row has an anchor of 0 and one of s."""
        anchors = torch.randint(0, self.s + 1, (self.b, self.n), generator=g)
        anchors[0, -1], anchors[0, 0] = self.s, 0
        return anchors


CASES = [
    Case(b=2, heads=4, kv=2, n=3, q=5, slots=5, s=11, d=8),
    Case(b=2, heads=6, kv=2, n=7, q=2, slots=5, s=9, d=4),  # some ask, all answer
    Case(b=1, heads=3, kv=3, n=9, q=1, slots=4, s=3, d=8),  # repeated anchors
    Case(b=3, heads=4, kv=1, n=5, q=3, slots=3, s=1, d=4),
    Case(b=1, heads=2, kv=1, n=1, q=1, slots=1, s=6, d=2),
    Case(b=4, heads=9, kv=3, n=1, q=8, slots=8, s=20, d=16),  # a decode step
]


def dense(given: list[torch.Tensor], anchors: torch.Tensor) -> torch.Tensor:
    """One softmax over every key there is, entry by entry."""
    query, block_key, block_value, context_key, context_value = given
    b, heads, n, q, d = query.shape
    group, slots, s = heads // context_key.shape[1], block_key.shape[3], context_key.shape[2]
    key = torch.cat([context_key, block_key.flatten(2, 3)], 2).repeat_interleave(group, 1)
    value = torch.cat([context_value, block_value.flatten(2, 3)], 2).repeat_interleave(group, 1)
    allowed = torch.zeros(b, 1, n * q, s + n * slots, dtype=torch.bool)
    for i in range(b):
        for j in range(n):
            rows = slice(j * q, (j + 1) * q)
            allowed[i, 0, rows, : anchors[i, j]] = True
            allowed[i, 0, rows, s + j * slots : s + (j + 1) * slots] = True
    scores = (query.flatten(2, 3) @ key.mT / d**0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).unflatten(2, (n, q))


def by_flex(given: list[torch.Tensor], anchors: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The way that CUDA goes, not compiled."""
    monkeypatch.setattr(attention, "_by_chunks", attention._flex)
    return block_attention(*given, anchors)


def same(got: torch.Tensor, want: torch.Tensor, mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Output and the gradients of all five tensors."""
    torch.testing.assert_close(got, want)
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    pairs = zip(torch.autograd.grad(got, mine, seed), torch.autograd.grad(want, theirs, seed), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("scores", [1, 700, attention.SCORES])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_dense_attention_wherever_the_chunks_end(
    case: Case, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    g = torch.Generator().manual_seed(0)
    given, anchors = case.tensors(g), case.anchors(g)
    same(block_attention(*given, anchors), dense(given, anchors), given, given)


@pytest.mark.parametrize(("n", "r", "s"), [(100, 12, 700), (100, 12, 0), (3, 2, 10), (9, 40, 10**6)])
def test_no_more_scores_are_formed_at_a_time_than_is_said(n: int, r: int, s: int) -> None:
    """Of context positions; but at least a block of each sequence, and at most a quarter of them."""
    rows, anchors = torch.zeros(2, n, r, 1), torch.full((2, n), s)
    sizes = [len(range(n)[at]) for at, _, _ in attention._chunks(rows, torch.zeros(2, s, 1), anchors)]
    most = max(1, min(-(-n // 4), attention.SCORES // (2 * r * max(1, s))))
    assert sum(sizes) == n and set(sizes[:-1]) == {most} and 0 < sizes[-1] <= most


def test_the_compiled_kernel_may_have_a_graph_for_every_use() -> None:
    before = torch._dynamo.config.recompile_limit
    try:
        torch._dynamo.config.recompile_limit = 8
        attention._kernel.__wrapped__("cuda")  # compiles nothing before it is called
        assert torch._dynamo.config.recompile_limit >= 64
    finally:
        torch._dynamo.config.recompile_limit = before


def test_the_compiled_kernel_may_go_backward_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As losses of several parts do, Domino's for one. Up to Inductor, this is what a GPU compiles."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # no gradients on a CPU
    kernel, g = attention._kernel.__wrapped__("cuda"), torch.Generator().manual_seed(0)
    for s in (140, 150):
        mask = flex_mask(torch.randint(0, s, (2, 20), generator=g), 8, 4, s)
        rows, keys = torch.randn(2, 2, 160, 16, requires_grad=True), torch.randn(2, 2, s + 80, 16)
        out = kernel(rows, keys, keys, block_mask=mask)
        (twice,) = torch.autograd.grad(2 * out.sum(), rows, retain_graph=True)
        (once,) = torch.autograd.grad(out.sum(), rows)
        torch.testing.assert_close(twice, 2 * once)


def test_it_equals_dense_attention_at_random_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)

    def one_to(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=g))

    for _ in range(40):
        kv, slots = one_to(3), one_to(5)
        case = Case(one_to(3), kv * one_to(3), kv, one_to(12), one_to(slots), slots, one_to(20), 2 * one_to(4))
        monkeypatch.setattr(attention, "SCORES", one_to(4000))
        given, anchors = case.tensors(g), case.anchors(g)
        same(block_attention(*given, anchors), dense(given, anchors), given, given)


def test_float32_is_within_rounding_of_float64() -> None:
    g = torch.Generator().manual_seed(0)
    case = Case(b=2, heads=9, kv=3, n=12, q=8, slots=8, s=200, d=64)
    given, anchors = case.tensors(g), case.anchors(g)
    single = [t.detach().float().requires_grad_() for t in given]
    out = block_attention(*single, anchors)
    want = dense(given, anchors)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(out.sum(), single), torch.autograd.grad(want.sum(), given), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    case = Case(b=2, heads=2, kv=1, n=5, q=1, slots=2, s=4, d=2)
    g = torch.Generator().manual_seed(0)
    given, anchors = case.tensors(g), case.anchors(g)
    assert torch.autograd.gradcheck(lambda *t: block_attention(*t, anchors), given)


def test_sums_over_many_chunks_are_not_rounded_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given = [
        torch.randn(1, 64, 4, 16),
        *(torch.randn(1, 64, 4, 16) for _ in "kv"),
        *(torch.randn(1, 128, 16) for _ in "kv"),
    ]
    anchors = torch.full((1, 64), 128)

    def grads(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        attention._Chunked.apply(*leaves, anchors).sum().backward()
        return [t.grad.double() for t in leaves[3:]]  # type: ignore[union-attr]

    monkeypatch.setattr(attention, "SCORES", 1)  # a block a chunk
    for rounded, exact in zip(grads(torch.bfloat16), grads(torch.float64), strict=True):
        assert (rounded - exact).norm() / exact.norm() < 0.01  # 0.02 when each chunk's sum is rounded


@pytest.mark.parametrize("s", [0, 1, 7])
def test_an_anchor_of_zero_sees_its_own_block_alone(s: int) -> None:
    case = Case(b=2, heads=4, kv=2, n=5, q=2, slots=3, s=s, d=8)
    given = case.tensors(torch.Generator().manual_seed(0))
    anchors = torch.zeros(2, 5, dtype=torch.long)
    out = block_attention(*given, anchors)
    gradients = torch.autograd.grad(out.square().sum(), given)
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert all((t == 0).all() for t in gradients[3:])
    for j in range(5):
        alone = [t[:, :, j : j + 1] for t in given[:3]] + [t[:, :, :1] for t in given[3:]]
        torch.testing.assert_close(block_attention(*alone, anchors[:, :1]), out[:, :, j : j + 1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_an_anchor_beyond_the_context_sees_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(b=1, heads=2, kv=1, n=8, q=3, slots=3, s=5, d=4)
    given = case.tensors(torch.Generator().manual_seed(0))
    beyond = torch.tensor([[9, 2, 3, 7, 0, 4, 6, 8]])
    want = dense(given, beyond.clamp(max=5))
    same(block_attention(*given, beyond), want, given, given)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            torch.testing.assert_close(by_flex([t.clone() for t in given], beyond.clone(), monkeypatch), want)


def test_under_autocast_all_products_are_in_its_dtype() -> None:
    """As the layers hand them over: norms promote queries and keys to float32, values stay bfloat16."""
    case = Case(b=2, heads=4, kv=2, n=6, q=3, slots=4, s=12, d=16)
    g = torch.Generator().manual_seed(0)
    single, anchors = case.tensors(g, torch.float32), case.anchors(g)
    mixed = [t.bfloat16() if i in (2, 4) else t for i, t in enumerate(single)]
    with torch.autocast("cpu", torch.bfloat16):
        out = block_attention(*mixed, anchors)
    assert out.dtype == torch.bfloat16
    want = block_attention(*single, anchors)
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)
    pairs = zip(torch.autograd.grad(out.float().sum(), single), torch.autograd.grad(want.sum(), single), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=0.05, atol=0.1)


def test_the_backward_pass_keeps_no_probabilities() -> None:
    """Twice the context costs what the context itself costs, not n B S: the inputs alone are kept."""

    def kept(s: int) -> int:
        case = Case(b=1, heads=4, kv=2, n=50, q=8, slots=8, s=s, d=8)
        g = torch.Generator().manual_seed(0)
        given, anchors = case.tensors(g), case.anchors(g)
        sizes: list[int] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block_attention(*given, anchors)
        return sum(sizes)

    assert kept(200) - kept(100) == 2 * 2 * 100 * 8


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [CASES[1], Case(b=2, heads=4, kv=2, n=30, q=3, slots=5, s=150, d=16)], ids=str)
def test_flex_attention_gives_the_same_output_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, on the CPU, where torch offers FlexAttention's forward pass only and refuses tensors that want a gradient.

    Its eager backward does run there, so the refusal is lifted and the gradients are compared too. What is not covered
    without a GPU is the fused kernel: eager FlexAttention evaluates the predicate everywhere and reads no tiles, hence
    the test of the tiles below.
    """
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    g = torch.Generator().manual_seed(0)
    mine, anchors = case.tensors(g, torch.float32), case.anchors(g)
    theirs = [t.detach().clone().requires_grad_() for t in mine]
    want = block_attention(*theirs, anchors)
    same(by_flex(mine, anchors, monkeypatch), want, mine, theirs)


def test_the_layers_of_a_pass_share_a_mask_and_anchors_that_moved_get_another() -> None:
    anchors = torch.tensor([[3, 5]])
    mask = attention._mask_of(anchors, 4, 2, 9)
    assert attention._mask_of(anchors, 4, 2, 9) is mask
    assert attention._mask_of(anchors, 2, 2, 9) is not mask, "the last layer asks for fewer rows"
    mask = attention._mask_of(anchors, 4, 2, 9)
    assert attention._mask_of(anchors.clone(), 4, 2, 9) is not mask, "others, which no one moved either"

    def seen() -> list[bool]:
        return [bool(attention._mask_of(anchors, 4, 2, 9).mask_mod(*map(torch.tensor, (0, 0, 0, c)))) for c in range(9)]

    assert seen() == [c < 3 for c in range(9)]
    anchors += 2
    assert seen() == [c < 5 for c in range(9)]
    with torch.inference_mode():
        anchors = torch.tensor([[3, 5]])
        assert seen() == [c < 3 for c in range(9)]
        anchors += 2
        assert seen() == [c < 5 for c in range(9)]


@pytest.mark.parametrize(
    ("n", "rows", "slots", "s"), [(40, 24, 8, 297), (70, 5, 5, 256), (3, 7, 4, 1), (9, 128, 128, 128)]
)
def test_the_tiles_are_those_with_something_to_see(n: int, rows: int, slots: int, s: int) -> None:
    g = torch.Generator().manual_seed(0)
    anchors = torch.randint(0, s + 1, (4, n), generator=g)
    anchors[0] = anchors[0].sort().values
    anchors[1:3] = torch.tensor([[128], [129]]).clamp(
        max=s
    )  # all see a tile of context, to its end or to the next one's first
    mask = flex_mask(anchors, rows, slots, s)
    entry_by_entry = torch_flex.create_block_mask(mask.mask_mod, 4, None, *mask.seq_lengths, device="cpu")
    assert torch.equal(mask.to_dense(), entry_by_entry.to_dense())
    if n > 9:
        assert not mask.to_dense().all()
    if n * rows <= attention.TILE:
        assert mask.full_kv_num_blocks is None
        return
    context = s // attention.TILE  # a block's own slots may fill a tile too; the predicate is evaluated there
    mine, theirs = (
        torch_flex._ordered_to_dense(m.full_kv_num_blocks, m.full_kv_indices, m.full_kv_indices.shape[-1])
        for m in (mask, entry_by_entry)
    )
    assert torch.equal(mine[..., :context], theirs[..., :context]) and not mine[..., context:].any()
    if n > 40:
        assert mine.any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_the_fused_kernel_reads_full_tiles_and_partial_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass, which torch compiles for a CPU too."""
    case, g = Case(b=2, heads=4, kv=2, n=40, q=12, slots=8, s=300, d=16), torch.Generator().manual_seed(0)
    given, anchors = [t.detach() for t in case.tensors(g, torch.float32)], case.anchors(g).sort().values
    want = block_attention(*given, anchors)
    mask = attention._mask_of(anchors, 24, 8, 300)
    assert mask.full_kv_num_blocks.any() and mask.kv_num_blocks.any()
    monkeypatch.setattr(attention, "_kernel", lambda device: torch.compile(torch_flex.flex_attention, fullgraph=True))
    torch.testing.assert_close(by_flex(given, anchors, monkeypatch), want)
