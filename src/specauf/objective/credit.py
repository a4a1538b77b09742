"""The credit c_i of each slot: how much its loss counts. Constants, never differentiated.

All objectives are one weighted loss, L = sum m c l / sum m c (paper, equation 1), and differ in c. Most of them are one
*gate*: with q the drafter's probability of the label and r = (1 - alpha) q + alpha (1 at invalid slots),

    c_i = G_{i-shift} (1 + f sum_{k>i} prod_{l=i+1..k} r_l),    G_i = prod_{l<=i} r_l.

Everything here takes plain tensors and imports torch alone, so the file can be pasted into another trainer. Slots are on
the last axis, the first prediction first. Invalid slots are passed over: they neither break a prefix nor count in a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Slots(NamedTuple):
    """What a credit may look at. A credit that reads a field which is None was not given what it needs."""

    valid: Bool[Tensor, "... k"]
    hit: Bool[Tensor, "... k"] | None = None
    """The drafter's argmax is the label."""
    prob: Float[Tensor, "... k"] | None = None
    """The drafter's probability of the label, softmax(z / T)[y], at the temperature that the credit names (default 1)."""
    rank: Int[Tensor, "... k"] | None = None
    """How many tokens the drafter puts before the label; 0 is a hit."""
    uniform: Float[Tensor, "... k"] | None = None
    """One draw from [0, 1) a slot."""
    teacher_prob: Float[Tensor, "... k"] | None = None
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
        """The drafter's fields from its logits, for trainers that hold them all. Labels may be anything where invalid."""
        labels = labels.masked_fill(~valid, 0)
        gold = logits.gather(-1, labels[..., None])
        above = logits > gold
        tied = (logits == gold) & (torch.arange(logits.shape[-1], device=logits.device) < labels[..., None])
        rank = (above | tied).sum(-1)
        prob = (logits / temperature).softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return cls(valid, rank == 0, prob, rank)


def position_decay(num_predictions: int, gamma: float | None) -> Float[Tensor, " k"]:
    """exp(-(i-1)/gamma) for i = 1..N in float64; ones when gamma is None. The first prediction always has weight 1."""
    steps = torch.arange(num_predictions, dtype=torch.float64)
    return torch.ones_like(steps) if gamma is None else torch.exp(-steps / gamma)


def before(prefix: Tensor) -> Tensor:
    """`prefix` one slot late: what held up to the slot before, 1 at the first slot."""
    return torch.cat([torch.ones_like(prefix[..., :1]), prefix[..., :-1]], -1)


def exclusive_prefix(ok: Bool[Tensor, "... k"]) -> Bool[Tensor, "... k"]:
    """True at i when `ok` holds at every slot before i."""
    return before(ok.cumprod(-1)).bool()


def continuation(r: Float[Tensor, "... k"], valid: Bool[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """f_i = 1 + sum over valid k > i of prod_{l=i+1..k} r_l, what a slot opens up behind it (paper, equation 2)."""
    value, out = torch.ones_like(r[..., 0]), []
    for i in range(r.shape[-1] - 1, -1, -1):
        out.append(value)
        value = 1 + r[..., i] * (
            value - (~valid[..., i]).to(r)
        )  # an invalid slot hands on what follows it and adds nothing
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
    """The gate of the module's head. Temperature 0 is the argmax's 0 or 1; any other says at which `slots.prob` was read.
    `shift` 1 is the exclusive gate, which keeps the breaker; `future` is f, the continuation.

    `eps` > 0 cuts a block off behind the first slot whose G_i is below it: later slots have gate 0 and are in no sum,
    whether they were read or not.
    """
    q = slots.hit.float() if temperature == 0 else slots.prob  # type: ignore[union-attr]
    r = torch.where(slots.valid, (1 - alpha) * q + alpha, 1.0)  # type: ignore[operator]
    kept = exclusive_prefix(r.cumprod(-1) >= eps)
    r = r * kept if eps else r
    prefix = r.cumprod(-1)
    prefix = before(prefix) * kept if shift else prefix
    return prefix * continuation(r, slots.valid) if future else prefix


# The gate's presets.


def uniform(slots: Slots) -> Tensor:
    """Every slot counts 1: the gate at alpha = 1."""
    return torch.ones_like(slots.valid, dtype=torch.float32)


def auf(slots: Slots) -> Tensor:
    """Accept-Until-Fail: 1[i <= j*], j* the first wrong argmax; the exclusive gate at zero temperature (section 4)."""
    return gate(slots, temperature=0, shift=1)


def soft_auf(slots: Slots, temperature: float = 1.0, alpha: float = 0.0, eps: float = 0.0) -> Tensor:
    """The exclusive gate: how likely a sample of the drafter still agrees before i. AUF is its limit at T = 0."""
    return gate(slots, temperature=temperature, alpha=alpha, shift=1, eps=eps)


def sampled_auf(slots: Slots) -> Tensor:
    """AUF on one sample of the drafter instead of its argmax: an unbiased 0/1 estimate of `soft_auf`."""
    return exclusive_prefix(sample_agrees(slots) | ~slots.valid).float()


def dpace(slots: Slots, temperature: float = 1.0, alpha: float = 0.5, eps: float = 0.0) -> Tensor:
    """D-PACE: the inclusive gate times the continuation, both smoothed."""
    return gate(slots, temperature=temperature, alpha=alpha, future=True, eps=eps)


def dpace_cumulative(slots: Slots, temperature: float = 1.0, alpha: float = 0.5, eps: float = 0.0) -> Tensor:
    """D-PACE's first factor alone."""
    return gate(slots, temperature=temperature, alpha=alpha, eps=eps)


def dpace_continuation(slots: Slots, temperature: float = 1.0, alpha: float = 0.5) -> Tensor:
    """D-PACE's second factor alone; outside the family, since no prefix gates it."""
    return continuation(torch.where(slots.valid, (1 - alpha) * slots.prob + alpha, 1.0), slots.valid)  # type: ignore[operator]


def streak_credit(slots: Slots, temperature: float = 1.0, eps: float = 0.0) -> Tensor:
    """The gradient of the expected streak, per log-probability (paper, equation 2): D-PACE without smoothing."""
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
    """The decayed loss, plus `focal` times the mean loss of the breakers: two parts, each with a denominator."""
    return (1.0, decay(slots)), (focal, first_error(slots))


def griffin_exclusive(slots: Slots, k: int = 3) -> Tensor:
    """1 while every label before i is among the drafter's k best: the first that is not stays in. k = 1 is AUF."""
    return exclusive_prefix(in_top_k(slots, k) | ~slots.valid).float()


def griffin_inclusive(slots: Slots, k: int = 3) -> Tensor:
    """1 while every label up to i is among the k best: a label that is not there yet gets no gradient at all."""
    return (in_top_k(slots, k) | ~slots.valid).cumprod(-1).float()


def griffin_windowed(slots: Slots, k: int = 3, window: int = 2) -> Tensor:
    """1 when the `window` slots before i have their label among the k best; a miss further back is forgotten."""
    misses = (slots.valid & ~in_top_k(slots, k)).cumsum(-1)
    earlier = torch.cat([torch.zeros_like(misses[..., :1]), misses[..., :-1]], -1)  # misses before i
    forgotten = torch.cat([torch.zeros_like(earlier[..., :window]), earlier[..., :-window]], -1)[
        ..., : misses.shape[-1]
    ]
    return (earlier == forgotten).float()


def pard2(slots: Slots) -> Tensor:
    """PARD-2: the exclusive gate of the *target's* confidence in the data; it does not move as the drafter learns."""
    return before(torch.where(slots.valid, slots.teacher_prob, 1.0).cumprod(-1))  # type: ignore[arg-type]


# What lets a block go on to its next slot, for the supports that end at the first slot where it fails.


def is_right(slots: Slots) -> Tensor:
    assert slots.hit is not None
    return slots.hit


def in_top_k(slots: Slots, k: int = 3) -> Tensor:
    return slots.rank < k  # type: ignore[operator,return-value]


def sample_agrees(slots: Slots) -> Tensor:
    """Does a token drawn from the drafter equal the label? It does with probability q, which is all that is needed."""
    return slots.uniform < slots.prob  # type: ignore[operator]


def gate_holds(slots: Slots, temperature: float = 1.0, alpha: float = 0.0, eps: float = 0.0) -> Tensor:
    """The inclusive gate is not below eps."""
    return gate(slots, temperature=temperature, alpha=alpha) >= eps


def streak_holds(slots: Slots, temperature: float = 1.0, eps: float = 0.0) -> Tensor:
    return gate_holds(slots, temperature, eps=eps)


def within_k(slots: Slots, k: int = 1) -> Tensor:
    return (torch.arange(slots.valid.shape[-1], device=slots.valid.device) < k - 1).expand_as(slots.valid)
