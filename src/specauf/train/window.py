"""Gradients of an optimizer window, which is every micro-batch of one step on all ranks.

They are summed over the window and divided by the denominators that are known at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from specauf.objective.loss import LossTerms
from specauf.train.distributed import Ranks

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Part:
    """One part of the loss, summed over the window."""

    num: float = 0.0
    den: float = 0.0
    scale: float = 1.0
    grads: list[Tensor | None] | None = None

    @property
    def divisor(self) -> float:
        return max(self.den, 1e-12) / self.scale if self.scale else float("inf")


@dataclass
class Window:
    """(num, den, un-normalised gradient) of every part of the loss.

    Parts whose denominators differ cannot be mixed before the window's end, so each has its own gradient buffer. Every
    further part costs one more backward pass through the body and the memory of the gradients. With one micro-batch a rank
    the ranks tell each other their denominators before the backward pass, and pay neither.
    """

    parameters: Sequence[nn.Parameter]
    micro_batches: int
    """Micro-batches of this rank."""
    ranks: Ranks = field(default_factory=Ranks)
    parts: list[Part] = field(default_factory=list)

    def add(self, terms: LossTerms) -> None:
        if self.micro_batches == 1 and len(terms.num) > 1:
            dens = zip(*self.ranks.gather(terms.den.tolist()), strict=True)
            terms = terms.mixed(terms.den.new_tensor([sum(theirs) for theirs in dens]))
            terms = terms._replace(den=terms.den * self.ranks.main)  # summed over the ranks it is 1
        self.parts.extend(Part() for _ in range(len(terms.num) - len(self.parts)))
        # The scale of one of Domino's two parts may be 0 for now.
        counted = [i for i, scale in enumerate(terms.scale.tolist()) if scale]
        for i, part in enumerate(self.parts):
            part.num += float(terms.num[i].detach())
            part.den += float(terms.den[i])
            part.scale = float(terms.scale[i])
            if i not in counted:
                continue
            for parameter, kept in zip(self.parameters, part.grads or [None] * len(self.parameters), strict=True):
                parameter.grad = kept
            terms.num[i].backward(retain_graph=i != counted[-1])
            part.grads = [parameter.grad for parameter in self.parameters]

    def close(self) -> float:
        """Leave the window's gradient in the parameters, the same on every rank; returns its loss."""
        sums = self.ranks.gather([(part.num, part.den) for part in self.parts])
        for part, terms in zip(self.parts, zip(*sums, strict=True), strict=True):
            part.num, part.den = (sum(values) for values in zip(*terms, strict=True))
        for i, parameter in enumerate(self.parameters):
            parameter.grad = None
            for part in self.parts:
                grad = part.grads[i] if part.grads else None
                if grad is None:
                    continue
                grad.div_(part.divisor)
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        summed = self.ranks.add([parameter.grad for parameter in self.parameters], self.parameters)
        for parameter, total in zip(self.parameters, summed, strict=True):
            if total is None and not all(part.scale for part in self.parts):
                total = torch.zeros_like(parameter)  # not None, so that the optimizer's moments still change
            parameter.grad = total
        return sum(part.num / part.divisor for part in self.parts)
