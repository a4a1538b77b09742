"""The commands on another device than the CPU: nothing mixes the two, and the numbers are the CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from specauf.cli import main

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).parents[2]


def commands(world: Path, out: Path, device: str) -> list[list[str]]:
    recipe, where = str(world / "recipe.yaml"), f"target.device={device}"

    def train(name: str, *more: str) -> list[str]:
        return ["train", recipe, "--set", where, f"out={out / name}", "train.max_steps=3", *more]

    def evaluate(name: str, *more: str) -> list[str]:
        tasks = ["--eval.tasks", "birds", "--eval.tasks-dir", str(world / "tasks"), "--eval.max-new-tokens", "8"]
        where = ["--target.device", device, "--out", str(out / f"eval-{name}")]
        return ["eval", str(out / name / "checkpoint"), *tasks, *where, *more]

    def generate(name: str, *more: str) -> list[str]:
        return [
            "generate",
            str(out / name / "checkpoint"),
            "the cat",
            "--max-new-tokens",
            "12",
            "--target.device",
            device,
            *more,
        ]

    rolled = str(out / "rolled")
    return [
        train("dflash", "features.cache=true"),
        train("labels", "objective.labels=target", "objective.name=pard2", "drafter.draft_vocab_size=100"),
        train("domino", "drafter.kind=domino", "train.eval_every=2"),
        ["rollout", recipe, "--set", where, "--out", rolled, "--turns", "2", "--max-tokens", "200"],
        train("streak", f"data.path={rolled}", "objective.name=streak", "drafter.init_layers=[1]"),
        evaluate("dflash", "--live", "1"),
        evaluate("domino", "--lookup-first", "2"),
        evaluate("streak", "--eval.sampling.temperature", "1"),
        generate("dflash", "--candidates", "3"),
        generate("domino", "--sampling.temperature", "1", "--sampling.proposal", "sampled"),
    ]


def told(out: Path) -> dict[str, Any]:
    """What the commands measured, less what depends on the clock."""
    found: dict[str, Any] = {}
    for log in out.glob("*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found[log.parent.name] = [
            row[key] for row in rows for key in ("loss", "grad_norm", "replay_tau", "r_active") if key in row
        ]
    for results in out.glob("*/results.json"):
        kept = json.loads(results.read_text())
        methods = kept["evaluation"]["birds"]["methods"]
        found[results.parent.name] = [methods[m]["tau"] for m in sorted(methods)]
        assert all(check["passed"] for check in kept["checks"]), kept["checks"]
    return found


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no backend written in Python",
)
def test_every_command_runs_on_one_device(world: Path, tmp_path: Path) -> None:
    for command in commands(world, tmp_path / "cpu", "cpu"):
        assert main(command) == 0, command
    (tmp_path / "commands.json").write_text(json.dumps(commands(world, tmp_path / "gpu", "gpu:0")))
    run = subprocess.run(
        [sys.executable, "-m", "tests.e2e.pretended_gpu", str(tmp_path / "commands.json")],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    ours, theirs = told(tmp_path / "cpu"), told(tmp_path / "gpu")
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name, numbers in ours.items():
        assert theirs[name] == pytest.approx(numbers, rel=1e-4), name
