"""Which figures a study's report has: for every part its bars, curves and maps, with captions that say what is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from specauf.report import plots, study_plots, study_training
from specauf.report import study_index as index
from specauf.report.study_words import CAPTIONS, SEVERAL, SINGLE
from specauf.report.tables import Results
from specauf.report.words import clean


@dataclass(frozen=True)
class Drawing:
    """One figure. `name` is its file's and its id's; `part` the key of the part it belongs to; `draw` takes `narrow`."""

    name: str
    part: str
    caption: str
    draw: Callable[[bool], Figure | None]


def drawings(results: Results) -> list[Drawing]:
    """Every figure in reading order. One without data is listed too, and draws nothing.

    The parts that repeat the paper's tables have its Figures 3, 4 and 5; every other part has figures of the same kind.
    """
    found: list[Drawing] = []
    slugs, numbered = index.slugs(results), {p["key"]: number for number, p in index.paper_parts(results).items()}
    five = next(iter(numbered), None)
    for part in results["parts"]:
        slug, number = slugs[part["key"]], numbered.get(part["key"])
        add = partial(_drawing, part["key"])
        for place, temperature in _places(results, part):
            caption = CAPTIONS["bars"].format(temperature=clean(temperature))
            found.append(add(f"{slug}-tau-{place}", caption, partial(study_plots.bars, results, part, temperature)))
        if part["key"] == five:
            found.append(
                add("figure-5", _alpha_caption(results, part, "5"), partial(study_plots.alpha, results, _five(results)))
            )
        elif number is None:
            caption = _alpha_caption(results, part, "")
            found.append(add(f"{slug}-alpha", caption, partial(study_plots.alpha, results, _panels(results, part))))
        found += _of_training(results, part, slug, number)
    return found


def _of_training(results: Results, part: dict[str, Any], slug: str, number: int | None) -> list[Drawing]:
    own, names = within(results, part), index.drafters(results, part)
    groups = study_plots.together(names, part.get("baseline"))
    lines = SEVERAL if study_training.several(own, names) else SINGLE
    paper = number == 2
    add = partial(_drawing, part["key"])
    caption = CAPTIONS["support"].format(figure=_figure("3", paper), lines=lines)
    found = [add("figure-3" if paper else f"{slug}-support", caption, partial(study_training.support, own, groups))]
    for i, group in enumerate(groups, start=1):
        tau = study_training.tau_words(study_training.tau_key(own, group))
        caption = CAPTIONS["training"].format(figure=_figure("4", paper), lines=lines, tau=tau)
        name = "figure-4" if paper else f"{slug}-training"
        name += f"-{i}" if len(groups) > 1 else ""
        found.append(add(name, caption, partial(study_training.training, own, group)))
    found.append(add(f"{slug}-credit", CAPTIONS["credit"], partial(study_training.credit, own, names)))
    if number is not None or not index.paper_parts(results):  # elsewhere it would repeat the same picture
        found.append(add(f"{slug}-reach", CAPTIONS["reach"], partial(study_training.reach, own, names)))
    return found


def within(results: Results, part: dict[str, Any]) -> Results:
    """`results` with the training logs of the part's own seeds: a method may have more seeds for another part."""
    if not part.get("seeds"):
        return results
    seeds = {str(s) for s in part["seeds"]}
    held = results.get("training") or {}
    return {**results, "training": {n: {s: log for s, log in logs.items() if s in seeds} for n, logs in held.items()}}


def _drawing(part: str, name: str, caption: str, draw: Callable[[bool], Figure | None]) -> Drawing:
    return Drawing(name, part, " ".join(caption.split()), plots.styled(draw))


def _places(results: Results, part: dict[str, Any]) -> list[tuple[str, str]]:
    """(plain name, temperature): `t0`, `t1`, `t0-7`; a temperature that is no number is named by its position."""
    found = []
    for i, temperature in enumerate(index.temperatures(results, part)):
        plain = temperature.replace(".", "-") if re.fullmatch(r"\d+(\.\d+)?", temperature, re.ASCII) else f"x{i}"
        found.append((f"t{plain}", temperature))
    return found


def _greedy(results: Results, part: dict[str, Any]) -> str:
    """T = 0 where it was measured, as in the paper's figures; else the first temperature."""
    known = index.temperatures(results, part)
    return "0" if "0" in known or not known else known[0]


def _panels(results: Results, part: dict[str, Any]) -> list[tuple[str, dict[str, Any], str, list[str]]]:
    temperature = _greedy(results, part)
    groups = study_plots.together(index.rows(results, part), part.get("baseline"))
    return [("", part, temperature, group) for group in groups]


def _five(results: Results) -> list[tuple[str, dict[str, Any], str, list[str]]]:
    """Figure 5's panels, DFlash to the left and Domino to the right, as far as there are both."""
    found = index.paper_parts(results)
    titles = {2: "DFlash", 4: "Domino"}
    return [
        (titles[number], found[number], _greedy(results, found[number]), index.drafters(results, found[number]))
        for number in sorted(found)
    ]


def _alpha_caption(results: Results, part: dict[str, Any], number: str) -> str:
    return CAPTIONS["alpha"].format(figure=_figure(number, bool(number)), temperature=clean(_greedy(results, part)))


def _figure(number: str, paper: bool) -> str:
    return f"Figure {number} of the paper, measured here. " if paper else ""
