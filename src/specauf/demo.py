"""`specauf demo`: two drafters from the same start, measured on the same recordings, in a budget of minutes.

The budget is turned once, from measured rates, into numbers of conversations and steps. They are kept in plan.json, so that
an interrupted demo resumes with the same plan and a finished one is read back from disk.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specauf import provenance
from specauf.bench.compare import record_tasks
from specauf.bench.runner import LiveCheck, Recorded, check_live, comparison, measure
from specauf.config import LOOKUP, RunConfig, SamplingConfig, digest, override
from specauf.console import Console
from specauf.data.features import estimate_gb, extract
from specauf.decode.generate import Generation
from specauf.decode.propose import DrafterProposer, PromptLookup
from specauf.decode.replay import Replayable
from specauf.drafter.checkpoint import fingerprint, load_drafter, save_drafter
from specauf.drafter.dflash import DFlash
from specauf.files import atomic_write_text, read_json, read_rows
from specauf.report import page
from specauf.run import (
    data_dir,
    feature_cache,
    geometry_of,
    open_run,
    prepare_data,
    require_trainable,
    settings_of,
    step_note,
)
from specauf.strict import UserError, counted, from_dict, require, to_dict
from specauf.target import Target
from specauf.train.calibration import calibrate
from specauf.train.loop import Trainer

SHARE_FEATURES, SHARE_TRAINING = 0.26, 0.45
"""Shares of the budget for writing the target's features and for both trainings. The rest records, replays and decodes."""
LIVE_PROMPTS, LIVE_TOKENS = 2, 64
"""Prompts per task that are also decoded live, and tokens of each, if so many were recorded."""
EQUAL_STEPS = "auf@decay-steps"
VARIANTS = {"decay": "decay-only", "auf": "b-auf-d"}
"""The two objectives for a Domino drafter: the paper's baseline, and its best variant under greedy decoding."""

DEMO = from_dict(
    RunConfig,
    {
        "data": {"max_conversations": 1500},
        "features": {"cache": True},
        "eval": {"prompts": 32, "max_new_tokens": 128, "batch_size": 32},
    },
)
"""The demo's recipe; recipes/smollm2_cpu.yaml is the same for one drafter, trained longer."""


def demo_recipe(overrides: Sequence[str]) -> RunConfig:
    """The demo's recipe with overrides. Raises `ConfigError` when they set train.max_steps or train.minutes, which the budget
    decides, or a temperature above 0: live and plain decoding are compared token for token."""
    base = override(DEMO, overrides)
    planned = base.train.max_steps is None and base.train.minutes is None
    require(planned, "the demo turns its own --minutes into train.max_steps")
    require(base.eval.sampling.temperature == 0, "the demo decodes at eval.sampling.temperature=0; use specauf eval")
    return base


@dataclass(frozen=True)
class Plan:
    """What the budget was turned into. Frozen in plan.json."""

    minutes: float
    examples: int
    steps: dict[str, int]
    seconds_per_step: dict[str, float]
    """Calibrated: decay's at initial weights; then AUF's, and decay's again, both at decay's final weights."""
    tokens_per_second: float
    """Rate of feature extraction."""


def _read_plan(path: Path) -> Plan:
    remedy = "delete it, and the budget is planned anew"
    try:
        return Plan(**read_json(path, remedy))
    except TypeError as error:
        raise UserError(f"{path} is no plan of a demo ({error}): {remedy}") from None


def _write(plan: Plan, path: Path) -> None:
    atomic_write_text(path, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")


def run_demo(base: RunConfig, minutes: float, console: Console) -> Path:
    """Everything from data to page. Returns the page's path."""
    began = time.perf_counter()
    out = Path(base.out)
    target = Target.load(base.target)
    console.say(f"target {target.name}, fingerprint {target.fingerprint()}")
    prepared = prepare_data(base, target)
    for line in prepared.ledger.lines():
        console.say("  " + line)
    require_trainable(base, target, prepared)
    box = _provenance(base, target, prepared.train.meta)  # now: a commit made while this runs is not what it runs
    block, thinking = base.drafter.block_size, base.data.enable_thinking
    tasks = record_tasks(target, base.eval, block, thinking, data_dir(base), out, console)

    plan_path = out / "plan.json"
    plan = _read_plan(plan_path) if plan_path.is_file() else None
    if plan and plan.minutes != minutes:
        console.say(f"{plan_path} holds a plan for {plan.minutes:g} minutes: continuing with that plan")
    if plan and plan.examples > len(prepared.train):
        raise UserError(
            f"{plan_path} is a plan for {plan.examples} conversations, and there are {len(prepared.train)}: other data need "
            "another `out`"
        )
    if plan is None:
        examples, rate = _affordable(base, target, prepared, minutes)
        plan = Plan(minutes, examples, {}, {}, rate)
        _write(plan, plan_path)
    lengths = [len(prepared.train[i].input_ids) for i in range(plan.examples)]
    with console.progress(f"features of {plan.examples} conversations", sum(lengths)) as advance:
        features = feature_cache(base, target, prepared, plan.examples, advance)

    trainers = {name: open_run(_variant(base, name), target, prepared, features) for name in ("decay", "auf")}
    for name, trainer in trainers.items():
        if name not in plan.steps:
            _plan_steps(plan, name, trainers, console)
            _write(plan, plan_path)
        trainer.max_steps = trainer.max_steps or plan.steps[name]
        _train(trainer, name, plan.steps["decay"], console)

    drafters = {name: trainer.drafter for name, trainer in trainers.items()}
    drafters[EQUAL_STEPS] = load_drafter(out / "auf" / "equal-steps", target.device)
    proposers: dict[str, Replayable] = {name: DrafterProposer(drafter, target) for name, drafter in drafters.items()}
    proposers[LOOKUP] = PromptLookup(block)
    trajectories = sum(len(task.trajectories) for task in tasks.values())
    with console.progress("replaying every drafter", trajectories * len(proposers)) as advance:
        evaluation, rounds = measure(target, proposers, tasks, advance)
    compared = comparison(tasks, rounds, "auf", "decay", "equal time")
    compared += comparison(tasks, rounds, EQUAL_STEPS, "decay", "equal steps")
    live = _decode_live(target, proposers["auf"], tasks, base.eval.sampling, console)
    results = {
        "title": "Two drafters, one target, the same minutes",
        "created": box["created"],
        "command": shlex.join(["specauf", *sys.argv[1:]]),
        "provenance": box,
        "settings": {**settings_of(base), "conversations": plan.examples, "minutes": plan.minutes},
        "ledger": prepared.ledger.to_dict(),
        "methods": _methods(base, plan, trainers, drafters),
        "evaluation": evaluation,
        "comparisons": compared,
        "training": {name: read_rows(out / name / "log.jsonl") for name in trainers},
        **_live_section(target, live, tasks),
    }
    index = page.write(results, out / "report")
    console.say(f"done in {(time.perf_counter() - began) / 60:.1f} minutes")
    return index


def _variant(base: RunConfig, name: str) -> RunConfig:
    domino = base.drafter.kind == "domino"
    objective = f"objective.variant={VARIANTS[name]}" if domino else f"objective.name={name}"
    return dataclasses.replace(override(base, [objective]), out=str(Path(base.out) / name))


def _affordable(base: RunConfig, target: Target, prepared: Any, minutes: float) -> tuple[int, float]:
    """(How many conversations' features fit in their share of the budget, the measured tokens per second)."""
    ids = geometry_of(base, target).target_layer_ids
    sample = [prepared.train[i].input_ids for i in range(min(12, len(prepared.train)))]
    extract(target, sample[:4], ids)  # warm-up
    began = time.perf_counter()
    extract(target, sample, ids)
    rate = sum(map(len, sample)) / (time.perf_counter() - began)
    allowed = 1e6 * base.features.max_gb / estimate_gb(10**6, ids, int(target.config.hidden_size), base.features)
    budget, total, count = min(rate * minutes * 60 * SHARE_FEATURES, 0.95 * allowed), 0, 0
    while count < len(prepared.train) and total < budget:
        total += len(prepared.train[count].input_ids)
        count += 1
    return max(count, base.train.batch_size), rate


def _plan_steps(plan: Plan, name: str, trainers: Mapping[str, Trainer], console: Console) -> None:
    """Set decay's steps from the budget, and AUF's from decay's, so that both take the same time.

    The cost of an AUF step grows with tau, and at initial weights it is too low, so the two are timed at decay's final
    weights. The page shows the training seconds that both really took.
    """
    decay, auf = trainers["decay"], trainers["auf"]
    console.say("calibrating: a few steps, undone afterwards")
    if name == "decay":
        plan.seconds_per_step["decay"] = calibrate([decay], steps=10)[0]
        plan.steps["decay"] = max(20, int(plan.minutes * 60 * SHARE_TRAINING / 2 / plan.seconds_per_step["decay"]))
        return
    mine, theirs = calibrate([auf, decay], steps=10, weights=decay.drafter.state_dict())
    plan.seconds_per_step.update({"auf": mine, "decay, trained": theirs})
    plan.steps["auf"] = max(20, round(plan.steps["decay"] * theirs / mine))


def _train(trainer: Trainer, name: str, equal_steps: int, console: Console) -> None:
    snapshot = Path(trainer.config.out) / "equal-steps"
    total = trainer.max_steps or 0
    with console.progress(f"training {name}, {total} steps", total, trainer.done) as advance:

        def on_step(row: dict[str, Any]) -> None:
            if name == "auf" and row["step"] == equal_steps:
                save_drafter(trainer.drafter, snapshot)
            advance(1, step_note(row))

        trainer.run(on_step=on_step)
    if name == "auf" and not snapshot.is_dir():  # fewer steps than decay's: the end is the snapshot
        save_drafter(trainer.drafter, snapshot)


def _methods(
    base: RunConfig, plan: Plan, trainers: dict[str, Trainer], drafters: Mapping[str, DFlash]
) -> list[dict[str, Any]]:
    gamma = trainers["decay"].branches[0].objective.gamma
    labels = {"decay": f"decay (γ={gamma:g})", "auf": "AUF", EQUAL_STEPS: "AUF at decay's steps"}
    if base.drafter.kind == "domino":
        labels = {name: label.replace("AUF", "B-AUF+D") for name, label in labels.items()}
    methods: list[dict[str, Any]] = []
    for name, label in labels.items():
        log = read_rows(Path(base.out) / ("auf" if name == EQUAL_STEPS else name) / "log.jsonl")
        if name == EQUAL_STEPS:
            log = log[: plan.steps["decay"]]
        methods.append(
            {
                "name": name,
                "label": label,
                "kind": "drafter",
                "steps": len(log),
                "weights": fingerprint(drafters[name]),
                "seconds_per_step": statistics.median(row["seconds"] for row in log),
                "train_seconds": sum(row["seconds"] for row in log),
                "tokens_seen": sum(row["tokens"] for row in log),
                "blocks_seen": sum(row["blocks"] for row in log),
                "head_rows_per_block": statistics.fmean(row["head_rows"] for row in log),
                "note": "taken mid-schedule, where the other run ended" if name == EQUAL_STEPS else "",
            }
        )
    return [*methods, {"name": LOOKUP, "label": "prompt lookup", "kind": "lookup", "note": "no parameters"}]


def _decode_live(
    target: Target, proposer: Replayable, tasks: dict[str, Recorded], sampling: SamplingConfig, console: Console
) -> dict[str, LiveCheck]:
    checks = {}
    with console.progress("decoding for real, plain and speculative", LIVE_PROMPTS * len(tasks)) as advance:
        for name, task in tasks.items():
            some = task.trajectories[:LIVE_PROMPTS]
            limit = min(LIVE_TOKENS, task.limit)
            checks[name] = check_live(target, proposer, some, limit, sampling=sampling, on_done=advance)
    return checks


def segments(target: Target, generation: Generation) -> list[dict[str, str]]:
    """The text, cut where it changes between accepted draft tokens and the target's own."""
    parts: list[tuple[bool, list[int]]] = []
    for token, drafted in zip(generation.tokens, generation.drafted, strict=True):
        if not parts or parts[-1][0] != drafted:
            parts.append((drafted, []))
        parts[-1][1].append(token)
    decode = target.require_tokenizer().decode
    return [{"text": str(decode(tokens)), "kind": "draft" if drafted else "target"} for drafted, tokens in parts]


def _live_section(target: Target, checks: dict[str, LiveCheck], tasks: dict[str, Recorded]) -> dict[str, Any]:
    live, problems, ties, count = [], [], [], 0
    for name, check in checks.items():
        count += len(check.generations)
        problems += check.problems
        ties += check.near_ties
        for trajectory, generation, plain in zip(
            tasks[name].trajectories, check.generations, check.plain, strict=False
        ):
            rounds = max(1, len(generation.rounds))
            live.append(
                {
                    "task": name,
                    "id": trajectory.id,
                    "prompt": target.require_tokenizer().decode(trajectory.prompt, skip_special_tokens=True),
                    "segments": segments(target, generation),
                    "tau": 1 + sum(r.accepted for r in generation.rounds) / rounds,
                    "rounds": len(generation.rounds),
                    "tokens_per_second": len(generation.tokens) / generation.seconds,
                    "plain_tokens_per_second": len(plain.tokens) / plain.seconds,
                }
            )
    seconds = {k: sum(getattr(c, f"{k}_seconds") for c in checks.values()) for k in ("live", "replay", "prefill")}
    told = "; ".join(problems) or f"{counted(count, 'prompts')}, {counted(len(ties), 'near ties')}"
    return {
        "live": live,
        "checks": [
            {
                "name": "speculative output is the target's own greedy output; live rounds are the replayed rounds",
                "value": told,
                "passed": not problems,
            }
        ],
        "speedups": [
            {
                "name": "replay against live decoding, batch 1",
                "ratio": seconds["live"] / seconds["replay"],
                "note": "same prompts, features cached",
            },
            {
                "name": "the same, computing the features counted",
                "ratio": seconds["live"] / (seconds["replay"] + seconds["prefill"]),
                "note": "same prompts",
            },
        ],
    }


def _provenance(base: RunConfig, target: Target, meta: dict[str, Any]) -> dict[str, Any]:
    return {
        **provenance.for_report(digest(base)),
        "target": {"name": target.display_name, "fingerprint": target.fingerprint()},
        "data": {"name": base.data.path, "fingerprint": meta["key"]},
        "config": to_dict(base),
    }
