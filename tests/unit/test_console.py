"""Plain progress lines."""

from __future__ import annotations

import errno
import io
import sys

import pytest
import torch
from rich.text import Text

from specauf import console
from specauf.console import Terminal, reported
from specauf.strict import UserError


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


def test_what_is_finished_has_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal().progress("training", 3, done=3):
        pass
    assert not capsys.readouterr().out


def test_a_closed_output_and_one_without_greek_are_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> int:
        Terminal().say("\u03c4 of \udcc3.yaml")
        return 0

    monkeypatch.setattr(sys, "stdout", None)
    assert reported(work, []) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), "ascii", write_through=True))
    assert reported(work, []) == 0 and out.getvalue() == b"? of ?.yaml\n"


def test_nothing_that_is_told_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]52;c;AAAA\x07\x9b31m\tb"

    def work() -> int:
        Terminal().say(hostile)
        Terminal().rich.print(Text(hostile, style="green"), end="")
        Terminal().rich.rule(Text(hostile))
        raise UserError(hostile)

    assert reported(work, []) == 2
    out, err = capsys.readouterr()
    assert "a\ufffd]52" in out and "a\ufffd]52" in err and not {*"\x1b\x07\x9b"} & {*out, *err}


@pytest.mark.parametrize(
    ("error", "arguments", "code", "told"),
    [
        (OSError(errno.ELOOP, "Too many links", "x"), ["export"], 2, "specauf: x: Too many links\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. See documentation"),
            ["study"],
            2,
            "specauf: CUDA out of memory\n",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["eval", "x"], 2, ". Lower --eval.batch-size\n"),
        (KeyboardInterrupt(), ["prepare"], 130, "\nspecauf: interrupted\n"),
        (KeyboardInterrupt(), ["train", "--fresh"], 130, "the same command without --fresh goes on from here\n"),
    ],
)
def test_what_ends_a_command_is_told_in_a_line(
    error: BaseException, arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert reported(work, arguments) == code and capsys.readouterr().err.endswith(told)
