"""Self-selection is measured live: the target's scores choose the block, and a recording has none off its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from specauf.bench.runner import Recorded, departure, near_tie
from specauf.config import EvalConfig
from specauf.decode.acceptance import compare, summarise
from specauf.decode.generate import Generation, Round, generate
from specauf.decode.propose import DrafterProposer
from specauf.decode.select import Selection
from specauf.strict import counted
from specauf.target import Target


def measure_selection(
    target: Target,
    proposer: DrafterProposer,
    recording: Recorded,
    replayed: Sequence[Sequence[Round]],
    selection: Selection,
    config: EvalConfig,
    on_done: Callable[[int], None],
) -> tuple[dict[str, Any], list[str]]:
    """(Tau and cost over the recorded prompts, problems). `replayed` are the greedy block's rounds over the same prompts.

    At T=0 the text must be the recorded one; a divergence within the margin of a near tie is no problem.
    """
    prompts, out = [t.prompt for t in recording.trajectories], list[Generation]()
    for start in range(0, len(prompts), config.batch_size):
        part = prompts[start : start + config.batch_size]
        out += generate(
            target,
            proposer,
            part,
            sampling=config.sampling,
            selection=selection,
            max_new_tokens=recording.limit,
            uids=range(start, start + len(part)),
            record_margins=True,
        )
        on_done(len(part))
    rounds = [g.rounds for g in out]
    found = summarise(rounds, [len(g.tokens) for g in out], proposer.block_size - 1, recording.clusters)
    gain = compare(rounds, replayed, recording.clusters)
    row = {
        "how": str(selection),
        "tau": found.tau,
        "interval": list(found.interval),
        "nodes": sum(g.verified for g in out) / found.rounds,
        "rounds": found.rounds,
        "gain": gain.difference,
        "gain_interval": list(gain.interval),
    }
    pairs = zip(recording.trajectories, out, recording.texts(), strict=True)
    problems = [f"{t.id}: {told}" for t, g, text in pairs if (told := _parting(g, text, near_tie(target)))]
    return row, problems if config.sampling.temperature == 0 else []


def _parting(live: Generation, text: Sequence[int], tie: float) -> str:
    """Where a live text departs from the recorded one by more than a near tie; empty when it does not."""
    at = departure(text, live)
    if at is None or live.margins[at] <= tie:
        return ""
    return f"leaves the recorded text at token {at}, top-2 margin {live.margins[at]:.2e}"


def selected(
    target: Target,
    proposers: Mapping[str, DrafterProposer],
    tasks: Mapping[str, Recorded],
    rounds: Mapping[str, Mapping[str, Sequence[Sequence[Round]]]],
    selection: Selection,
    config: EvalConfig,
    progress: Callable[[str, float], AbstractContextManager[Callable[..., None]]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The report's `selection` rows and `checks`, every drafter on every task. `rounds` as `measure` returns them."""
    rows, checks = [], []
    for name, proposer in proposers.items():
        for task, recording in tasks.items():
            count, label = len(recording.trajectories), f"{name}, {recording.label}, {selection}"
            with progress(f"live: {label}", count) as advance:
                given = (recording, rounds[task][name], selection, config)
                row, problems = measure_selection(target, proposer, *given, advance)
            rows.append({"name": name, "task": task, **row})
            if config.sampling.temperature == 0:
                told = "; ".join(problems) or f"{counted(count, 'prompts')}, {counted(row['rounds'], 'rounds')}"
                check = {"name": f"{label}: live tokens are plain decoding's", "value": told, "passed": not problems}
                checks.append(check)
    return rows, checks
