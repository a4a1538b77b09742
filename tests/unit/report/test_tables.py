from __future__ import annotations

import re
from typing import Any

import pytest

from specauf.report import markdown, tables
from specauf.report.words import CAPTIONS, clean, escape, fixed, large, signed, span

Results = dict[str, Any]


def compare(results: Results, **facts: Any) -> tuple[str, str]:
    """The sentence and the headline of a single comparison."""
    results["comparisons"] = [{"task": "humaneval", "a": "auf", "b": "decay", "condition": "equal time", **facts}]
    return tables.comparison_sentences(results)[0], tables.headline(results)[0]


def pipes(text: str) -> list[list[int]]:
    """Unescaped column separators per line, for each run of table lines."""
    runs: list[list[int]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            runs[-1].append(len(re.findall(r"(?<!\\)\|", line)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_every_method_has_a_row_with_its_tau_and_interval(results: Results) -> None:
    rows = tables.summary_rows(results)
    heads = [
        "method",
        "τ average",
        "τ HumanEval",
        "τ ShareGPT held-out",
        "α₁",
        "α₂",
        "α₃",
        "α₄",
        "s/step",
        "tokens seen",
    ]
    assert rows[0] == heads
    assert [row[0] for row in rows[1:]] == ["Decay", "AUF", "AUF, equal steps", "Prompt lookup"]
    assert re.fullmatch(r"1\.245 \[1\.198, 1\.291\]", rows[2][2])
    assert rows[2][1] == f"{(1.245 + float(rows[2][3][:5])) / 2:.3f}"
    assert rows[2][-2:] == ["0.49", "1.11 M"] and rows[4][-2:] == ["–", "–"]


def test_alpha_over_tasks_is_the_ratio_of_mean_survivals(results: Results) -> None:
    for i, curve in enumerate(([0.8, 0.4], [0.2, 0.1])):
        task = list(results["evaluation"].values())[i]
        task["methods"]["auf"] = {"survival": curve, "alpha": [0.9, 0.9]}
    assert tables.mean_alpha(results, "auf", 1) == pytest.approx(0.5)
    assert tables.mean_alpha(results, "auf", 2) == pytest.approx(0.25 / 0.5)
    assert tables.mean_alpha(results, "auf", 3) is None


def test_alpha_over_tasks_needs_the_method_on_every_task(results: Results) -> None:
    del results["evaluation"]["heldout"]["methods"]["auf"]
    assert tables.mean_alpha(results, "auf", 1) is None


def test_survival_follows_from_alpha_when_it_is_not_given() -> None:
    assert tables.survival({"alpha": [0.5, 0.5, None, 0.9]}) == [0.5, 0.25]


@pytest.mark.parametrize("interval", [[-0.01, 0.2], [0.0, 0.2], [-0.2, 0.0], [-0.2, 0.01]])
def test_an_interval_that_includes_zero_is_undecided(results: Results, interval: list[float]) -> None:
    for text in compare(results, difference=0.1 if interval[1] > 0.1 else -0.1, interval=interval, ratio=1.7):
        assert "undecided" in text and "better" not in text and "worse" not in text and "1.70" not in text


@pytest.mark.parametrize(("interval", "word"), [([0.01, 0.2], "better"), ([-0.2, -0.01], "worse")])
def test_an_interval_beside_zero_decides(results: Results, interval: list[float], word: str) -> None:
    for text in compare(results, difference=sum(interval) / 2, interval=interval, ratio=1.7):
        assert f"AUF is {word} than Decay" in text and "undecided" not in text


@pytest.mark.parametrize("interval", [None, [0.1], [0.3, 0.1], [float("nan"), 0.1], "wide", [True, 1]])
def test_nothing_is_claimed_without_a_usable_interval(results: Results, interval: Any) -> None:
    for text in compare(results, difference=5.0, interval=interval, ratio=9.0):
        assert "nothing is claimed" in text and "better" not in text and "9.00" not in text


def test_a_difference_that_contradicts_its_interval_is_undecided(results: Results) -> None:
    assert "undecided" in compare(results, difference=-0.1, interval=[0.01, 0.2])[0]


def test_the_headline_separates_decided_tasks_from_undecided_ones(results: Results) -> None:
    text = tables.headline(results)[1]
    assert "better than Decay on HumanEval (1.29 times" in text and "on ShareGPT held-out is undecided" in text


def test_the_headline_names_prompt_lookup_and_the_best_drafter(results: Results) -> None:
    assert "reaches τ 2.284 on HumanEval and 1.423 on" in tables.headline(results)[-1]
    assert "(best drafter: 1.245 and 1.271)" in tables.headline(results)[-1]


def test_the_condition_replaces_the_variant_in_a_label(results: Results) -> None:
    assert tables.comparison_sentences(results)[2].startswith("At equal steps, on HumanEval, AUF is better than Decay")
    del results["comparisons"][2]["condition"]
    assert tables.comparison_sentences(results)[2].startswith("On HumanEval, AUF, equal steps is better than Decay")


def test_a_ledger_that_does_not_add_up_says_so(results: Results) -> None:
    assert "unaccounted for" not in dict(tables.ledger_rows(results)[1:])
    results["ledger"]["kept"] -= 7
    assert dict(tables.ledger_rows(results)[1:])["unaccounted for"] == "7"


def test_only_true_passes_and_only_false_fails(results: Results) -> None:
    results["checks"] = [{"name": "x", "passed": p} for p in (True, False, None, "yes", [])]
    outcomes = [row[2] for row in tables.check_rows(results)[1:]]
    assert outcomes == ["passed", "FAILED", *["for information"] * 3]


def test_a_column_without_numbers_is_left_out(minimal: Results) -> None:
    assert tables.summary_rows(minimal) == [["method", "τ chat"], ["auf", "1.250"]]


def test_prompts_that_were_not_measured_are_told(minimal: Results) -> None:
    facts = minimal["evaluation"]["chat"]
    facts["prompts"] = facts["methods"]["auf"]["prompts"] = 16
    assert tables.task_note(minimal, "chat") == "16 prompts."
    facts["methods"]["auf"]["prompts"] = 13  # three answers ended with their first token
    assert tables.task_note(minimal, "chat").startswith("16 prompts, 3 of them without a round")


def test_plain_table_aligns_its_columns(results: Results) -> None:
    lines = tables.plain_table(tables.summary_rows(results)).splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1


def test_numbers_are_written_for_readers() -> None:
    assert [large(n) for n in (812, 81234, 1.35e6, 2.1e9, None)] == ["812", "81.2 k", "1.35 M", "2.10 G", "–"]
    assert [signed(x) for x in (0.1, -0.1, 0.0, 0.0002, float("inf"))] == ["+0.100", "−0.100", "+0.000", "+0.0002", "–"]
    assert [fixed(x) for x in ("7", True, float("nan"), -1)] == ["–", "–", "–", "−1.000"]
    assert span([1, 2]) == (1.0, 2.0) and span([2, 1]) is None


def test_markdown_has_every_section_and_as_many_cells_in_each_row(results: Results) -> None:
    text = markdown.markdown(results, CAPTIONS)
    for title in ("Emitted length", "What was compared", "Live decoding", "Data", "Checks", "Provenance", "Terms"):
        assert f"\n## {title}\n" in text
    assert text.count("](figures/") == 4 and "<b>    for</b> i<b> in</b>" in text
    runs = pipes(text)
    assert len(runs) == 9 and all(len(set(run)) == 1 for run in runs)


def test_markdown_of_the_least_results_has_no_empty_section(minimal: Results) -> None:
    text = markdown.markdown(minimal)
    assert "## Checks" not in text and "## Live" not in text and "| auf | 1.250 |" in text


def test_hostile_strings_neither_break_tables_nor_become_markup(hostile: Results) -> None:
    text = markdown.markdown(hostile)
    assert not re.search(r"<(?!/?(?:b|pre)>)", text)
    assert "https://" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert all(len(set(run)) == 1 for run in pipes(text))
    assert "\x00" not in text and text.encode("utf-8")


def test_escape_keeps_one_line_and_disarms_markdown() -> None:
    assert escape("a|b\n*c*  [d](x)") == r"a\|b \*c\* \[d\](x)"
    assert clean("a\x00\ud800é") == "a\ufffd\ufffdé"


def test_self_selection_has_a_table_of_its_own_and_no_row_in_another(results: Results) -> None:
    rows = tables.selection_rows(results)
    assert rows[0] == ["method", "task", "τ", "gain", "nodes/round", "rounds"]
    assert rows[1][:2] == ["AUF, self-selection, K=8, T_s=1.5", "HumanEval"]
    assert rows[1][2:] == ["1.412 [1.350, 1.470]", "+0.167 [+0.110, +0.220]", "41.3", "1,450"]
    assert not any("self-selection" in row[0] for row in tables.summary_rows(results))
    assert "## Self-selection" in markdown.markdown(results)
    del results["selection"]
    assert len(tables.selection_rows(results)) == 1 and "## Self-selection" not in markdown.markdown(results)


def test_the_terms_of_an_experiment_stand_only_where_there_was_one(results: dict[str, Any]) -> None:
    of_an_evaluation = {
        **results,
        "comparisons": [{**c, "condition": "before the text loops"} for c in results["comparisons"]],
    }
    told = markdown.markdown(of_an_evaluation)
    assert "Equal steps" in markdown.markdown(results) and "Equal steps" not in told and "“No loop”" in told
    assert "**Before the text loops, " in told and "At before" not in told
