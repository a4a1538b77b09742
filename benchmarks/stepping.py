"""One training step in a process of its own, taken when asked for, so that two environments can be timed in turns.

A script that calls `main` prints the seconds of its steps and its peak memory as one line of JSON. `Stepper` starts such a
script under another interpreter and takes its steps one by one; `Stepper.step` goes into `benchmarks.common.alternate`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What is trained on: SmolLM2-135M's geometry, two drafter layers, five taps."""

    block_size: int = 16
    anchors: int = 32
    gamma: float | None = None
    """The position decay, off by default."""
    sequences: int = 4
    tokens: int = 384
    layers: int = 2
    taps: int = 5
    hidden_size: int = 576
    intermediate_size: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab_size: int = 49152
    chunk_blocks: int = 128
    """SpecForge's: blocks per slice of the objective, each recomputed in backward; 0: all kept, none recomputed."""


SHAPES = ((8, 32), (16, 32), (16, 128))
"""Block size and anchors per sequence."""


def random_batch(shape: Shape) -> dict[str, Tensor]:
    """Random tokens and features; every token is supervised. Never the mask token, which is the last of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    rows = (shape.sequences, shape.tokens)
    return {
        "input_ids": torch.randint(shape.vocab_size - 1, rows, generator=generator),
        "hidden_states": torch.randn(*rows, shape.taps * shape.hidden_size, generator=generator),
        "loss_mask": torch.ones(rows),
    }


def main(name: str, build: Callable[[Shape], Callable[[], object]]) -> None:
    """Time the step that `build` makes. One configuration per process, since peak memory is the process's."""
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--anchors", type=int, default=32, help="blocks a sequence")
    parser.add_argument("--gamma", type=float, help="position decay (default: none)")
    parser.add_argument("--chunk-blocks", type=int, default=128, help="SpecForge's objective_chunk_blocks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--wait", action="store_true", help="a step for every line on stdin, answered with its seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = Shape(args.block_size, args.anchors, args.gamma, chunk_blocks=args.chunk_blocks)
    step = build(shape)
    for _ in range(args.warmup):
        step()
    turns: Iterable[Any] = sys.stdin if args.wait else range(args.steps)
    seconds = []
    for _ in turns:
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
        if args.wait:
            print(seconds[-1], flush=True)
    found = {
        "name": name,
        "median_seconds": statistics.median(seconds) if seconds else None,
        "seconds": seconds,
        "peak_rss_gb": peak_rss() / 1e9,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **asdict(shape),
    }
    print(json.dumps(found), flush=True)


def peak_rss() -> int:
    """Peak resident memory in bytes. Not getrusage's, which a process inherits from the one that started it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Stepper:
    """`with Stepper([python, "-m", "benchmarks.specforge_step", ...]) as other: alternate({"other": other.step, ...})`"""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = [*command, "--wait"]
        self.found: dict[str, Any] = {}
        """What the process reports when it ends."""

    def __enter__(self) -> Stepper:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def step(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"{' '.join(self.command)} ended before its step; its error is above")
        return float(answer)

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        last = self.process.stdout.read()
        if self.process.wait() == 0:
            self.found = json.loads(last.splitlines()[-1])
