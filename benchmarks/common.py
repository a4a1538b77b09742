"""What every benchmark shares: alternating timing in one run, peak memory in a process of its own, one row per figure."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specauf import provenance


@dataclass(frozen=True)
class Row:
    """One ratio, both sides measured side by side in this run."""

    what: str
    against: str
    at: str
    ratio: float
    reach: float | None = None
    """The goal, set before it was measured; None: reported only."""
    below: bool = False
    """The goal is an upper bound."""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.reach is None:
            return None
        return self.ratio <= self.reach if self.below else self.ratio >= self.reach


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each way. The ways take turns, so that a change in the machine's load affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            gc.collect()
            began = time.perf_counter()
            way()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_mb(make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Peak resident memory that `make(*arguments)()` adds to what `make` left, in 10^6 bytes, in a fresh process.

    `make` builds the inputs and must be importable. Counted from the kernel's high-water mark, reset before the call.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue, torch.get_num_threads(), make, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the memory measurement of {make.__name__}{arguments} failed")
    return float(queue.get())


def _peak(queue: Any, threads: int, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    call = make(*arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    queue.put((_status("VmHWM") - before) / 1e6)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    return {**provenance.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def table(found: Iterable[Row]) -> str:
    """Plain text, one line a figure."""
    lines = []
    for row in found:
        sign = "<=" if row.below else ">="
        goal = (
            "reported" if row.reach is None else f"{sign} {row.reach:g}: {'reached' if row.reached else 'NOT reached'}"
        )
        lines.append(f"{row.what} against {row.against}; {row.at}\n    {row.ratio:.2f} ({goal}) {row.note}")
    return "\n".join(lines)


def main(rows: Callable[[], Iterable[Row]]) -> None:
    """Run one benchmark by itself."""
    print(machine())
    for row in rows():
        print(table([row]), flush=True)
