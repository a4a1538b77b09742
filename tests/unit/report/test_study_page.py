from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.browser import Outline, fetches, papers, widths
from tests.unit.report.conftest import HOSTILE, poison
from tests.unit.report.study_fixture import study

from specauf.report import page, plots, study_figures, study_markdown, study_page, study_tables
from specauf.strict import UserError

Results = dict[str, Any]
SHOWN = ("figure-3", "a-credit")
"""Figures that the pages of these tests have; test_study_figures.py draws the others."""


@pytest.fixture(scope="module", autouse=True)
def fewer_figures() -> Iterator[None]:
    """Drawing is most of what a page costs."""
    every = study_page.drawings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_page, "drawings", lambda results: [d for d in every(results) if d.name in SHOWN])
        yield


@pytest.fixture
def results() -> Results:
    return study(rows=12, parts=("a", "c"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a study's report, written once, by the way that every report is written."""
    return page.write(study(rows=12, parts=("a", "c")), tmp_path_factory.mktemp("study")).parent


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def bare(results: Results) -> str:
    """The page without figures."""
    return study_page.render(results, [], {})


def test_results_of_a_study_become_a_study_report(report: Path, text: str) -> None:
    names = {str(f.relative_to(report)) for f in report.rglob("*") if f.is_file()}
    assert names == {"index.html", "report.md", "results.json"} | {
        f"figures/{n}.{kind}" for n in SHOWN for kind in ("png", "svg")
    }
    assert "<h2>Findings</h2>" in text and "## Findings" in (report / "report.md").read_text(encoding="utf-8")
    assert page.read(report) == json.loads(json.dumps(study(rows=12, parts=("a", "c"))))


def test_the_page_fetches_and_runs_nothing(text: str) -> None:
    found = Outline(text)
    assert fetches(found) == [] and found.open == []
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in found.tags}
    styles = re.findall(r"<style>(.*?)</style>", text, flags=re.S)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_findings_come_first_then_what_is_missing_then_the_parts(text: str) -> None:
    titles = [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", text)]
    assert titles == ["Findings", "What is missing", "DFlash: decay, AUF, AUF + decay", "Head to head", "Budgets", "Methods",
                      "Benchmarks", "Data", "Checks", "Provenance", "Recipe", "Terms"]  # fmt: skip
    assert text.index('class="lede"') < text.index("<h2>Findings") < text.index("<table")


def test_a_negative_result_is_as_large_as_a_positive_one(text: str) -> None:
    items = re.findall(r'<li class="([\w-]+)"><b>(.*?)</b>', text)
    assert items == [("reproduced", "Reproduced here"), ("undecided", "Undecided"), ("not-reproduced", "Not reproduced here"),
                     ("not-run", "Not run")]  # fmt: skip
    style = text[text.index("<style>") : text.index("</style>")]
    rules = [r for r in re.findall(r"([^{}]*)\{([^{}]*)\}", style) if re.search("reproduced|undecided|not-run", r[0])]
    assert rules and not any("font-size" in body or "opacity" in body or "display" in body for _, body in rules)


def test_the_pages_grid_is_the_papers(text: str) -> None:
    head = text[text.index('class="scroll grid"') :]
    first = re.findall(r'colspan="(\d)">(.*?)</th>', head[: head.index("</tr>")])
    assert first == [("2", "MATH"), ("2", "CODE"), ("2", "CHAT"), ("1", "OVERALL")]
    assert head.count('scope="rowgroup"', 0, head.index("</table>")) == 2
    assert '<td class="best"><span>1.' in head and '<td class="drafter"><span>1.' in head
    assert re.search(r"<span>\d\.\d{3}</span><small>\d\.\d{3} – \d\.\d{3}</small></td>", head)
    assert '<td class="missing"><span>not run yet</span></td>' in text and "seed ± 0.031" in text


def test_the_page_has_what_the_tables_have(results: Results, text: str) -> None:
    words = " ".join(" ".join(Outline(text).words).split())
    for part in results["parts"]:
        for block in study_tables.emitted(results, part).blocks:
            for row in block.rows:
                assert row.label in words and all(cell.text in words for cell in row.cells)
    for row in study_tables.budget_rows(results)[1:]:
        assert all(cell in words for cell in row)
    for fact in ("0000000", "SmolLM2-135M-Instruct, Q4_1 dequantised", "000000000000", "222222222222", "one file ends early",
                 "specauf study recipes/study_synthetic.yaml", "24 of 24 rounds",
                 "as many minutes as a synthetic run takes"):  # fmt: skip
        assert fact in words, fact


def test_every_figure_is_in_the_page_for_both_widths_with_its_caption(text: str) -> None:
    for name in SHOWN:
        block = text[text.index(f'id="figure-{name}"') :]
        block = block[: block.index("</figure>")]
        assert block.count('<svg class="wide"') == block.count('<svg class="narrow"') == 1 and "<figcaption>" in block
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_same_results_make_the_same_files(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = study_page.drawings
    monkeypatch.setattr(study_page, "drawings", lambda results: [d for d in drawn(results) if d.name == "a-credit"])
    again = study(rows=12, parts=("a", "c"))
    out = page.write(again, tmp_path).parent
    for file in ("results.json", "figures/a-credit.svg", "figures/a-credit.png"):
        assert (out / file).read_bytes() == (report / file).read_bytes()
    assert bare(again) == bare(study(rows=12, parts=("a", "c")))
    assert study_markdown.markdown(again, []) == study_markdown.markdown(study(rows=12, parts=("a", "c")), [])


def test_markdown_has_every_section_and_as_many_cells_in_each_row(report: Path, results: Results) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert text.count("](figures/") == len(SHOWN) and "- **Not reproduced here:** The base branch" in text
    assert text.index("## Findings") < text.index("## What is missing") < text.index("| Temperature | Method |")
    runs: list[set[int]] = [set()]
    for line in text.splitlines():
        if line.startswith("|"):
            runs[-1].add(len(re.findall(r"(?<!\\)\|", line)))
        elif runs[-1]:
            runs.append(set())
    assert all(len(run) == 1 for run in runs if run) and sum(map(bool, runs)) >= 12


@pytest.mark.parametrize(
    "keys", [(), ("scores",), ("scores", "comparisons", "training", "claims", "tasks", "checks", "ledger")]
)
def test_a_study_with_less_makes_a_page_with_less(results: Results, keys: tuple[str, ...]) -> None:
    for key in keys:
        del results[key]
    found = Outline(bare(results))
    assert found.open == [] and "PARD-2" in " ".join(found.words)
    assert study_markdown.markdown(results, [])


def test_the_least_study_is_a_page(tmp_path: Path) -> None:
    least: Results = {"kind": "study", "title": "Nothing yet", "methods": [], "parts": []}
    text = page.write(least, tmp_path).read_text(encoding="utf-8")
    assert "Nothing has been run yet" in text and "No claim has been put to the test yet." in text


def test_numbers_that_are_none_or_not_finite_are_dashes(results: Results) -> None:
    turn = [None, math.nan, math.inf]
    records = results["scores"] + results["comparisons"] + [c for m in results["methods"] for c in m["cells"]]
    for i, record in enumerate(records):
        for key, value in record.items():
            if isinstance(value, float):
                record[key] = turn[i % 3]
            elif isinstance(value, list):
                record[key] = [turn[i % 3] if isinstance(v, float) else v for v in value]
    found = Outline(bare(results))
    words = " ".join(found.words)
    assert found.open == [] and "not run yet" in words and not re.search(r"\b(?:nan|inf|None)\b", words)
    assert not re.search(r"\b(?:nan|inf|None)\b", study_markdown.markdown(results, []))
    bars = next(d for d in study_figures.drawings(results) if d.name == "a-tau-t0")
    assert bars.draw(False) is None


def hostile() -> Results:
    """A study whose every free string means harm. Names that must agree are poisoned alike; kinds stay as they are."""
    results = study(rows=12, parts=("a", "c"))
    bad: Results = poison(results, [0])
    names = {m["name"]: f"{m['name']}{HOSTILE[i % len(HOSTILE)]}" for i, m in enumerate(results["methods"])}
    tasks = {t: f"{t}{HOSTILE[i % len(HOSTILE)]}" for i, t in enumerate(results["tasks"])} | {"macro": "macro"}
    bad["kind"] = "study"
    for new, old in zip(bad["methods"], results["methods"], strict=True):
        new.update(name=names[old["name"]], kind=old["kind"], objective=old["objective"])
    bad["tasks"] = {tasks[t]: facts for t, facts in bad["tasks"].items()}
    bad["training"] = {names[n]: seeds for n, seeds in results["training"].items()}
    for new, old in zip(bad["parts"], results["parts"], strict=True):
        new.update(
            key=HOSTILE[0] + old["key"],
            temperatures=[HOSTILE[3] + t for t in old["temperatures"]],
            methods=[names[n] for n in old["methods"]],
            baseline=names[old["baseline"]],
        )
    for new, old in zip(bad["scores"], results["scores"], strict=True):
        new.update(
            temperature=HOSTILE[3] + old["temperature"],
            part=HOSTILE[0] + old["part"],
            method=names[old["method"]],
            task=tasks[old["task"]],
        )
    for new, old in zip(bad["comparisons"], results["comparisons"], strict=True):
        new.update(
            temperature=HOSTILE[3] + old["temperature"],
            part=HOSTILE[0] + old["part"],
            a=names[old["a"]],
            b=names[old["b"]],
            task=tasks[old["task"]],
        )
    return bad


def test_hostile_strings_stay_text() -> None:
    bad = hostile()
    found = Outline(bare(bad))
    assert fetches(found) == [] and found.open == []
    assert not {"script", "img", "a"} & {tag for tag, _ in found.tags}
    words = "".join(found.words)
    assert "<script>alert(1)</script>" in words and "{{ 7 * 7 }}" in words
    text = study_markdown.markdown(bad, [])
    assert not re.search(r"<(?!/?(?:sub|br)>)", text) and "https://" not in text
    assert "\x00" not in text and text.encode("utf-8")


def test_hostile_strings_in_figures_and_their_file_names_are_harmless() -> None:
    drawn = study_figures.drawings(hostile())
    assert all(re.fullmatch(r"[a-z0-9-]+", d.name) for d in drawn) and len({d.name for d in drawn}) == len(drawn)
    for found in [d for d in drawn if d.name == "figure-5"]:
        figure = found.draw(False)
        assert figure is not None and "<script" not in plots.to_svg(figure, found.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {}}, "'parts' must be a list"),
        ({"parts": [{"key": "a"}, {"key": "a"}]}, "'parts' must be a list of different keys"),
        ({"parts": [{"title": "x"}]}, r"parts\[0\]\.key must be a string"),
        ({"parts": [{"key": "a", "methods": "auf"}]}, r"parts\[0\]\.methods must be a list of strings"),
        ({"methods": [{"label": "x"}]}, r"methods\[0\]\.name must be a string"),
        ({"methods": [{"name": "x", "cells": [3]}]}, r"methods\[0\]\.cells must be a list of objects"),
        ({"scores": [{"part": "a"}]}, r"scores\[0\]\.temperature must be a string"),
        ({"comparisons": [{"part": "a", "temperature": "0", "task": "macro", "a": "auf"}]}, r"comparisons\[0\]\.b must be"),
        ({"claims": [{"claim": "x", "evidence": ["0"]}]}, r"claims\[0\]\.evidence must be a list of whole numbers"),
        ({"training": {"auf": {"0": [3]}}}, r"training\.auf\.0 must be a list of objects"),
        ({"title": None}, "'title' must be a str"),
        ({"ledger": {"dropped": [1]}}, "ledger.dropped must be an object"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_named_by_file_and_key(tmp_path: Path, change: Results, message: str) -> None:
    least: Results = {"kind": "study", "title": "x", "methods": [], "parts": []}
    (tmp_path / "results.json").write_text(json.dumps(least | change))
    with pytest.raises(UserError, match=rf"results\.json: {message}.* `specauf study`"):
        page.read(tmp_path)


@pytest.mark.parametrize("width", [390, 1200])
def test_no_screen_has_to_scroll_sideways(text: str, tmp_path: Path, width: int) -> None:
    text = text.replace("Head to head", "unbroken" * 40).replace("AUF-only is better", "unbroken" * 40)
    assert widths(text, width, tmp_path) == f"{width}/{width}"


def test_the_page_can_be_drawn_in_light_and_dark(report: Path, tmp_path: Path) -> None:
    light, dark = papers(report / "index.html", tmp_path)
    assert light > 0.9 and dark < 0.2
