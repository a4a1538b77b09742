"""Corpora made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Write records as a JSON array."""

    def write(records: Iterable[Any], name: str = "corpus.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(list(records)), encoding="utf-8")
        return path

    return write
