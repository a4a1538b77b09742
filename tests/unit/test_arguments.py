"""What is typed and tyro alone would lose or not explain."""

from __future__ import annotations

import pytest

from specauf import cli
from specauf.arguments import gathered, parse
from specauf.strict import ConfigError


def test_a_repeated_flag_adds_to_what_was_set_before() -> None:
    arguments = ["train", "r.yaml", "--set", "a=1", "b=2", "--fresh", "--set=c=3", "--set", "d=4"]
    assert gathered(arguments, "--set") == ["train", "r.yaml", "--fresh", "--set", "a=1", "b=2", "c=3", "d=4"]
    once = ["train", "--set", "a=1", "r.yaml"]
    assert gathered(once, "--set") == once
    assert gathered(["--average_with", "c", "--average-with", "d"], "--average-with") == ["--average-with", "c", "d"]


@pytest.mark.parametrize("arguments", [["--set"], ["--set", "--fresh"], ["--set", "a=1", "--set"]])
def test_set_with_nothing_behind_it_does_not_train_the_whole_recipe(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--set has nothing behind it"):
        parse(cli._verbs(), ["train", "r.yaml", *arguments], None)


@pytest.mark.parametrize("before", [[], ["--fresh"], ["--set", "train.lr=1", "--fresh"]])
def test_an_override_without_its_flag_is_told_the_flag(before: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"write --set train\.max_steps=2 out=x"):
        parse(cli._verbs(), ["train", "r.yaml", *before, "train.max_steps=2", "out=x"], None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "r.yaml", "--fesh"], "--fresh"),
        (["train", "r.yaml", "more"], "Unrecognized options: more"),
        (["report", "a", "b=c"], "Unrecognized options: b=c"),
        (["rollout", "r.yaml", "--out", "o", "--samples", "2", "--sampling.temperature", "1"], "Unrecognized"),
    ],
)
def test_other_unknown_options_are_answered_by_tyro(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(cli._verbs(), arguments, None)
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_options_that_do_not_go_together_are_told_where_none_is_unknown() -> None:
    with pytest.raises(ConfigError, match="2 samples at temperature 0"):
        parse(cli._verbs(), ["rollout", "r.yaml", "--out", "o", "--samples", "2"], None)
