"""eps-truncation is an approximation: how far off it may be, that the bound is reached, and that eps = 0 is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specauf.objective import RULES, Blocks, Head, Objective, block_loss
from specauf.objective.registry import options_of
from tests.unit.objective import reference

NAMES = ("dpace", "dpace-cumulative", "soft-auf", "streak-credit")
VOCAB, SLOTS = 5, 6


def test_the_gates_of_the_drafters_probabilities_can_be_truncated() -> None:
    assert {name for name, rule in RULES.items() if "eps" in options_of(rule)} == set(NAMES)


def blocks_of(q: Tensor, valid: Tensor) -> tuple[Tensor, Blocks]:
    """Logits in which label 1 has probability q [n, k], and the blocks that go with them."""
    rest = ((1 - q) / (VOCAB - 1)).clamp(min=1e-12)
    logits = rest.log()[..., None].repeat(1, 1, VOCAB)
    logits[..., 1] = q.clamp(min=1e-12).log()
    labels = torch.where(valid, 1, 0)
    return logits[None], Blocks(torch.zeros(1, len(q)).long(), valid.any(-1)[None], labels[None], valid[None])


def exact_and_cut(
    name: str, q: Tensor, valid: Tensor, options: dict[str, Any], eps: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(credit, gradient of the summed loss in logit space), of the loops without truncation and of the code with it."""
    logits, blocks = blocks_of(q, valid)
    logits.requires_grad_()
    dead = torch.zeros_like(logits.detach())
    eye = torch.eye(VOCAB, dtype=torch.float64)
    theirs = reference.loss(
        *(name, logits, blocks, eye, None),
        **{"gamma": None, "reduction": "sequence", "options": options, "target_hidden": dead, "uniform": dead[..., 0]},
    )
    (want,) = torch.autograd.grad(theirs, logits)
    c = torch.zeros(valid.shape, dtype=torch.float64)
    for m in range(len(q)):
        block = {"logits": logits[0, m], "labels": blocks.labels[0, m].tolist(), "valid": valid[m].tolist()}
        c[m] = c.new_tensor([part[0][1] for part in reference.credits(name, block, None, options)])
    terms = block_loss(logits, blocks, Objective(name, None, "sequence", {**options, "eps": eps}), Head(eye))
    (got,) = torch.autograd.grad(terms.num.sum(), logits)
    return (c * valid, want[0]), (terms.credit[0], got[0])


def lost(name: str, k: int, n: int) -> list[float]:
    """The most credit that each of n valid slots can lose when the block is cut behind the k-th, in units of eps."""
    if name in ("dpace", "streak-credit"):
        return [float(n - max(i, k) + (i > k)) for i in range(1, n + 1)]
    return [float(i > k) for i in range(1, n + 1)]


def check(name: str, q: Tensor, valid: Tensor, options: dict[str, Any], eps: float) -> float:
    """Credits and gradients are off by no more than the bound; returns the largest share of it that was used."""
    (c, want), (cut, got) = exact_and_cut(name, q, valid, options, eps)
    used = 0.0
    for m in range(len(q)):
        live = valid[m].nonzero().squeeze(1).tolist()
        k = int((cut[m][live] > 0).sum())
        most = torch.tensor(lost(name, k, len(live)), dtype=torch.float64) * eps
        off = (c[m] - cut[m])[live]
        assert (off >= -1e-12).all() and (off <= most + 1e-12).all()
        rows = (want[m] - got[m]).norm(dim=-1)
        assert (rows[live] <= math.sqrt(2) * most + 1e-9).all()
        used = max(used, float(off.sum() / most.sum()) if most.sum() else 0.0)
        if name in ("dpace", "streak-credit"):  # the sum, as it is quoted
            n = len(live)
            assert most.sum() == pytest.approx(eps * (k * (n - k) + (n - k) * (n - k + 1) / 2))
    return used


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.01, 0.05, 0.3]))
def test_credits_and_gradients_are_off_by_at_most_the_bound(name: str, seed: int, eps: float) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.rand(2, SLOTS, generator=g, dtype=torch.float64) ** float(torch.rand((), generator=g) * 3)
    valid = torch.rand(2, SLOTS, generator=g) < 0.8
    check(name, q, valid, {}, eps)


@pytest.mark.parametrize("name", NAMES)
def test_the_worst_block_reaches_the_bound(name: str) -> None:
    """A gate just below eps at the k-th slot, and certainty behind it."""
    eps, alpha = 0.2, {} if name == "streak-credit" else {"alpha": 0.0}
    for k in range(1, SLOTS):
        q = torch.ones(1, SLOTS, dtype=torch.float64)
        q[0, k - 1] = 0.999 * eps
        valid = torch.ones(1, SLOTS).bool()
        assert 0.99 < check(name, q, valid, alpha, eps) <= 1
        q[0, k - 1] = 1.001 * eps  # just above: nothing is cut, and nothing is off
        (c, want), (cut, got) = exact_and_cut(name, q, valid, alpha, eps)
        torch.testing.assert_close(c, cut)
        torch.testing.assert_close(want, got)


@pytest.mark.parametrize("name", NAMES)
def test_at_zero_it_is_the_dense_readout_and_exact(name: str) -> None:
    objective = Objective(name, options={"eps": 0.0})
    assert not objective.truncates and objective == Objective(name)
    q = torch.full((2, SLOTS), 1e-9, dtype=torch.float64)
    logits, blocks = blocks_of(q, torch.ones(2, SLOTS).bool())
    terms = block_loss(
        logits.requires_grad_(), blocks, objective, Head(torch.eye(VOCAB, dtype=torch.float64)), cuts=[1, 6]
    )
    assert terms.readout.evaluated.all() and terms.survival is None
    assert Objective(name, options={"eps": 1e-3}).truncates


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_read_until_its_gate_is_below_eps(name: str) -> None:
    q = torch.tensor([[0.9, 0.5, 0.5, 0.9, 0.9, 0.9], [1e-3, 0.9, 0.9, 0.9, 0.9, 0.9]], dtype=torch.float64)
    options = {"eps": 0.25} if name == "streak-credit" else {"eps": 0.25, "alpha": 0.0}
    logits, blocks = blocks_of(q, torch.ones(2, SLOTS).bool())
    eye = torch.eye(VOCAB, dtype=torch.float64)
    terms = block_loss(
        logits.requires_grad_(), blocks, Objective(name, options=options), Head(eye), cuts=list(range(1, SLOTS + 1))
    )
    assert terms.readout.evaluated.sum(-1).tolist() == [[3, 1]]
    assert (terms.credit > 0).sum(-1).tolist() == [[3, 1]]
    torch.testing.assert_close(
        terms.survival, torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64), check_dtype=False
    )
