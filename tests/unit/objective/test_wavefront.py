"""The stages are the cheapest there are, memory is bounded whatever the batch is, and low precision is told of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from specauf.objective import RULES, Blocks, Objective, block_loss
from specauf.objective.wavefront import Head, default_cuts, plan_cuts, read_head
from tests.unit.objective.test_loss import Case


def cost(cuts: list[int], survival: list[float], blocks: int, launch: float) -> float:
    alive, total, start = [1.0, *survival], 0.0, 0
    for stop in cuts:
        s = alive[start]
        total += (stop - start) * s + launch / blocks * (1 - (1 - s) ** blocks)
        start = stop
    return total


@settings(max_examples=60, deadline=None)
@given(
    alphas=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    blocks=st.sampled_from([1, 8, 128, 4096]),
    launch=st.sampled_from([0.0, 1.0, 8.0, 200.0]),
)
def test_planned_stages_are_the_cheapest_of_all(alphas: list[float], blocks: int, launch: float) -> None:
    survival = torch.tensor(alphas, dtype=torch.float64).cumprod(0).tolist()
    n = len(survival)
    planned = plan_cuts(survival, blocks, launch)
    assert planned == sorted(set(planned)) and planned[-1] == n
    every = [[*inner, n] for size in range(n) for inner in itertools.combinations(range(1, n), size)]
    best = min(cost(cuts, survival, blocks, launch) for cuts in every)
    assert cost(planned, survival, blocks, launch) == pytest.approx(best, abs=1e-12)


def test_free_launches_read_slot_by_slot_and_dear_ones_read_all_at_once() -> None:
    survival = [0.5**k for k in range(1, 8)]
    assert plan_cuts(survival, 128, 0.0) == list(range(1, 8))
    assert plan_cuts(survival, 128, 1e6) == [7]
    assert plan_cuts([1.0] * 7, 128) == [7], "nothing ever fails: stages would save nothing"


@pytest.mark.parametrize("cuts", [[5], [1, 5], [2, 3, 5], [1, 2, 3, 4, 5]])
def test_every_list_of_stages_gives_the_same_loss_and_gradient(cuts: list[int]) -> None:
    for seed in range(12):
        case = Case(seed, slots=5)
        for name in ("auf", "griffin-exclusive", "sampled-auf", "first-error"):
            grads, losses = [], []
            for given_cuts in (default_cuts(5), cuts):
                leaf = case.hidden.clone().requires_grad_()
                losses.append(case.terms(Objective(name), leaf, cuts=given_cuts).loss)
                losses[-1].backward()
                grads.append(leaf.grad)
            torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned whose name contains `named`."""

    numel = 0

    def __init__(self, named: str = "") -> None:
        super().__init__()
        self.named = named

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and self.named in str(func):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("name", sorted(RULES))
def test_no_tensor_is_larger_than_the_budget_of_logits_rows(name: str) -> None:
    vocab, width, budget, n = 4000, 8, 10, 200
    g = torch.Generator().manual_seed(0)
    weight, hidden = (
        torch.randn(vocab, width, generator=g),
        torch.randn(1, n, 5, width, generator=g, requires_grad=True),
    )
    valid = torch.ones(1, n, 5, dtype=torch.bool)
    blocks = Blocks(torch.zeros(1, n).long(), valid[..., 0], torch.randint(vocab, (1, n, 5), generator=g), valid)
    gamma = 4.0 if isinstance(RULES[name].gamma, str) else None
    objective = Objective(name, gamma)
    with Largest() as seen, Largest("mm") as products:
        terms = block_loss(
            *(hidden, blocks, objective, Head(weight)),
            target_hidden=hidden.detach().roll(1, 1),
            uniform=torch.rand(1, n, 5, generator=g),
            logits_rows=budget,
        )
        terms.loss.backward()
    assert vocab <= seen.numel <= budget * vocab  # the weight's views count too: it is no larger
    assert products.numel == budget * vocab // (5 if objective.needs_target else 1), "as many are held at once"


def test_a_mask_that_is_a_transposed_view_is_read_as_its_copy() -> None:
    hidden, labels, head = torch.randn(2, 3, 4, 8), torch.randint(0, 9, (2, 3, 4)), Head(torch.randn(9, 8))
    valid = (torch.rand(2, 4, 3) > 0.2).transpose(1, 2)
    here, there = (read_head(hidden, labels, v, head) for v in (valid, valid.contiguous()))
    assert torch.equal(here.ce, there.ce) and torch.equal(here.order, there.order)  # type: ignore[arg-type]


def test_the_weight_is_not_copied_for_every_row_of_a_batch_that_is_a_slice() -> None:
    vocab, width = 3000, 64
    weight, blocks = torch.randn(vocab, width), torch.randn(8, 1, 5, width)
    predictions = blocks[:, 0, 1:]  # as decoding slices them: not contiguous
    with Largest() as seen:
        logits = Head(weight).read(predictions)
    assert seen.numel == vocab * width, "that is the weight itself"
    torch.testing.assert_close(logits, predictions.contiguous() @ weight.T)


def test_bfloat16_supports_differ_from_float32s_only_at_near_ties() -> None:
    """What moves is reported: every block whose support changes has a slot whose two best logits are within rounding."""
    g = torch.Generator().manual_seed(1)
    vocab, width, n, k = 300, 64, 400, 7
    weight = torch.randn(vocab, width, generator=g) * width**-0.5
    hidden = torch.randn(1, n, k, width, generator=g)
    low_weight, low_hidden = weight.bfloat16(), hidden.bfloat16()
    exact = low_hidden.float() @ low_weight.float().T
    labels = torch.where(torch.rand(1, n, k, generator=g) < 0.8, exact.argmax(-1), 0)
    blocks = Blocks(torch.zeros(1, n).long(), torch.ones(1, n).bool(), labels, torch.ones(1, n, k).bool())
    high = block_loss(low_hidden.float().requires_grad_(), blocks, Objective("auf"), Head(low_weight.float())).credit
    low = block_loss(low_hidden.requires_grad_(), blocks, Objective("auf"), Head(low_weight)).credit
    moved = (high != low).any(-1)
    top = exact.topk(2).values
    near = ((top[..., 0] - top[..., 1]) <= 2**-7 * top[..., 0].abs()).any(-1)
    assert moved.any(), "the case shows nothing"
    assert (~moved | near).all()
    assert moved.float().mean() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["uniform", "lk-lambda"])
def test_a_confident_token_has_its_own_gradient_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """At p = 0.999 what is left of a row's gradient is a thousandth of its two parts, which 16 bits round coarser."""
    g = torch.Generator().manual_seed(2)
    vocab, width = 2000, 64
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    labels = torch.randint(vocab, (1, 8, 1), generator=g)
    own = weight[labels].float()
    sure = (own * 16 / own.square().sum(-1, keepdim=True)).to(dtype)  # the label's own logit is 16
    target_hidden = (1.05 * sure.float()).to(dtype)
    blocks = Blocks(torch.zeros(1, 8).long(), torch.ones(1, 8).bool(), labels, torch.ones(1, 8, 1).bool())
    grads = []
    for cast in (torch.float64, dtype):
        leaf = sure.to(cast).requires_grad_()
        terms = block_loss(leaf, blocks, Objective(name), Head(weight.to(cast)), target_hidden=target_hidden.to(cast))
        terms.loss.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.double())
    assert float(terms.readout.prob.min()) > 0.995
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.1


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_confident_token_has_its_own_gradient_under_autocast_too(softcap: float | None) -> None:
    """A trainer of its own may call the loss under autocast, with the head in float32: the products are in 16 bits then."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(2000, 64, generator=g)
    labels = torch.randint(2000, (1, 8, 1), generator=g)
    own = weight[labels]
    sure = own * 16 / own.square().sum(-1, keepdim=True)
    blocks = Blocks(torch.zeros(1, 8).long(), torch.ones(1, 8).bool(), labels, torch.ones(1, 8, 1).bool())
    grads = []
    for on in (False, True):
        leaf = sure.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            terms = block_loss(leaf, blocks, Objective("uniform"), Head(weight, softcap=softcap))
        terms.loss.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert float(terms.readout.prob.min()) > 0.9
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.1


def test_rows_of_a_wider_drafter_are_read_in_the_heads_precision() -> None:
    g = torch.Generator().manual_seed(0)
    labels, valid = torch.randint(9, (1, 6, 4), generator=g), torch.ones(1, 6, 4, dtype=torch.bool)
    weight, expansion, rows = (torch.randn(*s, generator=g).bfloat16() for s in ((9, 8), (9, 3), (1, 6, 4, 11)))
    found = [
        read_head(rows.to(to), labels, valid, Head(weight, expansion=expansion.to(to)))
        for to in (weight.dtype, torch.float)
    ]
    assert torch.equal(found[0].ce, found[1].ce) and found[1].ce.dtype == torch.float
    assert torch.equal(found[0].grad["ce"].float(), found[1].grad["ce"])  # type: ignore[index]


def test_float16_holds_the_normaliser_of_a_large_vocabulary() -> None:
    vocab, width = 151_936, 4
    weight = torch.zeros(vocab, width, dtype=torch.float16)
    weight[7] = 1
    blocks = Blocks(
        torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.tensor([[[7]]]), torch.ones(1, 1, 1).bool()
    )
    leaf = torch.zeros(1, 1, 1, width, dtype=torch.float16, requires_grad=True)
    block_loss(leaf, blocks, Objective("uniform"), Head(weight)).loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.float(), torch.full((1, 1, 1, width), -1.0), rtol=1e-3, atol=1e-3)
