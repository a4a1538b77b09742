"""Fixtures of the comparison with the reference implementation of DFlash; what they are made of is in `reference.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import MEASURED, embedded_target, tiny_target

from specauf.target import Target


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section("measured against dflash 0.1.0")
        for line in MEASURED:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", params=["llama", "qwen3", "embedded"])
def target(request: pytest.FixtureRequest) -> Target:
    return embedded_target() if request.param == "embedded" else tiny_target(request.param)


@pytest.fixture(autouse=True)
def cpu_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference stops its clock with torch.cuda.synchronize(), which a CPU build refuses."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    yield
