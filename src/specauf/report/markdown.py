"""The report of a run or an evaluation as Markdown, from the rows and sentences of `tables`."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping

from specauf.report import tables
from specauf.report.tables import Results, Rows
from specauf.report.words import GLOSSARY, LEGEND, PROSE, SELECTION, clean, escape


def markdown(results: Results, captions: Mapping[str, str] | None = None) -> str:
    """The whole report as Markdown. `captions` are those of the files in figures/ to show, by name."""

    def figure(name: str) -> str:
        caption = escape((captions or {}).get(name, ""))
        return f"![{caption}](figures/{name}.png)\n\n*{caption}*" if caption else ""

    ledger = results.get("ledger") or {}
    per_task, live = list[str](), list[str]()
    for t in results["evaluation"]:
        per_task += [
            f"**{escape(tables.task_label(results, t))}**",
            escape(tables.task_note(results, t)),
            table(tables.task_rows(results, t)),
        ]
    for sample in results.get("live") or []:
        text = "".join(
            f"<b>{html.escape(clean(s['text']))}</b>" if s.get("kind") == "draft" else html.escape(clean(s["text"]))
            for s in sample.get("segments") or []
        )
        name = " · ".join(
            escape(v) for v in (tables.task_label(results, sample.get("task", "")), sample.get("id")) if v
        )
        live += [
            f"**{name}** {escape(tables.live_line(sample))}",
            bullets([shorten(sample.get("prompt", ""))]),
            f"<pre>{text}</pre>",
        ]
    legend, chosen = LEGEND.replace("Marked text", "Bold text") if live else "", table(tables.selection_rows(results))
    blocks = [
        f"# {escape(results['title'])}",
        escape(" · ".join(tables.meta(results))),
        "\n\n".join(f"**{escape(line)}**" for line in tables.headline(results)),
        table(tables.summary_rows(results)),
        bullets(tables.comparison_sentences(results)),
        section("Emitted length", figure("tau")),
        section("Conditional acceptance", figure("alpha"), *per_task),
        section(
            "What was compared",
            escape(tables.compared(results)),
            table(tables.method_rows(results)),
            table(tables.speedup_rows(results)),
        ),
        section("Self-selection", escape(SELECTION) if chosen else "", chosen),
        section("Training", figure("training"), figure("support")),
        section("Live decoding", legend, *live),
        section("Data", table(tables.ledger_rows(results)), bullets(ledger.get("warnings") or [])),
        section("Checks", table(tables.check_rows(results))),
        section("Provenance", table(tables.provenance_rows(results))),
        section("Terms", bullets(f"{term}: {text}" for term, text in GLOSSARY)),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def shorten(text: object, limit: int = 600) -> str:
    """The first `limit` characters, with a count of the rest."""
    whole = clean(text)
    return whole if len(whole) <= limit else f"{whole[:limit].rstrip()} … ({len(whole) - limit:,} more characters)"


def section(title: str, *blocks: str) -> str:
    return "\n\n".join([f"## {escape(title)}", *filter(None, blocks)]) if any(blocks) else ""


def table(rows: Rows, prose: Collection[str] = PROSE) -> str:
    """A pipe table, aligned right except for the first column and those in `prose`; empty when there is no row."""
    if len(rows) < 2:
        return ""
    lines = [table_line(map(escape, row)) for row in rows]
    lines.insert(1, "|" + "|".join("---" if not i or h in prose else "--:" for i, h in enumerate(rows[0])) + "|")
    return "\n".join(lines)


def table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)
