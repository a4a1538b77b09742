"""The credit c_i of each slot: how much its loss counts. Credits are constants, never differentiated.

Every objective is one weighted loss, L = sum m c l / sum m c (paper, equation 1), and has its own c. Most credits are one
*gate*. With q the drafter's probability of the label and r = (1 - alpha) q + alpha (1 at invalid slots),

    c_i = G_{i-shift} (1 + f sum_{k>i} prod_{l=i+1..k} r_l),    G_i = prod_{l<=i} r_l,    G_0 = 1.

G is the prefix-acceptance gate of equation 2, smoothed by alpha, and the bracket is its continuation value. With T the
temperature of q, the presets and their defaults are

    preset             T     alpha   shift   f
    uniform            any   1       any     0
    soft_auf           1     0       1       0    prod_{l<i} q_l
    auf                0     0       1       0    1[i <= j*], j* the breaker (section 4)
    dpace_cumulative   1     0.5     0       0
    dpace              1     0.5     0       1
    streak_credit      1     0       0       1    g_i (equation 2)

Position priors, first-error and Top-K supports and PARD-2's credit follow below them.

Everything here takes plain tensors and imports torch alone, so the file can be pasted into another trainer. Slots are on
the last axis, the first prediction first. Invalid slots are passed over: they neither break a prefix nor count in a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Slots(NamedTuple):
    """What a credit may read. A field is None if it was not given; a credit that reads it then fails."""

    valid: Bool[Tensor, "... k"]
    hit: Bool[Tensor, "... k"] | None = None
    """The drafter's argmax is the label."""
    prob: Float[Tensor, "... k"] | None = None
    """The drafter's probability of the label, softmax(z / T)[y], at the temperature that the credit names (default 1)."""
    rank: Int[Tensor, "... k"] | None = None
    """How many tokens the drafter ranks above the label; 0 is a hit."""
    uniform: Float[Tensor, "... k"] | None = None
    """One draw from [0, 1) per slot."""
    target_prob: Float[Tensor, "... k"] | None = None
    """The target's probability of the label, given the text before it."""
    decay: Float[Tensor, " k"] | None = None
    """The position decay w_i."""

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "... k v"],
        labels: Int[Tensor, "... k"],
        valid: Bool[Tensor, "... k"],
        temperature: float = 1.0,
    ) -> Slots:
        """The drafter's fields from its full logits, for trainers that keep them. Labels may be anything where invalid."""
        logits, labels = logits.detach(), labels.masked_fill(~valid, 0)
        gold = logits.gather(-1, labels[..., None])
        above = logits > gold
        tied = (logits == gold) & (torch.arange(logits.shape[-1], device=logits.device) < labels[..., None])
        rank = (above | tied).sum(-1)
        prob = (logits / temperature).softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return cls(valid, rank == 0, prob, rank)


def position_decay(num_predictions: int, gamma: float | None) -> Float[Tensor, " k"]:
    """exp(-(i-1)/gamma) for i = 1..N in float64; ones when gamma is None. The first prediction has weight 1.

    Raises `ValueError` unless gamma is above 0 or None.
    """
    if gamma is not None and not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}; None is no decay")
    steps = torch.arange(num_predictions, dtype=torch.float64)
    return torch.ones_like(steps) if gamma is None else torch.exp(-steps / gamma)


def before(prefix: Tensor) -> Tensor:
    """`prefix` moved one slot on: its value at the slot before, 1 at the first slot."""
    return torch.cat([torch.ones_like(prefix[..., :1]), prefix[..., :-1]], -1)


def exclusive_prefix(ok: Bool[Tensor, "... k"]) -> Bool[Tensor, "... k"]:
    """True at i when `ok` holds at every slot before i."""
    return before(ok.cumprod(-1)).bool()


def continuation(r: Float[Tensor, "... k"], valid: Bool[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """f_i = 1 + sum over valid k > i of prod_{l=i+1..k} r_l, the continuation value (paper, equation 2)."""
    value, out = torch.ones_like(r[..., 0]), []
    for i in reversed(range(r.shape[-1])):
        out.append(value)
        # An invalid slot passes on the value behind it.
        value = torch.where(valid[..., i], 1 + r[..., i] * value, value)
    return torch.stack(out[::-1], -1)


def gate(
    slots: Slots,
    *,
    temperature: float = 1.0,
    alpha: float = 0.0,
    shift: int = 0,
    future: bool = False,
    eps: float = 0.0,
) -> Float[Tensor, "... k"]:
    """The gate of the module's head.

    Temperature 0 takes q from the argmax, 0 or 1; any other says at which temperature `slots.prob` was read. `shift` 1 is
    the exclusive gate, which keeps the breaker; `future` is f, the continuation.

    `eps` > 0 cuts a block off after the first slot whose G_i is below it: later slots have credit 0 and are in no sum,
    whether they were read or not.
    """
    q = slots.hit.float() if temperature == 0 else slots.prob  # type: ignore[union-attr]
    r = torch.where(slots.valid, (1 - alpha) * q + alpha, 1.0)  # type: ignore[operator]
    prefix = r.cumprod(-1)
    kept = exclusive_prefix(prefix >= eps)  # everything at eps = 0
    prefix = (before(prefix) if shift else prefix) * kept
    return prefix * continuation(r * kept, slots.valid) if future else prefix


# The gate's presets.


def uniform(slots: Slots) -> Tensor:
    """Every slot counts 1: the gate at alpha = 1."""
    return torch.ones_like(slots.valid, dtype=torch.float32)


def auf(slots: Slots) -> Tensor:
    """Accept-Until-Fail (paper, section 4): 1[i <= j*], j* the first wrong argmax; the exclusive gate at temperature 0."""
    return gate(slots, temperature=0, shift=1)


def soft_auf(slots: Slots, temperature: float = 1.0, alpha: float = 0.0, eps: float = 0.0) -> Tensor:
    """The exclusive gate: how likely a sample of the drafter agrees with every label before i. At T = 0 it is AUF."""
    return gate(slots, temperature=temperature, alpha=alpha, shift=1, eps=eps)


def sampled_auf(slots: Slots) -> Tensor:
    """AUF on one sample of the drafter instead of its argmax: an unbiased 0/1 estimate of `soft_auf`."""
    return exclusive_prefix(sample_agrees(slots) | ~slots.valid).float()


def dpace(slots: Slots, temperature: float = 1.0, alpha: float = 0.5, eps: float = 0.0) -> Tensor:
    """D-PACE: the inclusive gate times the continuation, both smoothed by `alpha`."""
    return gate(slots, temperature=temperature, alpha=alpha, future=True, eps=eps)


def dpace_cumulative(slots: Slots, temperature: float = 1.0, alpha: float = 0.5, eps: float = 0.0) -> Tensor:
    """D-PACE's first factor alone."""
    return gate(slots, temperature=temperature, alpha=alpha, eps=eps)


def dpace_continuation(slots: Slots, temperature: float = 1.0, alpha: float = 0.5) -> Tensor:
    """D-PACE's second factor alone; outside the family, since no prefix gates it."""
    return continuation((1 - alpha) * slots.prob + alpha, slots.valid)  # type: ignore[operator,arg-type]


def streak_credit(slots: Slots, temperature: float = 1.0, eps: float = 0.0) -> Tensor:
    """g_i of equation 2: the gradient of the expected streak per log-probability; D-PACE without smoothing."""
    return gate(slots, temperature=temperature, future=True, eps=eps)


# Position priors, the controls.


def decay(slots: Slots) -> Tensor:
    """exp(-(i-1)/gamma) whatever the drafter says (DFlash)."""
    assert slots.decay is not None
    return slots.decay.expand_as(slots.valid)


def first_k(slots: Slots, k: int = 1) -> Tensor:
    """Only the first k slots of the block."""
    return (torch.arange(slots.valid.shape[-1], device=slots.valid.device) < k).expand_as(slots.valid).float()


# First-error and Top-K supports.


def first_error(slots: Slots) -> Tensor:
    """1[i = j*]: the breaker alone; nothing in a block without one."""
    wrong = slots.valid & ~slots.hit  # type: ignore[operator]
    return (wrong & exclusive_prefix(~wrong)).float()


def l2r_focal(slots: Slots, focal: float = 2.4) -> Tensor:
    """w_i + lambda 1[i = j*] (paper, Table 1)."""
    prior = decay(slots)
    return prior + focal * first_error(slots).to(prior)


def l2r_focal_separate(slots: Slots, focal: float = 0.3) -> tuple[tuple[float, Tensor], ...]:
    """The decayed loss plus `focal` times the mean loss of the breakers: two parts, each with its own denominator."""
    return (1.0, decay(slots)), (focal, first_error(slots))


def griffin_exclusive(slots: Slots, k: int = 3) -> Tensor:
    """1 while every label before i is in the drafter's top k, so the first that is not keeps its credit. k = 1 is AUF."""
    return exclusive_prefix(in_top_k(slots, k) | ~slots.valid).float()


def griffin_inclusive(slots: Slots, k: int = 3) -> Tensor:
    """1 while every label up to and including i is in the top k: a label outside it gets no gradient at all."""
    return (in_top_k(slots, k) | ~slots.valid).cumprod(-1).float()


def griffin_windowed(slots: Slots, k: int = 3, window: int = 2) -> Tensor:
    """1 when the `window` slots before i all have their label in the top k; a miss further back is forgotten."""
    ok = (in_top_k(slots, k) | ~slots.valid).float()
    return F.pad(ok, (window, 0), value=1.0)[..., :-1].unfold(-1, window, 1).amin(-1)


def pard2(slots: Slots) -> Tensor:
    """PARD-2: the exclusive gate of the *target's* probability of the data; it does not change as the drafter learns."""
    return before(torch.where(slots.valid, slots.target_prob, 1.0).cumprod(-1))  # type: ignore[arg-type]


# Whether a block goes on to its next slot. A truncating support ends at the first slot where this is false.


def is_right(slots: Slots) -> Tensor:
    """The argmax is the label."""
    assert slots.hit is not None
    return slots.hit


def in_top_k(slots: Slots, k: int = 3) -> Tensor:
    """The label is among the drafter's k most probable tokens."""
    return slots.rank < k  # type: ignore[operator,return-value]


def sample_agrees(slots: Slots) -> Tensor:
    """Whether a draw from the drafter equals the label. That has probability q, so one uniform number decides it."""
    return slots.uniform < slots.prob  # type: ignore[operator]


def gate_holds(slots: Slots, temperature: float = 1.0, alpha: float = 0.0, eps: float = 0.0) -> Tensor:
    """The inclusive gate is not below eps."""
    return gate(slots, temperature=temperature, alpha=alpha) >= eps


def streak_holds(slots: Slots, temperature: float = 1.0, eps: float = 0.0) -> Tensor:
    """`gate_holds` without smoothing."""
    return gate_holds(slots, temperature, eps=eps)


def within_k(slots: Slots, k: int = 1) -> Tensor:
    """True before the k-th slot, where reading ends."""
    return (torch.arange(slots.valid.shape[-1], device=slots.valid.device) < k - 1).expand_as(slots.valid)
