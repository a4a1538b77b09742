"""Every objective by name, one line each in `RULES`: Table 1 of the paper and its neighbours.

A rule is a credit, a loss, and what the two need. `docs/objectives.md` explains every row; `docs/adding-an-objective.md`
shows how to add one.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from specauf.objective import credit
from specauf.objective.credit import Slots

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Rows(NamedTuple):
    """What the head read of every slot, as leaves for the loss's derivative. Zero where it was not read."""

    ce: Float[Tensor, "b n k"]
    """-log q(label)."""
    kl: Float[Tensor, "b n k"] | None
    """KL(p || q) of the target's distribution p and the drafter's q, at temperature 1."""
    overlap: Float[Tensor, "b n k"] | None
    """sum_v min(p, q): the chance that a token drawn from q is accepted. 1 - overlap is the total variation."""
    valid: Bool[Tensor, "b n k"]
    """There is a label, and the head has a row for it."""
    outside: Bool[Tensor, "b n k"] | None = None
    """There is a label that the head has no row for: q = 0, and the slot has no loss. Only with a draft vocabulary."""


def cross_entropy(rows: Rows) -> Tensor:
    return rows.ce


def pard2(rows: Rows, ce_weight: float = 0.1, kd_weight: float = 1.0) -> Tensor:
    """PARD-2: both terms share one credit, hence one denominator."""
    return ce_weight * rows.ce + kd_weight * rows.kl  # type: ignore[operator]


def lk_alpha(rows: Rows) -> Tensor:
    """-log of the acceptance probability; its gradient is the total variation's, divided by the overlap."""
    return -torch.log(rows.overlap.clamp(min=torch.finfo(rows.ce.dtype).tiny))  # type: ignore[union-attr]


def lk_lambda(rows: Rows, eta: float = 3.0, per: str = "token") -> Tensor:
    """lam KL + (1 - lam) TV with lam = exp(-eta overlap), a constant: mostly KL while p and q are far apart, then TV.

    `per` says what the overlap in lam is averaged over. `token` averages nothing (speculators), `slot` averages each slot
    over the micro-batch (the LK paper), `all` the whole micro-batch (SpecForge). Only `token` does not depend on how a
    batch is cut.
    """
    assert rows.overlap is not None and rows.kl is not None
    overlap = rows.overlap.detach()
    if per != "token":
        over = (0, 1) if per == "slot" else (0, 1, 2)
        count = rows.valid.sum(over).clamp(min=1)
        overlap = (overlap * rows.valid).sum(over) / count
    mix = torch.exp(-eta * overlap)
    return mix * rows.kl + (1 - mix) * (1 - rows.overlap)


def streak(rows: Rows) -> Tensor:
    """SpecDiff-2's product reward, negated: -prod_{l<=m} q_l at every slot m, whose sum is minus the expected streak.

    It is differentiated through every factor. The credit is 1, so a reduction divides by constants.
    """
    product = torch.exp(-(rows.ce * rows.valid).cumsum(-1))
    return -product if rows.outside is None else -product * (~rows.outside).cumprod(-1)


class Rule(NamedTuple):
    """One objective. The keyword arguments of its three functions are its options."""

    credit: Callable[..., Any]
    """slots -> c, or ((scale, c), ...) when parts of the loss have denominators of their own."""
    loss: Callable[..., Tensor] = cross_entropy
    """rows -> l; may be differentiated through, and may look along a block."""
    survives: Callable[..., Tensor] | None = None
    """slots -> whether a block goes on. Set it when c is 0 after the first valid slot where this is false.

    The head then reads blocks left to right. With an option `eps`, that applies only if eps > 0; at 0 the credit is exact
    and every slot is read.
    """
    rows: tuple[str, ...] = ("ce",)
    """The fields of `Rows` that the loss is a function of. `kl` and `overlap` need the target's distribution."""
    needs: frozenset[str] = frozenset()
    """Any of `rank` and `target_prob` (the label's, under drafter and target), `uniform` (draws), `rollouts` (as data)."""
    gamma: float | str | None = None
    """Position decay: None takes none, a number is the default, "by block size" is left to the caller."""


BY_BLOCK = "by block size"
LK_GAMMA = -1 / math.log(0.8)  # 0.8^(i-1), as the LK paper weighs its heads
SMOOTH_GATE_HOLDS = functools.partial(credit.gate_holds, alpha=0.5)  # D-PACE's own default

RULES: dict[str, Rule] = {
    "uniform": Rule(credit.uniform),
    "decay": Rule(credit.decay, gamma=BY_BLOCK),
    "first-k": Rule(credit.first_k, survives=credit.within_k),
    "auf": Rule(credit.auf, survives=credit.is_right),
    "soft-auf": Rule(credit.soft_auf, survives=credit.gate_holds),
    "sampled-auf": Rule(credit.sampled_auf, survives=credit.sample_agrees, needs=frozenset({"uniform"})),
    "first-error": Rule(credit.first_error, survives=credit.is_right),
    "griffin-exclusive": Rule(credit.griffin_exclusive, survives=credit.in_top_k, needs=frozenset({"rank"})),
    "griffin-inclusive": Rule(credit.griffin_inclusive, survives=credit.in_top_k, needs=frozenset({"rank"})),
    "griffin-windowed": Rule(credit.griffin_windowed, needs=frozenset({"rank"})),
    "l2r-focal": Rule(credit.l2r_focal, gamma=10.0),
    "l2r-focal-separate": Rule(credit.l2r_focal_separate, gamma=10.0),
    "dpace": Rule(credit.dpace, survives=SMOOTH_GATE_HOLDS),
    "dpace-cumulative": Rule(credit.dpace_cumulative, survives=SMOOTH_GATE_HOLDS),
    "dpace-continuation": Rule(credit.dpace_continuation),
    "streak-credit": Rule(credit.streak_credit, survives=credit.streak_holds),
    "streak": Rule(credit.uniform, streak, needs=frozenset({"rollouts"})),
    "pard2": Rule(credit.pard2, pard2, rows=("ce", "kl")),
    "lk-alpha": Rule(credit.decay, lk_alpha, rows=("overlap",), gamma=LK_GAMMA),
    "lk-lambda": Rule(credit.decay, lk_lambda, rows=("kl", "overlap"), gamma=LK_GAMMA),
}

NEEDS = frozenset({"rank", "target_prob", "uniform", "rollouts"})
BELOW_ONE = math.nextafter(1, 0)
LIMITS: dict[str, tuple[float, float]] = {
    "alpha": (0, 1),
    "eps": (0, BELOW_ONE),
    "temperature": (1e-3, math.inf),
    "k": (1, math.inf),
    "window": (1, math.inf),
    "focal": (0, math.inf),
    "eta": (0, math.inf),
    "ce_weight": (0, math.inf),
    "kd_weight": (0, math.inf),
}
"""Closed ranges of the options that have one."""
CHOICES = {"per": ("token", "slot", "all")}


def register(
    name: str,
    *,
    loss: Callable[..., Tensor] = cross_entropy,
    survives: Callable[..., Tensor] | None = None,
    rows: tuple[str, ...] = ("ce",),
    needs: frozenset[str] | set[str] = frozenset(),
    gamma: float | str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make the credit function below it the objective `name`. See `Rule` for the arguments.

    Raises `ValueError` when the name is taken or ends in -decay, for unknown rows or needs, or when an option has no default
    or two different ones.
    """
    if unknown := sorted(set(needs) - NEEDS):
        raise ValueError(f"objective {name!r} needs {unknown[0]!r}, which is none of {', '.join(sorted(NEEDS))}")
    if not {*rows} <= {"ce", "kl", "overlap"}:
        raise ValueError(f"objective {name!r}: rows are a tuple of ce, kl and overlap, got {rows!r}")
    if name.endswith("-decay"):
        raise ValueError(f"{name!r}: names that end in -decay belong to the rule before the ending, times the decay")

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        held = RULES[name].credit if name in RULES else function  # a notebook's cell may be run again
        if (held.__module__, held.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"the objective {name!r} exists already")
        rule = Rule(function, loss, survives, tuple(rows), frozenset(needs), gamma)
        options_of(rule)
        RULES[name] = rule
        return function

    return add


def rule_of(name: str) -> Rule:
    """The rule called `name`. `<name>-decay` is any rule without a position decay, multiplied by one ("auf-decay").

    Raises `ValueError` on an unknown name, with the nearest and all valid ones.
    """
    if name in RULES:
        return RULES[name]
    base = RULES.get(name.removesuffix("-decay"))
    if base is not None and base.gamma is None:
        return base._replace(credit=_decayed(base.credit), gamma=BY_BLOCK)
    near = difflib.get_close_matches(name, list(RULES), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown objective {name!r}{hint} Valid: {', '.join(RULES)}, and <name>-decay")


def _decayed(function: Callable[..., Any]) -> Callable[..., Any]:
    def product(slots: Slots, **options: Any) -> Any:
        found, prior = function(slots, **options), credit.decay(slots)
        return tuple((scale, c * prior) for scale, c in found) if isinstance(found, tuple) else found * prior

    product.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return product


def options_of(rule: Rule) -> dict[str, Any]:
    """The rule's options and their defaults. Raises `ValueError` on an option without a default, or with two."""
    found: dict[str, Any] = {}
    for function in (rule.credit, rule.loss, rule.survives):
        for option in list(inspect.signature(function).parameters.values())[1:] if function else ():
            if found.get(option.name, option.default) != option.default or option.default is option.empty:
                raise ValueError(f"the option {option.name!r} must have one default, the same wherever it is taken")
            found[option.name] = option.default
    return found


def call(function: Callable[..., Any], value: Any, options: Mapping[str, Any]) -> Any:
    """`function` on `value`, with those of `options` that it takes."""
    takes = list(inspect.signature(function).parameters)[1:]
    return function(value, **{name: options[name] for name in takes})


def check_options(name: str, rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults overridden by `given`. Raises `ValueError` on an option the rule does not take or a value out of range."""
    options = options_of(rule)
    for option, value in given.items():
        if option not in options:
            takes = f"it takes {', '.join(options)}" if options else "it takes none"
            raise ValueError(f"objective {name!r} has no option {option!r}; {takes}")
        if option in CHOICES:
            if value not in CHOICES[option]:
                raise ValueError(
                    f"objective {name!r}: {option} must be one of {', '.join(CHOICES[option])}, got {value!r}"
                )
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"objective {name!r}: {option} must be a finite number, got {value!r}")
        if option in LIMITS and not LIMITS[option][0] <= value <= LIMITS[option][1]:
            low, high = LIMITS[option]
            end = "1)" if high == BELOW_ONE else f"{high:g}]"
            bound = f"in [{low:g}, {end}" if high < math.inf else f"at least {low:g}"
            raise ValueError(f"objective {name!r}: {option} must be {bound}, got {value!r}")
        if isinstance(options[option], int) and not isinstance(value, int):
            raise ValueError(f"objective {name!r}: {option} must be a whole number, got {value!r}")
        options[option] = value
    return options
