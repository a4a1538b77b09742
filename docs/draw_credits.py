"""Draws docs/images/credits.png: what every objective makes of the same three blocks, by the library's own functions.

    .venv/bin/python docs/draw_credits.py

A bar is what multiplies the gradient of the slot's loss. That is the credit c, except for `streak`, whose loss couples the
slots: there it is the derivative by the slot's cross entropy. `objectives.md` quotes the second block as `sparkline`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from specauf.objective import Objective, Rows, Slots, position_decay
from specauf.objective.registry import call, rule_of
from specauf.report.plots import INK, PAPER, RULE, SOFT, STYLE

OUT = Path(__file__).parent / "images" / "credits.png"
GAMMA = 4.0
"""The decay that a recipe takes by itself for the block size of these blocks, 8."""
HOLE = None

# The blocks of the three columns: per slot the rank of the label under the drafter (0 is a hit), its probability, the
# draw that `sampled-auf` takes, and the target's probability of the label.
BLOCKS: dict[str, dict[str, list[float | None]]] = {
    "fails at slot 1": {
        "rank": [5, 0, 0, 1, 0, 0, 2],
        "q": [0.06, 0.70, 0.85, 0.30, 0.60, 0.55, 0.15],
        "u": [0.41, 0.22, 0.90, 0.65, 0.13, 0.37, 0.71],
        "p": [0.35, 0.90, 0.95, 0.60, 0.85, 0.75, 0.50],
    },
    "fails at slot 4": {
        "rank": [0, 0, HOLE, 1, 4, 0, 0],
        "q": [0.95, 0.45, HOLE, 0.30, 0.05, 0.80, 0.65],
        "u": [0.58, 0.33, HOLE, 0.24, 0.77, 0.08, 0.46],
        "p": [0.97, 0.55, HOLE, 0.80, 0.40, 0.92, 0.85],
    },
    "all right": {
        "rank": [0, 0, 0, 0, 0, 0, 0],
        "q": [0.98, 0.95, 0.85, 0.90, 0.70, 0.80, 0.60],
        "u": [0.50, 0.12, 0.64, 0.29, 0.83, 0.05, 0.44],
        "p": [0.99, 0.97, 0.90, 0.95, 0.85, 0.90, 0.80],
    },
}
N = 7

GROUPS: dict[str, dict[str, str]] = {
    "position alone": {
        "uniform": r"$1$",
        "decay": r"$w_i = e^{-(i-1)/\gamma}$",
        "first-k": r"$1[\,i \leq k\,]$,  k = 1",
    },
    "the first error": {
        "auf": r"$1[\,i \leq j^{\mathregular{*}}\,]$",
        "auf-decay": r"$1[\,i \leq j^{\mathregular{*}}\,]\;w_i$",
        "soft-auf": r"$q_1\, q_2 \cdots\, q_{i-1}$",
        "sampled-auf": r"$u_l < q_l$ at all $l < i$",
        "first-error": r"$1[\,i = j^{\mathregular{*}}\,]$",
        "l2r-focal": r"$w_i + \lambda\,1[\,i = j^{\mathregular{*}}\,]$",
        "l2r-focal-separate": r"$w_i$  and  $\lambda\,1[\,i = j^{\mathregular{*}}\,]$, each normalised",
    },
    "Top-K, K = 3": {
        "griffin-exclusive": r"label in Top-K at all $l < i$",
        "griffin-inclusive": r"label in Top-K at all $l \leq i$",
        "griffin-windowed": r"label in Top-K at $i-2,\, i-1$",
    },
    "the drafter's probabilities": {
        "dpace": r"$\tilde{G}_i\,\tilde{f}_i$,  $\alpha = 0.5$",
        "dpace-cumulative": r"$\tilde{G}_i = \tilde{q}_1\, \tilde{q}_2 \cdots\, \tilde{q}_i$",
        "dpace-continuation": r"$\tilde{f}_i = 1 + \tilde{q}_{i+1}\, \tilde{f}_{i+1}$",
        "streak-credit": r"$G_i\,f_i$, no smoothing",
        "streak": r"gradient of  $-\Sigma_k\; q_1 \cdots\, q_k$",
    },
    "the target's distribution": {
        "pard2": r"$p_1\, p_2 \cdots\, p_{i-1}$,  of CE and KL",
        "lk-alpha": r"$0.8^{\,i-1}$,  of $-\log$ overlap",
        "lk-lambda": r"$0.8^{\,i-1}$,  of KL going over to TV",
    },
}
NAMES = [name for group in GROUPS.values() for name in group]

READ, BREAKER, UNREAD = "#4a7299", "#d1570b", "#bfbab0"
TOP, ROW, BAR, HEADING, GAP = 1.68, 0.375, 0.265, 0.13, 0.15  # inches, like everything below
LEFT, PITCH, COLUMN, WIDTH = 2.36, 0.215, 1.72, 7.4


def blocks() -> Slots:
    """The three blocks, [3, N]."""

    def field(name: str) -> Tensor:
        return torch.tensor([[0.0 if x is HOLE else x for x in facts[name]] for facts in BLOCKS.values()]).double()

    valid = torch.tensor([[x is not HOLE for x in facts["rank"]] for facts in BLOCKS.values()])
    rank = field("rank").long()
    return Slots(valid, (rank == 0) & valid, field("q"), rank, field("u"), field("p"))


def weights(name: str) -> Tensor:
    """[3, N]: what multiplies the gradient of each slot's loss, before any reduction; parts are added, scaled."""
    rule, slots = rule_of(name), blocks()
    objective = Objective(name, GAMMA if isinstance(rule.gamma, str) else None)
    found = call(rule.credit, slots._replace(decay=position_decay(N, objective.gamma)), objective.options)
    parts = found if isinstance(found, tuple) else ((1.0, found),)
    total = sum((scale * c for scale, c in parts), torch.zeros(1)) * slots.valid
    if rule.rows != ("ce",):
        return total
    ce = (-slots.prob.log()).nan_to_num(posinf=0.0).requires_grad_()  # type: ignore[union-attr]
    loss = call(rule.loss, Rows(ce, None, None, slots.valid), objective.options)
    return torch.autograd.grad((total * loss).sum(), ce)[0]


def sparkline(name: str) -> str:
    """The second block in seven characters: `o` is the hole, `.` is zero, eight heights up to the larger of 1 and the top."""
    row, valid = weights(name)[1], blocks().valid[1]
    top = max(1.0, float(row.max()))
    marks = ["▁▂▃▄▅▆▇█"[min(7, int(8 * float(x) / top))] if x > 0 else "." for x in row]
    return "".join(mark if ok else "o" for mark, ok in zip(marks, valid.tolist(), strict=True))


def digest() -> str:
    """Of all that is drawn; the picture carries it, so that a stale one is noticed."""
    numbers = [[round(x, 4) for x in row] for name in NAMES for row in weights(name).tolist()]
    return hashlib.sha256(repr((BLOCKS, GROUPS, numbers)).encode()).hexdigest()[:16]


def draw() -> Figure:
    height = TOP + len(NAMES) * ROW + len(GROUPS) * (HEADING + GAP) + 0.14
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.set_axis_off()
    slots = blocks()
    wrong = (slots.valid & ~slots.hit).tolist()  # type: ignore[operator]
    stops = [row.index(True) if any(row) else N for row in wrong]
    _header(ax, slots, stops, height)
    y = TOP
    for group, rows in GROUPS.items():
        y += GAP
        ax.plot((0.1, WIDTH - 0.1), (y - 0.05, y - 0.05), color=RULE, linewidth=0.8)
        ax.text(0.1, y + HEADING / 2 + 0.02, group, color=SOFT, fontsize=7.5, va="center", style="italic")
        y += HEADING
        for name, formula in rows.items():
            _row(ax, y + ROW, name, formula, slots, stops)
            y += ROW
    return figure


def _x(column: int, slot: int) -> float:
    """The middle of a slot."""
    return LEFT + column * COLUMN + (slot + 0.5) * PITCH


def _header(ax: Axes, slots: Slots, stops: list[int], height: float) -> None:
    ax.text(0.1, 0.22, "Credit of each slot", fontsize=11, weight="bold", va="center")
    for x, colour, words in (
        (_x(0, 0) - 0.08, READ, "before the first error"),
        (_x(1, 0) - 0.08, BREAKER, "the first error, j*"),
        (_x(2, 0) - 0.08, UNREAD, "after it: not verified"),
    ):
        ax.add_patch(Rectangle((x, 0.17), 0.11, 0.11, color=colour, linewidth=0))
        ax.text(x + 0.17, 0.23, words, fontsize=7.8, va="center", color=INK)
    names = {"rank": "rank of the label", "q": "drafter's probability q", "u": "draw u", "p": "target's probability p"}
    for line, words in enumerate(names.values()):
        ax.text(LEFT - 0.15, 1.06 + 0.165 * line, words, fontsize=7.5, va="center", ha="right", color=SOFT)
    ax.text(LEFT - 0.15, 0.82, "slot", fontsize=7.5, va="center", ha="right", color=SOFT)
    for column, (title, facts) in enumerate(BLOCKS.items()):
        ax.text(_x(column, 0) - 0.08, 0.56, title, fontsize=9.5, weight="bold", va="center")
        for slot in range(N):
            x = _x(column, slot)
            if not slots.valid[column, slot]:
                ax.add_patch(
                    Rectangle((x - PITCH / 2, 0.7), PITCH, height - 0.84, facecolor=RULE, alpha=0.45, linewidth=0)
                )
                ax.text(x, 0.82, "hole", fontsize=6.2, va="center", ha="center", color=SOFT)
                continue
            colour = _colour(slot, stops[column])
            hit = bool(slots.hit[column, slot])  # type: ignore[index]
            ax.add_patch(Circle((x, 0.82), 0.082, facecolor=colour if hit else PAPER, edgecolor=colour, linewidth=1.2))
            ax.text(x, 0.825, str(slot + 1), fontsize=6.8, va="center", ha="center", color=PAPER if hit else colour)
            for line, name in enumerate(names):
                value = facts[name][slot]
                words = f"{value:.0f}" if name == "rank" else f"{value:.2f}".lstrip("0")
                ax.text(x, 1.06 + 0.165 * line, words, fontsize=6.8, va="center", ha="center", color=INK)


def _row(ax: Axes, base: float, name: str, formula: str, slots: Slots, stops: list[int]) -> None:
    values = weights(name)
    top = max(1.0, float(values.max()))
    ax.text(0.1, base - 0.235, name, fontsize=8.6, weight="bold", va="center")
    ax.text(0.1, base - 0.075, formula, fontsize=7.6, va="center", color=SOFT)
    if top > 1:
        x = _x(0, 0) - PITCH / 2 - 0.03
        ax.text(x, base - BAR, f"{top:.1f}", fontsize=6.5, va="center", ha="right", color=SOFT)
        ax.plot((x + 0.015, x + 0.045), (base - BAR,) * 2, color=SOFT, linewidth=0.6)
    for column, stop in enumerate(stops):
        left = _x(column, 0) - PITCH / 2
        ax.plot((left, left + N * PITCH), (base, base), color=SOFT, linewidth=0.5)
        for slot in range(N):
            tall = BAR * float(values[column, slot]) / top
            if tall > 0:
                corner = (_x(column, slot) - 0.4 * PITCH, base - max(tall, 0.008))
                ax.add_patch(
                    Rectangle(corner, 0.8 * PITCH, max(tall, 0.008), color=_colour(slot, stop), linewidth=0, zorder=2)
                )


def _colour(slot: int, stop: int) -> str:
    return READ if slot < stop else BREAKER if slot == stop else UNREAD


def main() -> None:
    OUT.parent.mkdir(exist_ok=True)
    facts = {"Software": None, "Credits": digest()}
    with matplotlib.rc_context({**STYLE, "mathtext.fontset": "dejavusans"}):
        draw().savefig(OUT, dpi=200, facecolor=PAPER, metadata=facts, pil_kwargs={"optimize": True})
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
