"""docs/objectives.md says what the code does: names, defaults, inputs, cost, pictures and figures."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from scipy.optimize import brentq
from torch.utils.flop_counter import FlopCounterMode

from specauf.config import ObjectiveConfig, RunConfig
from specauf.objective import RULES, Objective, gate, position_decay
from specauf.objective.registry import call, options_of, rule_of
from specauf.objective.wavefront import default_cuts
from specauf.strict import from_dict
from specauf.train.objectives import objectives_of
from tests.unit.objective.test_loss import Case

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split())


def tables(page: str) -> list[list[list[str]]]:
    """Rows of cells, the header first, of every table."""
    found = re.findall(r"(?:^\|.*\|\n)+", page, re.M)
    rows = [[[c.strip() for c in line.strip().strip("|").split(" | ")] for line in t.splitlines()] for t in found]
    return [[table[0], *table[2:]] for table in rows]


def table(first: str, second: str) -> list[list[str]]:
    """The rows of the table whose header starts so."""
    (found,) = [t for t in tables(PAGE) if t[0][0].startswith(first) and t[0][1].startswith(second)]
    assert all(len(row) == len(found[0]) for row in found), "a cell too many"
    return found[1:]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAW = load(DOCS / "draw_credits.py")
ROWS = {name.strip("`"): cells for name, *cells in table("name", "credit")}
"""name -> credit, reads, head, options, block 2."""


def objective(name: str) -> Objective:
    return Objective(name, 4.0 if isinstance(rule_of(name).gamma, str) else None)


def test_every_objective_has_its_row_and_a_paragraph() -> None:
    assert set(ROWS) == {*RULES, "auf-decay"}
    details = PAGE[PAGE.index("## One by one") : PAGE.index("## Reductions")]
    assert not [name for name in RULES if f"`{name}`" not in details]


@pytest.mark.parametrize("name", ROWS)
def test_the_quoted_defaults_are_those_of_the_code(name: str) -> None:
    rule = rule_of(name)
    quoted = dict(re.findall(r"`(\w+)` ([^,]+)", ROWS[name][3]))
    gamma = quoted.pop("gamma", None)
    assert quoted == {k: v if isinstance(v, str) else f"{v:g}" for k, v in options_of(rule).items()}
    assert gamma == (rule.gamma if rule.gamma is None or isinstance(rule.gamma, str) else f"{rule.gamma:.3g}")


class Watched:
    """Slots that remember which of their fields were looked at."""

    def __init__(self, slots: Any, seen: set[str]) -> None:
        self._slots, self._seen = slots, seen

    def __getattr__(self, name: str) -> Any:
        self._seen.add(name)
        return getattr(self._slots, name)


WORDS = {"hit": "argmax", "prob": "q", "rank": "rank", "uniform": "draws", "target_prob": "target"}


@pytest.mark.parametrize("name", ROWS)
def test_what_an_objective_reads_is_what_the_page_says(name: str) -> None:
    rule, seen = rule_of(name), set[str]()
    slots = Watched(DRAW.blocks()._replace(decay=position_decay(DRAW.N, 4.0)), seen)
    for function in filter(None, (rule.credit, rule.survives)):
        call(function, slots, objective(name).options)
    found = {WORDS[field] for field in seen - {"valid", "decay"}} | (rule.needs & {"rollouts"})
    found |= {"target"} if rule.rows != ("ce",) else set()
    assert found == set(ROWS[name][1].split(", ")) - {"–"}


@pytest.mark.parametrize("name", ROWS)
def test_the_work_of_the_head_is_what_the_page_says(name: str) -> None:
    """Rows forward and products back, in products of one row with the head's matrix."""
    told = re.match(r"(\d?)([NS]) \+ (\d?)\2(?:, at most k)?$", ROWS[name][2])
    assert told, ROWS[name][2]
    assert (told[2] == "S") == objective(name).truncates
    for seed in range(6):
        case = Case(seed)
        with FlopCounterMode(display=False) as counted:
            terms = case.terms(objective(name))
        read = int(terms.readout.evaluated.sum())
        assert told[2] == "S" or read == int(case.blocks.valid.sum())
        products = counted.get_total_flops() / (2 * case.weight.numel())
        assert products == read * (int(told[1] or 1) + int(told[3] or 1))


def test_the_blocks_in_the_table_are_drawn_from_the_code() -> None:
    assert {name: cells[4] for name, cells in ROWS.items()} == {n: f"`{DRAW.sparkline(n)}`" for n in ROWS}


def test_the_picture_is_of_this_code() -> None:
    picture = Image.open(DRAW.OUT)
    assert set(DRAW.NAMES) == set(ROWS)
    assert picture.info["Credits"] == DRAW.digest(), "draw it again: .venv/bin/python docs/draw_credits.py"
    assert DRAW.OUT.stat().st_size < 250_000 and picture.width > 1200


def test_the_table_of_the_gate_gives_the_rows() -> None:
    slots = DRAW.blocks()
    for name, temperature, alpha, shift, future in table("row", "temperature of q"):
        row = objective(name.strip("`"))
        found = call(row.rule.credit, slots, row.options)
        cold = 0 if temperature.startswith("0") else 1.0
        want = gate(
            slots,
            temperature=cold,
            alpha=float(alpha),
            shift=0 if shift == "any" else int(shift),
            future=future == "1",
        )
        torch.testing.assert_close(found.double(), want.double(), rtol=1e-12, atol=1e-12)


def test_the_recipe_on_the_page_is_one() -> None:
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    found = objectives_of(from_dict(RunConfig, yaml.safe_load(recipe)))[0].objective
    (python,) = re.findall(r"`(Objective\(.*?\))`", PAGE)
    assert found == eval(python, {"Objective": Objective})
    for size, gamma in ((16, 7), (10, 5), (8, 4), (4, 2), (20, 9)):
        assert ObjectiveConfig("decay").decay_for(size) == gamma == ObjectiveConfig("auf-decay").decay_for(size)


def geometric(tau: float, n: int = 15) -> list[float]:
    """P(the support has at least i slots), i = 1..n, at the accuracy that makes tau."""
    accuracy = brentq(lambda a: 1 + sum(a**k for k in range(1, n + 1)) - tau, 1e-3, 1 - 1e-3)
    return [accuracy**k for k in range(n)]


def test_the_shares_of_a_block_under_two_reductions() -> None:
    for told, *cells in table("tau on the training", "slot 1"):
        tau, reduction = told.split(", ")
        reach = geometric(float(tau))
        ends = [a - b for a, b in zip(reach, [*reach[1:], 0], strict=True)]
        share = [x / sum(reach) for x in reach]
        if reduction == "block":
            share = [sum(ends[n] / (n + 1) for n in range(i, 15)) for i in range(15)]
        assert cells == [f"{100 * share[i]:.1f} %" for i in (0, 1, 2, 4)]
    reach = geometric(2.6)
    block = [sum((reach[n] - (reach[n + 1] if n < 14 else 0)) / (n + 1) for n in range(i, 15)) for i in range(15)]
    told = re.search(r"as if slots 1 to 5 carried 1, ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) on top", PROSE)
    assert told and list(told.groups()) == [f"{block[i] / reach[i] / block[0]:.2f}" for i in range(1, 5)]


def test_the_rows_read_and_supported() -> None:
    (header,) = [t[0] for t in tables(PAGE) if "N = 15" in t[0][0]]
    support, read = table("tau on the training", header[1])
    for i, tau in enumerate(header[1:], start=1):
        reach, cuts = geometric(float(tau)), default_cuts(15)
        rows = sum((end - start) * reach[start] for start, end in zip([0, *cuts], cuts, strict=False))
        assert support[i] == f"{sum(reach):.2f}" and read[i] == f"{rows:.2f}"


def test_the_figures_in_the_prose() -> None:
    sums = [sum(math.exp(-i / 10) for i in range(n)) for n in (15, 7)]
    assert f"Σ w is {sums[0]:.2f} a block, and 0.3 · {sums[0]:.2f} = {0.3 * sums[0]:.2f}" in PROSE
    assert f"At N = 7 the same sum gives {0.3 * sums[1]:.2f}." in PROSE
    assert sum(m * 0.5**m for m in range(1, 16)) == pytest.approx(2, abs=0.01) and 15 * 16 // 2 == 120
    assert f"is gamma {-1 / math.log(0.8):.2f}" in PROSE


@pytest.mark.parametrize("page", ["objectives.md", "adding-an-objective.md", "draft-vocabulary.md"])
def test_links_and_tests_that_a_page_names_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    headings = {"#" + h.lower().replace(" ", "-").replace(",", "") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    for link in re.findall(r"\]\((?!https)([^)]+)\)", text):
        assert link in headings if link.startswith("#") else (DOCS / link).exists(), link
    here = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert not [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in here]
