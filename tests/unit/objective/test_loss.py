"""Every objective against the slow reference: loss and gradient, in float64, over random and adversarial blocks."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from specauf import config
from specauf.objective import RULES, Blocks, Head, Objective, Slots, block_loss, block_metrics, read_head
from specauf.objective.credit import dpace
from specauf.objective.loss import LossTerms, credit_of
from specauf.objective.metrics import leading_run
from specauf.objective.wavefront import default_cuts
from tests.unit.objective import reference

REDUCTIONS = ["global", "block", "sequence"]
CASES: list[tuple[str, float | None, dict[str, Any]]] = [
    *((name, 4.0 if isinstance(rule.gamma, str) else None, {}) for name, rule in RULES.items()),
    *((f"{name}-decay", 2.5, {}) for name in ("auf", "soft-auf", "griffin-exclusive", "sampled-auf", "first-error")),
    ("first-k", None, {"k": 2}),
    ("soft-auf", None, {"temperature": 0.5, "alpha": 0.2}),
    ("griffin-exclusive", None, {"k": 2}),
    ("griffin-inclusive", None, {"k": 1}),
    ("griffin-windowed", None, {"k": 1, "window": 3}),
    ("l2r-focal", 3.0, {"focal": 1.5}),
    ("dpace", None, {"alpha": 0.0}),
    ("dpace", None, {"alpha": 1.0, "temperature": 2.0}),
    ("dpace", None, {"eps": 0.3}),
    ("dpace-cumulative", None, {"eps": 0.3}),
    ("soft-auf", None, {"eps": 0.1, "alpha": 0.1}),
    ("soft-auf-decay", 2.5, {"eps": 0.1}),
    ("streak-credit", None, {"eps": 0.05, "temperature": 2.0}),
    ("pard2", None, {"ce_weight": 0.0}),
    ("lk-alpha", 2.0, {}),
    ("lk-lambda", 2.0, {"eta": 0.5}),
]


class Case:
    """A small vocabulary, so that hits, all-right blocks, holes, ties and all-invalid blocks are common."""

    def __init__(self, seed: int, vocab: int = 4, slots: int | None = None) -> None:
        g = torch.Generator().manual_seed(seed)
        b, n, k, h = 2, 4, int(torch.randint(1, 6, (), generator=g)), 3
        k = slots or k
        self.weight = torch.randn(vocab, h, generator=g, dtype=torch.float64)
        self.hidden = torch.randn(b, n, k, h, generator=g, dtype=torch.float64)
        self.target_hidden = torch.randn(b, n, k, h, generator=g, dtype=torch.float64)
        self.bias = torch.randn(vocab, generator=g, dtype=torch.float64) if seed % 3 == 0 else None
        self.softcap = 1.5 if seed % 4 == 0 else None
        if seed % 5 == 0:  # ties
            self.hidden, self.weight, self.bias = self.hidden.round(), self.weight.round(), None
        labels = torch.randint(0, vocab, (b, n, k), generator=g)
        right = (torch.rand(b, n, 1, generator=g) < 0.6) & (torch.rand(b, n, k, generator=g) < 0.8)
        labels = torch.where(right, F.linear(self.hidden, self.weight, self.bias).argmax(-1), labels)
        valid = torch.rand(b, n, k, generator=g) < torch.rand(b, n, 1, generator=g) * 1.5
        self.blocks = Blocks(torch.zeros(b, n).long(), valid.any(-1), labels.masked_fill(~valid, 0), valid)
        self.uniform = torch.rand(b, n, k, generator=g, dtype=torch.float64)

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.softcap)

    def terms(self, objective: Objective, hidden: Tensor | None = None, **changes: Any) -> LossTerms:
        given = {
            "blocks": self.blocks,
            "target_hidden": self.target_hidden,
            "logits_rows": 3,
            **changes,
        }
        leaf = self.hidden.clone().requires_grad_() if hidden is None else hidden
        return block_loss(leaf, given.pop("blocks"), objective, self.head, uniform=self.uniform, **given)

    def reference(self, objective: Objective, hidden: Tensor) -> Tensor:
        return reference.loss(
            objective.name,
            hidden,
            self.blocks,
            self.weight,
            self.bias,
            gamma=objective.gamma,
            reduction=objective.reduction,
            options=dict(objective.options),
            target_hidden=self.target_hidden,
            uniform=self.uniform,
            softcap=self.softcap,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return reference.head(hidden, self.weight, self.bias, self.softcap)


def identify(case: Any) -> str | None:
    return case if isinstance(case, str) else None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_loss_and_gradient_equal_the_reference(
    name: str, gamma: float | None, options: dict[str, Any], reduction: Any, seed: int
) -> None:
    case, objective = Case(seed), Objective(name, gamma, reduction, options)
    ours, theirs = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    found, wanted = case.terms(objective, ours).loss, case.reference(objective, theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    found.backward()
    if wanted.requires_grad:
        wanted.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(ours.grad).all()


def test_the_recipes_know_every_objective_that_is_built_in() -> None:
    assert set(config.OBJECTIVES) == set(RULES)
    assert set(config.OWN_DECAY) == {name for name, rule in RULES.items() if rule.gamma is not None}


@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), staged=st.booleans())
def test_the_wavefront_reads_the_supports_and_changes_nothing(
    name: str, gamma: float | None, options: dict[str, Any], seed: int, staged: bool
) -> None:
    case, objective = Case(seed), Objective(name, gamma, "global", options)
    if not objective.truncates:
        return
    k = case.hidden.shape[2]
    how = {"uniform": case.uniform, "ranks": "rank" in objective.rule.needs}
    dense = read_head(case.hidden, case.blocks.labels, case.blocks.valid, case.head, **how)
    cuts = default_cuts(k) if staged else list(range(1, k + 1))
    found = read_head(
        *(case.hidden, case.blocks.labels, case.blocks.valid, case.head),
        cuts=cuts,
        survives=objective.survives,
        **how,
    )
    (_, want), (_, got) = (credit_of(r, case.blocks, objective, case.uniform)[0] for r in (dense, found))
    torch.testing.assert_close(want, got, rtol=1e-12, atol=0)  # probabilities round with the shape of the product
    support = want > 0
    assert (found.evaluated | ~support).all(), "a supported slot was not read"
    assert torch.equal(found.hit[support], dense.hit[support])
    torch.testing.assert_close(found.ce[support], dense.ce[support], rtol=1e-12, atol=1e-12)
    if not staged and (name in ("auf", "sampled-auf", "griffin-exclusive") or "eps" in options):
        assert int(found.evaluated.sum()) == int(support.sum())


@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
def test_slots_without_credit_get_exactly_zero_and_do_not_matter(
    name: str, gamma: float | None, options: dict[str, Any]
) -> None:
    """T2, T9: bitwise, for invalid slots under every objective and for the suffix under those that truncate."""
    for seed in range(8):
        case, objective = Case(seed), Objective(name, gamma, "global", options)
        leaf = case.hidden.clone().requires_grad_()
        terms = case.terms(objective, leaf)
        terms.loss.backward()
        outside = terms.credit == 0
        if name != "streak":
            assert (leaf.grad[outside] == 0).all()
        ends = objective.truncates and not name.startswith(("first-error", "griffin-inclusive"))
        silent = outside if ends else ~case.blocks.valid
        poked = torch.where(silent[..., None], leaf.detach() * -7 + 1, leaf.detach()).requires_grad_()
        again = case.terms(objective, poked)
        assert torch.equal(again.num, terms.num) and torch.equal(again.den, terms.den)


def test_first_slot_wrong_is_that_slot_alone() -> None:
    weight = torch.eye(4, dtype=torch.float64)
    hidden = 3 * F.one_hot(torch.tensor([[[0, 1, 2], [1, 1, 2]]]), 4).double()
    labels = torch.tensor([[[0, 1, 2], [0, 1, 2]]])
    blocks = Blocks(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), labels, torch.ones(1, 2, 3).bool())
    credit = block_loss(hidden.requires_grad_(), blocks, Objective("auf"), Head(weight)).credit
    assert credit[0].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
def test_micro_batches_add_up_and_blocks_may_be_permuted(
    name: str, gamma: float | None, options: dict[str, Any]
) -> None:
    """T4: numerators and denominators of chunks sum to the whole's."""
    case, objective = Case(11), Objective(name, gamma, "global", options)
    whole = case.terms(objective)
    parts = []
    for i in (1, 0):
        one = Case(11)
        one.hidden, one.target_hidden, one.uniform = (
            t[i : i + 1] for t in (one.hidden, one.target_hidden, one.uniform)
        )
        one.blocks = Blocks(*(t[i : i + 1].flip(1) for t in case.blocks))
        one.hidden, one.target_hidden, one.uniform = (t.flip(1) for t in (one.hidden, one.target_hidden, one.uniform))
        parts.append(one.terms(objective))
    torch.testing.assert_close(sum(p.num for p in parts), whole.num, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sum(p.den for p in parts), whole.den, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "gamma", "options"), [*CASES, *(("lk-lambda", None, {"per": p}) for p in ("slot", "all"))], ids=identify
)
def test_nothing_valid_gives_zero_loss_and_finite_gradient(
    name: str, gamma: float | None, options: dict[str, Any]
) -> None:
    """T5."""
    case = Case(1)
    empty = case.blocks._replace(valid=torch.zeros_like(case.blocks.valid))
    for reduction in REDUCTIONS:
        leaf = case.hidden.clone().requires_grad_()
        terms = case.terms(Objective(name, gamma, reduction, options), leaf, blocks=empty)  # type: ignore[arg-type]
        terms.loss.backward()
        assert terms.loss == 0 and (leaf.grad == 0).all()
        assert terms.survival is None or (terms.survival == 0).all()


@pytest.mark.parametrize("cuts", [None, [4]], ids=["as far as needed", "every slot"])
def test_metrics_of_a_block_worked_by_hand(cuts: list[int] | None) -> None:
    """Slots behind the support are in no figure of it, though the head may have read them."""
    weight = torch.eye(5, dtype=torch.float64)
    said = torch.tensor([[[0, 1, 2, 3], [0, 0, 2, 3]]])
    hidden = 3 * F.one_hot(said, 5).double()
    labels = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 3]]])
    valid = torch.ones(1, 2, 4).bool()
    valid[0, 0, 1] = False  # a hole is passed over
    blocks = Blocks(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), labels.masked_fill(~valid, 0), valid)
    terms = block_loss(hidden.requires_grad_(), blocks, Objective("auf"), Head(weight), cuts=cuts)
    found = {k: s / c for k, (s, c) in block_metrics(terms.readout, blocks, terms.credit).items()}
    assert found["simulated_tau"] == (1 + 3 + 1 + 1) / 2
    assert found["r_active"] == 5 / 8 and found["r_active_B"] == 5 / 10
    assert found["a_support"] == 4 / 5
    assert [found[f"first_error_{k}"] for k in range(5)] == [0.5, 0, 0.5, 0, 0]
    assert [found[f"credit_{k}"] for k in range(1, 5)] == [1, 0.5, 0.5, 0.5]
    assert found.get("common_accuracy") == (6 / 7 if cuts else None)


def test_metrics_are_of_the_blocks_that_are_there_and_of_the_predictions_that_are_served() -> None:
    """A padded block is in no mean, and what is trained but never served is not looked at."""
    weight = torch.eye(5, dtype=torch.float64)
    said = torch.tensor([[[0, 1, 2], [0, 1, 4], [0, 0, 0]]])
    labels = torch.tensor([[[0, 1, 2], [0, 1, 2], [0, 0, 0]]])
    valid = torch.tensor([[[True] * 3, [True] * 3, [False] * 3]])
    blocks = Blocks(torch.zeros(1, 3).long(), valid.any(-1), labels, valid)
    terms = block_loss(3 * F.one_hot(said, 5).double(), blocks, Objective("uniform"), Head(weight))

    def figures(served: int | None) -> dict[str, float]:
        return {k: s / c for k, (s, c) in block_metrics(terms.readout, blocks, terms.credit, served).items()}

    whole, part = figures(None), figures(2)
    assert (whole["simulated_tau"], part["simulated_tau"]) == (1 + 5 / 2, 1 + 4 / 2)
    assert (whole["first_error_3"], part["first_error_0"], whole["r_active"]) == (0.5, 1, 1)
    assert (whole["common_accuracy"], part["common_accuracy"]) == (5 / 6, 1)
    assert whole["head_rows"] == part["head_rows"] == 3 and "credit_3" not in part
    assert whole["r_active_B"] == 3 / 4 and part["r_active_B"] == 2 / 3


def test_accuracy_on_all_slots_needs_all_slots() -> None:
    weight = torch.eye(4, dtype=torch.float64)
    labels = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 3]]])
    hidden = 3 * F.one_hot(torch.tensor([[[0, 0, 2, 3], [0, 1, 2, 3]]]), 4).double()
    blocks = Blocks(torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), labels, torch.ones(1, 2, 4).bool())
    for name, known in (("auf", False), ("uniform", True)):
        terms = block_loss(hidden, blocks, Objective(name), Head(weight), cuts=[1, 2, 3, 4])
        found = block_metrics(terms.readout, blocks, terms.credit)
        assert ("common_accuracy" in found) == known, name
        assert found["simulated_tau"] == (2 + 5, 2)
    terms = block_loss(hidden, blocks, Objective("first-k", options={"k": 2}), Head(weight), cuts=[1, 2, 3, 4])
    found = block_metrics(terms.readout, blocks, terms.credit)
    assert not {"common_accuracy", "simulated_tau", "first_error_0"} & found.keys(), "one block's run may go on"


def test_a_run_passes_over_holes_and_does_not_count_them() -> None:
    hit = torch.tensor([[True, True, False, True], [True, False, True, True]])
    valid = torch.tensor([[True, False, True, True], [True, False, True, True]])
    assert leading_run(hit, valid).tolist() == [1, 3]
    assert leading_run(hit, torch.ones_like(valid)).tolist() == [2, 1]


@pytest.mark.parametrize("cuts", [None, [3]], ids=["as far as needed", "every slot"])
def test_survival_is_the_share_of_real_blocks_that_go_on_past_each_slot(cuts: list[int] | None) -> None:
    """By hand: right, wrong at its second slot alone, right over a hole, and a block that is padding; in two sequences."""
    weight = torch.eye(4, dtype=torch.float64)
    hidden = 3 * F.one_hot(torch.tensor([[[0, 1, 2], [0, 3, 2]], [[0, 3, 2], [0, 0, 0]]]), 4).double()
    labels, valid = torch.tensor([[[0, 1, 2], [0, 1, 2]], [[0, 0, 2], [0, 0, 0]]]), torch.ones(2, 2, 3).bool()
    valid[1, 0, 1] = valid[1, 1, :] = False
    blocks = Blocks(torch.zeros(2, 2).long(), valid.any(-1), labels, valid)
    found = block_loss(hidden, blocks, Objective("auf"), Head(weight), cuts=cuts).survival
    assert found is not None and found.tolist() == pytest.approx([1, 2 / 3, 2 / 3])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_first_slots_alone_are_read_for_the_first_slots_alone(k: int) -> None:
    case = Case(3, slots=4)
    blocks = case.blocks._replace(valid=torch.ones_like(case.blocks.valid))
    terms = case.terms(Objective("first-k", options={"k": k}), blocks=blocks, cuts=[1, 2, 3, 4])
    assert torch.equal(terms.readout.evaluated, terms.credit > 0) and int(terms.credit.sum()) == 2 * 4 * k


def test_the_drafters_fields_are_read_from_its_logits_at_the_temperature_asked_for() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 5)
    labels, valid = torch.tensor([1, 2, 0, 3, 99]), torch.tensor([True] * 4 + [False])
    found = Slots.of(logits, labels, valid, temperature=0.5)
    assert found.rank is not None and found.rank.tolist() == [0, 1, 2, 3, 2], "ties go to the lower index"
    assert found.hit is not None and found.hit.tolist() == [True, False, False, False, False]
    want = (logits[0] / 0.5).softmax(0)[[1, 2, 0, 3, 0]]
    torch.testing.assert_close(found.prob, want)
    assert Slots.of(logits, labels, valid).prob.tolist() == pytest.approx(
        logits[0].softmax(0)[[1, 2, 0, 3, 0]].tolist()
    )


@pytest.mark.parametrize("per", ["token", "slot", "all"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_lambda_is_of_the_overlap_averaged_over_what_it_is_said_to_be(per: str, seed: int) -> None:
    """Loss and gradient: the average is over valid slots alone, and a constant."""
    case, eta = Case(seed), 0.7
    if not case.blocks.valid.any():
        return
    leaf, ours = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    p, q = case.logits(case.target_hidden).softmax(-1), case.logits(leaf).softmax(-1)
    overlap, valid = torch.minimum(p, q).sum(-1), case.blocks.valid.tolist()
    b, n, k = overlap.shape
    places = [(i, j, m) for i in range(b) for j in range(n) for m in range(k) if valid[i][j][m]]
    total = torch.zeros((), dtype=torch.float64)
    for i, j, m in places:
        among = {"token": [(i, j, m)], "slot": [x for x in places if x[2] == m], "all": places}[per]
        lam = math.exp(-eta * sum(float(overlap[x].detach()) for x in among) / len(among))
        kl = (p[i, j, m] * (p[i, j, m].log() - q[i, j, m].log())).sum()
        total = total + 0.8**m * (lam * kl + (1 - lam) * (1 - overlap[i, j, m]))
    want = total / sum(0.8**m for _, _, m in places)
    found = case.terms(Objective("lk-lambda", None, "global", {"per": per, "eta": eta}), ours).loss
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    found.backward()
    want.backward()
    torch.testing.assert_close(ours.grad, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("auff",), "did you mean 'auf'"),
        (("xyz",), r"unknown objective 'xyz'\. Valid: uniform, "),
        (("decay",), "needs a gamma"),
        (("decay", 0.0), "gamma must be > 0"),
        (("auf", 4.0), "'auf-decay' does"),
        (("lk-alpha-decay", 4.0), "unknown objective"),
        (("auf", None, "token"), "unknown reduction"),
        (("dpace", None, "global", {"alpha": 1.5}), r"alpha must be in \[0, 1\]"),
        (("dpace", None, "global", {"eps": 1.0}), r"eps must be in \[0, 1\), got 1.0"),
        (("dpace-continuation", None, "global", {"eps": 0.1}), "has no option 'eps'; it takes temperature, alpha"),
        (("dpace", None, "global", {"beta": 1}), "has no option 'beta'; it takes"),
        (("auf", None, "global", {"alpha": 0.5}), "it takes none"),
        (("griffin-exclusive", None, "global", {"k": 0}), "k must be at least 1"),
        (("griffin-exclusive", None, "global", {"k": 1.5}), "whole number"),
        (("lk-lambda", None, "global", {"per": "head"}), "token, slot, all"),
        (("dpace", None, "global", {"alpha": "much"}), "must be a finite number"),
        (("dpace", None, "global", {"alpha": True}), "must be a finite number"),
        (("lk-lambda", None, "global", {"eta": math.inf}), "must be a finite number"),
    ],
)
def test_objectives_that_cannot_be_meant_are_refused(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Objective(*arguments)


@pytest.mark.parametrize(
    ("name", "missing"), [("pard2", "target_hidden"), ("lk-alpha", "target_hidden"), ("sampled-auf", "uniform")]
)
def test_what_an_objective_needs_is_asked_for_by_name(name: str, missing: str) -> None:
    case = Case(2)
    with pytest.raises(ValueError, match=f"needs '{missing}'"):
        block_loss(case.hidden, case.blocks, Objective(name), Head(case.weight))


def test_inputs_that_are_laid_out_otherwise_are_refused() -> None:
    case = Case(1, slots=4)
    for cuts in ([1, 2], [3, 1, 4]):
        told = rf"cuts are stage ends, ascending, the last of them 4, .* got {re.escape(str(cuts))}"
        with pytest.raises(ValueError, match=told):
            case.terms(Objective("auf"), cuts=cuts)
    with pytest.raises(ValueError, match=r"target_hidden has one row per prediction, \(2, 4, 4\)"):
        case.terms(Objective("pard2"), target_hidden=case.target_hidden[:, :, 0])
    with pytest.raises(ValueError, match="uniform has one row per prediction"):
        case.uniform = case.uniform[:1]
        case.terms(Objective("sampled-auf"))


def test_a_credit_that_is_nan_where_nothing_is_valid_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, slots=4)
    assert not case.blocks.valid.all()
    nan = RULES["uniform"]._replace(credit=lambda slots: torch.where(slots.valid, 1.0, torch.nan))
    want = case.terms(Objective("uniform"))
    monkeypatch.setitem(RULES, "uniform", nan)
    found = case.terms(Objective("uniform"))
    assert torch.equal(found.loss, want.loss) and torch.equal(found.credit, want.credit)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["auf", "streak", "pard2"])
def test_the_loss_needs_no_gradient(name: str, off: type) -> None:
    case = Case(1, slots=4)
    want = case.terms(Objective(name)).loss
    with off():
        found, formed = case.terms(Objective(name)), Objective(name).formed
    torch.testing.assert_close(found.loss, want.detach())
    assert not found.num.requires_grad and found.readout.grad is None and formed == ()


def test_credits_of_logits_that_have_a_gradient_are_constants() -> None:
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    slots = Slots.of(logits, torch.randint(7, (3, 4)), torch.ones(3, 4, dtype=torch.bool))
    assert not dpace(slots).requires_grad


def test_a_gradient_that_overflows_counts_only_where_its_slot_does() -> None:
    """The second slot is read with the first, and has no credit behind its failure."""
    weight = torch.tensor([[65504.0, 0], [-65504.0, 0], [0, 1]], dtype=torch.float16)
    blocks = Blocks(
        torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), *(torch.ones(1, 1, 2, dtype=t) for t in (int, bool))
    )
    leaf = torch.tensor([[[[0.0, 1.0], [1e-3, 0.0]]]], dtype=torch.float16, requires_grad=True)
    for name, finite in (("uniform", False), ("auf", True)):
        (grad,) = torch.autograd.grad(block_loss(leaf, blocks, Objective(name), Head(weight), cuts=[2]).loss, leaf)
        assert grad[..., 0, :].isfinite().all() and bool((grad[..., 1, :] == 0).all()) == finite


def test_an_objective_may_be_a_key() -> None:
    same, other = Objective("dpace"), Objective("dpace", options={"alpha": 0.3})
    assert {same: 1, other: 2}[Objective("dpace")] == 1 and same != other


def test_a_second_derivative_is_refused_and_not_zero() -> None:
    case = Case(1, slots=4)
    leaf = case.hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(case.terms(Objective("uniform"), leaf).loss ** 2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
