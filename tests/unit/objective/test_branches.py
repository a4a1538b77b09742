"""Domino's two-branch loss against dense logits in float64: loss, gradients, who gets any, and what is read."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from specauf.drafter.checkpoint import build_drafter
from specauf.drafter.config import DominoHead
from specauf.drafter.domino import Corrected, Domino
from specauf.objective import Blocks, Head, Objective, read_head
from specauf.objective.branches import VARIANTS, Branch, Shared, TwoBranchTerms, lambda_base, two_branch_loss
from specauf.objective.credit import position_decay
from tests.conftest import make_geometry, make_target
from tests.unit.objective import reference as slow

VOCAB, WIDTH, N = 61, 32, 5
HEAD = ("prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight")


class Rows:
    """Hidden states that are all there; counts what is asked for."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.asked = z, 0

    def rows(self, todo: Tensor) -> Tensor:
        self.asked += int(todo.sum())
        return self.z[todo]


class Scene(NamedTuple):
    drafter: Domino
    z: Tensor
    said: Tensor
    blocks: Blocks
    weight: Tensor


def scene(seed: int, right: float = 0.7, holes: float = 0.2, blocks: int = 9) -> Scene:
    """Labels agree with one branch's argmax or the other's with probability `right`, else with nothing in particular. The
    correction is as large as the base branch's logits, so that the branches fail at different slots."""
    target = make_target()
    geometry = dataclasses.replace(make_geometry(target), domino=DominoHead(7, 6, 1, True))
    drafter = build_drafter(geometry, seed).double()
    assert isinstance(drafter, Domino)
    drafter.expansion.data.mul_(3000)
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64)
    z = torch.randn(1, blocks, N, WIDTH, generator=g, dtype=torch.float64).requires_grad_()
    said = torch.randn(1, blocks, N, WIDTH, generator=g, dtype=torch.float64)
    base, final = dense(drafter, z, said, weight)
    best = torch.where(torch.rand(1, blocks, N, generator=g) < 0.5, base.argmax(-1), final.argmax(-1))
    labels = torch.where(
        torch.rand(1, blocks, N, generator=g) < right, best, torch.randint(VOCAB, (1, blocks, N), generator=g)
    )
    valid = torch.rand(1, blocks, N, generator=g) >= holes
    valid[0, 0] = False  # a block with nothing in it
    keep = valid.any(-1)
    return Scene(drafter, z, said, Blocks(keep.long() * 0, keep, labels.masked_fill(~valid, 0), valid), weight)


def dense(drafter: Domino, z: Tensor, said: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    base = z @ weight.T
    corrected = torch.arange(N) >= drafter.pure
    code = drafter.code(z, drafter.prefix(said)) * corrected[:, None]
    return base, base + code @ drafter.expansion.T


def support(logits: Tensor, blocks: Blocks) -> Tensor:
    """1 up to the first wrong valid slot, block by block and slot by slot."""
    out = torch.zeros(blocks.valid.shape, dtype=torch.float64)
    for j, (block, labels, valid) in enumerate(zip(logits[0], blocks.labels[0], blocks.valid[0], strict=True)):
        for i in range(N):
            if valid[i]:
                out[0, j, i] = 1
                if int(block[i].argmax()) != int(labels[i]):
                    break
    return out


def reference(s: Scene, variant: str, lam: float, gamma: float) -> Tensor:
    """Section 5.2 of the paper, read literally."""
    base, final = dense(s.drafter, s.z, s.said, s.weight)
    decay = position_decay(N, gamma)
    masks = {"common": s.blocks.valid.double(), "base": support(base, s.blocks), "final": support(final, s.blocks)}
    of_base, of_final, decayed = {
        "decay-only": ("common", "common", True),
        "b-auf": ("base", "common", False),
        "b-auf-d": ("base", "common", True),
        "s-auf": ("base", "base", False),
        "s-auf-d": ("base", "base", True),
        "f-auf": ("base", "final", False),
        "f-auf-d": ("base", "final", True),
    }[variant]
    total = torch.zeros((), dtype=torch.float64)
    for share, logits, name in ((lam, base, of_base), (1 - lam, final, of_final)):
        credit = masks[name] * (decay if decayed else 1)
        ce = F.cross_entropy(logits.flatten(0, 2), s.blocks.labels.flatten(), reduction="none").view_as(credit)
        total = total + share * (credit * ce).sum() / credit.sum()
    return total


def branches(variant: str, gamma: float) -> tuple[Branch, Branch]:
    base, final, side = VARIANTS[variant]

    def objective(name: str) -> Objective:
        return Objective(name, gamma if "decay" in name else None)

    return Branch(objective(base), "base"), Branch(objective(final), side)


def ours(
    s: Scene,
    pair: tuple[Branch, Branch],
    lam: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    **how: object,
) -> TwoBranchTerms:
    rows = Shared(Rows(s.z), s.blocks.valid)
    corrected = Corrected(s.drafter, rows, s.said)
    head = Head(s.weight, bias, softcap, expansion=s.drafter.expansion)
    return two_branch_loss(rows, corrected, s.blocks, *pair, lam, head, logits_rows=4, **how)  # type: ignore[arg-type]


def gradients(loss: Tensor, s: Scene) -> dict[str, Tensor]:
    wanted = {"z": s.z, **{n: p for n, p in s.drafter.named_parameters() if n in HEAD}}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lam", [1.0, 0.35, 0.0])
def test_loss_and_gradients_are_the_references(variant: str, lam: float) -> None:
    for seed in range(3):
        s = scene(seed)
        assert not torch.equal(*(support(logits, s.blocks) for logits in dense(s.drafter, s.z, s.said, s.weight)))
        found, want = ours(s, branches(variant, 3.0), lam).terms.loss, reference(s, variant, lam, 3.0)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
        for (name, a), b in zip(gradients(found, s).items(), gradients(want, s).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.4]))
def test_staged_supports_are_the_dense_ones_whatever_the_cuts(seed: int, right: float, holes: float) -> None:
    s = scene(seed % 1000, right, holes, blocks=4)
    pair = branches("f-auf", 3.0)
    want = reference(s, "f-auf", 0.5, 3.0)
    for cuts in ([5], [1, 2, 3, 4, 5], [2, 5]):
        found = ours(s, pair, 0.5, cuts={"base": cuts, "final": cuts})
        torch.testing.assert_close(found.terms.loss, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.final.credit, support(dense(s.drafter, s.z, s.said, s.weight)[1], s.blocks))


def test_nothing_valid_gives_zero_loss_and_gradient() -> None:
    s = scene(1)
    s = s._replace(blocks=s.blocks._replace(valid=torch.zeros_like(s.blocks.valid)))
    for variant in VARIANTS:
        loss = ours(s, branches(variant, 3.0), 0.5).terms.loss
        assert loss == 0 and not any(grad.any() for grad in gradients(loss, s).values())


def test_who_learns_from_what() -> None:
    """lambda 1 leaves the head alone; lambda 0 leaves the base branch's objective without effect; between, both count."""
    s = scene(5)
    for variant in VARIANTS:
        for lam in (1.0, 0.5, 0.0):
            found = gradients(ours(s, branches(variant, 3.0), lam).terms.loss, s)
            assert bool(found["z"].any())
            for name in HEAD:
                assert bool(found[name].any()) == (lam < 1), (variant, lam, name)
    auf, decay = (
        gradients(ours(s, (Branch(Objective(name), "base"), Branch(Objective("uniform"), "final")), 0.0).terms.loss, s)
        for name in ("auf", "uniform")
    )
    assert all(torch.equal(auf[name], decay[name]) for name in auf)


def test_only_what_counts_is_read() -> None:
    s = scene(7, right=0.5, holes=0.0)
    one = [1, 2, 3, 4, 5]
    own = int(support(dense(s.drafter, s.z, s.said, s.weight)[1], s.blocks).sum())
    base = int(support(dense(s.drafter, s.z, s.said, s.weight)[0], s.blocks).sum())
    found = ours(s, branches("f-auf", 3.0), 0.5, cuts={"base": one, "final": one})
    assert int(found.final.readout.evaluated.sum()) == own and int(found.base.readout.evaluated.sum()) == base
    found = ours(s, branches("s-auf", 3.0), 0.5, cuts={"base": one, "final": one})
    assert int(found.final.readout.evaluated.sum()) == base
    plain = Rows(s.z)
    shared = Shared(plain, s.blocks.valid)
    shared.rows(s.blocks.valid)
    assert torch.equal(shared.rows(s.blocks.valid), s.z[s.blocks.valid]) and plain.asked == int(s.blocks.valid.sum())


def test_any_pair_of_objectives_from_either_branch() -> None:
    """D-PACE on the base branch read off the final one, focal with a part of its own on the final branch."""
    s = scene(2)
    base, final = dense(s.drafter, s.z, s.said, s.weight)
    pair = (
        Branch(Objective("griffin-exclusive", options={"k": 2}), "final"),
        Branch(Objective("l2r-focal-separate"), "base"),
    )
    found = ours(s, pair, 0.4)
    valid, labels = s.blocks.valid, s.blocks.labels
    ce = {
        n: F.cross_entropy(z.flatten(0, 2), labels.flatten(), reduction="none").view_as(valid)
        for n, z in (("base", base), ("final", final))
    }
    top = (final.argsort(-1, descending=True)[..., :2] == labels[..., None]).any(-1) | ~valid
    kept = (torch.cat([torch.ones_like(top[..., :1]), top[..., :-1]], -1).cumprod(-1) * valid).double()
    wrong = support(base, s.blocks) * (base.argmax(-1) != labels)
    decay = position_decay(N, 10.0) * valid
    want = 0.4 * (kept * ce["base"]).sum() / kept.sum()
    want = want + 0.6 * (
        (decay * ce["final"]).sum() / decay.sum() + 0.3 * (wrong * ce["final"]).sum() / wrong.sum().clamp(min=1)
    )
    torch.testing.assert_close(found.terms.loss, want, rtol=1e-12, atol=0)
    for a, b in zip(gradients(found.terms.loss, s).values(), gradients(want, s).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def literally(
    s: Scene,
    pair: tuple[Branch, Branch],
    lam: float,
    target_hidden: Tensor,
    uniform: Tensor,
    bias: Tensor,
    softcap: float,
) -> Tensor:
    """Any pair of one-part objectives: credits of the branch that is named, losses of the branch itself, slot by slot."""
    base, final = dense(s.drafter, s.z, s.said, s.weight)
    capped = slow.head(s.z, s.weight, bias, softcap)  # the target's head ends here; the correction comes behind it
    logits = {"base": capped, "final": capped + (final - base)}
    total = torch.zeros((), dtype=torch.float64)
    for share, side, branch in ((lam, "base", pair[0]), (1 - lam, "final", pair[1])):
        o, num, den = branch.objective, torch.zeros((), dtype=torch.float64), 0.0
        for j in range(s.z.shape[1]):
            block = {
                "labels": s.blocks.labels[0, j].tolist(),
                "valid": s.blocks.valid[0, j].tolist(),
                "target": slow.head(target_hidden[0, j], s.weight, bias, softcap),
                "uniform": uniform[0, j].tolist(),
            }
            read, own = ({**block, "logits": logits[x][0, j]} for x in (branch.support, side))
            for i, ((_, c),) in enumerate(slow.credits(o.name, read, o.gamma, dict(o.options))):
                if block["valid"][i]:
                    num = num + c * slow.row_loss(o.name.removesuffix("-decay"), own, i, dict(o.options))
                    den += c
        total = total + share * num / den
    return total


AUF = Objective("auf")
SOFT = {"temperature": 2.0, "alpha": 0.2}


@pytest.mark.parametrize(
    "pair",
    [
        (Branch(AUF, "base"), Branch(Objective("auf-decay", 3.0), "final")),
        (Branch(Objective("decay", 3.0), "base"), Branch(Objective("lk-alpha", 2.0), "final")),
        (Branch(Objective("lk-lambda", 2.0), "base"), Branch(Objective("lk-lambda", 3.0), "final")),
        (Branch(AUF, "base"), Branch(Objective("pard2"), "base")),
        (Branch(Objective("soft-auf", options=SOFT), "base"), Branch(Objective("dpace", options=SOFT), "base")),
        (Branch(Objective("sampled-auf"), "base"), Branch(Objective("sampled-auf"), "final")),
        (Branch(Objective("griffin-exclusive", options={"k": 20}), "final"), Branch(AUF, "final")),
        (Branch(AUF, "final"), Branch(AUF, "base")),
        (Branch(Objective("griffin-windowed"), "base"), Branch(AUF, "base")),
        # The base branch reads the final one, as far as it needs; the final branch's loss needs every slot.
        (Branch(AUF, "final"), Branch(Objective("streak"), "base")),
        (Branch(AUF, "final"), Branch(Objective("pard2"), "base")),
        (Branch(AUF, "final"), Branch(Objective("lk-lambda", 3.0), "base")),
    ],
    ids=lambda pair: ", ".join(f"{b.objective.name} off {b.support}" for b in pair),
)
def test_pairs_of_objectives_are_the_references_under_a_bias_and_a_soft_cap(pair: tuple[Branch, Branch]) -> None:
    for seed in range(2):
        s, g = scene(seed), torch.Generator().manual_seed(seed)
        bias, softcap = torch.randn(VOCAB, generator=g, dtype=torch.float64), 8.0
        base, final = dense(s.drafter, s.z, s.said, s.weight)
        capped = slow.head(s.z, s.weight, bias, softcap)
        side, right = (
            torch.rand(1, 9, n, generator=g) for n in (1, N)
        )  # a block that one branch reads further than the other
        best = torch.where(side < 0.5, capped.argmax(-1), (capped + final - base).argmax(-1))
        labels = torch.where(right < 0.7, best, torch.randint(VOCAB, best.shape, generator=g))
        s = s._replace(blocks=s.blocks._replace(labels=labels.masked_fill(~s.blocks.valid, 0)))
        target_hidden = torch.randn(s.z.shape, generator=g, dtype=torch.float64)
        uniform = torch.rand(s.blocks.valid.shape, generator=g, dtype=torch.float64)
        cuts = {"base": [1, 2, 3, 4, 5], "final": [1, 2, 3, 4, 5]}
        given = {"target_hidden": target_hidden, "uniform": uniform, "bias": bias, "softcap": softcap}
        found, want = ours(s, pair, 0.4, cuts=cuts, **given).terms.loss, literally(s, pair, 0.4, **given)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=0)
        for (name, a), b in zip(gradients(found, s).items(), gradients(want, s).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_what_was_read_for_the_loss_and_for_the_other_branchs_credit_is_reported_together() -> None:
    s = scene(4)
    base, _ = dense(s.drafter, s.z, s.said, s.weight)
    found = ours(s, (Branch(Objective("decay", 3.0), "base"), Branch(AUF, "base")), 0.5)
    assert torch.equal(found.base.readout.evaluated, s.blocks.valid), "decay reads every slot, AUF's gate does not"
    assert torch.equal(found.base.readout.hit, s.blocks.valid & (base.argmax(-1) == s.blocks.labels))
    ce = F.cross_entropy(base.flatten(0, 2), s.blocks.labels.flatten(), reduction="none").view_as(s.blocks.valid)
    torch.testing.assert_close(found.base.readout.ce, ce * s.blocks.valid)


def test_a_branch_reports_all_that_was_read_of_it_and_how_far_its_blocks_survive() -> None:
    """Its gate reads whole blocks here, its loss the support alone."""
    s = scene(4)
    found = ours(s, branches("f-auf", 3.0), 0.5, cuts={"base": [N], "final": [N]})
    for terms, logits in zip((found.base, found.final), dense(s.drafter, s.z, s.said, s.weight), strict=True):
        right = logits.argmax(-1) == s.blocks.labels
        assert torch.equal(terms.readout.evaluated, s.blocks.valid)
        assert torch.equal(terms.readout.hit, s.blocks.valid & right)
        alive = (right | ~s.blocks.valid)[s.blocks.valid.any(-1)].cumprod(-1)
        assert terms.survival is not None and terms.survival.tolist() == pytest.approx(alive.double().mean(0).tolist())


@pytest.mark.parametrize(
    ("variant", "passes"), [("decay-only", 2), ("b-auf", 2), ("b-auf-d", 2), ("s-auf", 2), ("f-auf", 3)]
)
def test_only_a_final_branch_that_is_its_own_gate_is_read_twice(
    variant: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no pass reads the target's distribution for nobody, or more rows at a time than it may."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "specauf.objective.branches.read_head", lambda *a, **how: calls.append(how) or read_head(*a, **how)
    )
    s = scene(2)
    ours(s, branches(variant, 3.0), 0.5, target_hidden=torch.zeros_like(s.z))
    assert len(calls) == passes
    assert all(how["target_hidden"] is None and how["logits_rows"] == 4 for how in calls)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", ["f-auf-d", "b-auf"])
def test_the_loss_needs_no_gradient(variant: str, off: type) -> None:
    s = scene(2)
    want = ours(s, branches(variant, 3.0), 0.5).terms.loss
    with off():
        found = ours(s, branches(variant, 3.0), 0.5).terms
    torch.testing.assert_close(found.loss, want.detach(), rtol=1e-12, atol=0)
    assert not found.num.requires_grad


def test_in_16_bits_the_corrections_products_are_the_heads_and_their_sum_is_not() -> None:
    """W2's gradient is a sum over many reads of a few rows each, which 16 bits would round at each of them."""
    s = scene(3, blocks=200)
    grads, seen = [], set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
                seen.add(args[0].dtype)
            return op(*args, **(kwargs or {}))

    for dtype in (torch.float64, torch.bfloat16):
        w2 = s.drafter.expansion.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        rows = torch.cat(
            [s.z, torch.randn(*s.z.shape[:3], w2.shape[1], generator=torch.Generator().manual_seed(0))], -1
        )
        pair = (Branch(Objective("uniform"), "base"), Branch(Objective("uniform"), "final"))
        given = Rows(s.z.detach().to(dtype)), Rows(rows.detach().to(dtype))
        with Products() if dtype == torch.bfloat16 else contextlib.nullcontext():
            found = two_branch_loss(*given, s.blocks, *pair, 0.0, Head(s.weight.to(dtype), expansion=w2), logits_rows=4)
        found.terms.loss.backward()
        assert w2.grad is not None and w2.grad.dtype == w2.dtype
        grads.append(w2.grad.double())
    assert seen == {torch.bfloat16}
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.02


def test_a_loss_of_the_targets_distribution_on_the_final_branch() -> None:
    s = scene(3)
    target_hidden = torch.randn_like(s.z)
    pair = (Branch(Objective("decay", 3.0), "base"), Branch(Objective("pard2"), "final"))
    found = ours(s, pair, 0.3, target_hidden=target_hidden)
    base, final = dense(s.drafter, s.z, s.said, s.weight)
    p, valid = (target_hidden @ s.weight.T).softmax(-1), s.blocks.valid
    gold = torch.where(valid, p.gather(-1, s.blocks.labels[..., None]).squeeze(-1), 1.0)
    credit = torch.cat([torch.ones_like(gold[..., :1]), gold[..., :-1]], -1).cumprod(-1) * valid
    ce = [
        F.cross_entropy(z.flatten(0, 2), s.blocks.labels.flatten(), reduction="none").view_as(gold)
        for z in (base, final)
    ]
    kl = (p * (p.log() - final.log_softmax(-1))).sum(-1)
    decay = position_decay(N, 3.0) * valid
    want = 0.3 * (decay * ce[0]).sum() / decay.sum() + 0.7 * (credit * (0.1 * ce[1] + kl)).sum() / credit.sum()
    torch.testing.assert_close(found.terms.loss, want, rtol=1e-12, atol=0)
    for a, b in zip(gradients(found.terms.loss, s).values(), gradients(want, s).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_what_is_missing_or_contradictory_is_said() -> None:
    s = scene(1)
    plain = Objective("auf")
    for name, lacking in (("pard2", "target_hidden"), ("sampled-auf", "uniform")):
        for pair in ((plain, Objective(name)), (Objective(name), plain)):
            with pytest.raises(ValueError, match=f"needs '{lacking}'"):
                ours(s, (Branch(pair[0], "base"), Branch(pair[1], "final")), 0.5)
    hot, cold = (Branch(Objective("soft-auf", options={"temperature": t}), "base") for t in (2.0, 0.5))
    with pytest.raises(ValueError, match="different temperatures"):
        ours(s, (hot, cold), 0.5)


def test_lambda_falls_linearly_over_its_share_of_the_steps() -> None:
    assert [lambda_base(t, 10) for t in (0, 5, 10, 12)] == [1.0, 0.5, 0.0, 0.0]
    assert [lambda_base(t, 10, ratio=0.5) for t in (0, 2, 5, 9)] == [1.0, 0.6, 0.0, 0.0]
    assert lambda_base(0, 10, start=0.6) == 0.6
    assert [lambda_base(t, 10, ratio=0.01) for t in (0, 1)] == [1.0, 0.0], "a share of less than one step is one step"
