from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.browser import Outline, fetches, papers, widths

from specauf.report import page, tables
from specauf.strict import UserError

Results = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, everything: Results) -> Path:
    """The directory of the whole report, written once."""
    return page.write(everything, tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def outline(results: Results, out: Path) -> Outline:
    return Outline(page.write(results, out).read_text(encoding="utf-8"))


def test_write_makes_the_whole_report_and_no_other_file(report: Path) -> None:
    names = {str(f.relative_to(report)) for f in report.rglob("*") if f.is_file()}
    figures = {f"figures/{n}.{kind}" for n in ("tau", "alpha", "training", "support") for kind in ("png", "svg")}
    assert names == {"index.html", "report.md", "results.json"} | figures


def test_the_page_fetches_and_runs_nothing(text: str) -> None:
    found = Outline(text)
    assert fetches(found) == [] and found.open == []
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in found.tags}
    style = re.findall(r"<style>(.*?)</style>", text, flags=re.S)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]


def test_every_section_stands_in_its_order(text: str) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Emitted length", "Conditional acceptance", "What was compared", "Self-selection", "Training",
                      "Live decoding", "Data", "Checks", "Provenance", "Terms"]  # fmt: skip
    assert (
        text.index('class="lede"')
        < text.index("<table")
        < text.index('id="figure-tau"')
        < text.index('id="figure-alpha"')
    )


def test_the_page_says_what_the_markdown_says(results: Results, text: str) -> None:
    words = " ".join(" ".join(Outline(text).words).split())
    for row in tables.summary_rows(results)[1:]:
        assert row[0] in words
    for sentence in [*tables.headline(results), *tables.comparison_sentences(results)]:
        assert sentence in words
    assert "1,204 bytes were lost" in words and "31 of 32 prompts" in words and "τ 1.410 · 91 rounds" in words


def test_accepted_draft_tokens_are_marked_and_nothing_else(results: Results, text: str) -> None:
    answer = text[text.index('<pre class="answer">') : text.index("</pre>")]
    marked = "".join(html.unescape(m) for m in re.findall(r"<mark>(.*?)</mark>", answer, flags=re.S))
    segments = results["live"][0]["segments"]
    assert marked == "".join(s["text"] for s in segments if s["kind"] == "draft")
    plain = html.unescape(re.sub(r"<[^>]+>", "", answer)).removeprefix("\n")
    assert plain == "".join(s["text"] for s in segments)


def test_the_least_results_make_a_page_without_empty_sections(minimal: Results, tmp_path: Path) -> None:
    found = outline(minimal, tmp_path)
    assert found.open == [] and [t for t, _ in found.tags].count("h2") == 2
    assert "1.250" in " ".join(found.words)


def test_hostile_strings_stay_text(hostile: Results, tmp_path: Path) -> None:
    found = outline(hostile, tmp_path)
    assert fetches(found) == [] and found.open == []
    assert not {"script", "img", "a"} & {tag for tag, _ in found.tags}
    words = "".join(found.words)
    assert "<script>alert(1)</script>" in words and "{{ 7 * 7 }}" in words and "</svg></style></pre>" in words


def test_what_was_written_reads_back_the_same(results: Results, report: Path) -> None:
    assert page.read(report) == page.read(report / "results.json") == results


def test_numbers_that_json_lacks_become_null(minimal: Results, tmp_path: Path) -> None:
    minimal["evaluation"]["chat"]["methods"]["auf"]["tau"] = float("nan")
    page.write(minimal, tmp_path)
    assert page.read(tmp_path)["evaluation"]["chat"]["methods"]["auf"]["tau"] is None


def test_writing_again_gives_the_same_files_and_leaves_strangers_alone(minimal: Results, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("mine")
    page.write(minimal, tmp_path)
    first = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    page.write(minimal, tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == first
    assert (tmp_path / "run.json").read_text() == "mine"


def test_missing_and_broken_files_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results at .*nowhere"):
        page.read(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text('{"title": ')
    with pytest.raises(UserError, match=r"results\.json is not JSON"):
        page.read(tmp_path)
    (tmp_path / "results.json").write_text('{"title": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match=r"results\.json is not JSON"):
        page.read(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        page.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": None}, "'title' must be a str"),
        ({"methods": {}}, "'methods' must be a list"),
        ({"methods": [{"label": "x"}]}, r"methods\[0\]\.name must be a string"),
        ({"methods": [{"name": "a"}, {"name": "a"}]}, "'methods' must be a list of different names"),
        ({"evaluation": {"chat": {}}}, "evaluation.chat.methods must be an object"),
        ({"evaluation": {"chat": {"methods": {"afu": {}}}}}, "evaluation.chat.methods.afu must be listed .*did you mean 'auf'"),
        ({"comparisons": [{"a": "auf", "b": "auf"}]}, r"comparisons\[0\]\.task must be a string"),
        ({"training": {"auf": [3]}}, "training.auf must be a list of objects"),
        ({"live": [{"segments": [{"kind": "draft"}]}]}, r"live\[0\]\.segments must be a list"),
        ({"ledger": {"dropped": [1]}}, "ledger.dropped must be an object"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_named_by_file_and_key(
    minimal: Results, tmp_path: Path, change: Results, message: str
) -> None:
    (tmp_path / "results.json").write_text(json.dumps({**minimal, **change}))
    with pytest.raises(UserError, match=rf"results\.json: {message}"):
        page.read(tmp_path)


def test_a_results_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="must be an object"):
        page.read(tmp_path)


def test_a_place_that_cannot_be_written_is_the_users_to_mend(minimal: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        page.write(minimal, tmp_path / "file")


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_no_screen_has_to_scroll_sideways(text: str, tmp_path: Path, width: int) -> None:
    assert widths(text.replace("def has_close_elements", "unbroken" * 40), width, tmp_path) == f"{width}/{width}"


def test_the_page_can_be_drawn_in_light_and_dark(report: Path, tmp_path: Path) -> None:
    light, dark = papers(report / "index.html", tmp_path)
    assert light > 0.9 and dark < 0.2


def test_a_caption_explains_no_mark_that_is_not_there(results: Results, minimal: Results, tmp_path: Path) -> None:
    minimal["methods"].append(
        {"name": "prompt-lookup", "kind": "lookup"}
    )  # in every table, with a hollow mark of its own
    for number, (found, hollow) in enumerate(((results, True), (minimal, False))):
        out = page.write(found, tmp_path / str(number)).parent
        for name in ("report.md", "index.html"):
            assert ("hollow mark" in (out / name).read_text(encoding="utf-8")) == hollow


@pytest.mark.filterwarnings("error")
def test_letters_that_matplotlib_does_not_have_are_no_warning(minimal: Results, tmp_path: Path) -> None:
    minimal["evaluation"]["chat"]["label"] = "数学"
    assert "数学" in page.write(minimal, tmp_path).read_text(encoding="utf-8")
