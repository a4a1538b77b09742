"""The report of one evaluation or demo: its figures, its Markdown and its page."""

from __future__ import annotations

from functools import partial
from typing import Any

from markupsafe import Markup

from specauf.report import markdown, plots, tables
from specauf.report.templates import Pieces, environment, shared, source
from specauf.report.words import CAPTIONS, GLOSSARY, HOLLOW, LEGEND, PROSE, SELECTION, clean


def pieces(results: dict[str, Any]) -> Pieces:
    """Its figures by file name, and a function from their SVGs to the (Markdown, HTML)."""

    def texts(figures: dict[str, dict[str, str]]) -> tuple[str, str]:
        told = {name: caption for name, caption in _captions(results).items() if name in figures}
        return markdown.markdown(results, told), render(results, figures)

    return {name: partial(draw, results) for name, draw in plots.FIGURES.items()}, texts


def render(results: dict[str, Any], figures: dict[str, dict[str, str]]) -> str:
    """The page. `figures` maps a name of `plots.FIGURES` to its SVG texts `wide` and `narrow`."""
    captions = _captions(results)
    template = environment(captions).from_string(source("page.html.j2"))
    tasks = [
        {
            "label": tables.task_label(results, t),
            "note": tables.task_note(results, t),
            "rows": tables.task_rows(results, t),
        }
        for t in results["evaluation"]
    ]
    return template.render(
        shared(results),
        headline=tables.headline(results),
        summary=tables.summary_rows(results),
        findings=tables.comparison_sentences(results),
        tasks=[task for task in tasks if len(task["rows"][0]) > 2],  # more than the main table has
        methods=tables.method_rows(results),
        speedups=tables.speedup_rows(results),
        selection=tables.selection_rows(results),
        selection_note=SELECTION,
        live=[_sample(results, sample) for sample in results.get("live") or []],
        provenance=tables.provenance_rows(results),
        figures=figures,
        looks={tables.method_label(results, name): style for name, style in plots.styles(results).items()},
        captions=captions,
        compared=tables.compared(results),
        glossary=GLOSSARY,
        legend=LEGEND.removeprefix("Marked text"),
        prose=PROSE,
        css=Markup(plots.dark_rules()),
    )


def _captions(results: dict[str, Any]) -> dict[str, str]:
    """By figure; they explain no mark that the figure does not have."""
    # Prompt lookup's mark is hollow too, and none of these.
    variants = any("@" in name for name in plots.styles(results))
    return {**CAPTIONS, "tau": CAPTIONS["tau"] + (HOLLOW if variants else "")}


def _sample(results: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    name = [tables.task_label(results, sample.get("task") or ""), clean(sample.get("id") or "")]
    runs: list[tuple[str, bool]] = []
    for segment in sample.get("segments") or []:
        text, drafted = clean(segment["text"]), segment.get("kind") == "draft"
        if runs and runs[-1][1] == drafted:
            runs[-1] = (runs[-1][0] + text, drafted)
        else:
            runs.append((text, drafted))
    prompt = markdown.shorten(sample.get("prompt") or "")
    return {
        "name": " · ".join(filter(None, name)),
        "line": tables.live_line(sample),
        "prompt": prompt,
        "segments": runs,
    }
