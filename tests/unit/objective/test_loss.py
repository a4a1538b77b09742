"""The objective against a reference that is slow and obvious: loops over blocks and slots in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from specauf.objective import Blocks, Objective, block_loss, block_metrics, read_head
from specauf.objective.wavefront import default_cuts

OBJECTIVES = [("uniform", None), ("decay", 4.0), ("auf", None), ("auf-decay", 4.0)]
REDUCTIONS = ["global", "block", "sequence"]


def reference(hidden: Tensor, blocks: Blocks, weight: Tensor, name: str, gamma: float | None, reduction: str) -> Tensor:
    """Paper, section 4 and equation 1, read literally."""
    b, n, k, _ = hidden.shape
    total, count, ratios = hidden.new_zeros(()), 0.0, []
    for i in range(b):
        for j in range(n):
            logits = hidden[i, j] @ weight.T
            valid = [s for s in range(k) if blocks.valid[i, j, s]]
            wrong = [s for s in valid if int(logits[s].argmax()) != int(blocks.labels[i, j, s])]
            support = [s for s in valid if not wrong or s <= wrong[0]] if name.startswith("auf") else valid
            credit = [1.0 if gamma is None else math.exp(-s / gamma) for s in support]
            terms = [
                c * F.cross_entropy(logits[s], blocks.labels[i, j, s]) for c, s in zip(credit, support, strict=True)
            ]
            if terms:
                total, count = total + sum(terms), count + sum(credit)
                ratios.append(sum(terms) / sum(credit))
    if reduction == "global":
        return total / max(count, 1e-300)
    if reduction == "block":
        return sum(ratios) / len(ratios) if ratios else total
    return total / b


def random_case(seed: int, vocab: int = 4) -> tuple[Tensor, Blocks, Tensor]:
    """A small vocabulary, so that hits, all-right blocks, holes and all-invalid blocks are common."""
    g = torch.Generator().manual_seed(seed)
    b, n, k, h = 2, 4, int(torch.randint(1, 6, (), generator=g)), 3
    weight = torch.randn(vocab, h, generator=g, dtype=torch.float64)
    hidden = torch.randn(b, n, k, h, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocab, (b, n, k), generator=g)
    right = torch.rand(b, n, 1, generator=g) < 0.6  # in these blocks most labels are what the head says
    labels = torch.where(right & (torch.rand(b, n, k, generator=g) < 0.8), (hidden @ weight.T).argmax(-1), labels)
    valid = torch.rand(b, n, k, generator=g) < torch.rand(b, n, 1, generator=g) * 1.5
    if seed % 5 == 0:
        hidden = hidden.round()  # ties
        weight = weight.round()
    return hidden, Blocks(torch.zeros(b, n).long(), valid.any(-1), labels.masked_fill(~valid, 0), valid), weight


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "gamma"), OBJECTIVES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_loss_and_gradient_equal_the_reference(name: str, gamma: float | None, reduction: str, seed: int) -> None:
    hidden, blocks, weight = random_case(seed)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    terms = block_loss(ours, blocks, Objective(name, gamma, reduction), weight, logits_rows=3)
    loss = terms.num / terms.den.clamp(min=1e-300)
    wanted = reference(theirs, blocks, weight, name, gamma, reduction)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    loss.backward()
    if wanted.requires_grad:
        wanted.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(ours.grad).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), staged=st.booleans())
def test_wavefront_reads_the_supports_and_changes_nothing(seed: int, staged: bool) -> None:
    hidden, blocks, weight = random_case(seed)
    k = hidden.shape[2]
    dense = block_loss(hidden.requires_grad_(), blocks, Objective("auf"), weight)
    cuts = default_cuts(k) if staged else list(range(1, k + 1))
    found = read_head(hidden.detach(), blocks.labels, blocks.valid, weight, cuts=cuts)
    support = dense.credit > 0
    assert (found.evaluated | ~support).all(), "a supported slot was not read"
    assert torch.equal(found.hit[support], dense.readout.hit[support])
    torch.testing.assert_close(found.ce[support], dense.readout.ce[support], rtol=1e-12, atol=1e-12)
    if not staged:
        assert int(found.evaluated.sum()) == int(support.sum())


def test_suffix_rows_get_exactly_zero_and_do_not_matter() -> None:
    hidden, blocks, weight = random_case(3)
    hidden.requires_grad_()
    terms = block_loss(hidden, blocks, Objective("auf"), weight)
    terms.num.backward()
    outside = terms.credit == 0
    assert outside.any()
    assert (hidden.grad[outside] == 0).all()
    after = outside & blocks.valid
    poked = torch.where(after[..., None], hidden.detach() * -7 + 1, hidden.detach()).requires_grad_()
    assert torch.equal(block_loss(poked, blocks, Objective("auf"), weight).num, terms.num)


def test_fully_right_block_is_uniform_and_first_slot_wrong_is_that_slot_alone() -> None:
    weight = torch.eye(4, dtype=torch.float64)
    hidden = 3 * F.one_hot(torch.tensor([[[0, 1, 2], [1, 1, 2]]]), 4).double()
    labels = torch.tensor([[[0, 1, 2], [0, 1, 2]]])
    blocks = Blocks(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), labels, torch.ones(1, 2, 3).bool())
    credit = block_loss(hidden.requires_grad_(), blocks, Objective("auf"), weight).credit
    assert credit[0].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_chunks_and_micro_batches_add_up() -> None:
    hidden, blocks, weight = random_case(11)
    objective = Objective("auf-decay", 4.0)
    whole = block_loss(hidden.clone().requires_grad_(), blocks, objective, weight)
    parts = [
        block_loss(
            hidden[i : i + 1].clone().requires_grad_(), Blocks(*(t[i : i + 1] for t in blocks)), objective, weight
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(p.num for p in parts), whole.num, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(p.den for p in parts), whole.den, rtol=1e-12, atol=0)


def test_nothing_valid_gives_zero_loss_and_finite_gradient() -> None:
    hidden, blocks, weight = random_case(1)
    blocks = blocks._replace(valid=torch.zeros_like(blocks.valid))
    for name, gamma in OBJECTIVES:
        for reduction in REDUCTIONS:
            leaf = hidden.clone().requires_grad_()
            terms = block_loss(leaf, blocks, Objective(name, gamma, reduction), weight)
            terms.num.backward()
            assert terms.num == 0 and (leaf.grad == 0).all()


def test_metrics_of_a_block_worked_by_hand() -> None:
    weight = torch.eye(5, dtype=torch.float64)
    said = torch.tensor([[[0, 1, 2, 3], [0, 0, 2, 3]]])
    hidden = 3 * F.one_hot(said, 5).double()
    labels = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 3]]])
    valid = torch.ones(1, 2, 4).bool()
    valid[0, 0, 1] = False  # a hole is passed over
    blocks = Blocks(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), labels.masked_fill(~valid, 0), valid)
    terms = block_loss(hidden.requires_grad_(), blocks, Objective("auf"), weight)
    found = {k: s / c for k, (s, c) in block_metrics(terms.readout, blocks, terms.credit).items()}
    assert found["simulated_tau"] == (1 + 3 + 1 + 1) / 2
    assert found["r_active"] == 5 / 8 and found["r_active_B"] == 5 / 10
    assert found["a_support"] == 4 / 5
    assert found["first_error_0"] == 0.5 and found["first_error_2"] == 0.5
    assert "common_accuracy" not in found or found["common_accuracy"] == 6 / 7


@pytest.mark.parametrize(("name", "gamma"), [("auff", None), ("decay", None), ("decay", 0.0), ("auf", 4.0)])
def test_objectives_that_cannot_be_meant_are_refused(name: str, gamma: float | None) -> None:
    with pytest.raises(ValueError, match=r"objective|gamma"):
        Objective(name, gamma)
