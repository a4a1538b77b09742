"""Replay: acceptance without decoding again.

Record the target's own continuation once. A at an anchor is then the number of the drafter's argmaxes that match the
recording before the first that does not. Replay reads it for every anchor at once, and walks a -> a + A + 1 to get the
rounds. At T=0 these are the rounds that live decoding makes. At T=1 accepting a point mass x with probability p(x) is the
same event as "the target's sample is x", so replay over sampled trajectories has live decoding's law.

That needs a deterministic proposal that does not look at the target off the trajectory, which every proposer here makes. A
proposal that is drawn from the drafter or selected by the target must be measured live; nothing here accepts one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from specauf.config import SamplingConfig
from specauf.data.chat import TemplateRefused, UnstableTemplate, continuation_ids, prompt_ids
from specauf.decode.cache import Columns
from specauf.decode.generate import Round, generate
from specauf.decode.propose import DrafterProposer, LookupFirst, PromptLookup
from specauf.files import atomic_dir, save_tensors
from specauf.objective.blocks import counter_hash
from specauf.objective.wavefront import default_cuts, read_head
from specauf.strict import UserError
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

log = logging.getLogger(__name__)

Replayable = DrafterProposer | PromptLookup | LookupFirst
"""Proposers whose block depends on the committed text alone."""

TURN = 22
"""Stream of the counter hash that gives each later answer of a conversation its uid."""


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


class Dialogue(NamedTuple):
    """A conversation to record. One with a single answer needs only the first two fields."""

    id: str
    prompt: list[int]
    """The prompt of the first answer."""
    messages: Sequence[Mapping[str, str]] = ()
    """The messages that `prompt` renders."""
    later: Sequence[str] = ()
    """The user's message after each answer but the last."""
    enable_thinking: bool = False


def record(
    target: Target,
    prompts: Sequence[tuple[str, list[int]] | Dialogue],
    *,
    limit: int,
    block_size: int,
    sampling: SamplingConfig,
    batch_size: int = 16,
    parts: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """Plain batched decoding of (id, prompt ids), or of conversations: one trajectory per answer, in the order given.

    Conversations are numbered in that order for the counter-based randomness. Where one has several answers, they are named
    `<id>#1`, `<id>#2`. With `parts`, a directory, every finished batch is kept there, and a killed recording goes on with
    what is missing. `on_progress` is called with the number of conversations that were just recorded. Raises `UserError`
    when `sampling` asks for a drawn proposal, which replay cannot measure, or a first prompt and its answer exceed the
    target's reach.
    """
    if sampling.proposal != "greedy":
        raise UserError("replay measures deterministic proposals alone: proposal 'sampled' is for `specauf generate`")
    dialogues = {i: Dialogue(*p) for i, p in enumerate(prompts)}
    check_reach(target, list(dialogues.values()), limit + block_size - 1)  # all before any: a new limit starts over
    done = _read_parts(parts, dialogues) if parts else {}
    if on_progress and done:
        on_progress(len(done))
    left = sorted(dialogues.keys() - done.keys(), key=lambda i: (len(dialogues[i].prompt), i))  # alike share a batch
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        made = _answer(target, {i: dialogues[i] for i in batch}, limit, block_size, sampling)
        if parts:
            found = [t for i in batch for t in made[i]]
            save_trajectories(parts / f"{batch[0]:06d}", found, {"conversations": batch})
        done |= made
        if on_progress:
            on_progress(len(batch))
    return [t for i in dialogues for t in done[i]]


def check_reach(target: Target, dialogues: Sequence[Dialogue], tokens: int) -> None:
    """Raise `UserError` when a first prompt with `tokens` more tokens exceeds the target's reach, or fills a window."""
    window = Columns(target).window
    for d in dialogues:
        positions = len(d.prompt) + tokens
        remedy = f"{d.id} has a prompt of {len(d.prompt)} tokens; leave it out, or lower the new tokens"
        target.require_reach(positions, remedy)
        if window is not None and positions >= window:
            told = f"{target.name} has layers that see the last {window} tokens alone, and this takes {positions}"
            raise UserError(f"{told}: {remedy}")


def _answer(
    target: Target, batch: Mapping[int, Dialogue], limit: int, block_size: int, sampling: SamplingConfig
) -> dict[int, list[Trajectory]]:
    """Every answer of the conversations, by their number; the batch goes through the turns together."""
    made: dict[int, list[Trajectory]] = {i: [] for i in batch}
    prompts, turn = {i: d.prompt for i, d in batch.items()}, 0
    while prompts:
        out = generate(
            target,
            None,
            list(prompts.values()),
            sampling=sampling,
            max_new_tokens=limit + block_size - 1,
            uids=[int(counter_hash(TURN, i, turn)) if turn else i for i in prompts],
        )
        for i, generation in zip(prompts, out, strict=True):
            name = f"{batch[i].id}#{turn + 1}" if batch[i].later else batch[i].id
            made[i].append(Trajectory(name, generation.prompt, generation.tokens, generation.ended))
        going, turn = [i for i in prompts if turn < len(batch[i].later)], turn + 1
        prompts = {i: next_prompt(target, batch[i], made[i], limit) for i in going}
    return made


def next_prompt(target: Target, dialogue: Dialogue, answered: Sequence[Trajectory], limit: int) -> list[int]:
    """The prompt of the next answer: the last prompt, the target's answer and the template's text up to the next one.

    All three are kept token for token. The answer ends before EOS or at the limit; the template's end of turn follows it,
    even when the limit cut it. If the template changes text that it rendered before (it drops the thinking of earlier
    answers, say), the conversation is rendered anew, as a server would. Raises `UserError` when the template refuses it.
    """
    tokenizer, eos = target.require_tokenizer(), target.eos_ids()
    tokens = [list(takewhile(lambda token: token not in eos, t.tokens[:limit])) for t in answered]
    texts = [str(tokenizer.decode(answer, clean_up_tokenization_spaces=False)) for answer in tokens]
    said = list(dialogue.messages)
    for text, asked in zip(texts, dialogue.later, strict=False):
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": asked}]
    *before, _, question = said
    for end in sorted(eos):  # the template ends a turn with one of them, not always the one that the target chose
        with contextlib.suppress(UnstableTemplate):
            rest = continuation_ids(tokenizer, before, texts[-1], end, [question], dialogue.enable_thinking)
            return [*answered[-1].prompt, *tokens[-1], end, *rest]
    try:
        return prompt_ids(tokenizer, said, dialogue.enable_thinking)
    except TemplateRefused as error:
        raise UserError(f"{dialogue.id}: the chat template refuses turn {len(answered) + 1}: {error}") from None


def _read_parts(parts: Path, dialogues: Mapping[int, Dialogue]) -> dict[int, list[Trajectory]]:
    """The answers that an earlier recording left, by the number of their conversation."""
    done: dict[int, list[Trajectory]] = {}
    for directory in sorted(parts.glob("[0-9]*")):
        try:
            found, meta = load_trajectories(directory)
        except UserError:  # damaged: recorded again
            continue
        at = iter(found)
        for i in cast("list[int]", meta["conversations"]):
            done[i] = list(islice(at, 1 + len(dialogues[i].later)))
    return done


def save_trajectories(directory: Path, trajectories: Sequence[Trajectory], meta: dict[str, object]) -> None:
    with atomic_dir(directory) as temporary:
        flat = torch.tensor([t for x in trajectories for t in x.ids], dtype=torch.int32)
        sizes = torch.tensor([[len(x.prompt), len(x.tokens), int(x.ended)] for x in trajectories])
        save_tensors({"ids": flat, "sizes": sizes}, temporary / "trajectories.safetensors")
        (temporary / "meta.json").write_text(json.dumps({**meta, "ids": [x.id for x in trajectories]}, indent=1) + "\n")


def load_trajectories(directory: Path) -> tuple[list[Trajectory], dict[str, object]]:
    try:
        meta = json.loads((directory / "meta.json").read_text())
        tensors = load_file(directory / "trajectories.safetensors")
        flat, out, at = tensors["ids"].tolist(), [], 0
        for name, (p, n, ended) in zip(meta["ids"], tensors["sizes"].tolist(), strict=True):
            out.append(Trajectory(name, flat[at : at + p], flat[at + p : at + p + n], bool(ended)))
            at += p + n
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        told = f"{directory} holds no recorded trajectories ({error})"
        raise UserError(f"{told}: delete it, and the same command records them again") from None
    return out, meta


def trajectory_features(
    target: Target, trajectories: Sequence[Trajectory], layer_ids: Sequence[int], batch_size: int = 8
) -> list[Float[Tensor, "s taps_h"]]:
    """The tapped features of every trajectory in the target's dtype, in one pass each."""
    out: dict[int, Tensor] = {}
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].ids))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(trajectories[i].ids) for i in part], batch_first=True)
        features = target.run(ids.to(target.device), layer_ids).features
        for row, i in enumerate(part):
            out[i] = features[row, : len(trajectories[i].ids)].clone()
    return [out[i] for i in range(len(trajectories))]


@torch.no_grad()
def acceptances(
    proposer: Replayable,
    trajectory: Trajectory,
    features: Float[Tensor, "s taps_h"] | None,
    limit: int,
    *,
    own: Int[Tensor, " anchors"] | None = None,
    chunk: int = 128,
) -> Int[Tensor, " anchors"]:
    """A at every anchor of the trajectory from which live decoding could start a round before `limit` tokens.

    `own`, for a drafter behind a lookup, is the drafter's own A at every anchor; it is computed when not given.
    """
    first, count = len(trajectory.prompt), len(trajectory.tokens)
    stop = min(limit, count) - 1  # rounds start while fewer than `limit` tokens are committed, and not at the last one
    anchors = torch.arange(first, first + max(stop, 0))
    if isinstance(proposer, DrafterProposer):
        return _drafted(proposer, torch.tensor(trajectory.ids), anchors, features, chunk)
    lookup = proposer.lookup if isinstance(proposer, LookupFirst) else proposer
    found = lookup.along(trajectory.ids, anchors.tolist())
    copied = torch.tensor([draft for draft, _ in found], dtype=torch.long).view(-1, lookup.block_size - 1)
    run = _run(copied == _after(torch.tensor(trajectory.ids), anchors, lookup.block_size - 1))
    if isinstance(proposer, PromptLookup):
        return run
    if own is None:
        own = acceptances(proposer.drafter, trajectory, features, limit)
    return torch.where(torch.tensor([n >= proposer.ngram for _, n in found], dtype=torch.bool), run, own)


def _drafted(
    proposer: DrafterProposer, ids: Tensor, anchors: Tensor, features: Tensor | None, chunk: int
) -> Int[Tensor, " anchors"]:
    if features is None:
        raise ValueError("a trained drafter is replayed over the trajectory's features")
    device, k = proposer.target.device, proposer.block_size - 1
    if proposer.candidate_pool:
        chunk = min(chunk, 16)  # the logits of all predictions are held at once
    everything = torch.arange(len(ids), device=device)[None]
    context = proposer.drafter.context(features[None].to(device, proposer.drafter.fc.weight.dtype), everything)
    parts = [anchors[:0]]
    for start in range(0, len(anchors), chunk):
        now = anchors[start : start + chunk]
        labels = _after(ids, now, k)[None].to(device)
        here = ids[None].to(device), now[None].to(device)
        if proposer.candidate_pool:
            hit = proposer.pooled(*here, context) == labels
        else:
            hidden, head = proposer.reading(*here, context)
            hit = read_head(hidden, labels, labels >= 0, head, cuts=default_cuts(k), wants=()).hit
        parts.append(_run(hit[0]).cpu())
    return torch.cat(parts)


def _after(ids: Int[Tensor, " s"], anchors: Int[Tensor, " n"], k: int) -> Int[Tensor, "n k"]:
    """The k tokens after each anchor. Beyond the end of the recording they are -1: nothing can be accepted there."""
    return F.pad(ids, (0, k), value=-1)[anchors[:, None] + torch.arange(1, k + 1)]


def _run(hit: Bool[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """The number of hits before the first that is none."""
    return hit.cumprod(1).sum(1)


def walk(accepted: Sequence[int], trajectory: Trajectory) -> list[Round]:
    """The rounds: from the first generated token, a -> a + A + 1."""
    rounds, at, last = [], 0, len(trajectory.tokens) - 1
    while at < len(accepted):
        a = int(accepted[at])
        rounds.append(Round(at, a, cut=trajectory.ended and at + a == last))
        at += a + 1
    return rounds


def replay(
    proposer: Replayable,
    trajectories: Sequence[Trajectory],
    features: Sequence[Float[Tensor, "s taps_h"] | None] | None,
    limit: int,
) -> list[list[Round]]:
    """The rounds of every trajectory. `features` as from `trajectory_features`; None, or Nones, for prompt lookup."""
    return [
        walk(acceptances(proposer, t, features[i] if features is not None else None, limit).tolist(), t)
        for i, t in enumerate(trajectories)
    ]
