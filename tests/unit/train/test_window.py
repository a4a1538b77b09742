"""A window's gradient and loss against the definition: every part's sums over all micro-batches and ranks, then the ratio."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specauf.objective.loss import LossTerms
from specauf.objective.wavefront import Readout
from specauf.strict import ConfigError, UserError
from specauf.train.distributed import Ranks, ranks_of_run
from specauf.train.window import Window

SCALE = (0.3, 0.7)
NUM = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])  # parts x weights: what num is linear in


@dataclass(frozen=True)
class Two(Ranks):
    """One of two ranks, each a thread; they meet wherever ranks communicate."""

    world: int = 2
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60), compare=False)
    held: dict[int, Any] = field(default_factory=dict, compare=False)

    def gather(self, value: Any) -> list[Any]:
        self.held[self.rank] = value
        self.meeting.wait()
        found = [self.held[0], self.held[1]]
        self.meeting.wait()
        return found

    def add(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        pairs = zip(*self.gather([None if t is None else t.clone() for t in tensors]), strict=True)
        return [a if b is None else b if a is None else a + b for a, b in pairs]


def terms(weight: nn.Parameter, factor: float, den: Sequence[float], parts: int) -> LossTerms:
    nothing = torch.zeros(1, 1, 1)
    readout = Readout(nothing, nothing.bool(), nothing.bool(), nothing)
    num = factor * (NUM[:parts] * weight**2).sum(-1)
    return LossTerms(num, torch.tensor(den[:parts]), torch.tensor(SCALE[:parts]), nothing, readout)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batches", [[(2.0, (0.01, 0.4))], [(2.0, (0.01, 0.4)), (-1.0, (0.2, 0.1))]])
def test_sums_are_taken_before_the_ratio(
    batches: list[tuple[float, tuple[float, float]]], ranks: int, parts: int
) -> None:
    """Denominators below one are as good as any."""
    others = [(0.5, (0.3, 0.02))] * len(batches) if ranks == 2 else []
    weights = [nn.Parameter(torch.tensor([0.5, -1.0, 2.0])) for _ in range(ranks)]

    def window(rank: Ranks, weight: nn.Parameter, mine: list[tuple[float, tuple[float, float]]]) -> float:
        found = Window([weight], len(mine), rank)
        for factor, den in mine:
            found.add(terms(weight, factor, den, parts))
        assert len(found.parts) == (1 if len(mine) == 1 else parts), (
            "one backward pass where the denominators are known"
        )
        return found.close()

    if ranks == 1:
        losses = [window(Ranks(), weights[0], batches)]
    else:
        first = Two()
        with ThreadPoolExecutor(2) as pool:
            losses = list(pool.map(window, (first, replace(first, rank=1)), weights, (batches, others)))

    leaf = weights[0].detach().clone().requires_grad_()
    want = torch.zeros(())
    for part in range(parts):
        num = sum(factor * (NUM[part] * leaf**2).sum() for factor, _ in batches + others)
        want = want + SCALE[part] * num / sum(den[part] for _, den in batches + others)
    want.backward()
    for loss, weight in zip(losses, weights, strict=True):
        assert loss == pytest.approx(float(want.detach()), rel=1e-5)
        torch.testing.assert_close(weight.grad, leaf.grad)


def test_half_of_what_torchrun_sets_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(UserError, match=r"WORLD_SIZE=2 is set, and .*RANK.*Start with torchrun, or unset it"),
        ranks_of_run(),
    ):
        pass


def test_one_gpu_for_all_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda:0 would put all 2 processes on one GPU; with cuda each takes its own"):
        Two().require_own_device("cuda:0")
    for ranks, device in ((Ranks(), "cuda:0"), (Two(), "cuda"), (Two(), "cpu")):
        ranks.require_own_device(device)
