"""What must hold between objectives, in float64: the identities T1 to T31 of the project's notes on objectives.

T2, T4, T5, T9 are in `test_loss`, T26 and T27 with decoding, T33 with the acceptance figures. T31 is tested for what is built
of it (KL), T32 belongs to a drafter that is not.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specauf.objective import Blocks, Head, Objective, Slots, auf, block_loss, gate, position_decay
from specauf.objective import credit as credits
from specauf.objective.loss import credit_of
from specauf.objective.registry import RULES, call, options_of
from tests.unit.objective.reference import argmax
from tests.unit.objective.test_loss import CASES, Case, identify

SEEDS = range(30)
TOL = {"rtol": 1e-10, "atol": 1e-10}


def slots_of(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Slots:
    return Slots.of(logits, labels, torch.ones_like(labels, dtype=torch.bool) if valid is None else valid)


def random_slots(seed: int, n: int = 6, v: int = 3, rows: int = 40, scale: float = 2.0) -> tuple[Tensor, Tensor, Slots]:
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(rows, n, v, generator=g, dtype=torch.float64)
    y = torch.where(torch.rand(rows, n, generator=g) < 0.6, z.argmax(-1), torch.randint(0, v, (rows, n), generator=g))
    return z, y, slots_of(z, y)


def gradient(case: Case, objective: Objective, **changes: Any) -> Tensor:
    leaf = case.hidden.clone().requires_grad_()
    terms = case.terms(objective, leaf, **changes)
    (terms.num * terms.scale).sum().backward()
    return leaf.grad  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "gamma", "options"), CASES, ids=identify)
def test_t1_credits_are_constants(name: str, gamma: float | None, options: dict[str, Any]) -> None:
    """The gradient is that of a weighted loss with the same numbers put in as constants."""
    if name in ("streak", "pard2", "lk-alpha", "lk-lambda"):
        return  # not a weighted cross entropy; their gradients are compared with the reference's
    for seed in SEEDS:
        case, objective = Case(seed), Objective(name, gamma, "global", options)
        terms = case.terms(objective)
        leaf = case.hidden.clone().requires_grad_()
        logits = case.logits(leaf)
        ce = F.cross_entropy(logits.flatten(0, 2), case.blocks.labels.flatten(), reduction="none").view_as(terms.credit)
        parts = credit_of(terms.readout, case.blocks, objective, case.uniform)
        sum(scale * (c * ce).sum() / c.sum().clamp(min=1e-300) for scale, c in parts if c.sum() > 0).backward()
        ours = case.hidden.clone().requires_grad_()
        case.terms(objective, ours).loss.backward()
        torch.testing.assert_close(ours.grad, leaf.grad, **TOL)


def test_t3_a_constant_factor_cancels_in_ratios_and_scales_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(7)
    before = {r: case.terms(Objective("dpace", None, r)).loss for r in ("global", "block", "sequence")}
    rule = RULES["dpace"]
    monkeypatch.setitem(RULES, "dpace", rule._replace(credit=lambda s: 3 * credits.dpace(s)))
    after = {r: case.terms(Objective("dpace", None, r)).loss for r in before}
    torch.testing.assert_close(after["global"], before["global"], **TOL)
    torch.testing.assert_close(after["block"], before["block"], **TOL)
    torch.testing.assert_close(after["sequence"], 3 * before["sequence"], **TOL)


def test_t6_decay_between_uniform_and_the_first_slot() -> None:
    for seed in SEEDS:
        case = Case(seed)
        wide, uniform = (case.terms(o).loss for o in (Objective("decay", 1e12), Objective("uniform")))
        torch.testing.assert_close(wide, uniform, **TOL)
        if case.blocks.valid[..., 0].any():
            narrow, first = (case.terms(o).loss for o in (Objective("decay", 1e-3), Objective("first-k")))
            torch.testing.assert_close(narrow, first, **TOL)
    weights = position_decay(3, 7)
    torch.testing.assert_close(weights, torch.tensor([1, 0.866878, 0.751477], dtype=torch.float64), rtol=1e-6, atol=0)
    assert position_decay(3, None).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="gamma must be > 0"):
        position_decay(3, 0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_t7_t8_t10_t11_supports_of_auf(seed: int) -> None:
    z, y, slots = random_slots(seed)
    valid = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    slots = slots._replace(valid=valid)
    c = auf(slots) * valid
    for row in range(len(y)):
        live = [i for i in range(y.shape[1]) if valid[row, i]]
        wrong = [i for i in live if argmax(z[row, i]) != y[row, i]]
        support = [i for i in live if not wrong or i <= wrong[0]]  # T7, T8, T10: a wrong hole does not end it
        assert c[row].nonzero().flatten().tolist() == support
        run = len(support) - bool(wrong)  # A
        assert len(support) == min(run + 1, len(live))  # T11
        if wrong:
            accuracy = sum(bool(slots.hit[row, i]) for i in support) / len(support)  # type: ignore[index]
            assert accuracy == pytest.approx((len(support) - 1) / len(support))


def test_t11_mean_support_is_tau_minus_the_last_survival() -> None:
    _, y, slots = random_slots(5, rows=400)
    run = (slots.hit.cumprod(-1)).sum(-1).double()  # type: ignore[union-attr]
    survival = [(run >= i).double().mean() for i in range(1, y.shape[1] + 1)]
    size = auf(slots).sum(-1).double().mean()
    assert float(size) == pytest.approx(float(1 + sum(survival) - survival[-1]))


def test_t12_griffins_exclusive_form_spans_auf_to_uniform() -> None:
    for seed in SEEDS:
        case = Case(seed)

        def support(name: str, k: int | None = None, seed: int = seed) -> Tensor:
            return Case(seed).terms(Objective(name, options={} if k is None else {"k": k})).credit

        assert torch.equal(support("griffin-exclusive", 1), support("auf"))
        assert torch.equal(support("griffin-exclusive", 4), support("uniform"))
        grown = [support("griffin-exclusive", k) for k in range(1, 5)]
        assert all((a <= b).all() for a, b in itertools.pairwise(grown))
        wide = case.terms(Objective("auf-decay", 1e12)).loss
        torch.testing.assert_close(wide, case.terms(Objective("auf")).loss, **TOL)
        assert torch.equal(  # a window as long as the block forgets nothing
            Case(seed).terms(Objective("griffin-windowed", options={"k": 2, "window": 9})).credit,
            support("griffin-exclusive", 2),
        )


def test_t12_on_a_right_block_auf_decay_is_decay() -> None:
    case = Case(4)
    right = case.logits(case.hidden).argmax(-1)
    blocks = case.blocks._replace(labels=right.masked_fill(~case.blocks.valid, 0))
    one, other = (case.terms(Objective(n, 3.0), blocks=blocks).loss for n in ("auf-decay", "decay"))
    assert torch.equal(one, other)


def test_t13_zero_temperature_limits_of_the_gate() -> None:
    z, y, _ = random_slots(3, rows=300)
    gap = z.topk(2).values.diff(dim=-1).abs().amin(-1)[..., None].amin(-2) > 0.05
    z, y = z[gap.squeeze(-1)], y[gap.squeeze(-1)]
    assert len(z) > 50
    slots = slots_of(z, y)
    cold = slots._replace(prob=(z / 1e-3).softmax(-1).gather(-1, y[..., None]).squeeze(-1))
    torch.testing.assert_close(gate(cold, shift=1), auf(slots).double(), rtol=0, atol=1e-6)
    assert torch.equal(credits.soft_auf(slots, temperature=0), auf(slots))
    hard, ahead = (gate(slots, temperature=0, future=f) for f in (False, True))
    assert torch.equal(credits.dpace_cumulative(slots, temperature=0, alpha=0), hard)
    for at_zero in (credits.dpace(slots, temperature=0, alpha=0), credits.streak_credit(slots, temperature=0)):
        assert torch.equal(at_zero, ahead)
    assert torch.equal(credits.gate_holds(slots, temperature=0, eps=0.5), auf(slots).bool() & slots.hit)  # type: ignore[operator]
    i = torch.arange(1, y.shape[1] + 1)
    wrong = ~slots.hit  # type: ignore[operator]
    j = torch.where(wrong.any(-1), wrong.int().argmax(-1) + 1, y.shape[1] + 1)[:, None]
    torch.testing.assert_close(gate(cold), (i < j).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gate(cold, future=True), (j - i).clamp(min=0).double(), rtol=0, atol=1e-6)
    assert (gate(cold, future=True).gather(1, (j - 1).clamp(max=y.shape[1] - 1))[wrong.any(-1)] < 1e-6).all()


def test_t13_sampled_auf_is_unbiased_for_the_soft_gate() -> None:
    _, _, slots = random_slots(8, rows=4)
    draws = 20_000
    u = torch.rand(draws, *slots.valid.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = slots._replace(uniform=u, prob=slots.prob.expand_as(u), valid=slots.valid.expand(u.shape))  # type: ignore[union-attr]
    mean, want = credits.sampled_auf(many).double().mean(0), credits.soft_auf(slots)
    error = (want * (1 - want) / draws).sqrt()
    assert ((mean - want).abs() <= 4 * error + 1e-12).all()


def test_t14_dpace_without_smoothing_is_the_gradient_of_the_streak() -> None:
    """And `streak` is differentiated itself, so the control on the same normaliser coincides with it."""
    for seed in SEEDS:
        case = Case(seed)
        leaf = case.hidden.clone().requires_grad_()
        p = case.logits(leaf).softmax(-1).gather(-1, case.blocks.labels[..., None]).squeeze(-1)
        reached = torch.where(case.blocks.valid, p, 1.0).cumprod(-1)
        (-(reached * case.blocks.valid).sum() / 2).backward()  # two sequences
        for name, options in (("dpace", {"alpha": 0.0}), ("streak-credit", {}), ("streak", {})):
            ours = case.hidden.clone().requires_grad_()
            case.terms(Objective(name, None, "sequence", options), ours).loss.backward()
            torch.testing.assert_close(ours.grad, leaf.grad, **TOL)


def test_t15_t16_full_smoothing_counts_the_slots_to_come() -> None:
    case = Case(9)
    valid = case.blocks.valid
    left = valid.flip(-1).cumsum(-1).flip(-1)
    certain = Slots(valid, prob=torch.ones(valid.shape, dtype=torch.float64))
    for slots, alpha in ((certain._replace(prob=torch.rand(valid.shape).double()), 1.0), (certain, 0.3)):
        assert torch.allclose(credits.dpace(slots, alpha=alpha) * valid, (left * valid).double())
        assert torch.allclose(credits.dpace_continuation(slots, alpha=alpha) * valid, (left * valid).double())
        assert torch.allclose(credits.dpace_cumulative(slots, alpha=alpha), torch.ones(valid.shape).double())
    one = case.terms(Objective("dpace-cumulative", None, "sequence", {"alpha": 1.0})).loss
    torch.testing.assert_close(one, case.terms(Objective("uniform")).loss * valid.sum() / 2, **TOL)


def test_t17_t18_dpaces_weights() -> None:
    _, y, slots = random_slots(6)
    n = y.shape[1]
    for alpha in (0.0, 0.5):
        r = (1 - alpha) * slots.prob + alpha  # type: ignore[operator]
        reach, w = r.cumprod(-1), credits.dpace(slots, alpha=alpha)
        torch.testing.assert_close(w[:, :-1] - w[:, 1:], reach[:, :-1], **TOL)
        torch.testing.assert_close(w, reach * credits.dpace_continuation(slots, alpha=alpha), **TOL)
        torch.testing.assert_close(w.sum(-1), (torch.arange(1, n + 1) * reach).sum(-1), **TOL)
        assert (w[:, :-1] >= w[:, 1:]).all()
    broken = slots._replace(prob=slots.prob.clone())  # type: ignore[union-attr]
    broken.prob[:, 3] = 0.0  # type: ignore[index]
    w, reach = credits.dpace(broken, alpha=0.0), broken.prob.cumprod(-1)  # type: ignore[union-attr]
    assert (w[:, 3:] == 0).all()
    torch.testing.assert_close(w[:, 0], reach[:, :3].sum(-1), **TOL)


def test_t19_an_anchor_among_the_slots_changes_no_credit_behind_it() -> None:
    """Other trainers keep the anchor's slot in front. It is invalid, whatever the drafter says there; `first-k` counts it."""
    _, y, slots = random_slots(14)
    g = torch.Generator().manual_seed(0)
    extra = {"uniform": torch.rand(y.shape, generator=g), "target_prob": torch.rand(y.shape, generator=g)}
    slots = slots._replace(**extra, valid=torch.rand(y.shape, generator=g) < 0.8)
    front = Slots(*(None if t is None else torch.cat([torch.zeros_like(t[:, :1]), t], 1) for t in slots))
    for name in RULES.keys() - {"first-k"}:
        decay = position_decay(y.shape[1], 3.0)
        alone, behind = (
            call(RULES[name].credit, s._replace(decay=w), options_of(RULES[name]))
            for s, w in ((slots, decay), (front, torch.cat([decay[:1], decay])))
        )
        pairs = zip(alone, behind, strict=True) if isinstance(alone, tuple) else [((1.0, alone), (1.0, behind))]
        for (_, a), (_, b) in pairs:
            torch.testing.assert_close((b * front.valid)[:, 1:], a * slots.valid, msg=name, **TOL)


def test_t20_smoothed_dpace_is_not_a_gradient_and_by_which_factor() -> None:
    alpha = 0.5
    for seed in SEEDS:
        case = Case(seed)
        leaf = case.hidden.clone().requires_grad_()
        p = case.logits(leaf).softmax(-1).gather(-1, case.blocks.labels[..., None]).squeeze(-1)
        smooth = (1 - alpha) * p + alpha
        (-(torch.where(case.blocks.valid, smooth, 1.0).cumprod(-1) * case.blocks.valid).sum()).backward()
        ours = gradient(case, Objective("dpace", None, "sequence", {"alpha": alpha}))
        factor = ((1 - alpha) * p / smooth).detach()[..., None]
        torch.testing.assert_close(ours * factor, leaf.grad, **TOL)


def multi_pass(hits: list[list[bool]]) -> list[list[bool]]:
    """GRIFFIN's own masks of passes 2, 3, ...: M_2[t] = hit_1[t], M_{n+1}[t] = M_n[t-1] hit_n[t] (edges aside)."""
    masks = [hits[0]]
    for hit in hits[1:]:
        masks.append([(masks[-1][t - 1] if t else True) and hit[t] for t in range(len(hit))])
    return masks


def test_t21_griffins_own_mask_looks_back_a_window_and_revives() -> None:
    first, second = [True, False, True, True], [True, True, True, True]
    masks = multi_pass([first, second])
    assert masks[0] == first and masks[1][2] == (first[1] and second[2])
    assert not masks[0][1] and masks[1][1], "a row that was masked is active in the next pass"
    block = Slots(torch.ones(1, 4).bool(), rank=torch.tensor([[0, 9, 0, 0]]))
    assert credits.griffin_exclusive(block)[0].tolist() == [1, 1, 0, 0], "the block form ends for good"
    assert credits.griffin_windowed(block, window=1)[0].tolist() == [1, 1, 0, 1], "the windowed form revives"
    assert all(all(m) for m in multi_pass([[True] * 4] * 3))


def test_t22_the_inclusive_form_has_dead_blocks() -> None:
    z = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]], dtype=torch.float64)[None]  # b n k h, head = identity
    blocks = Blocks(
        torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.tensor([[[3]]]), torch.ones(1, 1, 1).bool()
    )
    eye = torch.eye(4, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    dead = block_loss(leaf, blocks, Objective("griffin-inclusive"), Head(eye)).loss
    dead.backward()
    assert dead == 0 and (leaf.grad == 0).all()
    alive = block_loss(z.clone().requires_grad_(), blocks, Objective("griffin-exclusive"), Head(eye)).loss
    torch.testing.assert_close(alive, F.cross_entropy(z[0, 0], torch.tensor([3])), **TOL)


def test_t23_l2r_joint_and_separate() -> None:
    for seed in SEEDS:
        case = Case(seed)
        plain = case.terms(Objective("decay", 10.0))
        torch.testing.assert_close(
            case.terms(Objective("l2r-focal", 10.0, options={"focal": 0})).loss, plain.loss, **TOL
        )
        breakers = case.terms(Objective("first-error"))
        joint = case.terms(Objective("l2r-focal", 10.0, options={"focal": 1.7}))
        torch.testing.assert_close(joint.num, plain.num + 1.7 * breakers.num, **TOL)
        if breakers.den > 0:
            effective = float(0.3 * plain.den / breakers.den)
            one = gradient(case, Objective("l2r-focal", 10.0, options={"focal": effective}))
            leaf = case.hidden.clone().requires_grad_()
            case.terms(Objective("l2r-focal-separate", 10.0, options={"focal": 0.3}), leaf).loss.backward()
            cosine = F.cosine_similarity(one.flatten(), leaf.grad.flatten(), dim=0)  # type: ignore[union-attr]
            assert float(cosine) == pytest.approx(1, abs=1e-10)


def test_t24_l2r_trains_the_suffix_and_auf_does_not() -> None:
    case = Case(13)
    c = case.terms(Objective("auf")).credit
    suffix = case.blocks.valid & (c == 0)
    assert suffix.any()
    assert (gradient(case, Objective("auf"))[suffix] == 0).all()
    assert (gradient(case, Objective("l2r-focal"))[suffix].abs().sum(-1) > 0).all()


def test_t25_the_streak_reward() -> None:
    certain = Slots(torch.ones(1, 5).bool(), prob=torch.ones(1, 5).double())
    assert torch.equal(credits.soft_auf(certain), torch.ones(1, 5).double())
    eye = 60 * torch.eye(5, dtype=torch.float64)
    labels = torch.arange(5).view(1, 1, 5)
    blocks = Blocks(torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), labels, torch.ones(1, 1, 5).bool())
    right, first_wrong = torch.eye(5).double()[None, None], torch.eye(5).double()[None, None].clone()
    first_wrong[0, 0, 0] = torch.eye(5).double()[1]
    objective = Objective("streak", None, "sequence")
    assert float(block_loss(right, blocks, objective, Head(eye)).loss) == pytest.approx(-5)
    assert float(block_loss(first_wrong, blocks, objective, Head(eye)).loss) == pytest.approx(0, abs=1e-20)
    alone = Blocks(*(t[..., :1] for t in blocks))
    q = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    one = block_loss(q.log()[None, None, None], alone, objective, Head(torch.eye(5, dtype=torch.float64)))
    assert float(one.loss) == pytest.approx(-0.4), "one slot: its own probability"


def test_t28_pard2_gates_on_the_target_alone() -> None:
    sure = Slots(torch.ones(2, 4).bool(), target_prob=torch.ones(2, 4).double())
    assert torch.equal(credits.pard2(sure), torch.ones(2, 4).double())
    unsure = sure._replace(target_prob=torch.tensor([[0.0, 1, 1, 1], [0.5, 0.5, 1, 1]]).double())
    assert credits.pard2(unsure).tolist() == [[1, 0, 0, 0], [1, 0.5, 0.25, 0.25]]
    case = Case(3)
    one = case.terms(Objective("pard2")).credit
    assert torch.equal(one, case.terms(Objective("pard2"), case.hidden.clone() * 2).credit)


def distributions(p: list[float], q: list[float], label: int = 0) -> tuple[Tensor, Blocks, Tensor, Tensor]:
    """Hidden states whose logits through the identity are log q and log p."""
    hidden, target_hidden = (torch.tensor(x, dtype=torch.float64).log()[None, None, None] for x in (q, p))
    blocks = Blocks(
        torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.tensor([[[label]]]), torch.ones(1, 1, 1).bool()
    )
    return hidden.requires_grad_(), blocks, torch.eye(len(p), dtype=torch.float64), target_hidden


def test_t29_lk_losses() -> None:
    p, q = [0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1]
    hidden, blocks, eye, target_hidden = distributions(p, q)
    found = block_loss(hidden, blocks, Objective("lk-alpha"), Head(eye), target_hidden=target_hidden)
    assert float(found.readout.overlap) == pytest.approx(0.9)  # type: ignore[arg-type]
    found.loss.backward()
    slope = hidden.grad.clone()
    pure = {}
    for eta in (0.0, 1e9):  # T29: eta 0 is KL, eta -> infinity the total variation
        leaf = hidden.detach().clone().requires_grad_()
        block_loss(
            leaf, blocks, Objective("lk-lambda", options={"eta": eta}), Head(eye), target_hidden=target_hidden
        ).loss.backward()
        pure[eta] = leaf.grad
    torch.testing.assert_close(
        pure[0.0].flatten(), torch.tensor(q, dtype=torch.float64) - torch.tensor(p, dtype=torch.float64), **TOL
    )
    torch.testing.assert_close(slope, pure[1e9] / 0.9, **TOL)
    hidden, blocks, eye, target_hidden = distributions(q, q)
    same = block_loss(hidden, blocks, Objective("lk-alpha"), Head(eye), target_hidden=target_hidden)
    assert float(same.loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(same.readout.kl) == pytest.approx(0, abs=1e-12)  # type: ignore[arg-type]


def test_t29_a_certain_target_makes_lk_alpha_cross_entropy() -> None:
    q = [0.4, 0.3, 0.2, 0.1]
    hidden, blocks, eye, _ = distributions(q, q, label=2)
    certain = torch.tensor([-800.0, -800.0, 0.0, -800.0], dtype=torch.float64)[None, None, None]
    found = block_loss(hidden, blocks, Objective("lk-alpha"), Head(eye), target_hidden=certain)
    assert float(found.loss.detach()) == pytest.approx(-math.log(0.2))
    found.loss.backward()
    want = torch.tensor(q, dtype=torch.float64) - F.one_hot(torch.tensor(2), 4)
    torch.testing.assert_close(hidden.grad.flatten(), want, **TOL)


def test_t30_granularities_of_lambda_agree_where_every_overlap_is_the_same() -> None:
    hidden, blocks, eye, target_hidden = distributions([0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1])
    hidden, target_hidden = (t.detach().expand(2, 3, 4, 4).clone() for t in (hidden, target_hidden))
    blocks = Blocks(torch.zeros(2, 3).long(), torch.ones(2, 3).bool(), *(t.expand(2, 3, 4) for t in blocks[2:]))
    losses = [
        block_loss(
            hidden.requires_grad_(),
            blocks,
            Objective("lk-lambda", options={"per": per}),
            Head(eye),
            target_hidden=target_hidden,
        ).loss
        for per in ("token", "slot", "all")
    ]
    torch.testing.assert_close(losses[0], losses[1], **TOL)
    torch.testing.assert_close(losses[0], losses[2], **TOL)
    mixed = next(c for c in map(Case, SEEDS) if c.hidden.shape[2] > 3)
    apart = [mixed.terms(Objective("lk-lambda", options={"per": per})).loss for per in ("token", "slot", "all")]
    assert len({round(float(x.detach()), 8) for x in apart}) == 3, "on unequal overlaps they are different objectives"


def test_t31_kl_row_gradient_is_q_minus_p() -> None:
    hidden, blocks, eye, target_hidden = distributions([0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1])
    block_loss(
        hidden, blocks, Objective("pard2", options={"ce_weight": 0}), Head(eye), target_hidden=target_hidden
    ).loss.backward()
    want = torch.tensor([-0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(hidden.grad.flatten(), want, **TOL)


def test_gates_are_one_function() -> None:
    """Design, section 4: every preset is a row of (T, alpha, shift, future)."""
    _, _, slots = random_slots(2)
    ones = gate(slots, alpha=1.0)
    for name, row in (
        ("uniform", {"alpha": 1.0}),
        ("auf", {"temperature": 0, "shift": 1}),
        ("soft-auf", {"shift": 1}),
        ("dpace", {"alpha": 0.5, "future": True}),
        ("dpace-cumulative", {"alpha": 0.5}),
        ("streak-credit", {"future": True}),
    ):
        objective = Objective(name)
        found = call(objective.rule.credit, slots, objective.options)
        torch.testing.assert_close(found.double(), gate(slots, **row).double().expand_as(ones), **TOL)  # type: ignore[arg-type]
