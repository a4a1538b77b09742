"""The report of a study: its figures, its Markdown and its page. Findings stand first.

The page looks like a run's report: it takes macros, head and style sheet from that template, up to where the body begins.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from markupsafe import Markup

from specauf.report import plots, study_findings, study_markdown, study_tables
from specauf.report import study_index as index
from specauf.report.study_figures import Drawing, drawings
from specauf.report.study_plots import looks
from specauf.report.study_tables import Grid
from specauf.report.study_words import BUDGETS, MEASURED, PROSE, TERMS
from specauf.report.tables import Results
from specauf.report.templates import Pieces, environment, shared, source
from specauf.report.words import clean

BODY = "<main>"
"""The part that the run's template and the study's have in common ends before this."""
UNDERLINED = "underlined"


def pieces(results: Results) -> Pieces:
    """Its figures by file name, and a function from their SVGs to the (Markdown, HTML)."""
    drawn = drawings(results)

    def texts(figures: dict[str, dict[str, str]]) -> tuple[str, str]:
        shown = [drawing for drawing in drawn if drawing.name in figures]
        return study_markdown.markdown(results, shown), render(results, shown, figures)

    return {d.name: d.draw for d in drawn}, texts


def render(results: Results, shown: list[Drawing], figures: dict[str, dict[str, str]]) -> str:
    """The page. `figures` maps the name of every drawing in `shown` to its SVG texts `wide` and `narrow`."""
    captions = {drawing.name: drawing.caption for drawing in shown}
    look, _, rest = source("page.html.j2").partition(BODY)
    assert rest  # the run's template has such a line
    template = environment(captions).from_string(f"{look}{BODY}\n{source('study_page.html.j2')}")
    style = looks(results)
    return template.render(
        shared(results),
        headline=study_findings.headline(results),
        findings=study_findings.findings(results),
        missing=study_findings.missing(results),
        primary=clean(results.get("primary") or ""),
        parts=[_part(results, part, shown) for part in results["parts"]],
        methods=study_tables.method_rows(results),
        budgets=study_tables.budget_rows(results),
        budgets_note=BUDGETS,
        benchmarks=study_tables.task_rows(results),
        provenance=study_tables.provenance_rows(results),
        recipe=study_tables.recipe_rows(results),
        figures=figures,
        captions=captions,
        looks={index.label(results, name): style[name] for name in style},
        styles=style,
        glossary=TERMS,
        prose=PROSE,
        css=Markup(plots.dark_rules() + source("study_page.css")),
    )


def _part(results: Results, part: dict[str, Any], shown: list[Drawing]) -> dict[str, Any]:
    """What the template needs of one part."""
    return {
        "id": f"part-{index.slugs(results)[part['key']]}",
        "title": index.part_label(part),
        "facts": study_findings.part_facts(results, part),
        "grids": [_noted(grid) for grid in study_tables.grids(results, part)],
        "details": study_tables.detail_rows(results, part),
        "measured": MEASURED,
        "comparisons": study_tables.comparison_rows(results, part),
        "compared": study_findings.rule(results),
        "figures": [drawing.name for drawing in shown if drawing.part == part["key"]],
    }


def _noted(grid: Grid) -> Grid:
    return replace(grid, notes=tuple(note.replace("{mark}", UNDERLINED) for note in grid.notes))
