"""A study's figures of measured acceptance: bars per benchmark and conditional acceptance, and how its methods look.

Drawn with the run report's own palette and style. Figures are made under `plots.STYLE` by `study_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from specauf.report import plots
from specauf.report import study_index as index
from specauf.report.plots import INK, KNOWN, LOOKUP, SOFT, SPARE, Style
from specauf.report.study_index import MACRO
from specauf.report.study_words import ABSENT
from specauf.report.tables import Results
from specauf.report.words import fixed, legend_columns, real, short, span

TOGETHER = 5
"""Number of lines in one panel that can still be told apart."""
AS_DFLASH = {"decay-only": "decay", "b-auf": "auf", "b-auf-d": "auf-decay"}
"""Domino's variant -> the DFlash objective whose line it has in the paper's Figure 5."""
PALETTE = (*KNOWN.values(), *SPARE)


def looks(results: Results) -> dict[str, Style]:
    """The style of every method, the same in all figures. DFlash and Domino share theirs, as in the paper's Figure 5, unless
    some part has both: then they meet in a panel.

    Otherwise no two are alike: first the objective's own colour, then colours that are free, then the
    same again, hollow and dashed.
    """
    names = [m["name"] for m in results["methods"]]
    names += [name for part in results["parts"] for name in index.rows(results, part)]
    names += list(results.get("training") or {})
    kinds = [{index.method(results, n).get("kind") for n in index.drafters(results, p)} for p in results["parts"]]
    mixed = any(len(found - {None}) > 1 for found in kinds)
    used: dict[str, set[int]] = {}
    found: dict[str, Style] = {}
    own = list(KNOWN)
    for exact in (True, False, None):  # by name, by objective, by what is left
        for name in (n for n in dict.fromkeys(names) if n not in found):
            record = index.method(results, name)
            taken = used.setdefault("" if mixed else str(record.get("kind")), set())
            key = name if exact else str((record.get("objective") or {}).get("name"))
            key = AS_DFLASH.get(key, key)
            if index.is_lookup(results, name):
                lookups = sum(style.colour == LOOKUP for style in found.values())
                found[name] = Style(LOOKUP, "dPXs"[lookups % 4], "--", True)
            elif exact is None or (key in KNOWN and own.index(key) not in taken):
                at = own.index(key) if exact is not None else next(i for i in range(10**6) if i not in taken)
                taken.add(at)
                found[name] = _look(at)
    return {name: found[name] for name in dict.fromkeys(names)}


def _look(at: int) -> Style:
    """The first seven have a colour each. Later ones reuse all but the baseline's and AUF's, hollow and dashed, then dotted."""
    if at < len(PALETTE):
        return Style(*PALETTE[at], "-", False)
    turn, place = divmod(at - len(PALETTE), len(PALETTE) - 2)
    marker = PALETTE[(place + turn) % len(PALETTE)][1]
    return Style(PALETTE[place + 2][0], marker, "--" if turn == 0 else ":", True)


def together(names: Sequence[str], baseline: str | None) -> list[list[str]]:
    """`names` in groups that a panel can hold, the baseline in every one of them."""
    if len(names) <= TOGETHER + 2:
        return [list(names)]
    first = [name for name in names if name == baseline]
    others = [name for name in names if name != baseline]
    size = TOGETHER - len(first)
    count = -(-len(others) // size)
    size = -(-len(others) // count)  # as even as can be
    return [first + others[i : i + size] for i in range(0, len(others), size)]


def bars(results: Results, part: dict[str, Any], temperature: str, narrow: bool) -> Figure | None:
    """tau of every method, a panel per benchmark and the average first: bars from 1, intervals, single seeds as dots."""
    look, names = looks(results), index.rows(results, part)
    places = [MACRO, *index.tasks(results)]
    scored = {(p, n): index.score(results, part, temperature, n, p) for p in places for n in names}
    places = [p for p in places if any(real(scored[p, n].get("tau")) is not None for n in names)]
    if not places:
        return None
    drafting = [_end(score) for (_, name), score in scored.items() if not index.is_lookup(results, name)]
    reach = max([end - 1 for end in drafting if end is not None] or [_end(s) or 1.0 for s in scored.values()])
    reach = max(reach, 0.01)
    limit = 1 + reach * (1.2 if narrow else 1.42)  # room for the last number
    figure, axes = plots.panels(len(places), narrow, 0.55 + 0.19 * len(names), columns=4, sharex=True, sharey=True)
    for ax, place in zip(axes, places, strict=True):
        for y, name in enumerate(names):
            lookup = index.is_lookup(results, name)
            _bar(ax, y, scored[place, name], look[name], limit if lookup else None)
        title = "Average" if place == MACRO else index.task_label(results, place)
        ax.set_title(short(title, narrow), parse_math=False)
        plots.tau_rows(ax, index.labels(results, names), look, narrow)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_xlim(1 - 0.02 * reach, limit)
    plots.tau_ticks(axes[0], 1.3 * reach, 6 if narrow else 4)
    for ax in plots.bottom(axes):
        ax.set_xlabel("tokens per round, τ")
    return figure


def _end(score: dict[str, Any]) -> float | None:
    """Where the marks of a bar end: at its value, its interval or the farthest of its seeds."""
    value, bounds = real(score.get("tau")), span(score.get("interval"))
    return None if value is None else max([value, *(bounds or ()), *_seeds(score)])


def _seeds(score: dict[str, Any]) -> list[float]:
    """tau of single seeds, where there are several."""
    seeds = [s for v in (score.get("seed_taus") or {}).values() if (s := real(v)) is not None]
    return seeds if len(seeds) > 1 else []


def _bar(ax: Axes, y: int, score: dict[str, Any], style: Style, limit: float | None = None) -> None:
    """`limit` is where the panel ends, for a method that may go beyond it; its number then stands before the edge."""
    value, bounds = real(score.get("tau")), span(score.get("interval"))
    if value is None:
        ax.annotate(ABSENT, (1.0, y), (4, 0), textcoords="offset points", va="center", color=SOFT, fontsize=7.5)
        return
    ax.barh(y, value - 1, left=1, height=0.68, color=style.colour, alpha=0.38, linewidth=0)
    ax.plot([value, value], [y - 0.34, y + 0.34], color=style.colour, linewidth=1.4, solid_capstyle="butt")
    if bounds:
        ax.plot(bounds, (y, y), color=INK, linewidth=1, solid_capstyle="butt")
    seeds, end = _seeds(score), _end(score)
    assert end is not None
    ax.plot(seeds, [y + 0.2] * len(seeds), linestyle="none", marker="o", markersize=2.2, color=style.colour)
    if limit is not None and end > 1 + 0.8 * (limit - 1):  # no room behind it
        beyond = value > limit
        told, x, shift, side = (
            (f"{fixed(value, 2)} →", limit, -2, "right") if beyond else (fixed(value, 2), 1.0, 4, "left")
        )
        ax.annotate(told, (x, y), (shift, 0), textcoords="offset points", ha=side, va="center", color=INK, fontsize=8)
        return
    ax.annotate(fixed(value, 2), (end, y), (4, 0), textcoords="offset points", va="center", color=INK, fontsize=8)


def alpha(
    results: Results, panels: Sequence[tuple[str, dict[str, Any], str, Sequence[str]]], narrow: bool
) -> Figure | None:
    """alpha_k over all benchmarks. A panel is (title, part, temperature, methods) and has a legend of its own."""
    held = []
    for title, part, temperature, names in panels:
        scores = {n: index.score(results, part, temperature, n, MACRO) for n in names}
        scores = {n: s for n, s in scores.items() if any(real(a) is not None for a in s.get("alpha") or [])}
        if scores:
            held.append((title, scores))
    if not held:
        return None
    look = looks(results)
    rows = max(len(scores) for _, scores in held)
    columns = columns_below([index.labels(results, scores) for _, scores in held], narrow)
    figure, axes = plots.panels(len(held), narrow, 2.35 + 0.17 * -(-rows // columns), columns=2, sharey=True)
    for ax, (title, scores) in zip(axes, held, strict=True):
        for name, score in scores.items():
            plots.alpha_line(ax, score, look[name])
        ax.set_title(short(title, narrow), parse_math=False)
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("slot k")
        ax.xaxis.set_major_locator(plots.whole_ticks(8))
        below(ax, index.labels(results, scores), look, columns, narrow, 1.75)
    axes[0].set_ylim(0, min(1.04, 1.12 * axes[0].get_ylim()[1]))
    plots.left_label(axes, "acceptance α at slot k")
    apart(figure)
    return figure


def apart(figure: Figure) -> None:
    """More room between panels that have legends or axis names of their own below them."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # what `plots` gives every figure
    engine.set(h_pad=0.14)


def columns_below(panels: Sequence[Mapping[str, str]], narrow: bool) -> int:
    """How many columns the legends `below` have, one of each of `panels`, so that none is wider than its panel."""
    most, room = (2, 29) if narrow or len(panels) > 1 else (3, 42)
    return min(legend_columns(labels.values(), narrow, most, room) for labels in panels)


def below(
    ax: Axes, labels: Mapping[str, str], look: Mapping[str, Style], columns: int, narrow: bool, height: float
) -> None:
    """A legend of one panel, `height` inches tall, under the name of its axis."""
    plots.legend(
        ax, labels, look, narrow, loc="upper left", bbox_to_anchor=(-0.02, -0.42 / height), ncols=columns,
        handlelength=2.0, columnspacing=1.2, fontsize=8,
    )  # fmt: skip
