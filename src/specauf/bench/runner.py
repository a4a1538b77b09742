"""Record once, replay every drafter over the same trajectories, and check a sample live."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specauf.config import EvalConfig, SamplingConfig, digest
from specauf.decode.acceptance import (
    before_loop,
    compare,
    loop_onset,
    prompt_taus,
    repeated_share,
    summarise,
    tau_interval,
)
from specauf.decode.generate import Generation, Round, generate, warm_tokens
from specauf.decode.propose import DrafterProposer, LookupFirst
from specauf.decode.replay import (
    Dialogue,
    Replayable,
    Trajectory,
    acceptances,
    load_trajectories,
    record,
    replay,
    save_trajectories,
    trajectory_features,
    walk,
)
from specauf.strict import UserError, to_dict
from specauf.target import Target

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 2**-2, torch.float16: 2**-5}
"""A divergence between two computations in this dtype is due to rounding up to this top-2 margin, and a bug above it. In 16
bits the margin is two steps of a logit between 16 and 32. Exactness, token for token, is claimed in float32."""
CHUNK = 64
"""Trajectories whose features are in memory at once."""


@dataclass
class Recorded:
    """A task's trajectories."""

    label: str
    trajectories: list[Trajectory]
    limit: int
    clusters: list[int]
    """The conversation that each trajectory belongs to: answers of one conversation are not independent."""
    keep_features: bool = False
    """Keep the target's features from one measurement to the next: for the few prompts that a training run repeats."""
    _features: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def texts(self) -> list[list[int]]:
        """The generated tokens up to the limit."""
        return [t.tokens[: self.limit] for t in self.trajectories]

    @cached_property
    def onsets(self) -> list[int]:
        """Where each text begins to repeat itself."""
        return [loop_onset(text) for text in self.texts()]

    def chunks(self, size: int | None = None) -> Iterator[range]:
        """The trajectories' numbers, a chunk at a time; without `keep_features`, a chunk's features go before the next."""
        numbers, size = range(len(self.trajectories)), size or CHUNK
        for start in numbers[::size]:
            yield numbers[start : start + size]
            if not self.keep_features:
                self._features.clear()

    def features_of(self, target: Target, layer_ids: Sequence[int], chunk: range) -> Sequence[Tensor | None]:
        """The tapped features of a chunk's trajectories, computed once; Nones when `layer_ids` is empty."""
        if not layer_ids:
            return [None] * len(chunk)
        key = (chunk.start, *layer_ids)
        if key not in self._features:
            self._features[key] = trajectory_features(target, [self.trajectories[i] for i in chunk], layer_ids)
        return self._features[key]


def recorded(
    target: Target,
    label: str,
    prompts: Sequence[tuple[str, list[int]] | Dialogue],
    config: EvalConfig,
    block_size: int,
    cache: Path,
    on_progress: Callable[[int], None] | None = None,
) -> Recorded:
    """Trajectories from `cache`, or recorded into it; keyed by target, prompts, sampling, EOS ids, length and block size.

    A killed recording resumes where it stopped. `block_size` is the largest that is to be replayed. Smaller blocks make the
    same rounds over such a recording, so an existing one for larger blocks is used.
    """
    if not prompts:
        raise UserError(f"the task {label!r} has no prompts")
    dialogues = [Dialogue(*p) for p in prompts]
    limit = config.max_new_tokens
    meta = {
        "target": target.fingerprint(),
        "prompts": digest([_identity(d) for d in dialogues]),
        "sampling": to_dict(config.sampling),
        "eos": sorted(target.eos_ids()),  # ends the answers, and may change while the weights do not
        "limit": limit,
        "block_size": block_size,
    }
    directory = _covering(cache, meta) or cache / f"trajectories-{digest(meta)}"
    parts = directory.with_name(f"{directory.name}.parts")
    if not directory.is_dir():
        found = record(
            target,
            dialogues,
            limit=limit,
            block_size=block_size,
            sampling=config.sampling,
            batch_size=config.batch_size,
            parts=parts,
            on_progress=on_progress,
        )
        save_trajectories(directory, found, meta)
    shutil.rmtree(parts, ignore_errors=True)
    clusters = [i for i, d in enumerate(dialogues) for _ in range(1 + len(d.later))]
    return Recorded(label, load_trajectories(directory)[0], limit, clusters)


def _covering(cache: Path, meta: Mapping[str, Any]) -> Path | None:
    """A recording in `cache` that matches `meta`, except that its block size may be larger."""
    for path in sorted(cache.glob("trajectories-*/meta.json")):
        try:
            other = json.loads(path.read_text())
            fits = all(other[k] == v for k, v in meta.items() if k != "block_size")
            if fits and other["block_size"] >= meta["block_size"]:
                return path.parent
        except (OSError, ValueError, LookupError, TypeError):  # another user's, damaged or just being put in place
            continue
    return None


def _identity(dialogue: Dialogue) -> list[Any]:
    """What the recording of a dialogue depends on, the target aside."""
    turns = [list(dialogue.later), dialogue.enable_thinking] if dialogue.later else []
    return [dialogue.id, dialogue.prompt, *turns]


def measure(
    target: Target,
    proposers: Mapping[str, Replayable],
    tasks: Mapping[str, Recorded],
    on_progress: Callable[[int, str], None] = lambda n, method: None,
) -> tuple[dict[str, Any], dict[str, dict[str, list[list[Round]]]]]:
    """Replay every method over the same trajectories: (the report's `evaluation` section, rounds by task and method).

    `on_progress` is called with 1 and the method's name after each trajectory that a method was replayed over.
    """
    evaluation: dict[str, Any] = {}
    rounds: dict[str, dict[str, list[list[Round]]]] = {}
    for name, task in tasks.items():
        tokens = [min(len(t.tokens), task.limit) for t in task.trajectories]
        accepted: dict[str, list[Tensor]] = {method: [] for method in proposers}
        for chunk in task.chunks():
            for method, p in proposers.items():
                alone = [accepted[m] for m, q in proposers.items() if isinstance(p, LookupFirst) and q is p.drafter]
                for i, features in zip(chunk, task.features_of(target, p.layer_ids, chunk), strict=True):
                    known = alone[0][i] if alone and i < len(alone[0]) else None  # not computed twice
                    accepted[method].append(acceptances(p, task.trajectories[i], features, task.limit, own=known))
                    on_progress(1, method)
        rounds[name] = {
            method: [walk(a.tolist(), t) for a, t in zip(found, task.trajectories, strict=True)]
            for method, found in accepted.items()
        }
        evaluation[name] = {
            "label": task.label,
            "prompts": len(task.trajectories),
            "methods": {
                method: to_dict(summarise(found, tokens, proposers[method].block_size - 1, task.clusters))
                | _unlooped(before_loop(found, task.onsets), proposers[method].block_size, task.clusters)
                for method, found in rounds[name].items()
            },
            "repeated_share": repeated_share(task.texts()),
        }
    return evaluation, rounds


def _unlooped(rounds: list[list[Round]], block_size: int, clusters: list[int]) -> dict[str, Any]:
    taus = prompt_taus(rounds)
    kept = taus[taus == taus]  # prompts with a round before the loop
    if not len(kept):
        return {}
    return {
        "tau_before_loop": float(kept.mean()),
        "interval_before_loop": list(tau_interval(taus, block_size, clusters)),
    }


def comparison(
    tasks: Mapping[str, Recorded],
    rounds: Mapping[str, dict[str, list[list[Round]]]],
    a: str,
    b: str,
    condition: str = "",
) -> list[dict[str, Any]]:
    """Rows of the report's `comparisons`: method `a` against `b` on every task, paired over prompts.

    Once over all rounds, and once over those that start before the text begins to loop.
    """
    rows = []
    for part in ("", "before the text loops"):
        for name, by_method in rounds.items():
            first, second = by_method[a], by_method[b]
            if part:
                first, second = (before_loop(x, tasks[name].onsets) for x in (first, second))
            found = compare(first, second, tasks[name].clusters)
            rows.append(
                {
                    "task": name,
                    "a": a,
                    "b": b,
                    "condition": " and ".join(filter(None, (condition, part))),
                    "difference": found.difference,
                    "interval": list(found.interval),
                    "ratio": found.ratio,
                }
            )
    return rows


@dataclass
class LiveCheck:
    """Live decoding of recorded prompts, compared with plain decoding and replay."""

    generations: list[Generation]
    plain: list[Generation]
    live_seconds: float
    replay_seconds: float
    """With the features cached."""
    prefill_seconds: float
    """What computing those features took; 0 where there are none."""
    problems: list[str]
    """Divergences with a top-2 margin above `near_tie`. Empty is a pass."""
    near_ties: list[str]
    """Divergences with a margin up to `near_tie`."""
    near_tie: float


def near_tie(target: Target) -> float:
    """The margin in `NEAR_TIE` for the target's dtype."""
    return NEAR_TIE.get(target.embed_weight.dtype, NEAR_TIE[torch.float32])


def check_live(
    target: Target,
    proposer: Replayable,
    trajectories: Sequence[Trajectory],
    limit: int,
    *,
    sampling: SamplingConfig | None = None,
    batch_size: int = 1,
    plain: Sequence[Generation] = (),
    on_done: Callable[[int], None] = lambda n: None,
) -> LiveCheck:
    """Decode recorded prompts (T=0) live; compare tokens with plain decoding and the recording, and rounds with replay.

    `sampling` is what the prompts were recorded with. `plain` are their plain decodings by an earlier check in the same
    batches; without it they are made.
    """
    plain, live = list(plain), list[Generation]()
    groups = [trajectories[i : i + batch_size] for i in range(0, len(trajectories), batch_size)]
    live_seconds = 0.0
    few = warm_tokens(target, limit)  # kernels are compiled before any is timed
    generate(target, proposer, [t.prompt for t in groups[0]], sampling=sampling, max_new_tokens=few)
    for group in groups:
        prompts = [t.prompt for t in group]
        if len(plain) == len(live):
            plain += generate(target, None, prompts, sampling=sampling, max_new_tokens=limit, record_margins=True)
        began = _clock(target)
        live += generate(target, proposer, prompts, sampling=sampling, max_new_tokens=limit)
        live_seconds += _clock(target) - began
        on_done(len(group))
    check = LiveCheck(live, plain, live_seconds, 0.0, 0.0, [], [], near_tie(target))
    for start in range(0, len(trajectories), CHUNK):
        part = trajectories[start : start + CHUNK]
        began = _clock(target)
        features = trajectory_features(target, part, proposer.layer_ids) if proposer.layer_ids else None
        between = _clock(target)
        replayed = replay(proposer, part, features, limit)
        check.prefill_seconds += between - began if features else 0.0
        check.replay_seconds += _clock(target) - between
        for i, trajectory in enumerate(part):
            ours, reference = live[start + i], plain[start + i]
            _compare_tokens(check, f"{trajectory.id}: speculative and plain decoding", ours.tokens, reference)
            recording = trajectory.tokens[: len(reference.tokens)]
            _compare_tokens(check, f"{trajectory.id}: the recording and plain decoding", recording, reference)
            if trajectory.tokens[: len(ours.tokens)] == ours.tokens:
                known = features[i] if features else None
                _compare_rounds(check, target, proposer, trajectory, known, *within(limit, ours.rounds, replayed[i]))
    return check


def parting(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Index in `b` of the first entry that `a` does not share; the last index of `b` where `a` has all of it."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b) - 1))


def departure(tokens: Sequence[int], reference: Generation) -> int | None:
    """Index of the first of the reference's tokens that `tokens` do not share; None when they are the same."""
    return None if list(tokens) == reference.tokens else parting(tokens, reference.tokens)


def within(limit: int, *texts: Sequence[Round]) -> list[list[Round]]:
    """The rounds of each text without the draft tokens that the limit cuts off, which no check of tokens has compared."""
    room = [[(r, limit - 1 - r.start) for r in rounds] for rounds in texts]
    return [[r if r.accepted < left else Round(r.start, left) for r, left in rounds] for rounds in room]


def _clock(target: Target) -> float:
    """Seconds, read when the device has finished its queued work."""
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()


def _note(check: LiveCheck, text: str, margin: float) -> None:
    log.warning("%s (top-2 margin %.2e)", text, margin)
    (check.problems if margin > check.near_tie else check.near_ties).append(f"{text}, top-2 margin {margin:.2e}")


def _compare_tokens(check: LiveCheck, names: str, tokens: list[int], plain: Generation) -> None:
    if (at := departure(tokens, plain)) is not None:
        _note(check, f"{names} part at token {at}", plain.margins[at])


def _compare_rounds(
    check: LiveCheck,
    target: Target,
    proposer: Replayable,
    trajectory: Trajectory,
    features: Tensor | None,
    live: list[Round],
    replayed: list[Round],
) -> None:
    if live == replayed:
        return
    number = min(parting(live, replayed), len(live) - 1)
    at = live[number]
    margin = float("inf")
    committed = trajectory.ids[: len(trajectory.prompt) + at.start + 1]
    if isinstance(proposer, LookupFirst) and proposer.asks_drafter(committed):  # a copied token is no near tie
        proposer = proposer.drafter
    if isinstance(proposer, DrafterProposer) and features is not None:
        slot = min(at.accepted, replayed[number].accepted)
        ids = torch.tensor(trajectory.ids)[None].to(target.device)
        anchors = torch.tensor([[len(trajectory.prompt) + at.start]], device=target.device)
        everything = torch.arange(features.shape[0], device=target.device)[None]
        context = proposer.drafter.context(features[None].to(proposer.drafter.fc.weight.dtype), everything)
        logits = proposer.one(ids, anchors, context, slot)
        top = logits.topk(2).values
        margin = float(top[0] - top[1])
    _note(check, f"{trajectory.id}: live and replayed round {number} differ, at token {at.start}", margin)
