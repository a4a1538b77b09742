"""The scripts of `benchmarks/`, as far as they answer mistakes."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from benchmarks import __main__, copying, repeats


def test_the_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--help"]) == 0 and "names: objective, attention" in capsys.readouterr().out
    assert __main__.main(["step", "nope"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("unknown: nope\n") and "names: objective, attention" in told


@pytest.mark.parametrize("script", [copying, repeats])
def test_a_script_without_arguments_says_which(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit, match=rf"^usage: python -m {script.__name__} [A-Z]"):
        script.main()
