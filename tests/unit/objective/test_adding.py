"""docs/adding-an-objective.md, taken at its word: its code is run, its recipe is resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specauf.config import RunConfig
from specauf.objective import RULES, Objective, Slots, auf, register
from specauf.strict import ConfigError, from_dict
from specauf.train.objectives import objectives_of
from tests.unit.objective.test_loss import Case

PAGE = (Path(__file__).parents[3] / "docs" / "adding-an-objective.md").read_text(encoding="utf-8")
PYTHON, YAML = (re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S) for kind in ("python", "yaml"))
PLUGINS = {found[1]: code for code in PYTHON if (found := re.match(r"# (\w+\.py)\n", code))}


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where specauf is started: the page's files are there."""
    for name, code in PLUGINS.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plugin(file: str, name: str, **options: Any) -> Objective:
    config = from_dict(RunConfig, {"objective": {"plugin": file, "name": name, "options": options}})
    return objectives_of(config)[0].objective


def test_the_page_runs_from_top_to_bottom() -> None:
    space: dict[str, Any] = {"__name__": "page"}
    for code in PYTHON:
        exec(compile(code, "adding-an-objective.md", "exec"), space)
    assert {"half-auf", "near-auf", "bounded"} <= set(RULES)
    assert space["hidden"].grad.abs().sum(-1).gt(0).all(), "every slot has credit, so every slot learns"


def test_its_objectives_take_less_than_twenty_lines() -> None:
    assert set(PLUGINS) == {"half_auf.py", "near_auf.py", "bounded.py"}
    assert all(len(code.splitlines()) < 20 for code in PLUGINS.values())


def test_the_recipe_of_the_page_resolves_to_the_plugin(workdir: Path) -> None:
    config = from_dict(RunConfig, yaml.safe_load(YAML[0]))
    assert "half-auf" not in RULES
    for _ in range(2):  # a run asks more than once, and the file is imported each time
        objective = objectives_of(config)[0].objective
    assert objective.options == {"rest": 0.25} and not objective.truncates
    hit = torch.tensor([[True, True, False, True], [True, False, False, True], [True, True, True, True]])
    valid = torch.tensor([[True, True, True, True], [True, False, True, True], [True, True, True, True]])
    found = objective.rule.credit(Slots(valid, hit), **objective.options)
    assert (found * valid).tolist() == [[1, 1, 1, 0.25], [1, 0, 1, 0.25], [1, 1, 1, 1]]
    assert Objective("half-auf-decay", 4.0).options == {"rest": 0.5}


def test_a_recipe_of_a_plugin_is_checked_like_any_other(workdir: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'half-auf'"):
        plugin("half_auf.py", "half-ouf")
    with pytest.raises(ConfigError, match="has no option 'half'; it takes rest"):
        plugin("half_auf.py", "half-auf", half=1)
    with pytest.raises(ConfigError, match=r"cannot import 'no\.py'"):
        plugin("no.py", "half-auf")
    with pytest.raises(ConfigError, match=r"cannot import '\./half_auf': the name of a file ends in \.py"):
        plugin("./half_auf", "half-auf")


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.1])
def test_reading_fewer_rows_changes_nothing(workdir: Path, floor: float) -> None:
    short = plugin("near_auf.py", "near-auf", floor=floor)
    RULES["near-auf-dense"] = RULES["near-auf"]._replace(survives=None)
    whole = Objective("near-auf-dense", options={"floor": floor})
    rows = {}
    for seed in range(20):
        grads = []
        for objective in (short, whole):
            leaf = Case(seed).hidden.requires_grad_()
            terms = Case(seed).terms(objective, leaf)
            terms.loss.backward()
            grads.append((terms.loss, terms.credit, leaf.grad))
            rows[objective.name] = rows.get(objective.name, 0) + int(terms.readout.evaluated.sum())
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert rows["near-auf"] <= rows["near-auf-dense"]
    assert (rows["near-auf"] < rows["near-auf-dense"]) == (floor > 0)


def test_near_auf_is_auf_where_no_error_is_near(workdir: Path) -> None:
    strict = plugin("near_auf.py", "near-auf", floor=1.1)
    slots = Slots(torch.ones(1, 4).bool(), torch.tensor([[True, False, True, True]]), torch.full((1, 4), 0.3))
    assert torch.equal(strict.rule.credit(slots, **strict.options), auf(slots))
    assert strict.rule.credit(slots, floor=0.2).tolist() == [[1, 1, 1, 1]]


def test_the_bounded_loss_and_its_gradient(workdir: Path) -> None:
    objective = plugin("bounded.py", "bounded", bend=0.25)
    case = Case(3)
    ours, theirs = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    case.terms(objective, ours).loss.backward()
    logits = torch.nn.functional.linear(theirs, case.weight, case.bias)
    q = logits.softmax(-1).gather(-1, case.blocks.labels[..., None]).squeeze(-1)
    ((1 - q**0.25) / 0.25)[case.blocks.valid].mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_credit_may_read_the_targets_probabilities() -> None:
    @register("trusted", needs={"target_prob"})
    def trusted(slots: Slots) -> torch.Tensor:
        assert slots.target_prob is not None
        return slots.target_prob

    case, objective = Case(3), Objective("trusted")
    assert objective.needs_target
    ours, theirs = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    case.terms(objective, ours).loss.backward()
    logits, said = (torch.nn.functional.linear(h, case.weight, case.bias) for h in (theirs, case.target_hidden))
    label = case.blocks.labels[..., None]
    credit = said.softmax(-1).gather(-1, label).squeeze(-1) * case.blocks.valid
    ce = -logits.log_softmax(-1).gather(-1, label).squeeze(-1)
    ((credit * ce).sum() / credit.sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="'trusted' needs 'target_hidden'"):
        case.terms(objective, target_hidden=None)


def test_a_field_that_a_loss_names_and_does_not_use_pulls_nothing() -> None:
    @register("idle", rows=("ce", "kl"))
    def idle(slots: Slots) -> torch.Tensor:
        return slots.valid.double()

    case = Case(3)
    ours, theirs = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    case.terms(Objective("idle"), ours).loss.backward()
    case.terms(Objective("uniform"), theirs).loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_built_in_objective_is_not_replaced_by_a_namesake() -> None:
    def dpace(slots: Slots) -> torch.Tensor:
        return slots.valid.float()

    dpace.__qualname__ = "dpace"
    with pytest.raises(ValueError, match="'dpace' exists already"):
        register("dpace")(dpace)
    register("mine")(dpace)
    register("mine")(dpace)  # a notebook's cell, run again


@pytest.mark.parametrize("rows", ["ce", ("entropy",)])
def test_unknown_rows_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="'odd': rows are a tuple of ce, kl and overlap, got"):
        register("odd", rows=rows)


def test_a_gamma_that_nothing_reads_is_refused(workdir: Path) -> None:
    for section in ({"plugin": "half_auf.py", "name": "half-auf"}, {"variant": "b-auf"}, {"final": "uniform"}):
        kind = "dflash" if "plugin" in section else "domino"
        config = from_dict(RunConfig, {"objective": {**section, "gamma": 3.0}, "drafter": {"kind": kind}})
        with pytest.raises(ConfigError, match=r"objective.gamma is given, and .* no position decay"):
            objectives_of(config)


def test_an_unknown_need_is_refused() -> None:
    with pytest.raises(ValueError, match="'odd' needs 'ranks', which is none of rank, rollouts, target_prob, uniform"):
        register("odd", needs={"ranks"})


def test_options_without_one_default_and_names_of_the_decay_are_refused_when_they_are_registered() -> None:
    def credit(slots: Slots, floor: float = 0.5) -> torch.Tensor:
        return slots.valid.float()

    for survives in (lambda slots, floor=0.25: slots.valid, lambda slots, edge: slots.valid):
        with pytest.raises(ValueError, match=r"'(floor|edge)' must have one default, the same wherever it is taken"):
            register("odd", survives=survives)(credit)
    with pytest.raises(ValueError, match="'odd-decay': names that end in -decay"):
        register("odd-decay")
    assert "odd" not in RULES


def test_the_decay_of_a_loss_of_two_parts_weighs_both() -> None:
    @register("halves")
    def halves(slots: Slots) -> Any:
        return (1.0, slots.valid.double()), (0.5, 2 * slots.valid.double())

    decay = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)
    found = Objective("halves-decay", 3.0).rule.credit(Slots(torch.ones(1, 3).bool(), decay=decay))
    assert [(scale, c.tolist()) for scale, c in found] == [(1.0, [[1, 0.5, 0.25]]), (0.5, [[2, 1, 0.5]])]


def test_a_credit_learns_nothing_itself() -> None:
    share = torch.ones((), dtype=torch.float64, requires_grad=True)

    @register("learned")
    def learned(slots: Slots) -> torch.Tensor:
        return share * slots.valid

    terms = Case(3).terms(Objective("learned"), Case(3).hidden.clone().requires_grad_())
    terms.loss.backward()
    assert not terms.den.requires_grad and share.grad is None
