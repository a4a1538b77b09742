"""A head over part of the vocabulary: labels outside it are certain failures without a loss, under every objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specauf.objective import Blocks, Head, Objective, block_loss, block_metrics, read_head
from specauf.objective.loss import LossTerms
from specauf.objective.wavefront import default_cuts
from tests.unit.objective import reference
from tests.unit.objective.test_loss import CASES, REDUCTIONS, Case, identify

VOCAB = 5


class Reduced(Case):
    """A case whose head keeps some of the tokens, in the order of their ids unless told otherwise."""

    def __init__(self, seed: int, kept: list[int] | None = None, slots: int | None = None) -> None:
        super().__init__(seed, VOCAB, slots)
        g = torch.Generator().manual_seed(seed + 1)
        if kept is None:
            kept = torch.randperm(VOCAB, generator=g)[: int(torch.randint(2, VOCAB + 1, (), generator=g))].tolist()
            kept.sort()
        self.kept, self.rows_of = kept, torch.full((VOCAB,), -1)
        self.rows_of[kept] = torch.arange(len(kept))
        self.outside = (self.rows_of[self.blocks.labels] < 0) & self.blocks.valid
        self.part = Head(self.weight[kept], None if self.bias is None else self.bias[kept], self.softcap, self.rows_of)

    def reduced(self, objective: Objective, hidden: Tensor, **changes: Any) -> LossTerms:
        return block_loss(
            *(hidden, self.blocks, objective, self.part),
            target_hidden=self.target_hidden,
            uniform=self.uniform,
            **{"logits_rows": 3, **changes},
        )


@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), reduction=st.sampled_from(REDUCTIONS), staged=st.booleans())
def test_loss_and_gradient_equal_the_dense_reference(
    name: str, gamma: float | None, options: dict[str, Any], reduction: Any, seed: int, staged: bool
) -> None:
    case = Reduced(seed)
    options = {**options, "k": min(options["k"], len(case.kept))} if "k" in options else options
    if name.startswith("griffin"):
        options = {"k": 2, **options}  # the default of 3 may be all there are
    objective = Objective(name, gamma, reduction, options)
    ours, theirs = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    k = case.hidden.shape[2]
    terms = case.reduced(objective, ours, cuts=default_cuts(k) if staged else list(range(1, k + 1)))
    wanted = reference.loss(
        *(objective.name, theirs, case.blocks, case.part.weight, case.part.bias),
        gamma=objective.gamma,
        reduction=reduction,
        options=dict(objective.options),
        target_hidden=case.target_hidden,
        uniform=case.uniform,
        softcap=case.softcap,
        rows_of=case.rows_of.tolist(),
    )
    torch.testing.assert_close(terms.loss, wanted, rtol=1e-10, atol=1e-10)
    terms.loss.backward()
    if wanted.requires_grad:
        wanted.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(ours.grad).all()
    read = terms.readout
    assert not (read.evaluated & case.outside).any(), "a head row was spent on a label that has none"
    assert (terms.credit[case.outside] == 0).all() and not read.hit[case.outside].any()
    assert (read.prob[case.outside] == 0).all()
    assert read.rank is None or (read.rank[case.outside] == len(case.kept)).all()


@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
def test_every_token_kept_is_the_full_vocabulary_in_any_order_of_rows(
    name: str, gamma: float | None, options: dict[str, Any]
) -> None:
    objective = Objective(name, gamma, "global", options)
    for seed in (1, 2, 3, 4, 6):  # 5 has ties, which the order of the rows breaks
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed)).tolist()
        case = Reduced(seed, kept=order)
        leaves = [case.hidden.clone().requires_grad_() for _ in range(2)]
        found = [case.terms(objective, leaves[0]), case.reduced(objective, leaves[1])]
        for terms in found:
            terms.loss.backward()
        torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[0].credit, found[1].credit, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-10, atol=1e-12)
        assert torch.equal(found[0].readout.evaluated, found[1].readout.evaluated)


def test_an_outside_label_ends_the_support_before_anything_behind_it_is_read() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    labels = torch.tensor([[[0, 3, 1, 2], [3, 0, 1, 2], [0, 1, 2, 0]]])  # token 3 has no row
    rows_of = torch.tensor([0, 1, 2, -1])
    hidden = 3 * eye[rows_of[labels].clamp(min=0)]
    blocks = Blocks(torch.zeros(1, 3).long(), torch.ones(1, 3).bool(), labels, torch.ones(1, 3, 4).bool())
    terms = block_loss(hidden.requires_grad_(), blocks, Objective("auf"), Head(eye, rows_of=rows_of), cuts=[1, 2, 3, 4])
    assert terms.credit[0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert terms.readout.evaluated[0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert float(terms.den) == 5
    assert terms.survival is not None and terms.survival.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3])
    found = {k: s / c for k, (s, c) in block_metrics(terms.readout, blocks, terms.credit).items()}
    assert found["outside"] == 2 / 12 and found["simulated_tau"] == (2 + 1 + 5) / 3
    assert [found[f"first_error_{i}"] for i in range(3)] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert found["a_support"] == 1 and found["head_rows"] == 5 / 3


def test_what_is_measured_over_all_slots_counts_outside_labels_as_wrong() -> None:
    case = Reduced(8, kept=[0, 2, 3])
    assert case.outside.any()
    dense = read_head(case.hidden, case.blocks.labels, case.blocks.valid, case.part)
    assert torch.equal(dense.evaluated, case.blocks.valid & ~case.outside)
    found = block_metrics(dense, case.blocks, case.blocks.valid.double())
    right = float((dense.hit & case.blocks.valid).sum())
    assert found["common_accuracy"] == (right, float(case.blocks.valid.sum()))
    assert found["outside"] == (float(case.outside.sum()), float(case.blocks.valid.sum()))
    whole = read_head(case.hidden, case.blocks.labels, case.blocks.valid, case.head)
    assert "outside" not in block_metrics(whole, case.blocks, case.blocks.valid.double())
