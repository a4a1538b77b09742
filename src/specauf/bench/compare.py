"""`specauf eval`: several checkpoints and prompt lookup over the same recordings, as a results dict for the report."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from specauf import provenance
from specauf.bench.runner import LiveCheck, Recorded, check_live, comparison, measure, recorded
from specauf.bench.selection import selected
from specauf.bench.server import check_server
from specauf.bench.tasks import describe_task, load_task, render_prompts
from specauf.config import LOOKUP, EvalConfig, SamplingConfig
from specauf.decode.generate import Generation, require_decodable
from specauf.decode.propose import DrafterProposer, LookupFirst, PromptLookup
from specauf.decode.replay import Replayable, check_reach
from specauf.decode.select import Selection
from specauf.decode.server import Server
from specauf.drafter.checkpoint import fingerprint, load_drafter
from specauf.drafter.dflash import DFlash
from specauf.drafter.domino import Domino
from specauf.files import atomic_write_text, json_text, set_aside
from specauf.strict import ConfigError, UserError, counted, require, to_dict
from specauf.target import Target

log = logging.getLogger(__name__)


class Progress(Protocol):
    def progress(self, label: str, total: float) -> AbstractContextManager[Callable[..., None]]: ...


def open_checkpoints(checkpoints: Sequence[Path]) -> dict[str, DFlash]:
    """Drafters that can share a table, by the name of their run, on the CPU.

    Raises `UserError` when they differ in block size or thinking flag, or when a name occurs twice or is prompt lookup's.
    """
    if not checkpoints:
        raise UserError(
            "give at least one drafter directory, before the options: a list such as --eval.tasks takes all that follows"
        )
    names = [_name(path) for path in checkpoints]
    if LOOKUP in names:
        raise UserError(
            f"the name {LOOKUP} is reserved for prompt lookup, which is in every table: rename the run's directory"
        )
    if len(set(names)) < len(names):
        raise UserError(f"checkpoints must have different names, got {', '.join(names)}")
    drafters = {name: load_drafter(path) for name, path in zip(names, checkpoints, strict=True)}
    blocks = {d.config.block_size for d in drafters.values()}
    if len(blocks) > 1:
        raise UserError(f"checkpoints with block sizes {sorted(blocks)} cannot share one table: evaluate them apart")
    if len({_thinking(d) for d in drafters.values()}) > 1:
        raise UserError("the checkpoints were trained with different enable_thinking: evaluate them apart")
    return drafters


def _thinking(drafter: DFlash) -> bool:
    return bool(drafter.config.extra.get("enable_thinking", False))


def evaluate(
    target: Target,
    drafters: Mapping[str, DFlash],
    config: EvalConfig,
    out: Path,
    data_dir: Path | None,
    live: int,
    console: Progress,
    selection: Selection | None = None,
    candidate_pool: int = 0,
    lookup_first: int = 0,
    lookup_block: int = 0,
    server: Server | None = None,
) -> tuple[dict[str, Any], bool]:
    """(results, whether every live check passed). Writes `out/results.json`; the first drafter is the baseline.

    Three options add rows. With `selection`, every drafter is also decoded live with self-selection. With `candidate_pool`,
    every Domino drafter is also measured with only that many candidates corrected. With `lookup_first`, every drafter is also
    measured behind prompt lookup, in blocks of `lookup_block`, by default the drafters' block size. A `server` that was started
    with the only drafter is asked every prompt, and must agree with replay.
    """
    if server and (config.sampling.temperature or len(drafters) > 1):
        raise ConfigError("--server compares text and rounds of one drafter, at temperature 0")
    if server:
        server.counters()  # refused now, if it has none
    if live and config.sampling.temperature:
        raise ConfigError("--live compares token for token, so it needs temperature 0")
    require(live >= 0, f"--live must be at least 0, got {live}")
    if selection and any(isinstance(d, Domino) for d in drafters.values()):
        raise ConfigError("--candidates draws the slots of a block one by one: Domino's depend on one another")
    first = next(iter(drafters.values()))
    block, flag = first.config.block_size, _thinking(first)
    lookup = lookup_block or block
    proposers, methods, pairs = _lineup(target, drafters, candidate_pool, lookup_first, lookup)
    if selection:  # now, not when all is recorded; a drawn proposal is refused there
        require_decodable(target, proposers[next(iter(drafters))], SamplingConfig(), selection)
    box = provenance.for_report()  # now: a commit made while this runs is not what it runs
    tasks = record_tasks(target, config, max(block, lookup), flag, data_dir, out, console)
    trajectories = sum(len(task.trajectories) for task in tasks.values())
    with console.progress("replaying", trajectories * len(proposers)) as advance:
        evaluation, rounds = measure(target, proposers, tasks, advance)
    results: dict[str, Any] = {
        "title": "Acceptance by replay",
        "created": box["created"],
        "command": shlex.join(["specauf", *sys.argv[1:]]),
        "provenance": {**box, "target": {"name": target.display_name, "fingerprint": target.fingerprint()}},
        "settings": {
            "block size": block,
            **({"block size of prompt lookup": lookup} if lookup != block else {}),
            **({"lookup first where so many tokens repeat": lookup_first} if lookup_first else {}),
            "new tokens": config.max_new_tokens,
            "conversations a task": config.prompts,
            **_sampling(config.sampling),
        },
        "methods": methods,
        "evaluation": evaluation,
        "comparisons": [row for a, b in pairs for row in comparison(tasks, rounds, a, b)],
        "checks": [],
        "speedups": [],
    }
    if selection:
        alone = {n: p for n, p in proposers.items() if isinstance(p, DrafterProposer)}
        results["selection"], results["checks"] = selected(
            target, alone, tasks, rounds, selection, config, console.progress
        )
    passed = all(check["passed"] for check in results["checks"])
    _keep_others(out / "results.json", results)
    atomic_write_text(out / "results.json", json_text(results))  # whatever happens to the live checks
    plain: dict[str, list[Sequence[Generation]]] = {task: [(), ()] for task in tasks}
    for name, proposer in proposers.items():
        for task, recording in tasks.items() if live else ():
            passed &= _live(target, name, proposer, recording, live, config, results, plain[task], console)
    if server:
        (name,) = drafters
        for task, recording in tasks.items():
            with console.progress(f"asking the server on {recording.label}", len(recording.trajectories)) as advance:
                given = (server, target, recording, rounds[task][name], config.sampling, block)
                served = check_server(*given, advance)
            passed &= served.passed
            what = f"{name}, {recording.label}, served by vLLM: its text is the target's, its rounds are replay's"
            results["checks"].append({"name": what, "value": str(served), "passed": served.passed})
    atomic_write_text(out / "results.json", json_text(results))
    return results, passed


def _lineup(
    target: Target, drafters: Mapping[str, DFlash], candidate_pool: int, lookup_first: int, lookup_block: int
) -> tuple[dict[str, Replayable], list[dict[str, Any]], list[tuple[str, str]]]:
    """What is measured, by name; the rows of the report's `methods`; and what is compared with what."""
    methods: list[dict[str, Any]] = [
        {"name": n, "label": n, "kind": "drafter", "steps": d.config.extra.get("steps"), "weights": fingerprint(d)}
        for n, d in drafters.items()
    ]
    drafters = {name: drafter.to(target.embed_weight) for name, drafter in drafters.items()}  # its dtype, as live
    alone = {n: DrafterProposer(d, target) for n, d in drafters.items()}
    causal = [n for n, d in drafters.items() if isinstance(d, Domino)] if candidate_pool else []
    if candidate_pool and not causal:
        raise ConfigError("--candidate-pool is for Domino drafters, and none of these is one")
    pools = {f"{n}, pool {candidate_pool}": n for n in causal}
    behind = {f"{n}, lookup first": n for n in drafters} if lookup_first else {}
    proposers: dict[str, Replayable] = {
        **alone,
        **{label: DrafterProposer(drafters[n], target, candidate_pool) for label, n in pools.items()},
        **{label: LookupFirst(alone[n], lookup_first, lookup_block) for label, n in behind.items()},
        LOOKUP: PromptLookup(lookup_block),
    }
    methods += [{"name": label, "label": label, "kind": "drafter", "of": n} for label, n in pools.items()]
    methods += [{"name": label, "label": label, "kind": "both", "of": n} for label, n in behind.items()]
    methods += [{"name": LOOKUP, "label": "prompt lookup", "kind": "lookup"}]
    baseline, *others = drafters
    pairs = [*((other, baseline) for other in others), *pools.items(), *behind.items()]
    pairs += [(name, LOOKUP) for name in [*drafters, *behind]]  # the competitor that costs nothing
    return proposers, methods, pairs


def _keep_others(path: Path, results: dict[str, Any]) -> None:
    """Set aside what is at `path` unless it measured the same as `results`."""

    def measured(found: Any) -> Any:
        methods = [(m["name"], m.get("weights")) for m in found["methods"]]
        return methods, found["settings"], found["provenance"]["target"], list(found["evaluation"])

    try:
        same = measured(json.loads(path.read_text(encoding="utf-8"))) == measured(json.loads(json_text(results)))
    except (ValueError, LookupError, TypeError, FileNotFoundError):
        same = False
    if path.exists() and not same:
        set_aside(path)
        log.warning("%s measured other drafters, tasks or settings: it is now %s.before", path, path.name)


def record_tasks(
    target: Target,
    config: EvalConfig,
    block_size: int,
    enable_thinking: bool,
    data_dir: Path | None,
    out: Path,
    console: Progress,
) -> dict[str, Recorded]:
    """The target's trajectories on every task, kept in `out/trajectories`. No task is recorded before all are read, and fit."""
    everything = {}
    for task in config.tasks:
        prompts = load_task(task, tasks_dir=config.tasks_dir, data_dir=data_dir)[: config.prompts]
        everything[task] = render_prompts(target, prompts, enable_thinking)
        check_reach(target, everything[task], config.max_new_tokens + block_size - 1)
    tasks = {}
    for task, dialogues in everything.items():
        label = describe_task(task, tasks_dir=config.tasks_dir).label
        with console.progress(f"recording the target on {label}", len(dialogues)) as advance:
            tasks[task] = recorded(target, label, dialogues, config, block_size, out / "trajectories", advance)
    return tasks


def _sampling(sampling: SamplingConfig) -> dict[str, Any]:
    """The temperature, and every other setting that is not at its default."""
    usual, known = to_dict(SamplingConfig()), to_dict(sampling)
    changed = {k.replace("_", " "): v for k, v in known.items() if v != usual[k] and k != "temperature"}
    return {"temperature": sampling.temperature, **changed}


def _name(path: Path) -> str:
    """`runs/x/auf/checkpoint` is `auf`; a trailing slash does not matter."""
    parts = [p for p in Path(os.path.realpath(path)).parts if p != "checkpoint"]
    return parts[-1]


def _live(
    target: Target,
    name: str,
    proposer: Replayable,
    recording: Recorded,
    count: int,
    config: EvalConfig,
    results: dict[str, Any],
    plain: list[Sequence[Generation]],
    console: Progress,
) -> bool:
    """Decode live at batch 1 and in batches. `plain` keeps the task's plain decoding in both ways for the next method."""
    everything, checks = recording.trajectories, list[LiveCheck]()
    for some, together, before in zip((everything[:count], everything), (1, config.batch_size), plain, strict=True):
        with console.progress(
            f"{name} live on {recording.label}, {counted(len(some), 'prompts')}", len(some)
        ) as advance:
            check = check_live(
                *(target, proposer, some, recording.limit),
                sampling=config.sampling,
                batch_size=together,
                plain=before,
                on_done=advance,
            )
        checks.append(check)
    plain[:] = [check.plain for check in checks]
    one, many = checks
    for how, check in (("batch 1", one), (f"batch {min(config.batch_size, len(many.generations))}", many)):
        prompts, rounds = len(check.generations), sum(len(g.rounds) for g in check.generations)
        label = f"{name}, {recording.label}, {how}"
        results["checks"].append(check_row(label, prompts, rounds, check.problems, check.near_ties))
    results["speedups"] += _ratios(name, recording.label, one, many)
    return not one.problems and not many.problems


def check_row(
    label: str, prompts: int, rounds: int, problems: Sequence[str], near_ties: Sequence[str]
) -> dict[str, Any]:
    """The report's row for a check of live decoding."""
    apart = ", near ties apart" if near_ties else ""
    told = f"{counted(prompts, 'prompts')}, {counted(rounds, 'rounds')}, {counted(len(near_ties), 'near ties')}"
    return {
        "name": f"{label}: live tokens are plain decoding's, live rounds are replay's{apart}",
        "value": "; ".join(problems) or told,
        "passed": not problems,
    }


def _ratios(name: str, label: str, one: LiveCheck, many: LiveCheck) -> list[dict[str, Any]]:
    rows = []
    for against, check in (("live, batch 1", one), ("live, batched", many)):
        spent = {"same prompts, features cached": check.replay_seconds}
        spent["same prompts, prefill counted"] = check.replay_seconds + check.prefill_seconds
        if not check.prefill_seconds:  # prompt lookup reads no features
            spent = {"same prompts": check.replay_seconds}
        what = f"replay of {name}, {label}, against {against}"
        rows += [{"name": what, "ratio": check.live_seconds / s, "note": note} for note, s in spent.items()]
    return rows
