"""Plain progress lines."""

from __future__ import annotations

import pytest

from specauf import console
from specauf.console import Terminal


def test_what_was_there_before_cost_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with Terminal().progress("training", 100, done=50) as advance:
        advance(10, "loss 1")
    told = capsys.readouterr().out
    assert "training: 60/100, 80 s left, loss 1" in told, "ten took twenty seconds, forty are left"


def test_what_is_reported_at_once_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.5, 20.0, 40.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with Terminal().progress("tokens", 100) as advance:
        advance(50, "reused")
        advance(10, "5 tokens/s")
    assert "tokens: 60/100, 80 s left" in capsys.readouterr().out
