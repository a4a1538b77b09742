"""The report's fixed texts, and how its numbers and strings are written. Imports nothing but the standard library."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

NONE = "–"
THIN = 100
"""Rounds below which a conditional acceptance is drawn as uncertain."""

PROSE = ("note", "value", "outcome", "task")
"""Columns of words, aligned left; every other one but the first holds numbers."""

EXPERIMENT = (
    "Equal time: every method is given the same measured seconds of optimizer steps, so a cheaper step buys more steps "
    "and the schedule of each run is fitted to its own number of them. "
    "Equal steps: every method takes the same number of optimizer steps from the same initial weights over the same "
    "anchors in the same order, so that only the objective differs. "
)
NO_LOOP = (
    "“No loop” counts the rounds that start before the text first repeats eight tokens: a small target's greedy text often "
    "ends in a loop, which a drafter that echoes one token follows for a whole block."
)
LEGEND = (
    "Marked text was proposed by the drafter and accepted by the target; "
    "the rest the target wrote itself, one token at the end of each round. Tokens per second are this machine's; what a "
    "drafter is worth on another is told by τ."
)
SELECTION = (
    "Decoded live over the same prompts, not replayed: of several candidate blocks, one of them the drafter's greedy one, "
    "the target verifies the one it scores highest. The gain is over the replayed greedy block, paired by prompt; its cost "
    "is the nodes verified per round; a greedy block has one per slot."
)
CAPTIONS = {
    "tau": "Tokens emitted per verify round, τ, with its 95 % interval over prompts. At τ = 1 no draft token is ever "
    "accepted.",
    "alpha": "Conditional acceptance α_k: of the rounds whose first k − 1 draft tokens were accepted, the share whose "
    f"k-th was accepted too. Small pale marks rest on fewer than about {THIN} rounds.",
    "training": "Training, step by step: raw values faint, running means solid. Losses of different objectives average "
    "over different slots and are not comparable with one another; the other panels are.",
    "support": "The path of training, from the open mark to the full one. A method with a fixed support can only move "
    "up; one with a growing support moves up and to the right.",
}
HOLLOW = " A hollow mark in another's colour is the same objective at another number of steps."
"""Follows the first caption where there is one."""
GLOSSARY = (
    ("target", "The language model whose output is to be reproduced faster. It is frozen, and it has the last word."),
    ("drafter", "The small network that proposes tokens for the target to verify."),
    ("block, anchor, slot", "A block is one proposal. Its slot 0, the anchor, is the last committed token; slots 1, 2, "
     "… predict the tokens after it, all at once."),
    ("verify round", "One draft, one forward pass of the target over it, one commit."),
    ("accepted length A", "How many draft tokens of a round the target accepts before the first it refuses."),
    ("τ", "Emitted length A + 1, averaged: the accepted draft tokens and the one the target adds itself."),
    ("α_k", "Conditional acceptance: the share of rounds that accept slot k among those that accepted slot k − 1. With "
     "S_k, the share that accept at least k, α_k = S_k / S_(k−1) and τ = 1 + S_1 + S_2 + …"),
    ("AUF", "Accept-Until-Fail: the loss covers a block up to and including its first wrong prediction, the breaker, "
     "and nothing the verifier would not have read."),
    ("decay", "The usual objective: every slot counts, later ones exponentially less."),
    ("r_active, a_support", "The share of a block's slots that carry loss; the share of those predicted correctly."),
    ("common-token accuracy", "The share of all valid slots predicted correctly, whatever the objective supervises."),
    ("simulated τ", "τ as the training batch itself would give it: 1 plus the correct slots before the breaker."),
    ("head row", "One slot put through the target's vocabulary projection, the costly part of a small drafter's step."),
    ("replay", "A drafter run over recorded continuations of the target, so that all methods meet the same text and "
     "their differences are paired by prompt."),
    ("self-selection, K, T_s", "One draft, K candidate blocks: the greedy one and K − 1 drawn slot by slot at temperature "
     "T_s. They share a tree of prefixes, whose nodes the target reads in one pass, and one of them is verified."),
    ("prompt lookup", "The free competitor: copy what followed the last occurrence of the current n-gram."),
    ("cut, engine τ", "A round is cut when the end of the text falls inside it. Engine τ is completion tokens over "
     "rounds, as serving engines report it."),
    ("95 % interval", "A bootstrap over prompts; for differences, paired. Undecided means that it includes zero."),
)  # fmt: skip


def clean(text: object) -> str:
    """`text` as a string that any file format can hold: control characters and lone surrogates become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))


def escape(text: object) -> str:
    """`text` as one line of inert Markdown: no HTML, no emphasis, no links, no column breaks."""
    line = html.escape(" ".join(clean(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#~$!])", r"\\\1", line).replace("://", ":&#47;&#47;")


def real(value: object) -> float | None:
    """`value` when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def span(value: object) -> tuple[float, float] | None:
    """`value` when it is an ordered pair of finite numbers, else None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = real(value[0]), real(value[1])
    return None if low is None or high is None or low > high else (low, high)


def fixed(value: object, digits: int = 3) -> str:
    number = real(value)
    return NONE if number is None else f"{number:.{digits}f}".replace("-", "−")


def signed(value: object) -> str:
    """With its sign, to three decimals, or more where it would otherwise read as zero."""
    number = real(value)
    if number is None:
        return NONE
    text = f"{number:+.3f}" if number == 0 or abs(number) >= 0.0005 else f"{number:+.1g}"
    return text.replace("-", "−")


def count(value: object) -> str:
    number = real(value)
    return NONE if number is None else f"{number:,.0f}".replace("-", "−")


def large(value: object) -> str:
    """812, 81.2 k, 1.35 M, 2.10 G."""
    number = real(value)
    for size, digits, unit in ((1e9, 2, "G"), (1e6, 2, "M"), (1e4, 1, "k")):
        if number is not None and abs(number) >= size:
            return f"{number / (1e3 if unit == 'k' else size):.{digits}f} {unit}"
    return count(value)


def duration(value: object) -> str:
    number = real(value)
    if number is None:
        return NONE
    return (
        f"{number:.0f} s" if number < 120 else f"{number / 60:.1f} min" if number < 7200 else f"{number / 3600:.1f} h"
    )


def share(value: object) -> str:
    number = real(value)
    return NONE if number is None else f"{100 * number:.1f} %"


def subscript(k: int) -> str:
    return str(k).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def short(text: str, narrow: bool) -> str:
    """One line that fits a panel's title."""
    limit, line = 20 if narrow else 30, " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def legend_columns(labels: Iterable[str], narrow: bool, most: int, room: float) -> int:
    """The most columns in which a figure's legend is no wider than `room` ems: 0.6 for a letter, 4 for a mark."""
    sizes = [len(short(label, narrow)) for label in labels]
    for columns in range(min(most, len(sizes)), 1, -1):
        least, longer = divmod(len(sizes), columns)  # matplotlib's first columns have one more
        starts = [i * least + min(i, longer) for i in range(columns + 1)]
        if sum(4 + 0.6 * max(sizes[a:b]) for a, b in pairwise(starts)) <= room:
            return columns
    return 1


def series(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def average(tasks: Iterable[Mapping[str, Any]], name: str, key: str) -> float | None:
    """A method's figure averaged over several tasks; None unless each has it."""
    found = [real(task["methods"].get(name, {}).get(key)) for task in tasks]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if len(known) == len(found) > 1 else None
