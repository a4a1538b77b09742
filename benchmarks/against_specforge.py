"""Our training step against SpecForge 0.2.0's own, in turns, each in its own environment and process.

    bash tests/interop/run.sh specforge     # builds SpecForge's environment, once
    python -m benchmarks.against_specforge

Same shapes, same threads, features cached on both sides. SpecForge puts every slot through the head whatever the objective.
By default it computes each slice of the head's logits twice, to save memory; one row is without that recomputation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import Row, alternate, main
from benchmarks.step import TAU
from benchmarks.stepping import SHAPES, Stepper

PYTHON = Path(".venv-interop-specforge/bin/python")
REACH = {(8, 32): 3.2, (16, 32): 4.0, (16, 128): 4.0}


def rows() -> Iterator[Row]:
    if not PYTHON.exists():
        print(f"skipped: {PYTHON} is not there; bash tests/interop/run.sh specforge builds it")
        return
    for block, anchors in SHAPES:
        shape = ["--block-size", str(block), "--anchors", str(anchors), "--threads", str(torch.get_num_threads())]
        theirs = Stepper([str(PYTHON), "-m", "benchmarks.specforge_step", *shape, "--gamma", "7"])
        auf, decay = (Stepper([sys.executable, "-m", "benchmarks.step", name, *shape]) for name in ("auf", "decay"))
        with theirs, auf, decay:
            ways = {"specforge": theirs.step, "auf": auf.step, "decay": decay.step}
            seconds = alternate(ways, rounds=2 if anchors > 32 else 5)
        at = f"B={block}, {anchors} anchors, 4 x 384 tokens, 2 layers, SmolLM2's head, tau_train {TAU}"
        for name, other, reach in (("AUF", auf, REACH[block, anchors]), ("decay", decay, 1.4)):
            spent = seconds[name.lower()]
            note = f"{spent:.2f} s against {seconds['specforge']:.2f} s"
            yield Row(f"training step, {name}", "SpecForge 0.2.0", at, seconds["specforge"] / spent, reach, note=note)
            ours, peak = other.found["peak_rss_gb"], theirs.found["peak_rss_gb"]
            bound = 1 / 3 if anchors == 128 else None
            note = f"{ours:.2f} GB against {peak:.2f} GB, whole process"
            yield Row("its peak memory", "SpecForge 0.2.0", at, ours / peak, bound, below=True, note=note)
        if (block, anchors) == (16, 32):
            plain = Stepper([*theirs.command[:-1], "--chunk-blocks", "0"])
            with plain, Stepper(auf.command[:-1]) as again:
                seconds = alternate({"plain": plain.step, "auf": again.step}, rounds=3)
            note = f"{seconds['auf']:.2f} s against {seconds['plain']:.2f} s, {plain.found['peak_rss_gb']:.2f} GB"
            unsaved = "SpecForge 0.2.0, nothing recomputed"
            yield Row("training step, AUF", unsaved, at, seconds["plain"] / seconds["auf"], note=note)


if __name__ == "__main__":
    main(rows)
