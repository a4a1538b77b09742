"""The objective alone, forward and backward, from hidden states to their gradient.

    python -m benchmarks.objective

AUF through the wavefront against the best dense head available here (the same fused pass over every slot, with the same
budget of logits rows), and that dense head against plain logits and `cross_entropy`. Blocks fail as they would at a given
tau: labels are the head's own argmax up to a failure drawn from a geometric distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from benchmarks.common import Row, alternate, main, peak_mb
from specauf.objective import Blocks, Head, Objective, block_loss
from specauf.objective.wavefront import plan_cuts

SHAPES = {"V=49152, h=576": (49152, 576), "V=151936, h=1024": (151936, 1024)}
SLOTS, ROWS = 15, 256


def alpha_of(tau: float, slots: int = SLOTS) -> float:
    """The constant alpha with 1 + alpha + alpha^2 + ... + alpha^N = tau."""
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        low, high = (alpha, high) if sum(alpha**i for i in range(slots + 1)) < tau else (low, alpha)
    return low


def problem(vocab: int, width: int, blocks: int, tau: float) -> tuple[torch.Tensor, Blocks, torch.Tensor]:
    """(hidden [1, n, k, h], blocks, head weight [v, h])."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=g) * width**-0.5
    hidden = torch.randn(1, blocks, SLOTS, width, generator=g)
    said = torch.cat([F.linear(part, weight).argmax(-1) for part in hidden[0].split(16)])[None]
    right = torch.rand(1, blocks, SLOTS, generator=g) < alpha_of(tau)
    everything = torch.ones(1, blocks, SLOTS, dtype=torch.bool)
    labels = torch.where(right, said, (said + 1) % vocab)
    return hidden, Blocks(torch.zeros(1, blocks).long(), everything[..., 0], labels, everything), weight


def fused(name: str, hidden: torch.Tensor, blocks: Blocks, weight: torch.Tensor, tau: float) -> Callable[[], object]:
    """Our objective; AUF with the stages that the trainer would plan from this survival."""
    objective = Objective(name)
    cuts = plan_cuts([alpha_of(tau) ** k for k in range(1, SLOTS + 1)], hidden.shape[1])

    def call() -> object:
        leaf = hidden.detach().requires_grad_()
        block_loss(leaf, blocks, objective, Head(weight), logits_rows=ROWS, cuts=cuts).loss.backward()
        return leaf.grad

    return call


def naive(hidden: torch.Tensor, blocks: Blocks, weight: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        leaf = hidden.detach().requires_grad_()
        F.cross_entropy(F.linear(leaf.flatten(0, 2), weight), blocks.labels.flatten()).backward()
        return leaf.grad

    return call


def make(way: str, shape: str, blocks: int, tau: float) -> Callable[[], object]:
    """One way on inputs of its own, for measuring memory."""
    given = problem(*SHAPES[shape], blocks, tau)
    return naive(*given) if way == "naive" else fused(way, *given, tau)


def rows() -> Iterator[Row]:
    for shape, tau, reach in (
        ("V=49152, h=576", 2.6, 4.5),
        ("V=151936, h=1024", 2.6, 4.5),
        ("V=151936, h=1024", 4.0, 3.0),
    ):
        given = problem(*SHAPES[shape], 512, tau)
        rounds = 5 if shape.startswith("V=49152") else 2
        seconds = alternate({name: fused(name, *given, tau) for name in ("auf", "uniform")}, rounds)
        del given
        at = f"N={SLOTS}, {shape}, 512 blocks, tau {tau}"
        note = f"{seconds['auf']:.2f} s against {seconds['uniform']:.2f} s"
        yield Row(
            "AUF objective", "fused dense cross entropy", at, seconds["uniform"] / seconds["auf"], reach, note=note
        )
        if shape.startswith("V=49152"):
            auf, dense = (peak_mb(make, name, shape, 512, tau) for name in ("auf", "uniform"))
            note = f"{auf:.0f} MB against {dense:.0f} MB"
            yield Row("its extra memory", "fused dense cross entropy", at, auf / dense, 1.0, below=True, note=note)
    for shape in SHAPES:
        given = problem(*SHAPES[shape], 128, 2.6)
        ways = {"uniform": fused("uniform", *given, 2.6), "naive": naive(*given)}
        seconds = alternate(ways, rounds=5 if shape.startswith("V=49152") else 2)
        del given, ways
        at = f"N={SLOTS}, {shape}, 128 blocks"
        note = f"{seconds['uniform']:.2f} s against {seconds['naive']:.2f} s"
        ratio = seconds["uniform"] / seconds["naive"]
        yield Row("fused dense cross entropy: time", "logits + F.cross_entropy", at, ratio, 1.1, below=True, note=note)
        ours, plain = (peak_mb(make, name, shape, 128, 2.6) for name in ("uniform", "naive"))
        note = f"{ours:.0f} MB against {plain:.0f} MB"
        yield Row("its extra memory", "logits + F.cross_entropy", at, ours / plain, 0.25, below=True, note=note)


if __name__ == "__main__":
    main(rows)
