"""torchrun: two processes take the steps that one takes with twice the accumulation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specauf.cli import main

pytestmark = pytest.mark.usefixtures("own_cache")

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ON_TWO = [*TORCHRUN, "-m", "specauf.cli"]


def train(world: Path, out: str, *changes: str, processes: int = 1) -> list[dict[str, object]]:
    arguments = ["train", str(world / "recipe.yaml"), "--set", f"out={world}/{out}", "train.eval_every=4", *changes]
    if processes == 1:
        assert main(arguments) == 0
    else:
        done = subprocess.run([sys.executable, *ON_TWO, *arguments], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("drafter:") == 1, "the main rank alone speaks"
    return [json.loads(line) for line in (world / out / "log.jsonl").read_text().splitlines()]


def assert_same_run(world: Path, ours: list[dict[str, object]], theirs: list[dict[str, object]], *outs: str) -> None:
    same = ("step", "loss", "grad_norm", "tokens", "blocks", "epoch", "r_active", "first_error", "replay_tau")
    for a, b in zip(ours, theirs, strict=True):
        for key in same:
            assert (key in a) == (key in b) and a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-5), (
                a["step"],
                key,
            )
    first, second = (load_file(world / out / "checkpoint" / "model.safetensors") for out in outs)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_ranks_go_on_as_one_process_with_twice_the_accumulation_would(world: Path) -> None:
    run = ("features.cache=true", "train.batch_size=2")
    train(world, "one", *run, "train.accumulation=2", "train.max_steps=3")
    state = world / "one" / "checkpoint" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"max_steps": 6}))  # as if it had been killed there
    shutil.copytree(world / "one", world / "two")
    one = train(world, "one", *run, "train.accumulation=2")
    two = train(world, "two", *run, processes=2)
    assert len(one) == 6
    assert_same_run(world, one, two, "one", "two")


def test_a_mistake_is_said_once(world: Path) -> None:
    arguments = ["train", str(world / "recipe.yaml"), "--set", f"out={world}/none", "data.path=nowhere.jsonl"]
    done = subprocess.run([sys.executable, *ON_TWO, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("data.path: no such data file: nowhere.jsonl") == 1
    assert "Connection closed" not in done.stderr and "barrier" not in done.stderr


def test_a_rank_that_fails_alone_says_why_and_waits_for_nobody(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text("""
import torch
from torch import distributed

from specauf.train.distributed import ranks_of_run

with ranks_of_run() as ranks:
    if not ranks.main:
        distributed.destroy_process_group = lambda: print("waits for the others")
        raise RuntimeError("out of memory, say")
    distributed.all_reduce(torch.ones(1))
""")
    done = subprocess.run([sys.executable, *TORCHRUN, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode and "RuntimeError: out of memory, say" in done.stderr
    assert "waits for the others" not in done.stdout


def test_a_mistake_that_one_rank_alone_finds_is_said_too(tmp_path: Path) -> None:
    """And said first: a peer that loses the connection would have torchrun end this one before it speaks."""
    script = tmp_path / "mistake.py"
    script.write_text("""
import torch
from torch import distributed

from specauf.console import reported
from specauf.strict import UserError
from specauf.train.distributed import ranks_of_run


def work():
    with ranks_of_run() as ranks:
        if ranks.main:
            raise UserError("this recording is damaged")
        distributed.all_reduce(torch.ones(1))
    return 0


raise SystemExit(reported(work, []))
""")
    done = subprocess.run([sys.executable, *TORCHRUN, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode and done.stderr.count("specauf: this recording is damaged") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_no_thread_of_the_ranks_outlives_their_block(tmp_path: Path) -> None:
    """One that is still there when Python ends may abort the process after all the work is done."""
    script = tmp_path / "block.py"
    script.write_text("""
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from specauf.train.distributed import ranks_of_run


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def forward():
    layer = torch.nn.Linear(4, 4)
    fully_shard(layer)
    layer(torch.ones(1, 4))


before = threads()
with ranks_of_run() as ranks:
    import torch._dynamo  # as training does, within the block

    forward()
    within = threads()
print(f"let go: {within > before == threads()}\\n", end="")  # one write, so that the ranks' lines stay whole
""")
    done = subprocess.run([sys.executable, *TORCHRUN, str(script)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["let go: True"] * 2, done.stdout + done.stderr


def test_domino_on_a_target_that_is_spread_over_the_ranks(world: Path) -> None:
    domino = ("drafter.kind=domino", "objective.variant=f-auf-d", "train.batch_size=2", "train.max_steps=4")
    one = train(world, "whole", *domino, "train.accumulation=2")
    two = train(world, "spread", *domino, "train.shard_target=true", processes=2)
    assert_same_run(world, one, two, "whole", "spread")
    assert json.loads((world / "spread" / "run.json").read_text())["processes"] == 2
