"""A study's report as Markdown: the same findings, tables and figures as the page, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from specauf.report import study_findings, study_tables, tables
from specauf.report import study_index as index
from specauf.report.markdown import bullets, section, table, table_line
from specauf.report.study_figures import Drawing
from specauf.report.study_tables import BEST, BEST_DRAFTER, Cell, Grid
from specauf.report.study_words import BUDGETS, MEASURED, PROSE, TERMS
from specauf.report.tables import Results
from specauf.report.words import clean, escape

ITALIC = "in italics"
rows = partial(table, prose=PROSE)


def markdown(results: Results, shown: Sequence[Drawing]) -> str:
    """The whole report. `shown` are the drawings that have files in figures/."""
    ledger = results.get("ledger") or {}
    blocks = [
        f"# {escape(results['title'])}",
        escape(" · ".join(tables.meta(results))),
        "\n\n".join(f"**{escape(line)}**" for line in study_findings.headline(results)),
        section("Findings", findings(results)),
        section("What is missing", bullets(study_findings.missing(results))),
    ]
    for part in results["parts"]:
        own = [drawing for drawing in shown if drawing.part == part["key"]]
        grids = []
        for made in study_tables.grids(results, part):
            grids += [f"**{escape(made.caption)}**", grid(made), notes(made)]
        compared = rows(study_tables.comparison_rows(results, part))
        details = rows(study_tables.detail_rows(results, part))
        blocks.append(
            section(
                index.part_label(part),
                escape(study_findings.part_facts(results, part)),
                *grids,
                "\n\n".join(["**Comparisons**", escape(study_findings.rule(results)), compared]) if compared else "",
                "\n\n".join(["**Over all benchmarks**", escape(MEASURED), details]) if details else "",
                *(f"![{escape(d.caption)}](figures/{d.name}.png)\n\n*{escape(d.caption)}*" for d in own),
            )
        )
    blocks += [
        section("Budgets", escape(BUDGETS), rows(study_tables.budget_rows(results))),
        section("Methods", rows(study_tables.method_rows(results))),
        section("Benchmarks", rows(study_tables.task_rows(results))),
        section("Data", rows(tables.ledger_rows(results)), bullets(map(clean, ledger.get("warnings") or []))),
        section("Checks", rows(tables.check_rows(results))),
        section("Provenance", rows(study_tables.provenance_rows(results))),
        section("Recipe", rows(study_tables.recipe_rows(results))),
        section("Terms", bullets(f"{term}: {text}" for term, text in TERMS)),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def findings(results: Results) -> str:
    """A bullet per claim: the verdict first, then the claim, its reason and what it rests on."""
    lines = []
    for finding in study_findings.findings(results):
        source = f" ({finding.source})" if finding.source else ""
        told = " ".join(filter(None, [finding.because, f"[{finding.evidence}.]" if finding.evidence else ""]))
        lines.append(f"- **{escape(finding.verdict)}:** {escape(finding.claim + source)}. {escape(told)}".rstrip())
    return "\n".join(lines)


def grid(found: Grid) -> str:
    """A pipe table with the families in its head and the benchmarks in its first row, as the paper's tables read."""
    families = ["Temperature", "Method"]
    for title, width in found.groups:
        families += [title, *[""] * (width - 1)]
    lines = [table_line(map(escape, families)), "|---|---|" + "--:|" * len(found.heads)]
    lines.append(table_line(["", "", *(f"**{escape(head)}**" for head in found.heads)]))
    for block in found.blocks:
        for i, row in enumerate(block.rows):
            name = escape(row.label) + (f" <sub>{escape(row.small)}</sub>" if row.small else "")
            lines.append(table_line([escape(block.label) if i == 0 else "", name, *map(_cell, row.cells)]))
    return "\n".join(lines)


def notes(found: Grid) -> str:
    return "\n\n".join(escape(note.replace("{mark}", ITALIC)) for note in found.notes)


def _cell(cell: Cell) -> str:
    mark = {BEST: "**", BEST_DRAFTER: "*"}.get(cell.mark, "")
    small = "".join(f"<br><sub>{escape(line)}</sub>" for line in cell.small)
    return f"{mark}{escape(cell.text)}{mark}{small}"
