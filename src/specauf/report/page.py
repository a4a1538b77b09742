"""Read a results file and write its report: index.html (one file, no scripts), report.md, results.json, figures/."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from specauf.files import atomic_file, atomic_write_text, json_text
from specauf.report import markdown, plots, tables
from specauf.report.words import CAPTIONS, GLOSSARY, LEGEND, PROSE, SELECTION, clean
from specauf.strict import UserError, nearest

SHAPES: dict[str, type] = {
    "title": str, "created": str, "command": str, "provenance": dict, "settings": dict, "ledger": dict, "methods": list,
    "evaluation": dict, "comparisons": list, "training": dict, "checks": list, "speedups": list, "live": list,
    "selection": list,
}  # fmt: skip
NEEDED = ("title", "methods", "evaluation")
RECORDS = {  # what every record of a list must have
    "methods": ("name",), "comparisons": ("task", "a", "b"), "checks": ("name",), "speedups": ("name",), "live": (),
    "selection": ("name", "task", "how"),
}  # fmt: skip


def read(path: str | Path) -> dict[str, Any]:
    """The results in `path`, a results.json or a directory with one. Raises `UserError` when it has none."""
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no results at {file}. Run `specauf eval` or `specauf demo` first, or name a results.json"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}). Write it again with `specauf eval`") from None
    check(results, str(file))
    return results


def is_study(results: dict[str, Any]) -> bool:
    return results.get("kind") == "study"


def demander(where: str, command: str) -> Callable[[bool, str, str], None]:
    """A function (holds, key, expected) that raises `UserError` when `holds` is false, naming `command` as the remedy."""

    def demand(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise UserError(f"{where}: {key} must be {expected}. Write the file again with `{command}`")

    return demand


def check(results: Any, where: str = "results", command: str = "specauf eval") -> None:
    """Raise `UserError` naming `where` and the key unless `results` has the shape that the report reads."""
    demand = demander(where, command)
    demand(isinstance(results, dict), "the whole", "an object")
    if is_study(results):
        from specauf.report import study_index  # here, since it imports this module

        study_index.check(results, where)
        return
    for key in NEEDED:
        demand(key in results, repr(key), f"there (the least is {', '.join(NEEDED)})")
    for key, kind in SHAPES.items():
        value = results.get(key)
        demand(isinstance(value, kind) or (value is None and key not in NEEDED), repr(key), f"a {kind.__name__}")
    for key, fields in RECORDS.items():
        for i, record in enumerate(results.get(key) or []):
            demand(isinstance(record, dict), f"{key}[{i}]", "an object")
            for field in fields:
                demand(isinstance(record.get(field), str), f"{key}[{i}].{field}", "a string")
    names = [method["name"] for method in results["methods"]]
    demand(len(set(names)) == len(names), "'methods'", "a list of different names")
    for task, facts in results["evaluation"].items():
        demand(
            isinstance(facts, dict) and isinstance(facts.get("methods"), dict),
            f"evaluation.{task}.methods",
            "an object",
        )
        for name, scores in facts["methods"].items():
            demand(name in names, f"evaluation.{task}.methods.{name}", f"listed in methods{nearest(name, names)}")
            demand(isinstance(scores, dict), f"evaluation.{task}.methods.{name}", "an object")
            for key in ("alpha", "survival"):
                demand(isinstance(scores.get(key) or [], list), f"evaluation.{task}.methods.{name}.{key}", "a list")
    for name, log in (results.get("training") or {}).items():
        demand(isinstance(log, list) and all(isinstance(r, dict) for r in log), f"training.{name}", "a list of objects")
    for key in ("dropped", "changed"):
        demand(isinstance((results.get("ledger") or {}).get(key) or {}, dict), f"ledger.{key}", "an object")
    demand(isinstance((results.get("ledger") or {}).get("warnings") or [], list), "ledger.warnings", "a list")
    for key in ("target", "data", "machine"):
        demand(isinstance((results.get("provenance") or {}).get(key) or {}, dict), f"provenance.{key}", "an object")
    for i, sample in enumerate(results.get("live") or []):
        pieces = sample.get("segments") or []
        whole = isinstance(pieces, list) and all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in pieces)
        demand(whole, f"live[{i}].segments", 'a list of {"text", "kind"}')


def write(results: dict[str, Any], out: Path) -> Path:
    """Write the whole report into the directory `out`, made if need be; index.html comes last. Returns its path.

    Other files in `out` stay. Every file is replaced whole. Raises `UserError` when `results` cannot be reported, or
    `out` cannot be written.
    """
    check(results)
    if is_study(results):
        from specauf.report import study_page  # here, since it imports this module

        return study_page.write(results, out)

    def page(figures: dict[str, dict[str, str]]) -> tuple[str, str]:
        return markdown.markdown(results, tuple(figures)), render(results, figures)

    drawings = {name: partial(draw, results) for name, draw in plots.FIGURES.items()}
    return write_files(results, Path(out), drawings, page)


def write_files(
    results: dict[str, Any],
    out: Path,
    drawings: Mapping[str, Callable[[bool], Figure | None]],
    texts: Callable[[dict[str, dict[str, str]]], tuple[str, str]],
) -> Path:
    """Draw every figure wide and narrow, then write the (Markdown, HTML) that `texts` makes of their SVGs.

    `drawings` maps a file name without suffix to a function of `narrow`; if that returns None, there is no file.
    """
    try:
        inline: dict[str, dict[str, str]] = {}
        for name, draw in drawings.items():
            wide, narrow = draw(False), draw(True)
            if wide is None or narrow is None:
                continue
            inline[name] = {"wide": plots.to_svg(wide, name), "narrow": plots.to_svg(narrow, f"{name}-narrow")}
            atomic_write_text(out / "figures" / f"{name}.svg", inline[name]["wide"])
            with atomic_file(out / "figures" / f"{name}.png") as temporary:
                temporary.write_bytes(plots.to_png(wide))
        markdown, html = texts(inline)
        atomic_write_text(out / "results.json", json_text(results))
        atomic_write_text(out / "report.md", markdown)
        atomic_write_text(out / "index.html", html)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}") from None
    return out / "index.html"


def render(results: dict[str, Any], figures: dict[str, dict[str, str]]) -> str:
    """The page. `figures` maps a name of `plots.FIGURES` to its SVG texts `wide` and `narrow`."""
    template = environment(CAPTIONS).from_string(source("page.html.j2"))
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
        captions=CAPTIONS,
        compared=tables.compared(results),
        glossary=GLOSSARY,
        legend=LEGEND.removeprefix("Marked text"),
        prose=PROSE,
        css=Markup(plots.dark_rules()),
    )


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
