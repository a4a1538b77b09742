"""A study's figures of training: the path of the support, four curves over steps, and where the credit goes.

Seeds are drawn faint as they were logged, the running mean over them solid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from specauf.report import plots
from specauf.report import study_index as index
from specauf.report.plots import INK, PAPER, SOFT, Style
from specauf.report.study_plots import apart, below, columns_below, looks
from specauf.report.study_words import ACTIVE_LABEL, COMMON_LABEL, SUPPORT_LABEL, TAU_MIXED, TAU_REPLAY, TAU_SIMULATED
from specauf.report.tables import Results
from specauf.report.words import clean, real, short

Log = Sequence[dict[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]
TRUNCATING = ("auf", "auf-decay", "b-auf", "b-auf-d", "s-auf", "s-auf-d", "f-auf", "f-auf-d")
FAINT, POINTS, BINS = 0.28, 120, 24
SHADE = 0.55
"""Strongest shade of a credit map: the numbers on it must stay legible in both themes."""


def logs(results: Results, name: str) -> list[Log]:
    """The logs of a method that hold something, one per seed."""
    return [log for log in ((results.get("training") or {}).get(name) or {}).values() if log]


def tau_key(results: Results, names: Sequence[str]) -> str:
    """ "replay_tau" when every logged method has some, else "simulated_tau": one panel must not mix the two.

    Empty when there is only simulated tau, and of labels from the data as well as from the target, which do not compare.
    """
    logged = {name: found for name in names if (found := logs(results, name))}
    if logged and all(any(real(r.get("replay_tau")) is not None for log in f for r in log) for f in logged.values()):
        return "replay_tau"
    labels = {(index.method(results, name).get("objective") or {}).get("labels", "data") for name in logged}
    return "simulated_tau" if len(labels) < 2 else ""


def tau_words(key: str) -> str:
    return {"replay_tau": TAU_REPLAY, "simulated_tau": TAU_SIMULATED}.get(key, TAU_MIXED)


def mean_curve(curves: Sequence[Curve], ordered: bool = True) -> Curve:
    """The mean over seeds, at the first seed's points where every seed has data; matched by x if `ordered`, else by index."""
    if len(curves) == 1:
        return curves[0]
    if not ordered:
        shortest = min(len(x) for x, _ in curves)
        stacked = np.array([(x[:shortest], y[:shortest]) for x, y in curves])
        mean = stacked.mean(axis=0)
        return mean[0], mean[1]
    start, stop = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = curves[0][0][(curves[0][0] >= start) & (curves[0][0] <= stop)]
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def several(results: Results, names: Sequence[str]) -> bool:
    return any(len(logs(results, name)) > 1 for name in names)


def training(results: Results, names: Sequence[str], narrow: bool) -> Figure | None:
    """The four panels of the paper's Figure 4 over optimizer steps; a panel without logged data says so."""
    look, key = looks(results), tau_key(results, names)
    title = tau_words(key)
    panels = (
        ("a_support", SUPPORT_LABEL), ("common_accuracy", COMMON_LABEL), ("r_active", ACTIVE_LABEL),
        (key, "τ by replay" if key == "replay_tau" else title[0].upper() + title[1:].split(",")[0]),
    )  # fmt: skip
    drawn = [n for n in names if any(_curves(results, n, "step", k) for k, _ in panels)]
    if not drawn:
        return None
    figure, axes = plots.panels(len(panels), narrow, 1.95, columns=2, sharex=True)
    for ax, (field, words) in zip(axes, panels, strict=True):
        for name in drawn:
            curves = _curves(results, name, "step", field)
            if curves:
                x, y = mean_curve(curves)
                _draw(ax, curves, (x, plots.smooth(y)), look[name])
        if not ax.lines:
            why = "not recorded" if field else "labels differ"
            ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=SOFT)
            ax.set_yticks([])
        elif field != key:
            ax.set_ylim(0, min(1.05, 1.12 * ax.get_ylim()[1]))
        ax.set_title(words, parse_math=False)
        ax.grid(axis="x", visible=False)
    axes[0].xaxis.set_major_locator(plots.whole_ticks(5))
    for ax in plots.bottom(axes):
        ax.set_xlabel("optimizer step")
    plots.above(figure, index.labels(results, drawn), look, narrow)
    return figure


def support(results: Results, groups: Sequence[Sequence[str]], narrow: bool) -> Figure | None:
    """The paper's Figure 3, measured: (r_active, a_support) through training, a panel per group of methods."""
    look = looks(results)
    every = [{name: _curves(results, name, "r_active", "a_support") for name in group} for group in groups]
    held = [shown for group in every if (shown := {n: paths for n, paths in group.items() if paths})]
    if not held:
        return None
    columns = columns_below([index.labels(results, paths) for paths in held], narrow)
    rows = -(-max(map(len, held)) // columns)
    figure, axes = plots.panels(len(held), narrow, 2.8 + 0.17 * rows, columns=2, sharey=True)
    for ax, paths in zip(axes, held, strict=True):
        for name, curves in paths.items():
            smooth = [(plots.smooth(x), plots.smooth(y)) for x, y in curves]  # raw, a path is a cloud
            mean = mean_curve(smooth, ordered=False)
            _draw(ax, smooth, mean, look[name], marks=False)
            x, y = mean
            ax.plot(x[:1], y[:1], **{**look[name].mark(5), "markerfacecolor": PAPER})
            ax.plot(x[-1:], y[-1:], **{**look[name].mark(7), "markerfacecolor": look[name].colour})
        ax.set_xlim(0, 1.04)
        ax.set_xlabel("share of slots that carry loss, r_active")
        below(ax, index.labels(results, paths), look, columns, narrow, 2.3)
    axes[0].set_ylim(0, min(1.04, 1.15 * axes[0].get_ylim()[1]))
    plots.left_label(axes, "accuracy on them, a_support")
    apart(figure)
    return figure


def credit_rows(results: Results, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Method -> mean credit of every slot over the last tenth of its training, all seeds together."""
    found = {}
    for name in names:
        last = [row for log in logs(results, name) for row in _tail(log)]
        mean = _mean_credit(last)
        if mean:
            found[name] = mean
    return found


def credit(results: Results, names: Sequence[str], narrow: bool) -> Figure | None:
    """Heat map, method by slot, shaded by the share of the row's largest credit."""
    maps = credit_rows(results, names)
    if not maps:
        return None
    look, slots = looks(results), max(map(len, maps.values()))
    width = 3.6 if narrow else 7.4 if slots > 8 else 5.2
    size = width, 0.75 + 0.27 * len(maps)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(**plots.GAPS))
    ax = figure.subplots()
    for y, (name, values) in enumerate(maps.items()):
        top = max((v for v in values if v is not None), default=0.0)
        for k, value in enumerate(values, start=1):
            if value is None:
                continue
            _tile(ax, k - 0.5, y - 0.5, 1, value / top if top > 0 else 0.0, look[name].colour)
            if not (narrow and slots > 8):
                ax.text(k, y, _short_number(value), ha="center", va="center", fontsize=7.5, color=INK)
    plots.label_rows(ax, index.labels(results, maps), look, narrow)
    _tiled(ax)
    ax.set_xlim(0.5, slots + 0.5)
    ax.set_ylim(len(maps) - 0.5, -0.5)
    ax.set_xlabel("slot k")
    ax.xaxis.set_major_locator(plots.whole_ticks(8 if narrow else 16))
    return figure


def reach(results: Results, names: Sequence[str], narrow: bool) -> Figure | None:
    """Heat map of AUF, slot by training step: how deep the support has grown. A panel per method that truncates."""
    chosen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in names:
        truncates = (index.method(results, name).get("objective") or {}).get("name") in TRUNCATING
        binned = _binned(logs(results, name)) if truncates else None
        if binned is not None:
            chosen[name] = binned
    if not chosen:
        return None
    look = looks(results)
    depth = max(grid.shape[1] for _, grid in chosen.values())
    figure, axes = plots.panels(len(chosen), narrow, 0.75 + 0.16 * depth, columns=2)
    for ax, (name, (edges, grid)) in zip(axes, chosen.items(), strict=True):
        top = np.nanmax(grid)
        for (low, high), column in zip(pairwise(edges), grid, strict=True):
            for k, value in enumerate(column, start=1):
                if top > 0 and not np.isnan(value):
                    _tile(ax, low, k - 0.5, high - low, value / top, look[name].colour)
        _tiled(ax)
        ax.set_xlim(edges[0], edges[-1])
        ax.set_ylim(0.5, grid.shape[1] + 0.5)
        ax.xaxis.set_major_locator(plots.whole_ticks(5))
        ax.yaxis.set_major_locator(plots.whole_ticks(8))
        ax.set_title(f"{short(index.label(results, name), narrow)}: strongest = {top:.2f}", parse_math=False)
        ax.set_xlabel("optimizer step")
    plots.left_label(axes, "slot k")
    apart(figure)
    return figure


def _curves(results: Results, name: str, x: str, y: str) -> list[Curve]:
    found = [plots.curve(log, x, y) for log in logs(results, name)]
    return [curve for curve in found if curve is not None]


def _draw(ax: Axes, curves: Sequence[Curve], mean: Curve, style: Style, marks: bool = True) -> None:
    """Seeds faint, their smoothed mean solid."""
    for x, y in curves:
        few = max(1, len(x) // POINTS)
        ax.plot(x[::few], y[::few], color=style.colour, alpha=FAINT, linewidth=0.7)
    x, y = mean
    few = max(1, -(-len(x) // POINTS))
    at = np.unique(np.append(np.arange(0, len(x), few), max(len(x) - 1, 0))) if len(x) else np.arange(0)
    ax.plot(x[at], y[at], color=style.colour, linestyle=style.dash, linewidth=1.6)
    if marks:
        ax.plot(x[-1:], y[-1:], **style.mark(5))


def _tail(log: Log) -> list[dict[str, Any]]:
    """Records of the last tenth of the steps, at least one."""
    held = [row for row in log if row.get("credit")]
    steps = [real(row.get("step")) for row in held]
    last = max((s for s in steps if s is not None), default=None)
    if last is None:
        return held[-1:]
    return [row for row, s in zip(held, steps, strict=True) if s is not None and s >= 0.9 * last]


def _mean_credit(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """Mean over records slot by slot, of the numbers there are; a slot without any is None."""
    credits = [c for row in rows if isinstance(c := row.get("credit"), (list, tuple))]
    depth, means = max(map(len, credits), default=0), []
    for k in range(depth):
        values = [v for c in credits if k < len(c) and (v := real(c[k])) is not None]
        means.append(sum(values) / len(values) if values else None)
    return means if any(m is not None for m in means) else []


def _binned(found: Sequence[Log]) -> tuple[np.ndarray, np.ndarray] | None:
    """(edges of the bins in steps, credit [bins, slots]) over all seeds, NaN in an empty bin; None without any credit."""
    held = [(s, row) for log in found for row in log if row.get("credit") and (s := real(row.get("step"))) is not None]
    if not held or not _mean_credit([row for _, row in held]):
        return None
    last = max(s for s, _ in held)
    edges = np.linspace(0, max(last, 1), min(BINS, len({s for s, _ in held})) + 1)
    depth, grid = len(_mean_credit([row for _, row in held])), []
    for low, high in pairwise(edges):
        mean = _mean_credit([row for s, row in held if low < s <= high or (low == 0 and s <= 0)])
        grid.append([np.nan if v is None else v for v in [*mean, *[None] * depth][:depth]])
    return edges, np.array(grid)


def _tile(ax: Axes, x: float, y: float, width: float, strength: float, colour: str) -> None:
    """One tile of a map. A colour of the palette at some opacity, so that a dark screen needs no second picture."""
    shade = SHADE * min(max(strength, 0.0), 1.0)
    tile = Rectangle((x, y), width, 1, facecolor=colour, alpha=shade, linewidth=0, antialiased=False, clip_on=False)
    ax.add_patch(tile)


def _tiled(ax: Axes) -> None:
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _short_number(value: float) -> str:
    text = f"{value:.2f}".removeprefix("0") if abs(value) < 1 else f"{value:.2g}"
    return clean("0" if text == ".00" else text)
