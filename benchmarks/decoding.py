"""Replay against live decoding, and live decoding against z-lab's, on the embedded target.

    python -m benchmarks.decoding

The drafter is untrained unless `SPECAUF_BENCH_DRAFTER` names a checkpoint for the embedded target. The note gives rounds and
tau, since rounds are what live decoding costs. The comparison with PyPI `dflash` runs in that package's environment
(`bash tests/interop/run.sh dflash` builds it), both decoders in turns in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers.cache_utils import DynamicLayer

from benchmarks.common import Row, alternate, main
from specauf.bench.tasks import load_task, render_prompts
from specauf.config import RunConfig, SamplingConfig, TargetConfig
from specauf.decode.cache import RoomyLayer
from specauf.decode.generate import generate
from specauf.decode.propose import DrafterProposer
from specauf.decode.replay import record, replay, trajectory_features
from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.drafter.dflash import DFlash
from specauf.run import new_drafter
from specauf.target import Target

ZLAB = Path(".venv-interop/bin/python")
PROMPTS, LIMIT = 4, 64
ROWS = 64


def scene() -> tuple[Target, DFlash, list[tuple[str, list[int]]]]:
    target = Target.load(TargetConfig())
    given = os.environ.get("SPECAUF_BENCH_DRAFTER")
    drafter = load_drafter(given) if given else new_drafter(RunConfig(), target)
    prompts = render_prompts(target, load_task("humaneval")[:PROMPTS], enable_thinking=False)
    return target, drafter, [(d.id, d.prompt) for d in prompts]


def rows() -> Iterator[Row]:
    target, drafter, prompts = scene()
    how = DrafterProposer(drafter, target)
    texts = record(target, prompts, limit=LIMIT, block_size=how.block_size, sampling=SamplingConfig())
    features = trajectory_features(target, texts, how.layer_ids)
    one = [[ids] for _, ids in prompts]
    ways = {
        "live": lambda: [generate(target, how, p, max_new_tokens=LIMIT) for p in one],
        "batched": lambda: generate(target, how, [ids for _, ids in prompts], max_new_tokens=LIMIT),
        "replay": lambda: replay(how, texts, features, LIMIT),
        "prefill": lambda: trajectory_features(target, texts, how.layer_ids),
    }
    seconds = alternate(ways, rounds=3)
    rounds = [r for row in replay(how, texts, features, LIMIT) for r in row]
    tau = 1 + sum(r.accepted for r in rounds) / len(rounds)
    at = f"{PROMPTS} HumanEval prompts, {LIMIT} tokens each, B={how.block_size}"
    note = f"{seconds['replay']:.3f} s against {seconds['live']:.2f} s, {len(rounds)} rounds, tau {tau:.2f}"
    yield Row(
        "replay", "live decoding, batch 1", f"{at}, features cached", seconds["live"] / seconds["replay"], 50, note=note
    )
    counted = seconds["replay"] + seconds["prefill"]
    yield Row("replay", "live decoding, batch 1", f"{at}, prefill counted", seconds["live"] / counted)
    yield Row(
        "replay", f"live decoding, batch {PROMPTS}", f"{at}, features cached", seconds["batched"] / seconds["replay"]
    )
    yield cache_row(target)
    if not ZLAB.exists():
        print(f"skipped: {ZLAB} is not there; bash tests/interop/run.sh dflash builds it")
        return
    with tempfile.TemporaryDirectory() as directory:
        save_drafter(drafter, directory)
        command = [str(ZLAB), "-m", "benchmarks.decoding", directory, str(torch.get_num_threads())]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    note = f"{found['ours']:.2f} s against {found['theirs']:.2f} s, {found['rounds']} rounds each"
    yield Row("live decoding: time", "dflash 0.1.0", at, found["ours"] / found["theirs"], 1.0, below=True, note=note)


def cache_row(target: Target) -> Row:
    """Many rows at once, where earlier keys and values are most of what moves in memory."""
    prompts = [d.prompt for d in render_prompts(target, load_task("humaneval")[:ROWS], enable_thinking=False)]

    def plain() -> None:
        generate(target, None, prompts, max_new_tokens=LIMIT, eos_ids=frozenset())

    def concatenating() -> None:
        with mock.patch.object(RoomyLayer, "update", DynamicLayer.update):
            plain()

    seconds = alternate({"ours": plain, "theirs": concatenating}, rounds=3)
    note = f"{seconds['ours']:.1f} s against {seconds['theirs']:.1f} s"
    at = f"{len(prompts)} HumanEval prompts at once, {LIMIT} tokens each"
    return Row("plain decoding: time", "a cache that concatenates", at, seconds["ours"] / seconds["theirs"], note=note)


def beside_zlab(directory: str, threads: str) -> None:
    """In z-lab's environment: the same checkpoint and prompts through both decoders, prompt by prompt in turns."""
    from dflash.model import DFlashDraftModel, dflash_generate

    torch.set_num_threads(int(threads))
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # dflash times with it
    target, _, prompts = scene()
    drafter = load_drafter(directory)
    theirs = DFlashDraftModel.from_pretrained(directory, dtype=torch.float32).eval()
    how, eos = DrafterProposer(drafter, target), sorted(target.eos_ids())
    spent, rounds = {"ours": 0.0, "theirs": 0.0}, 0
    for turn in range(3):
        for _, ids in prompts:
            began = time.perf_counter()
            (out,) = generate(target, how, [ids], max_new_tokens=LIMIT)
            middle = time.perf_counter()
            told = dflash_generate(
                theirs,
                target.model,
                torch.tensor([ids]),
                max_new_tokens=LIMIT,
                stop_token_ids=eos,
                return_stats=True,
            )
            after = time.perf_counter()
            if turn:  # the first turn warms up
                # Ours is scaled to their rounds: theirs shortens its last blocks, so it may take one round more or less.
                each = len(told.acceptance_lengths) / max(1, len(out.rounds))
                spent["ours"] += (middle - began) * each
                spent["theirs"] += after - middle
                rounds += len(told.acceptance_lengths)
    print(json.dumps({**spent, "rounds": rounds}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        beside_zlab(*sys.argv[1:])
    else:
        main(rows)
