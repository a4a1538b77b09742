"""The templates beside this file: where they are, their filters, and what every page shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from specauf.report import plots, tables
from specauf.report.words import clean

Pieces = tuple[dict[str, Callable[[bool], Figure | None]], Callable[[dict[str, dict[str, str]]], tuple[str, str]]]
"""Figures by file name, each a function of `narrow`; and what makes the (Markdown, HTML) of their SVGs, wide and narrow."""


def shared(results: dict[str, Any]) -> dict[str, Any]:
    """What the pages of a run and of a study both show, and how."""
    return {
        "title": clean(results["title"]),
        "meta": tables.meta(results),
        "ledger": tables.ledger_rows(results),
        "warnings": [clean(line) for line in (results.get("ledger") or {}).get("warnings") or []],
        "checks": tables.check_rows(results),
        "paper": plots.PAPER,
        "fonts": plots.FONTS,
    }


def environment(captions: Mapping[str, str]) -> Environment:
    """Jinja with the filters of the templates beside this file. `captions` name the figures for screen readers."""
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.filters |= {
        "interval": _interval,
        "svg": lambda svg, kind, name: _inline(svg, kind, captions[name]),
        "terms": _terms,
    }
    return found


def source(name: str) -> str:
    """The text of a template beside this file."""
    assert __package__
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _interval(cell: str) -> Markup:
    """`1.245 [1.198, 1.291]` with its interval small, on a line of its own."""
    value, bracket, interval = cell.partition(" [")
    return (
        Markup("{}<small>{}</small>").format(value, interval.rstrip("]").replace(", ", " – "))
        if bracket
        else escape(cell)
    )


def _terms(text: str) -> Markup:
    """`α_k` and its like with a real subscript. For this package's own texts only."""
    return Markup(re.sub(r"\b(\w)_(\([^)]*\)|\w+)", r"\1<sub>\2</sub>", str(escape(text))))


def _inline(svg: str, kind: str, label: str) -> Markup:
    """A figure's SVG as an element of the page: named for screen readers, limited in width, without its style rules."""
    body = re.sub(r"<style>.*?</style>", "", svg[svg.index(">") + 1 :], count=1, flags=re.S)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None  # matplotlib writes one
    limit = math.ceil(float(size[1]) * 4 / 3)  # points to CSS pixels
    head = '<svg class="{}" role="img" aria-label="{}" viewBox="{}" style="max-width: {}px">'
    return Markup(head).format(kind, label, size[0][9:-1], limit) + Markup(body)
