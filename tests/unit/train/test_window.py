"""A window's gradient and loss against the definition: every part's sums over all micro-batches and ranks, then the ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specauf.objective.loss import LossTerms
from specauf.objective.wavefront import Readout
from specauf.strict import ConfigError
from specauf.train.distributed import Ranks
from specauf.train.window import Window

SCALE = (0.3, 0.7)
NUM = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])  # parts x weights: what num is linear in


@dataclass(frozen=True)
class Two(Ranks):
    """One of two ranks; what the other one has is handed to it."""

    world: int = 2
    other: Window | None = field(default=None, compare=False)
    asked: list[int] = field(default_factory=list, compare=False)

    def gather(self, value: Any) -> list[Any]:
        assert self.other is not None
        return [value, [(part.num, part.den) for part in self.other.parts]]

    def add(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        assert self.other is not None
        theirs = self.other.parts[len(self.asked)].grads or []  # part by part
        self.asked.append(len(tensors))
        return [a if b is None else b if a is None else a + b for a, b in zip(tensors, theirs, strict=True)]


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
    weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    far = Window([weight], len(batches), Two())
    for factor, den in others:
        far.add(terms(weight, factor, den, parts))
    near = Window([weight], len(batches), Two(other=far) if ranks == 2 else Ranks())
    for factor, den in batches:
        near.add(terms(weight, factor, den, parts))
    loss = near.close()

    leaf = weight.detach().clone().requires_grad_()
    want = torch.zeros(())
    for part in range(parts):
        num = sum(factor * (NUM[part] * leaf**2).sum() for factor, _ in batches + others)
        want = want + SCALE[part] * num / sum(den[part] for _, den in batches + others)
    want.backward()
    assert loss == pytest.approx(float(want.detach()), rel=1e-5)
    torch.testing.assert_close(weight.grad, leaf.grad)


def test_one_gpu_for_all_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda:0 would put all 2 processes on one GPU; with cuda each takes its own"):
        Two().require_own_device("cuda:0")
    for ranks, device in ((Ranks(), "cuda:0"), (Two(), "cuda"), (Two(), "cpu")):
        ranks.require_own_device(device)
