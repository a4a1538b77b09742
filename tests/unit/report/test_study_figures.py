from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib
import numpy as np
import pytest
from tests.unit.report.study_fixture import study

from specauf.report import plots, study_figures, study_plots, study_training
from specauf.report import study_index as index

Results = dict[str, Any]


@pytest.fixture
def results() -> Results:
    return study(rows=20)


def drawing(results: Results, name: str) -> study_figures.Drawing:
    return next(d for d in study_figures.drawings(results) if d.name == name)


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def part(results: Results, key: str) -> dict[str, Any]:
    return next(p for p in results["parts"] if p["key"] == key)


def test_every_part_has_its_figures_and_the_papers_have_their_numbers(results: Results) -> None:
    names = [d.name for d in study_figures.drawings(results)]
    assert names[:8] == ["a-tau-t0", "a-tau-t1", "figure-5", "figure-3", "figure-4", "a-credit", "a-reach", "b-tau-t0"]
    assert {"b-support", "b-training", "b-credit", "c-alpha", "c-training-1", "c-training-2", "d-alpha"} <= set(names)
    assert "b-alpha" not in names and len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["figure-5", "figure-3", "a-credit", "a-reach"])
def test_figures_are_the_same_bytes_again_and_can_be_read_in_the_dark(results: Results, name: str) -> None:
    before = dict(matplotlib.rcParams)
    draw = drawing(results, name).draw
    first, second = draw(False), draw(False)
    assert first is not None and second is not None
    svg = plots.to_svg(first, name)
    assert svg == plots.to_svg(second, name)
    assert any("AUF-only" in text for text in texts(svg))
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg.split("</style>", 1)[1]))
    assert colours <= set(plots.COLOURS), "a colour without a dark twin"
    assert "<image" not in svg and dict(matplotlib.rcParams) == before


def test_simulated_tau_of_other_labels_is_not_drawn_beside_the_datas(results: Results) -> None:
    for logs in results["training"].values():
        for row in [row for log in logs.values() for row in log]:
            row.pop("replay_tau", None)
    assert study_training.tau_key(results, ["decay", "auf"]) == "simulated_tau"
    index.method(results, "auf")["objective"]["labels"] = "target"
    assert study_training.tau_key(results, ["auf"]) == "simulated_tau"
    figure = drawing(results, "figure-4")
    assert "not drawn here" in figure.caption
    shown = figure.draw(False)
    assert shown is not None and [ax.get_title(loc="left") for ax in shown.axes if not ax.lines] == ["Simulated τ"]
    assert "labels differ" in texts(plots.to_svg(shown, "figure-4"))


def test_no_two_methods_of_one_kind_look_alike(results: Results) -> None:
    look = study_plots.looks(results)
    for kind in ("dflash", "domino"):
        names = [m["name"] for m in results["methods"] if m["kind"] == kind]
        assert len({(look[n].colour, look[n].marker, look[n].dash) for n in names}) == len(names)
    many = {"methods": [{"name": f"m{i}", "kind": "dflash"} for i in range(27)], "parts": []}
    assert len({(s.colour, s.marker, s.dash) for s in study_plots.looks(many).values()}) == 27
    assert look["decay"].colour == look["domino-decay"].colour and look["auf"] == look["b-auf"]
    assert look["auf"].colour == plots.KNOWN["auf"][0]
    part(results, "b")["methods"] = ["decay", "domino-decay", "b-auf"]  # now the kinds meet in one panel
    look = study_plots.looks(results)
    names = [m["name"] for m in results["methods"] if m["kind"] in ("dflash", "domino")]
    assert len({(look[n].colour, look[n].marker, look[n].dash) for n in names}) == len(names)
    assert look["auf"].colour == plots.KNOWN["auf"][0]


def test_bars_begin_at_one_token_and_missing_methods_say_so(results: Results) -> None:
    figure = drawing(results, "c-tau-t0").draw(False)
    assert figure is not None and len([ax for ax in figure.axes if ax.get_visible()]) == 7
    first = figure.axes[0]
    assert first.get_title(loc="left") == "Average" and all(bar.get_x() == 1 for bar in first.patches)
    widths = [bar.get_width() for bar in first.patches]
    scores = [
        index.score(results, part(results, "c"), "0", n, "macro") for n in index.rows(results, part(results, "c"))
    ]
    assert widths == pytest.approx([s["tau"] - 1 for s in scores if s])
    assert [t.get_text() for t in first.texts].count("not run yet") == 1


def test_figure_three_starts_at_the_first_record_and_ends_at_the_last(results: Results) -> None:
    for log in results["training"]["auf"].values():
        for i, row in enumerate(log):
            row.update(r_active=0.1 + 0.01 * i, a_support=0.2 + 0.01 * i)
    figure = drawing(results, "figure-3").draw(False)
    assert figure is not None
    colour = plots.KNOWN["auf"][0]
    ends = [
        line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_color() == colour
    ]
    assert ends[0] == pytest.approx([0.1, 0.2], abs=0.011) and ends[1] == pytest.approx([0.29, 0.39], abs=0.011)


def test_seeds_are_faint_and_their_mean_is_solid(results: Results) -> None:
    figure = drawing(results, "figure-4").draw(False)
    assert figure is not None
    orange = [
        line for line in figure.axes[0].lines if line.get_color() == plots.KNOWN["auf"][0] and line.get_marker() != "o"
    ]
    assert [line.get_alpha() for line in orange] == [study_training.FAINT] * 3 + [None]
    mean = np.mean([line.get_ydata() for line in orange[:3]], axis=0)
    assert orange[3].get_ydata() == pytest.approx(plots.smooth(mean))


def test_the_mean_goes_as_far_as_every_seed_has_come() -> None:
    long, short = np.arange(0.0, 10.0), np.arange(0.0, 5.0)
    x, y = study_training.mean_curve([(long, long), (short, 3 * short)])
    assert x.tolist() == [0, 1, 2, 3, 4] and y.tolist() == [0, 2, 4, 6, 8]


def test_figure_four_has_its_four_panels_and_says_which_tau(results: Results) -> None:
    found = drawing(results, "figure-4")
    figure = found.draw(False)
    assert figure is not None and "τ by replay" in found.caption
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "Support accuracy, a_support", "Common-token accuracy", "Active ratio, r_active", "τ by replay"]  # fmt: skip
    for row in results["training"]["auf"]["1"] + results["training"]["auf"]["0"] + results["training"]["auf"]["2"]:
        row.pop("replay_tau", None)
    found = drawing(results, "figure-4")
    figure = found.draw(False)
    assert (
        figure is not None and figure.axes[3].get_title(loc="left") == "Simulated τ" and "simulated τ" in found.caption
    )


def test_a_panel_that_nobody_logged_says_so(results: Results) -> None:
    for seeds in results["training"].values():
        for log in seeds.values():
            for row in log:
                row.update(common_accuracy=None, a_support=math.nan)
    figure = drawing(results, "figure-4").draw(False)
    assert figure is not None
    assert [[t.get_text() for t in ax.texts] for ax in figure.axes] == [["not recorded"], ["not recorded"], [], []]
    assert drawing(results, "figure-3").draw(False) is None


def test_figure_five_has_dflash_to_the_left_and_domino_to_the_right(results: Results) -> None:
    figure = drawing(results, "figure-5").draw(False)
    assert figure is not None and [ax.get_title(loc="left") for ax in figure.axes] == ["DFlash", "Domino"]
    solid = next(line for line in figure.axes[0].lines if line.get_color() == plots.KNOWN["auf"][0])
    assert solid.get_ydata() == pytest.approx(index.score(results, part(results, "a"), "0", "auf", "macro")["alpha"])
    results["parts"] = [p for p in results["parts"] if p["key"] != "b"]
    figure = drawing(results, "figure-5").draw(False)
    assert figure is not None and len(figure.axes) == 1


def test_credit_is_the_mean_of_the_last_tenth_over_seeds(results: Results) -> None:
    for seed, log in results["training"]["auf"].items():
        for row in log:
            row["credit"] = [1.0, (int(seed) + 1) * 0.1, None] if row["step"] >= 450 else [9.0, 9.0, 9.0]
    means = study_training.credit_rows(results, ["auf", "unlisted"])
    assert list(means) == ["auf"] and means["auf"][2] is None
    assert means["auf"][:2] == pytest.approx([1.0, 0.2])


def test_a_part_shows_its_own_seeds_only(results: Results) -> None:
    assert list(study_figures.within(results, part(results, "c"))["training"]["auf"]) == ["0"]
    assert len(results["training"]["auf"]) == 3


def test_many_methods_are_drawn_in_groups_that_share_the_baseline() -> None:
    names = [f"m{i}" for i in range(15)]
    groups = study_plots.together(names, "m0")
    assert all(g[0] == "m0" and len(g) <= study_plots.TOGETHER for g in groups)
    assert {n for g in groups for n in g} == set(names) and sum(len(g) - 1 for g in groups) == 14
    assert study_plots.together(names[:7], "m0") == [names[:7]]


@pytest.mark.parametrize("narrow", [False, True])
def test_without_data_nothing_is_drawn(results: Results, narrow: bool) -> None:
    results.update(scores=[], training={"auf": {"0": []}, "decay": {"0": [{"step": None}]}})
    assert [d.name for d in study_figures.drawings(results) if d.draw(narrow) is not None] == []


def test_narrow_figures_fit_a_phone(results: Results) -> None:
    for name in ("a-tau-t0", "figure-5", "d-credit"):
        figure = drawing(results, name).draw(True)
        assert figure is not None and figure.get_size_inches()[0] <= 3.6, name


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["figure-5", "c-alpha", "c-support", "d-alpha"])
def test_a_legend_of_long_names_stays_below_its_panel(results: Results, name: str, narrow: bool) -> None:
    for number, method in enumerate(results["methods"]):
        method["label"] = f"Cross entropy, then AUF {number}"
    figure = drawing(results, name).draw(narrow)
    assert figure is not None
    figure.draw_without_rendering()
    across = max(ax.get_subplotspec().get_gridspec().ncols for ax in figure.axes)
    for ax in figure.axes:
        legend = ax.get_legend()
        last = ax.get_subplotspec().colspan.start + 1 == across
        assert legend is None or legend.get_window_extent().x1 <= figure.bbox.x1 * (1 if last else 0.53)
