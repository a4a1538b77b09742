"""The LM head on the slots that need it, once each, with bounded memory.

The head is most of a block drafter's training step. Two observations make it cheap and change neither loss nor gradient:

- AUF has no loss after the first failing slot. So the head is evaluated left to right, and a block leaves as soon as its
  argmax is wrong: about tau head rows per block instead of B-1 (the *wavefront*). Any support that ends at the first slot
  where something fails is read the same way.
- Credits are detached. So the gradient of a row's cross entropy with respect to its hidden state, W^T (softmax - onehot),
  can be formed while the row's logits are still in memory, and scaled by its credit later. No logits are kept and no row is
  evaluated twice, for any objective of one branch (`branches` says when Domino's final branch is).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from specauf.objective.credit import Slots, is_right

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class RowSource(Protocol):
    """Hidden states of slots, computed on demand."""

    def rows(self, todo: Bool[Tensor, "b n k"]) -> Float[Tensor, "rows h"]:
        """Those of the slots where `todo` is true, in the order of `todo.nonzero()`."""


class Head(NamedTuple):
    """An LM head: the target's, or the rows of it that a drafter keeps. Frozen but for `expansion`."""

    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None = None
    softcap: float | None = None
    """Logits z become cap tanh(z / cap)."""
    rows_of: Int[Tensor, " tokens"] | None = None
    """The row of each token, -1 for those without; None where row r is token r."""
    expansion: Float[Tensor, "v e"] | None = None
    """Domino's W2: hidden states are [z ; e], h + e wide, and the head is [weight ; expansion]."""

    def read(self, hidden: Float[Tensor, "... h"]) -> Float[Tensor, "... v"]:
        """Logits of the rows without the expansion, in the head's dtype, then as float32 (float64 stays)."""
        # As a matrix: for a batch that is a slice of another, matmul would copy the whole weight once per row of the batch.
        rows = hidden.to(self.weight.dtype).reshape(-1, hidden.shape[-1])
        logits = F.linear(rows, self.weight, self.bias).view(*hidden.shape[:-1], self.weight.shape[0])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def spread(self, logits: Float[Tensor, "... v"]) -> Float[Tensor, "... tokens"]:
        """The rows' logits over all tokens: -inf for those without a row."""
        if self.rows_of is None:
            return logits
        return logits[..., self.rows_of.clamp(min=0)].masked_fill(self.rows_of < 0, -torch.inf)


class Readout(NamedTuple):
    """What the head found at every slot. Slots that were not evaluated hold zeros and false."""

    ce: Float[Tensor, "b n k"]
    """Cross entropy of the label, in nats, float32 (float64 for float64 input)."""
    hit: Bool[Tensor, "b n k"]
    """The argmax (lowest index on a tie) equals the label."""
    evaluated: Bool[Tensor, "b n k"]
    """Whether the slot was put through the head. Slots whose label has no row in the head are not."""
    prob: Float[Tensor, "b n k"]
    """Probability of the label at the requested temperature."""
    rank: Int[Tensor, "b n k"] | None = None
    """How many tokens rank above the label, ties by index."""
    kl: Float[Tensor, "b n k"] | None = None
    overlap: Float[Tensor, "b n k"] | None = None
    target_prob: Float[Tensor, "b n k"] | None = None
    """The target's probability of the label."""
    order: Int[Tensor, " rows"] | None = None
    """Flat indices of the evaluated slots, in the order in which they were read."""
    grad: dict[str, Float[Tensor, "rows h"]] | None = None
    """By kind, its derivative with respect to each row in that order: `ce`, `kl` or `overlap`, as requested."""
    expansion_grad: Float[Tensor, "parts v e"] | None = None
    """d (weighted sum of the kinds) / d expansion, where an expansion and weights were given."""
    outside: Bool[Tensor, "b n k"] | None = None
    """Valid slots whose label has no row in the head: certain failures. None where the head has a row for every token."""

    def slots(self, valid: Tensor, uniform: Tensor | None = None, decay: Tensor | None = None) -> Slots:
        """This readout as the input of a credit function."""
        return Slots(valid, self.hit, self.prob, self.rank, uniform, self.target_prob, decay)


@torch.no_grad()
def read_head(
    hidden: Float[Tensor, "b n k h"] | RowSource,
    labels: Int[Tensor, "b n k"],
    valid: Bool[Tensor, "b n k"],
    head: Head,
    *,
    cuts: Sequence[int] | None = None,
    survives: Callable[[Slots], Tensor] | None = None,
    uniform: Float[Tensor, "b n k"] | None = None,
    target_hidden: Float[Tensor, "b n k h"] | None = None,
    temperature: float = 1.0,
    wants: Collection[str] = ("ce",),
    ranks: bool = False,
    weigh: Float[Tensor, "kinds parts b n k"] | None = None,
    logits_rows: int = 256,
) -> Readout:
    """Evaluate the head on the valid rows, stage by stage; a block that fails in a stage does not enter the next.

    `cuts` are the stage ends, ascending, the last one k; None is a single stage, the dense readout. `survives` decides from
    the slots read so far which of them let their block go on; by default those whose argmax is the label. `wants` names the
    gradients to form, of `ce`, `kl`, `overlap`; empty for none. `target_hidden` [b, n, k, h] holds the target's final hidden
    states at the position before each label, which go through the same head; `kl`, `overlap` and `target_prob` need them.

    The gradient of an expansion is a sum over rows, so the weight of every row must be known: `weigh`, one plane for each of
    `wants`.

    Where the head covers part of the vocabulary, so does the target's distribution, renormalised. A label without a row is
    a failure that costs no head row: hit false, prob 0, rank v. It ends its block as any failure does.

    At most `logits_rows` rows as wide as the vocabulary exist at a time. Rows are evaluated in stage-major order. Results
    do not depend on the cuts, up to the rounding of differently shaped matrix products.

    Raises `ValueError` when `cuts` do not ascend to k, or `target_hidden` or `uniform` is not laid out by prediction (see
    `before_labels`).
    """
    shape, device, k = valid.shape, valid.device, valid.shape[-1]
    cuts = [k] if cuts is None else list(cuts)
    if cuts[-1:] != [k] or cuts != sorted(cuts):
        raise ValueError(f"cuts are stage ends, ascending, the last of them {k}, the number of predictions; got {cuts}")
    for name, given in (("target_hidden", target_hidden), ("uniform", uniform)):
        if given is not None and given.shape[:3] != shape:
            raise ValueError(f"{name} has one row per prediction, {tuple(shape)} in front; got {tuple(given.shape)}")
    outside = None
    if head.rows_of is not None:
        labels = head.rows_of[labels]
        outside, labels = valid & (labels < 0), labels.clamp(min=0)
    flat_labels = labels.reshape(-1)
    flat_target = target_hidden.reshape(-1, target_hidden.shape[-1]) if target_hidden is not None else None
    found: dict[str, Tensor] = {}
    read: list[Tensor] = []
    grads: dict[str, list[Tensor]] = {name: [] for name in wants}
    evaluated = torch.zeros(valid.numel(), dtype=torch.bool, device=device)
    alive = torch.ones(shape[:-1], dtype=torch.bool, device=device)
    expansion_grad = None
    if (w2 := head.expansion) is not None:
        if weigh is not None:
            dtype = torch.promote_types(w2.dtype, torch.float32)
            expansion_grad = w2.new_zeros(weigh.shape[1], *w2.shape, dtype=dtype)
        head = head._replace(expansion=w2.to(head.weight.dtype))

    def readout() -> Readout:
        fields: dict[str, Any] = {name: values.view(shape) for name, values in found.items()}
        if outside is not None and ranks:
            fields["rank"] = fields["rank"].masked_fill(outside, len(head.weight))
        return Readout(**fields, evaluated=evaluated.view(shape), outside=outside)

    for start, stop in pairwise([0, *cuts]):
        asked = torch.zeros_like(valid)
        asked[..., start:stop] = valid[..., start:stop] & alive[..., None]
        todo = asked if outside is None else asked & ~outside
        index = todo.reshape(-1).nonzero().squeeze(1)
        rows = hidden[todo] if isinstance(hidden, torch.Tensor) else hidden.rows(todo)
        # With the target's logits, about five tensors as wide as the vocabulary exist at once.
        size = max(1, logits_rows // (1 if target_hidden is None else 5))
        for at, part in zip(index.split(size), rows.split(size), strict=True):
            theirs = flat_target[at] if flat_target is not None else None
            factors = dict(zip(wants, weigh.flatten(2)[..., at], strict=True)) if weigh is not None else {}
            values, row_grads = _rows(
                part, flat_labels[at], head, theirs, temperature, wants, ranks, factors, expansion_grad
            )
            for name, value in values.items():
                if name not in found:
                    found[name] = value.new_zeros(valid.numel())
                found[name][at] = value
            for name, value in row_grads.items():
                grads[name].append(value)
        read.append(index)
        evaluated[index] = True
        if stop == k:
            break
        goes_on = (survives or is_right)(readout().slots(valid, uniform))
        # A label outside the head's vocabulary was asked for and not read: it is no hit, and ends its block.
        alive &= (goes_on | ~asked).all(-1)
        if not alive.any():
            break
    formed = {name: torch.cat(parts) for name, parts in grads.items()}
    return readout()._replace(order=torch.cat(read), grad=formed, expansion_grad=expansion_grad)


def _rows(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    target_hidden: Tensor | None,
    temperature: float,
    wants: Collection[str],
    ranks: bool,
    factors: Mapping[str, Tensor],
    expansion_grad: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Values, gradients) of a few rows: one product to the vocabulary, and one back for each kind of gradient.

    `factors[kind]` [parts, rows] weighs the rows of the expansion's gradient, which is added to `expansion_grad` [parts, v, e].
    """
    weight, expansion = head.weight, head.expansion
    hidden, code = hidden.split([weight.shape[1], hidden.shape[1] - weight.shape[1]], 1)
    logits = head.read(hidden)
    # d logits / d (hidden W^T): 1 - tanh^2 under a soft cap.
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    if expansion is not None:
        logits += code.to(weight.dtype) @ expansion.t()

    def back(gradient: Tensor) -> Tensor:
        to_hidden = (gradient if slope is None else gradient * slope).to(weight.dtype) @ weight
        return to_hidden if expansion is None else torch.cat([to_hidden, gradient.to(weight.dtype) @ expansion], 1)

    def widen(kind: str, gradient: Tensor) -> None:
        """Add to the expansion's gradient, for each part of the loss, the share of `gradient`, d kind / d logits."""
        if expansion_grad is not None:
            for into, weights in zip(expansion_grad, factors[kind][..., None], strict=True):
                into += gradient.to(weight.dtype).t() @ (weights * code).to(weight.dtype)

    index = labels[:, None]
    top, best = logits.max(-1, keepdim=True)
    gold = logits.gather(1, index)
    values = {"hit": best.squeeze(1) == labels}
    if ranks:
        tied = (logits == gold) & (torch.arange(logits.shape[1], device=logits.device) < index)
        values["rank"] = ((logits > gold) | tied).sum(1)
    if temperature != 1:
        values["prob"] = 1 / ((logits - gold) / temperature).exp_().sum(1)
    # In place if possible: a row is a training step's largest tensor.
    soft = logits.sub_(top).exp_() if target_hidden is None else (logits - top).exp_()
    total = soft.sum(-1, keepdim=True)
    values["ce"] = (total.log() + top - gold).squeeze(1)
    values.setdefault("prob", torch.exp(-values["ce"]))
    grads: dict[str, Tensor] = {}
    if "ce" in wants:
        # softmax - onehot before the product: the difference of two products, in the 16 bits of a head or of autocast,
        # would be rounding alone where the label is all but certain.
        gap = soft.div_(total) if target_hidden is None else soft / total
        gap.scatter_add_(1, index, -torch.ones_like(gold))
        grads["ce"] = back(gap)
        widen("ce", gap)
    if target_hidden is not None:
        log_p = head.read(target_hidden).log_softmax(-1)
        p, q = log_p.exp(), soft.div_(total)
        values["target_prob"] = p.gather(1, index).squeeze(1)
        values["kl"] = (p * log_p.sub_(logits.sub_(top).sub_(total.log()))).sum(-1)
        values["overlap"] = torch.minimum(p, q).sum(-1)
        if "kl" in wants:
            gap = q - p
            grads["kl"] = back(gap)
            widen("kl", gap)
        if "overlap" in wants:
            # d overlap / d logits = q (1[q < p] - sum of q where q < p)
            low = q * (q < p)
            low -= q * low.sum(-1, keepdim=True)
            grads["overlap"] = back(low)
            widen("overlap", low)
    return values, {name: grad.to(hidden.dtype) for name, grad in grads.items()}


def default_cuts(num_predictions: int) -> list[int]:
    """Stage ends 1, 2, 4, 8, ..., N: few launches, and few rows beyond the supports."""
    cuts = [1]
    while cuts[-1] < num_predictions:
        cuts.append(min(2 * cuts[-1], num_predictions))
    return cuts


LAUNCH_ROWS, LAUNCH_ROWS_GPU = 8.0, 256.0
"""What starting a stage costs, in head rows: to read the head's weight once.

On a CPU it is measured (benchmarks/objective.py). For GPUs it is arithmetic: while it reads the weight in 16 bits, an A100
could multiply some 150 rows by it, an H100 some 300.
"""


def plan_cuts(survival: Sequence[float], blocks: int, launch_rows: float = LAUNCH_ROWS) -> list[int]:
    """The cheapest stage ends, in head rows, for `blocks` blocks of which a share S_k survives slot k.

    A stage from slot i to j evaluates (j - i) S_i rows per block, and costs `launch_rows` if any block reaches it. Solved
    by dynamic programming over the last cut.
    """
    alive = [1.0, *survival]
    best, last = [0.0], [0]
    for stop in range(1, len(alive)):
        costs = [
            best[start] + (stop - start) * s + launch_rows / blocks * (1 - (1 - s) ** blocks)
            for start, s in enumerate(alive[:stop])
        ]
        best.append(min(costs))
        last.append(costs.index(best[-1]))
    cuts = [len(alive) - 1]
    while last[cuts[0]]:
        cuts.insert(0, last[cuts[0]])
    return cuts
