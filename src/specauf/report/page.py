"""Read a results file and write its report: index.html (one file, no scripts), report.md, results.json, figures/."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from specauf.files import atomic_file, atomic_write_text, json_text
from specauf.report import plots, run_page, study_index, study_page
from specauf.report.shapes import check_run, demander
from specauf.strict import UserError


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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is no JSONDecodeError
        raise UserError(f"{file} is not JSON ({error}). Write it again with `specauf eval`") from None
    check(results, str(file))
    return results


def is_study(results: dict[str, Any]) -> bool:
    return results.get("kind") == "study"


def check(results: Any, where: str = "results") -> None:
    """Raise `UserError` naming `where` and the key unless `results` has the shape that the report reads."""
    demander(where, "specauf eval")(isinstance(results, dict), "the whole", "an object")
    (study_index.check if is_study(results) else check_run)(results, where)


def write(results: dict[str, Any], out: Path) -> Path:
    """Write the whole report into the directory `out`, made if need be; index.html comes last. Returns its path.

    Every figure is drawn wide and narrow; one that draws nothing has no file. Other files in `out` stay. Every file is
    replaced whole. Raises `UserError` when `results` cannot be reported, or `out` cannot be written.
    """
    check(results)
    out = Path(out)
    drawings, texts = (study_page if is_study(results) else run_page).pieces(results)
    try:
        inline: dict[str, dict[str, str]] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ ")  # the page has the reader's fonts; a PNG shows a box
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
