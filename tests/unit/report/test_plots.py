from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib
import pytest

from specauf.report import plots

Results = dict[str, Any]
EACH = pytest.mark.parametrize("name", list(plots.FIGURES))


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@EACH
def test_the_same_results_give_the_same_bytes(results: Results, name: str) -> None:
    draw = plots.FIGURES[name]
    first, second = draw(results, False), draw(results, False)
    assert first is not None and second is not None
    assert plots.to_svg(first, name) == plots.to_svg(second, name)
    if name == "tau":
        assert plots.to_png(first) == plots.to_png(second)


@EACH
def test_matplotlib_keeps_its_own_settings(results: Results, name: str) -> None:
    before = dict(matplotlib.rcParams)
    figure = plots.FIGURES[name](results, True)
    assert figure is not None
    plots.to_svg(figure, name)
    assert dict(matplotlib.rcParams) == before


@EACH
def test_a_figure_without_data_is_not_drawn(minimal: Results, name: str) -> None:
    if name != "tau":
        assert plots.FIGURES[name](minimal, False) is None
    minimal["evaluation"]["chat"]["methods"] = {}
    assert plots.FIGURES[name](minimal, False) is None


@EACH
def test_svg_keeps_text_as_text_and_can_be_read_in_the_dark(results: Results, name: str) -> None:
    figure = plots.FIGURES[name](results, False)
    assert figure is not None
    svg = plots.to_svg(figure, name)
    assert {"AUF", "Decay"} <= set(texts(svg))
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg.split("</style>", 1)[1]))
    assert colours <= set(plots.COLOURS), "a colour without a dark twin"
    assert "dc:date" not in svg and "Matplotlib" not in svg


@EACH
def test_a_smaller_svg_says_and_draws_the_same(results: Results, name: str) -> None:
    figure = plots.FIGURES[name](results, False)
    assert figure is not None
    figure.text(0.5, 0.5, "0.123456  and  two spaces")
    buffer = io.StringIO()
    with matplotlib.rc_context(plots.STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    large, small = buffer.getvalue(), plots.to_svg(figure, name)
    assert len(small) < 0.8 * len(large)
    assert texts(small) == texts(large) and "0.123456  and  two spaces" in texts(small)
    before, after = (re.findall(r'<path[^>]* d="([^"]*)"', svg) for svg in (large, small))
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert re.findall("[A-Za-z]", one) == re.findall("[A-Za-z]", other)
        numbers = [[float(n) for n in re.findall(r"-?[\d.]+", path)] for path in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.006)


def test_ids_of_two_figures_never_meet(results: Results) -> None:
    seen: list[str] = []
    for name in plots.FIGURES:
        figure = plots.FIGURES[name](results, False)
        assert figure is not None
        svg = plots.to_svg(figure, name)
        ids = set(re.findall(r'\sid="([^"]+)"', svg))
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= ids
        seen += ids
    assert len(seen) == len(set(seen))


def test_narrow_figures_fit_a_phone_and_stack_their_panels(results: Results) -> None:
    for name, draw in plots.FIGURES.items():
        wide, narrow = draw(results, False), draw(results, True)
        assert wide is not None and narrow is not None
        assert narrow.get_size_inches()[0] <= 3.6 < wide.get_size_inches()[0]
        assert len({ax.get_position().x0 for ax in narrow.axes}) == 1, name


def test_an_objective_keeps_its_colour_whatever_is_beside_it(results: Results) -> None:
    both, alone = plots.styles(results), plots.styles({**results, "methods": results["methods"][1:2], "training": {}})
    assert both["auf"] == alone["auf"] and both["auf"].colour == both["auf@decay-steps"].colour
    assert both["auf@decay-steps"].hollow and not both["auf"].hollow
    assert both["prompt-lookup"].dash == "--"
    assert len({both[n].colour for n in ("decay", "auf", "prompt-lookup")}) == 3


def test_thin_evidence_is_drawn_small(results: Results) -> None:
    figure = plots.alpha(results)
    assert figure is not None
    marks = {line.get_xdata()[0]: line for line in figure.axes[0].lines if line.get_marker() == "s"}
    assert marks[1].get_markersize() > marks[6].get_markersize() and marks[6].get_alpha() < 1 and 7 not in marks


def test_slots_and_steps_are_whole_even_where_there_is_one(minimal: Results) -> None:
    minimal["evaluation"]["chat"]["methods"]["auf"]["alpha"] = [0.25]  # blocks of two, or nothing accepted
    minimal["training"] = {"auf": [{"step": 1, "loss": 9.0}]}
    for draw in (plots.alpha, plots.training):
        figure = draw(minimal)
        assert figure is not None
        low, high = figure.axes[0].get_xlim()
        assert [t for t in figure.axes[0].get_xticks() if low <= t <= high] == [1]


def test_the_tau_axis_shows_one_token_a_round(results: Results) -> None:
    figure = plots.tau(results)
    assert figure is not None
    low, high = figure.axes[0].get_xlim()
    assert 1.0 in [pytest.approx(t) for t in figure.axes[0].get_xticks()] and low < 1 < high
    assert len([t for t in figure.axes[0].get_xticks() if low <= t <= high]) <= 7


def test_panels_without_data_are_left_out(results: Results) -> None:
    for log in results["training"].values():
        for record in log:
            record.update(common_accuracy=None, r_active=float("nan"))
    figure = plots.training(results)
    assert figure is not None and [ax.get_title(loc="left") for ax in figure.axes] == ["Loss", "Simulated τ"]
    assert plots.support(results) is None


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6])
def test_any_number_of_tasks_is_drawn(results: Results, count: int) -> None:
    facts = results["evaluation"]["humaneval"]
    results["evaluation"] = {f"t{i}": {**facts, "label": f"task {i}"} for i in range(count)}
    for draw in (plots.tau, plots.alpha):
        figure = draw(results)
        assert figure is not None and len([ax for ax in figure.axes if ax.get_visible()]) == count


@pytest.mark.parametrize("narrow", [False, True])
def test_a_legend_of_long_names_is_not_cut(results: Results, narrow: bool) -> None:
    for number, method in enumerate(results["methods"]):
        method["label"] = f"smollm2-135m-auf, lookup no. {number}"
    figure = plots.alpha(results, narrow)
    assert figure is not None
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


def test_hostile_labels_are_drawn_as_text(hostile: Results) -> None:
    for name, draw in plots.FIGURES.items():
        figure = draw(hostile, False)
        assert figure is not None
        svg = plots.to_svg(figure, name)
        found = texts(svg)  # well-formed, or this raises
        assert "<script" not in svg.lower() and any("<script>" in text or "$x^2$" in text for text in found)


def test_the_running_mean_is_exact_and_keeps_constants() -> None:
    values = plots.np.arange(100.0)
    assert plots.smooth(values)[50] == 50.0 and plots.smooth(values)[0] == 1.0
    assert (plots.smooth(plots.np.full(100, 3.0)) == 3.0).all()
