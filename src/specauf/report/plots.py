"""The report's figures: results dict -> matplotlib `Figure` (no pyplot, no global state), then SVG or PNG.

- A method has one colour and one mark everywhere, chosen by the objective in its name. In `objective@variant`, the same
  objective at another number of steps, the variant makes the mark hollow and the line dotted.
- SVG keeps its text as text, has a transparent background, and carries rules that swap each colour of `COLOURS` for its
  dark twin where the reader prefers a dark screen. PNG is for places that cannot show SVG, and has a light background.
- Every figure comes wide (7.4 inches, a page's column) and narrow (3.6 inches, a phone's), with the same text size.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator

from specauf.report.tables import Results, method_label, task_label, thin_slots
from specauf.report.words import fixed, legend_columns, real, short, span

INK, SOFT, RULE, PAPER = "#3b3a37", "#77746e", "#e2dfd8", "#fffefb"
LOOKUP = "#7c7a75"
COLOURS = {
    INK: "#d6d3cc", SOFT: "#9a968e", RULE: "#34332f", PAPER: "#171715", LOOKUP: "#a5a29b",
    "#4a7299": "#86b0d9", "#d1570b": "#f58f4f", "#a04a85": "#dc92c3", "#1d8265": "#58c3a0",
    "#9c7a00": "#d9b83f", "#2a93b8": "#63c6e8", "#5b4ba8": "#a99cf0",
}  # fmt: skip
"""Light colour -> the same on a dark screen. After the greys: slate, orange, mauve, green, ochre, cyan, indigo, which
stay apart under the common colour-blindnesses; marks differ as well, so colour is never the only cue."""

KNOWN = {
    "decay": ("#4a7299", "s"),
    "auf": ("#d1570b", "o"),
    "auf-decay": ("#a04a85", "D"),
    "uniform": ("#1d8265", "^"),
}
SPARE = (("#9c7a00", "v"), ("#2a93b8", "P"), ("#5b4ba8", "X"))
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlepad": 8,
    "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7, "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "xtick.major.size": 3, "ytick.major.size": 0,
    "lines.solid_capstyle": "round", "svg.fonttype": "none", "svg.hashsalt": "specauf", "path.simplify": True,
    "axes.unicode_minus": True, "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 6),
}  # fmt: skip
FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
GAPS: dict[str, Any] = {"w_pad": 0.06, "h_pad": 0.06, "wspace": 0.03, "hspace": 0.04}
PANELS = (
    ("loss", "Loss"),
    ("simulated_tau", "Simulated τ"),
    ("r_active", "Share of slots with loss, r_active"),
    ("common_accuracy", "Common-token accuracy"),
)


whole_ticks = functools.partial(MaxNLocator, integer=True, min_n_ticks=1)  # one of one: two would need fractions


@dataclass(frozen=True)
class Style:
    """How one method is drawn."""

    colour: str
    marker: str
    dash: Literal["-", "--", ":"]
    hollow: bool

    def mark(self, size: float = 5.5, pale: bool = False) -> dict[str, Any]:
        face = PAPER if self.hollow else self.colour
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": face,
            "markeredgecolor": self.colour,
            "markeredgewidth": 1.3,
            "alpha": 0.45 if pale else 1.0,
            "clip_on": False,
            "zorder": 3,
        }


def styles(results: Results) -> dict[str, Style]:
    """The style of every method that has a row or a training log."""
    lookups = {m["name"] for m in results["methods"] if m.get("kind") == "lookup"}
    names = list(dict.fromkeys([*(m["name"] for m in results["methods"]), *(results.get("training") or {})]))
    known, turns, found = dict(KNOWN), dict[str, int](), {}
    for name in names:
        base, _, variant = name.partition("@")
        if name in lookups:
            found[name] = Style(LOOKUP, "d", "--", True)
            continue
        if base not in known:
            turns[base], place = divmod(len(known) - len(KNOWN), len(SPARE))
            known[base] = SPARE[place]
        turn = min(turns.get(base, 0), 2)  # times the spare colours ran out: hollow, dashed, dotted
        found[name] = Style(*known[base], ":" if variant else ("-", "--", ":")[turn], bool(variant or turn))
    return found


P = ParamSpec("P")


def styled(draw: Callable[P, Figure | None]) -> Callable[P, Figure | None]:
    """`draw` under `STYLE`: matplotlib reads its parameters when an artist is made, and again when it is saved."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


@styled
def tau(results: Results, narrow: bool = False) -> Figure | None:
    """tau with its interval: a panel per task, a line per method; None when nothing was measured."""
    look, tasks = styles(results), results["evaluation"]
    rows = [m["name"] for m in results["methods"] if any(m["name"] in t["methods"] for t in tasks.values())]
    points = [real(t["methods"].get(n, {}).get("tau")) for t in tasks.values() for n in rows]
    if not any(p is not None for p in points):
        return None
    figure, axes = panels(len(tasks), narrow, 0.62 + 0.29 * len(rows), sharex=True, sharey=True)
    for ax, (task, facts) in zip(axes, tasks.items(), strict=False):
        for y, name in enumerate(rows):
            scores, style = facts["methods"].get(name, {}), look[name]
            value, interval = real(scores.get("tau")), span(scores.get("interval"))
            if value is None:
                continue
            if interval:
                ax.plot(interval, (y, y), color=style.colour, alpha=0.32, linewidth=6, solid_capstyle="butt")
            ax.plot([value], [y], **style.mark(5))
            end = max(value, interval[1] if interval else value)
            ax.annotate(fixed(value, 2), (end, y), (7, 0), textcoords="offset points", va="center", color=style.colour)
        ax.set_title(short(task_label(results, task), narrow), parse_math=False)
        tau_rows(ax, _labels(results, rows), look, narrow)
    axes[0].set_ylim(len(rows) - 0.45, -0.55)
    reach = axes[0].get_xlim()[1] - 1
    axes[0].set_xlim(min(axes[0].get_xlim()[0], 1 - 0.03 * reach), 1 + 1.2 * reach)  # room for the last number
    tau_ticks(axes[0], 1.2 * reach, 6)
    for ax in bottom(axes):
        ax.set_xlabel("tokens per verify round, τ")
    return figure


@styled
def alpha(results: Results, narrow: bool = False) -> Figure | None:
    """alpha_k over slots: a panel per task, a line per method."""
    look, tasks = styles(results), results["evaluation"]
    names = [m["name"] for m in results["methods"]]
    drawn = [n for n in names if any(t["methods"].get(n, {}).get("alpha") for t in tasks.values())]
    if not drawn:
        return None
    figure, axes = panels(len(tasks), narrow, 2.35, sharex=True, sharey=True)
    for ax, (task, facts) in zip(axes, tasks.items(), strict=False):
        for name in (n for n in drawn if n in facts["methods"]):
            alpha_line(ax, facts["methods"][name], look[name])
        ax.set_title(short(task_label(results, task), narrow), parse_math=False)
        ax.grid(axis="x", visible=False)
    axes[0].set_ylim(0, min(1.04, 1.12 * axes[0].get_ylim()[1]))
    axes[0].xaxis.set_major_locator(whole_ticks(8))
    for ax in bottom(axes):
        ax.set_xlabel("slot k")
    left_label(axes, "acceptance α at slot k")
    above(figure, _labels(results, drawn), look, narrow)
    return figure


@styled
def training(results: Results, narrow: bool = False) -> Figure | None:
    """Loss, simulated tau, r_active and common-token accuracy over steps; panels without data are left out."""
    look, logs = styles(results), results.get("training") or {}
    shown = [(key, title) for key, title in PANELS if any(curve(log, "step", key) is not None for log in logs.values())]
    if not shown:
        return None
    figure, axes = panels(len(shown), narrow, 1.95, columns=2, sharex=True)
    for ax, (key, title) in zip(axes, shown, strict=False):
        for name, log in logs.items():
            found = curve(log, "step", key)
            if found is None:
                continue
            steps, values = found
            few, style = max(1, len(steps) // 250), look[name]
            if len(steps) > 8:
                ax.plot(steps[::few], values[::few], color=style.colour, alpha=0.22, linewidth=0.7)
            line = smooth(values)[:: max(1, len(steps) // 160)]
            at = steps[:: max(1, len(steps) // 160)]
            ax.plot(at, line, color=style.colour, linestyle=style.dash, linewidth=1.6)
            ax.plot(at[-1:], line[-1:], **style.mark(5))
        ax.set_title(title, parse_math=False)
        ax.grid(axis="x", visible=False)
        if key in ("r_active", "common_accuracy"):
            ax.set_ylim(0, min(1.05, 1.1 * ax.get_ylim()[1]))
    axes[0].xaxis.set_major_locator(whole_ticks(5))
    for ax in bottom(axes):
        ax.set_xlabel("optimizer step")
    above(figure, _labels(results, list(logs)), look, narrow)
    return figure


@styled
def support(results: Results, narrow: bool = False) -> Figure | None:
    """The path of (r_active, a_support) through training, smoothed."""
    look, logs = styles(results), results.get("training") or {}
    paths = {name: path for name, log in logs.items() if (path := curve(log, "r_active", "a_support")) is not None}
    if not paths:
        return None
    figure, (ax,) = panels(1, narrow, 3.0)
    for name, (across, up) in paths.items():
        style, every = look[name], max(1, len(across) // 160)
        x, y = smooth(across)[::every], smooth(up)[::every]
        ax.plot(x, y, color=style.colour, linestyle=style.dash, linewidth=1.6)
        ax.plot(x[:1], y[:1], **{**style.mark(5), "markerfacecolor": PAPER})
        ax.plot(x[-1:], y[-1:], **{**style.mark(7), "markerfacecolor": style.colour})
    ax.set_xlim(0, 1.04)
    ax.set_ylim(0, min(1.04, 1.15 * ax.get_ylim()[1]))
    ax.set_xlabel("share of slots that carry loss, r_active")
    ax.set_ylabel("accuracy on them, a_support")
    above(figure, _labels(results, list(paths)), look, narrow)
    return figure


FIGURES: dict[str, Callable[[Results, bool], Figure | None]] = {
    "tau": tau,
    "alpha": alpha,
    "training": training,
    "support": support,
}


def to_png(figure: Figure) -> bytes:
    """200 dots per inch on a light background; the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=200, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, prefix: str) -> str:
    """A self-contained SVG with dark twins. Every id starts with `prefix`, so that several can live in one page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = _compact(text[text.index("<svg") :])
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    rules = f"svg text{{font-family:{FONTS}!important}}{dark_rules()}"
    return re.sub(r"<style type=\"text/css\">.*?</style>", f"<style>{rules}</style>", text, count=1, flags=re.S)


def _compact(svg: str) -> str:
    """The same picture in two thirds of the bytes, since one page has hundreds of pictures: coordinates to a hundredth of a
    point, without comments, indentation, rotations by zero, fonts that a rule replaces and ids that nothing refers to."""
    asked = set(re.findall(r"#([\w-]+)", svg))

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), match[0])
        text = re.sub(r'\sid="([^"]*)"', lambda name: name[0] if name[1] in asked else "", text)
        return re.sub(r" transform=\"rotate\(-?0 [^\"]*\"|font-family: [^;]*; |(?<= ) +", "", re.sub(r"\s", " ", text))

    svg = re.sub(r"<[^>]+>", tag, re.sub(r"<!--.*?-->", "", svg, flags=re.S))
    return re.sub(r">\s*\n\s*<", "><", svg)


def dark_rules() -> str:
    """CSS that swaps the colours of inline SVG styles on dark screens; elsewhere the light ones stay."""
    # No `svg` before the bracket: marks are drawn by `use`, in whose shadow tree an ancestor would not match.
    swaps = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in COLOURS.items()
        for kind in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme:dark){{{swaps}}}"


def panels(
    count: int, narrow: bool, height: float, columns: int = 3, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in reading order, each `height` inches high; narrow ones stand in one column."""
    across = 1 if narrow else min(count, columns if count != 4 else 2)
    down = -(-count // across)
    width = 3.6 if narrow else 7.4 if count > 1 else 5.2
    figure = Figure(figsize=(width, height * down + 0.5), layout=ConstrainedLayoutEngine(**GAPS))
    axes = figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=sharey)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    if sharex and count % across:  # the panel above an empty place is the last of its column
        for ax in axes.flat[count - across : down * across - across]:
            ax.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def _place(ax: Axes) -> SubplotSpec:
    place = ax.get_subplotspec()
    assert place is not None  # `panels` makes them in a grid
    return place


def bottom(axes: Sequence[Axes]) -> list[Axes]:
    """The last visible panel of each column."""
    last: dict[int, Axes] = {}
    for ax in axes:
        last[_place(ax).colspan.start] = ax
    return list(last.values())


def left_label(axes: Sequence[Axes], text: str) -> None:
    """Label the y axis of the first panel of each row."""
    for ax in axes:
        if _place(ax).is_first_col():
            ax.set_ylabel(text)


def alpha_line(ax: Axes, scores: dict[str, Any], style: Style) -> None:
    """alpha_k over slots; pale, with small marks, where it rests on few rounds."""
    points = [(k, a) for k, a in enumerate(map(real, scores.get("alpha") or []), start=1) if a is not None]
    thin = thin_slots(scores)
    solid = [p for p in points if p[0] not in thin]
    for some, strength in ((points, 0.35 if thin else 1.0), (solid, 1.0)):
        ax.plot([k for k, _ in some], [a for _, a in some], style.dash, color=style.colour, lw=1.5, alpha=strength)
    for k, a in points:
        ax.plot([k], [a], **style.mark(3.2 if k in thin else 5.5, pale=k in thin))


def _labels(results: Results, names: Sequence[str]) -> dict[str, str]:
    return {name: method_label(results, name) for name in names}


def label_rows(ax: Axes, labels: Mapping[str, str], look: Mapping[str, Style], narrow: bool) -> None:
    """A row per method, named on the left in its colour. `labels` are by method, in the order of the rows."""
    ax.set_yticks(range(len(labels)), [short(label, narrow) for label in labels.values()], parse_math=False)
    for tick, name in zip(ax.get_yticklabels(), labels, strict=False):  # of panels that share it, the first column's
        tick.set_color(look[name].colour)


def tau_rows(ax: Axes, labels: Mapping[str, str], look: Mapping[str, Style], narrow: bool) -> None:
    """Rows for marks of tau, from a line at 1."""
    label_rows(ax, labels, look, narrow)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.axvline(1.0, color=SOFT, linewidth=0.9)


def tau_ticks(ax: Axes, reach: float, most: int) -> None:
    """Fewer than `most` round steps from 1 to 1 + `reach`."""
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if reach / s < most or s == 10)
    ax.xaxis.set_major_locator(MultipleLocator(step, offset=1.0))


def above(figure: Figure, labels: Mapping[str, str], look: Mapping[str, Style], narrow: bool) -> None:
    """A legend of all panels, over them."""
    columns = legend_columns(labels.values(), narrow, 2 if narrow else 4, figure.get_figwidth() * 72 / 9)
    legend(figure, labels, look, narrow, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.6)


def legend(of: Figure | Axes, labels: Mapping[str, str], look: Mapping[str, Style], narrow: bool, **place: Any) -> None:
    """A legend of the methods that are keys of `labels`; `place` is matplotlib's."""
    handles = [Line2D([], [], linestyle=look[n].dash, linewidth=1.5, **look[n].mark(5)) for n in labels]
    made = of.legend(handles, ["x"] * len(labels), frameon=False, borderpad=0, **place)
    # Named afterwards: a legend would drop a label with a leading underscore, and read $ as mathematics.
    for text, label in zip(made.get_texts(), labels.values(), strict=True):
        text.set(text=short(label, narrow), parse_math=False, color=INK)


def curve(log: Sequence[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Two float arrays of equal length from the records that have both values, or None when none has."""
    pairs = [(real(record.get(x)), real(record.get(y))) for record in log]
    kept = [pair for pair in pairs if None not in pair]
    return None if not kept else tuple(np.array(kept, dtype=float).T)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the run, and five points of a short one; narrower at its ends."""
    half, index = max(len(values) // 40, min(2, len(values) // 10)), np.arange(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
