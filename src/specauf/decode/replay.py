"""Replay: acceptance without decoding again.

Record the target's own continuation once; then A at an anchor is the number of the drafter's argmaxes that match the
recording, for every anchor at once, and the rounds are read off by walking a -> a + A + 1. At T=0 these are the rounds that
live decoding makes. At T=1 accepting a point mass x with probability p(x) is the same event as "the target's sample is x",
so replay over sampled trajectories has live decoding's law. That needs a deterministic proposal that does not look at the
target off the trajectory, which both proposers here are. A proposal drawn from the drafter, or selected by the target, is
measured live: nothing here can be asked for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from specauf.config import SamplingConfig, UserError
from specauf.decode.generate import Round, generate
from specauf.decode.propose import DrafterProposer, PromptLookup
from specauf.files import atomic_dir
from specauf.objective.metrics import leading_run
from specauf.objective.wavefront import default_cuts, read_head
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trajectory:
    """A recorded target continuation, `limit` + B - 1 tokens long unless EOS ended it."""

    id: str
    prompt: list[int]
    tokens: list[int]
    ended: bool

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.tokens


def record(
    target: Target,
    prompts: Sequence[tuple[str, list[int]]],
    *,
    limit: int,
    block_size: int,
    sampling: SamplingConfig,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """Plain batched decoding of (id, prompt ids). Prompts are numbered in the order given, for the randomness.

    Raises `UserError` when `sampling` asks for a drawn proposal, which replay over the recording could not measure.
    """
    if sampling.proposal != "greedy":
        raise UserError("replay measures deterministic proposals alone: proposal 'sampled' is for `specauf generate`")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))  # alike lengths share a batch
    done: dict[int, Trajectory] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        out = generate(
            target,
            None,
            [prompts[i][1] for i in part],
            sampling=sampling,
            max_new_tokens=limit + block_size - 1,
            uids=part,
        )
        for i, generation in zip(part, out, strict=True):
            done[i] = Trajectory(prompts[i][0], generation.prompt, generation.tokens, generation.ended)
        if on_progress:
            on_progress(len(part))
    return [done[i] for i in range(len(prompts))]


def save_trajectories(directory: Path, trajectories: Sequence[Trajectory], meta: dict[str, object]) -> None:
    with atomic_dir(directory) as temporary:
        flat = torch.tensor([t for x in trajectories for t in x.ids], dtype=torch.int32)
        sizes = torch.tensor([[len(x.prompt), len(x.tokens), int(x.ended)] for x in trajectories])
        save_file({"ids": flat, "sizes": sizes}, temporary / "trajectories.safetensors")
        (temporary / "meta.json").write_text(json.dumps({**meta, "ids": [x.id for x in trajectories]}, indent=1) + "\n")


def load_trajectories(directory: Path) -> tuple[list[Trajectory], dict[str, object]]:
    try:
        meta = json.loads((directory / "meta.json").read_text())
        tensors = load_file(directory / "trajectories.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory} holds no recorded trajectories: {error}") from None
    flat, out, at = tensors["ids"].tolist(), [], 0
    for name, (p, n, ended) in zip(meta["ids"], tensors["sizes"].tolist(), strict=True):
        out.append(Trajectory(name, flat[at : at + p], flat[at + p : at + p + n], bool(ended)))
        at += p + n
    return out, meta


def trajectory_features(
    target: Target, trajectories: Sequence[Trajectory], layer_ids: Sequence[int], batch_size: int = 8
) -> list[Float[Tensor, "s taps_h"]]:
    """The tapped features of every trajectory in the target's dtype, in one pass each."""
    out: dict[int, Tensor] = {}
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].ids))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(trajectories[i].ids) for i in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long, device=target.device)
        for row, i in enumerate(part):
            ids[row, : len(trajectories[i].ids)] = torch.tensor(trajectories[i].ids)
        features = target.run(ids, layer_ids).features
        for row, i in enumerate(part):
            out[i] = features[row, : len(trajectories[i].ids)].clone()
    return [out[i] for i in range(len(trajectories))]


@torch.no_grad()
def acceptances(
    proposer: DrafterProposer | PromptLookup,
    trajectory: Trajectory,
    features: Float[Tensor, "s taps_h"] | None,
    limit: int,
    chunk: int = 128,
) -> Int[Tensor, " anchors"]:
    """A at every anchor of the trajectory that live decoding could start a round from before `limit` tokens."""
    ids = torch.tensor(trajectory.ids)
    first, count = len(trajectory.prompt), len(trajectory.tokens)
    stop = min(limit, count) - 1  # rounds start while fewer than `limit` tokens are committed, and not at the last one
    anchors = torch.arange(first, first + max(stop, 0))
    k = proposer.block_size - 1
    place = anchors[:, None] + torch.arange(1, k + 1)
    valid = place < len(ids)
    labels = ids[place.clamp(max=len(ids) - 1)]
    if isinstance(proposer, PromptLookup):
        proposer.start(1, len(ids))
        hit = torch.stack([proposer.propose(ids[None], a[None])[0] for a in anchors]) == labels if stop > 0 else valid
        return leading_run(hit & valid, torch.ones_like(valid))
    if features is None:
        raise ValueError("a trained drafter is replayed over the trajectory's features")
    target, device = proposer.target, proposer.target.device
    parts = [anchors[:0]]
    everything = torch.arange(len(ids), device=device)[None]
    context = proposer.drafter.context(features[None].to(device, proposer.drafter.fc.weight.dtype), everything)
    for start in range(0, len(anchors), chunk):
        now = slice(start, start + chunk)
        hidden = proposer.pending(ids[None].to(device), anchors[now][None].to(device), context)
        readout = read_head(
            hidden,
            labels[now][None].to(device),
            valid[now][None].to(device),
            target.head_weight,
            target.head_bias,
            softcap=target.softcap,
            cuts=default_cuts(k),
            wants=(),
        )
        # Slots beyond the end of the recording are not holes: nothing can be accepted there.
        parts.append(leading_run(readout.hit[0], torch.ones_like(readout.hit[0])).cpu())
    return torch.cat(parts)


def walk(accepted: Sequence[int], trajectory: Trajectory) -> list[Round]:
    """The rounds: from the first generated token, a -> a + A + 1."""
    rounds, at, last = [], 0, len(trajectory.tokens) - 1
    while at < len(accepted):
        a = int(accepted[at])
        rounds.append(Round(at, a, cut=trajectory.ended and at + a == last))
        at += a + 1
    return rounds


def replay(
    proposer: DrafterProposer | PromptLookup,
    trajectories: Sequence[Trajectory],
    features: Sequence[Float[Tensor, "s taps_h"]] | None,
    limit: int,
) -> list[list[Round]]:
    """The rounds of every trajectory. `features` as from `trajectory_features`; None for prompt lookup."""
    return [
        walk(acceptances(proposer, t, features[i] if features is not None else None, limit).tolist(), t)
        for i, t in enumerate(trajectories)
    ]
