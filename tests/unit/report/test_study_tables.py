from __future__ import annotations

import math
from typing import Any

import pytest
from tests.unit.report.study_fixture import TASKS, study

from specauf.report import study_findings, study_markdown, study_tables
from specauf.report import study_index as index
from specauf.report.study_tables import Grid, Row
from specauf.report.tables import thin_slots

Results = dict[str, Any]


@pytest.fixture
def results() -> Results:
    return study(rows=20)


def part(results: Results, key: str) -> dict[str, Any]:
    return next(p for p in results["parts"] if p["key"] == key)


def change(results: Results, facts: dict[str, Any], **where: str) -> None:
    """Lay `facts` over every score at a place."""
    for score in results["scores"]:
        if all(score[key] == value for key, value in where.items()):
            score.update(facts)


def row(grid: Grid, block: int, name: str) -> Row:
    return next(row for row in grid.blocks[block].rows if row.name == name)


def test_the_grid_has_the_papers_columns_blocks_and_rows(results: Results) -> None:
    grid = study_tables.emitted(results, part(results, "a"))
    assert grid.groups == (("MATH", 2), ("CODE", 2), ("CHAT", 2), ("OVERALL", 1))
    assert grid.heads == ("GSM8K", "MATH-500", "HumanEval", "MBPP", "MT-Bench", "AlpacaFarm", "Avg.")
    assert [block.label for block in grid.blocks] == ["T = 0", "T = 1"]
    for block in grid.blocks:
        assert [row.label for row in block.rows] == ["Decay-only", "AUF + decay", "AUF-only", "Prompt lookup"]
        assert all(len(row.cells) == len(grid.heads) for row in block.rows)
    assert grid.caption == "Emitted length τ, laid out as Table 2 of the paper"
    assert "Table 4" in study_tables.emitted(results, part(results, "b")).caption
    assert "paper" not in study_tables.emitted(results, part(results, "c")).caption


def test_families_keep_the_papers_order_whatever_the_results_order_is(results: Results) -> None:
    results["tasks"] = dict(reversed(results["tasks"].items())) | {"heldout": {"label": "Held-out", "family": "OWN"}}
    assert [family for family, _ in index.families(results)] == ["MATH", "CODE", "CHAT", "OWN"]


def test_a_cell_has_three_decimals_and_its_interval_small(results: Results) -> None:
    change(results, {"tau": 1.2345, "interval": [1.2, 1.3]}, part="a", temperature="0", method="auf", task="gsm8k")
    cell = row(study_tables.emitted(results, part(results, "a")), 0, "auf").cells[0]
    assert (cell.text, cell.small) == ("1.234", ("1.200 – 1.300",))


def test_the_best_of_a_column_is_bold_ties_as_printed_too(results: Results) -> None:
    for name, tau in (("decay", 1.2), ("auf", 1.3001), ("auf-decay", 1.2999), ("prompt-lookup", 1.1)):
        change(results, {"tau": tau}, part="a", temperature="0", method=name)
    marks = {
        r.name: {c.mark for c in r.cells} for r in study_tables.emitted(results, part(results, "a")).blocks[0].rows
    }
    assert marks == {"decay": {""}, "auf": {"best"}, "auf-decay": {"best"}, "prompt-lookup": {""}}


def test_where_prompt_lookup_leads_the_best_drafter_is_marked_as_well(results: Results) -> None:
    for name, tau in (("decay", 1.2), ("auf", 1.31), ("auf-decay", 1.3), ("prompt-lookup", 1.5)):
        change(results, {"tau": tau}, part="a", temperature="0", method=name)
    rows = {r.name: {c.mark for c in r.cells} for r in study_tables.emitted(results, part(results, "a")).blocks[0].rows}
    assert rows == {"decay": {""}, "auf": {"drafter"}, "auf-decay": {""}, "prompt-lookup": {"best"}}


def test_each_temperature_has_a_best_of_its_own(results: Results) -> None:
    change(results, {"tau": 9.0}, part="a", temperature="1", method="decay")
    grid = study_tables.emitted(results, part(results, "a"))
    assert row(grid, 1, "decay").cells[0].mark == "best" and row(grid, 0, "decay").cells[0].mark == ""


def test_what_was_not_measured_keeps_its_row(results: Results) -> None:
    grid = study_tables.emitted(results, part(results, "c"))
    assert {c.text for c in row(grid, 0, "pard2").cells} == {"not run yet"}
    texts = [c.text for c in row(grid, 0, "l2r-focal").cells]
    assert texts[3] == "not run yet" and texts.count("not run yet") == 1
    assert all(c.mark == "missing" for c in row(grid, 0, "pard2").cells)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1.2", True])
def test_what_is_no_number_is_not_run(results: Results, value: Any) -> None:
    change(results, {"tau": value, "interval": [value, value]}, part="a", temperature="0", method="auf", task="gsm8k")
    cell = row(study_tables.emitted(results, part(results, "a")), 0, "auf").cells[0]
    assert cell == study_tables.Cell("not run yet", (), "missing")


def test_a_method_short_of_seeds_says_so(results: Results) -> None:
    grid = study_tables.emitted(results, part(results, "a"))
    assert row(grid, 0, "auf-decay").small == "2 of 3 seeds"
    assert row(grid, 0, "auf").small == row(grid, 0, "prompt-lookup").small == ""


def test_the_noise_floor_stands_beside_every_single_seed_cell(results: Results) -> None:
    grid = study_tables.emitted(results, part(results, "b"))
    for block in grid.blocks:
        for found in block.rows:
            quoted = ["seed ± 0.031" in cell.small for cell in found.cells]
            assert quoted == [found.name != "prompt-lookup"] * 7
    assert any("noise floor" in note for note in grid.notes)
    several = study_tables.emitted(results, part(results, "a"))
    assert not any("seed ±" in small for b in several.blocks for r in b.rows for c in r.cells for small in c.small)


def test_single_seeds_without_a_known_floor_say_that_it_is_unknown(results: Results) -> None:
    for comparison in results["comparisons"]:
        comparison["noise_floor"] = None
    notes = " ".join(study_tables.emitted(results, part(results, "b")).notes)
    assert "not known yet" in notes and "has one seed" in notes


def test_tau_before_the_loop_has_a_grid_of_its_own(results: Results) -> None:
    assert len(study_tables.grids(results, part(results, "a"))) == 2
    grid = study_tables.emitted(results, part(results, "a"), "tau_before_loop")
    score = index.score(results, part(results, "a"), "0", "auf", "gsm8k")
    assert row(grid, 0, "auf").cells[0].text == f"{score['tau_before_loop']:.3f}"
    change(results, {"tau_before_loop": None})
    assert len(study_tables.grids(results, part(results, "a"))) == 1


def test_comparisons_begin_with_the_average_and_carry_the_column_before_the_loop(results: Results) -> None:
    rows = study_tables.comparison_rows(results, part(results, "a"))
    assert rows[0][-2:] == ["verdict", "before a loop"] and "p, Holm" in rows[0]
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["T"], first["task"], first["p, Holm"], first["p"]) == ("0", "average", "0.001", "< 0.001")
    assert len(rows) - 1 == 2 * 2 * 7  # two methods, two temperatures, six benchmarks and the average
    assert first["before a loop"].split(" [")[0].endswith(first["verdict"])


def test_a_method_that_was_not_compared_yet_has_a_row(results: Results) -> None:
    rows = study_tables.comparison_rows(results, part(results, "c"))
    found = [row for row in rows if row[0] == "PARD-2 against Decay-only"]
    assert len(found) == 1 and found[0][1:4] == ["0", "average", "–"] and "not run yet" in found[0]
    assert rows[rows.index(found[0]) + 1][2] == "GSM8K"  # among the averages, not after everything


def test_every_cell_has_a_budget_row(results: Results) -> None:
    rows = study_tables.budget_rows(results)
    assert rows[0] == ["method", "seed", "state", "steps", "epochs", "tokens", "blocks", "s/step", "training", "clipped",
                       "head rows/block"]  # fmt: skip
    cells = sum(len(m["cells"]) for m in results["methods"])
    assert len(rows) == 1 + cells + 1  # and prompt lookup, which has none
    assert rows[1] == [
        "Decay-only",
        "0",
        "done",
        "500",
        "0.51",
        "768.0 k",
        "64.0 k",
        "1.04",
        "8.7 min",
        "3.4 %",
        "7.00",
    ]
    assert ["PARD-2", "0", "not run yet", "–"] in [row[:4] for row in rows]
    assert rows[-1][:3] == ["Prompt lookup", "–", "no training"]


def test_a_cell_in_training_says_how_far_it_is(results: Results) -> None:
    results["methods"][0]["cells"][0] |= {"state": "training", "steps": 120}
    assert study_tables.budget_rows(results)[1][2:4] == ["training", "120 of 500"]


def test_findings_keep_their_order_and_their_verdicts(results: Results) -> None:
    found = study_findings.findings(results)
    assert [f.verdict for f in found] == ["Reproduced here", "Undecided", "Not reproduced here", "Not run"]
    assert found[0].evidence == "4 comparisons: 4 better" and found[2].evidence == ""
    line = study_findings.headline(results)[0]
    assert line.startswith("Of the paper's 4 claims, 1 is reproduced here, 1 is not reproduced, 1 is undecided and 1")
    results["claims"][3]["source"] = "a control, not of the paper"
    assert study_findings.headline(results)[0].endswith("1 is undecided; of our own 1 claim, 1 is not run yet.")


def test_the_headline_says_what_prompt_lookup_does(results: Results) -> None:
    line = study_findings.headline(results)[1]
    tau = index.score(results, part(results, "a"), "0", "prompt-lookup", "macro")["tau"]
    assert "AUF-only emits" in line and f"{tau:.3f}." in line and "without parameters" in line


def test_a_difference_of_single_runs_is_not_one_of_their_methods(results: Results) -> None:
    single = next(
        c for c in results["comparisons"] if c["part"] == "c" and c["task"] == "macro" and not c["before_loop"]
    )
    single |= {"verdict": "better", "standing": "undecided", "noise_floor": 0.065}
    verdicts = [row[7] for row in study_tables.comparison_rows(results, part(results, "c"))]
    assert "undecided (seed ± 0.065; these runs: better)" in verdicts
    results["claims"][0]["evidence"] = [results["comparisons"].index(single)]
    assert study_findings.findings(results)[0].evidence == "1 comparison: 1 undecided"


def test_an_acceptance_of_few_rounds_is_in_brackets(results: Results) -> None:
    score = index.score(results, part(results, "a"), "0", "auf", "macro")
    score |= {"rounds": 1000, "alpha": [0.5, 0.25, 0.2, 0.9], "survival": [0.5, 0.125, 0.025, 0.0225]}
    assert thin_slots(score) == {4}  # 1000, 500, 125 and 25 rounds
    rows = study_tables.detail_rows(results, part(results, "a"))
    row = next(r for r in rows[1:] if r[0] == "AUF-only" and r[1] == "0")
    assert row[8:12] == ["0.500", "0.250", "0.200", "(0.900)"]


def test_evidence_that_is_not_there_is_passed_over(results: Results) -> None:
    results["claims"][0]["evidence"] = [10**6, -1, 0]
    assert study_findings.findings(results)[0].evidence == "1 comparison: 1 better"


def test_what_is_missing_is_said_part_by_part(results: Results) -> None:
    lines = study_findings.missing(results)
    assert lines[0] == "“DFlash: decay, AUF, AUF + decay”. Not run yet: AUF + decay (seed 2)."
    assert lines[1] == "“Head to head”. Not run yet: PARD-2. Not measured yet at T = 0 on MBPP: L2R focal."
    assert lines[2] == "“Block size 8 and 16”. Not run yet: AUF-only, B=16."
    results["parts"] = results["parts"][1:2]
    assert study_findings.missing(results) == [
        "Nothing is missing: every cell of every part has been trained and measured."
    ]
    results["unchecked"] = ["auf-s0 on mbpp", "auf-s0 on gsm8k"]
    assert study_findings.missing(results) == [
        "Not decoded live yet, to be compared with replay: auf-s0 on mbpp, auf-s0 on gsm8k."
    ]


def test_cells_in_training_and_cells_that_wait_for_their_measurement_are_told_apart(results: Results) -> None:
    results["methods"][0]["cells"][0]["state"] = "training"
    results["parts"][0]["missing"] = ["auf-s1", "auf-decay-s2"]
    of_auf = [s for s in results["scores"] if (s["part"], s["method"]) == ("a", "auf")]
    for score in of_auf:
        score["seeds"] = [s for s in score["seeds"] if str(s) != "1"]
    assert study_findings.missing(results)[0] == (
        "“DFlash: decay, AUF, AUF + decay”. Not run yet: AUF + decay (seed 2). In training: Decay-only (seed 0). "
        "Trained, not measured yet: AUF-only (seed 1)."
    )
    of_auf[-1]["seeds"].append(1)
    assert "AUF-only" not in study_findings.missing(results)[0], "measured somewhere: where not is said by the place"


def test_the_recipe_has_a_row_for_every_section_method_and_part(results: Results) -> None:
    rows = study_tables.recipe_rows(results)
    assert rows[1] == ["base: train", "lr 0.0006 · max steps 500"] and ["parts: d", "methods auf, auf-b16"] in rows
    assert "config" not in dict(study_tables.provenance_rows(results))


def test_a_study_before_its_first_run_is_all_there(results: Results) -> None:
    results.update(scores=[], comparisons=[], training={}, claims=[], checks=[])
    for method in results["methods"]:
        method["cells"] = []
    for found in results["parts"]:
        grid = study_tables.emitted(results, found)
        assert {c.text for b in grid.blocks for r in b.rows for c in r.cells} == {"not run yet"}
        assert len(grid.heads) == len(TASKS) + 1 and len(grid.blocks[0].rows) == len(found["methods"]) + 1
    assert len(study_findings.missing(results)) == 4
    assert study_findings.headline(results) == ["No claim has been put to the test yet."]


def test_a_part_with_no_method_has_prompt_lookup_and_no_crash(results: Results) -> None:
    results["parts"] = [{"key": "z"}]
    grid = study_tables.emitted(results, results["parts"][0])
    assert grid.blocks == () and study_tables.comparison_rows(results, results["parts"][0])[1:] == []
    assert study_findings.missing(results) == ["“Part z”. It names no method."]


def test_markdown_reads_as_the_papers_tables_do(results: Results) -> None:
    lines = study_markdown.grid(study_tables.emitted(results, part(results, "a"))).splitlines()
    assert lines[0] == "| Temperature | Method | MATH |  | CODE |  | CHAT |  | OVERALL |"
    assert lines[2].startswith("|  |  | **GSM8K** | **MATH-500** | **HumanEval**")
    assert lines[3].startswith("| T = 0 | Decay-only | 1.") and lines[4].startswith(
        "|  | AUF + decay <sub>2 of 3 seeds</sub>"
    )
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 3 + 2 * 4
    assert "**" in lines[6] and "<br><sub>" in lines[6]


def test_a_label_less_method_and_a_number_less_claim_are_told(results: Results) -> None:
    results["parts"][0]["methods"].append("unlisted")
    assert row(study_tables.emitted(results, part(results, "a")), 0, "unlisted").label == "unlisted"
    results["claims"] = [{"claim": "x"}, {"claim": "y", "verdict": "perhaps"}]
    assert [f.verdict for f in study_findings.findings(results)] == ["Not run", "perhaps"]


def test_parts_have_names_of_their_own_in_files(results: Results) -> None:
    results["parts"] = [{"key": key} for key in ("x", "x-3", "x_", "é", "")]
    assert list(index.slugs(results).values()) == ["x", "x-3", "x-3-3", "part-4", "part-5"]
