"""Draft, verify, commit: exact speculative decoding with a key-value cache, for one row or many, and plain decoding.

Rows of a batch accept different numbers of tokens. The cache keeps as many new columns as the row that accepted most needs;
in the other rows the surplus columns hold rejected tokens and are masked from then on. Positions are explicit, so a hole in
the cache changes nothing but its size. Rows that are done leave the batch. A draft is a tree with one branch. With
self-selection (`select.py`) the tree has more, and the cache keeps the columns of the branch that was verified.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from specauf.config import SamplingConfig
from specauf.decode.cache import Columns
from specauf.decode.propose import DrafterProposer, LookupFirst, Proposer
from specauf.decode.select import Selection, along, build_tree, choose, sample_candidates
from specauf.decode.verify import ACCEPT, PROPOSE, RESAMPLE, accept_drawn, accept_greedy, accept_sampled, at, warp
from specauf.drafter.domino import Domino
from specauf.objective.blocks import counter_uniform
from specauf.strict import UserError
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """One verify round."""

    start: int
    """Index of the anchor among the generated tokens."""
    accepted: int
    """A: draft tokens committed."""
    cut: bool = False
    """An EOS token inside the draft ended the round, so no further token was emitted."""


@dataclass
class Generation:
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    """At most `max_new_tokens`, an EOS token included."""
    rounds: list[Round] = field(default_factory=list)
    """Every round that started before the limit, its A not cut by the limit."""
    margins: list[float] = field(default_factory=list)
    """Top-1 minus top-2 logit of the target at each token, when asked for (T=0)."""
    ended: bool = False
    """Whether EOS ended it, not the limit."""
    drafted: list[bool] = field(default_factory=list)
    """Per token: was it an accepted draft token?"""
    verified: int = 0
    """Inputs that the target verified, all rounds together: anchor and draft tokens, or the nodes of their tree."""
    seconds: float = 0.0
    """Wall-clock time from the prefill until this row was done, without that of `on_commit`; rows of a batch share it."""


@torch.no_grad()
def generate(
    target: Target,
    proposer: Proposer | None,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig | None = None,
    selection: Selection | None = None,
    max_new_tokens: int | Sequence[int] = 128,
    uids: Sequence[int] | None = None,
    eos_ids: frozenset[int] | None = None,
    record_margins: bool = False,
    on_commit: Callable[[int, list[int], list[bool]], None] | None = None,
) -> list[Generation]:
    """Decode every prompt. `proposer` None is plain decoding, one token a round; `selection` is self-selection.

    `max_new_tokens` is one number, or one for each prompt. `uids` number the prompts for the counter-based randomness
    (default 0, 1, ...). `on_commit(row, tokens, drafted)` is called as tokens are committed.

    Raises `UserError` on an empty prompt, when `proposer` cannot propose what `selection` or `sampling.proposal` ask for,
    and when the target's layers cannot drop a rejected draft, attend to a window that the text outgrows, or lack positions
    for it; `ValueError` when limits or uids are not one a prompt.
    """
    if not prompts:
        return []
    sampling = sampling or SamplingConfig()
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty: there is no token to start from")
    require_decodable(target, proposer, sampling, selection)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    uids = range(len(prompts)) if uids is None else uids
    longest = max(len(p) + limit for p, limit, _ in zip(prompts, limits, uids, strict=True))
    target.require_reach(longest, "shorten the prompts, or lower the new tokens")
    eos = target.eos_ids() if eos_ids is None else eos_ids
    batch = _Batch(target, proposer, sampling, selection, eos, limits, record_margins, on_commit)
    active = batch.prefill(prompts, uids, longest)
    while any(active):
        batch.select(active)
        active = batch.round()
    return batch.out


def warm_tokens(target: Target, limit: int) -> int:
    """How many new tokens, of `limit`, to decode before timing. On CUDA all: kernels are compiled anew as the text grows."""
    return limit if target.device.type == "cuda" else min(2, limit)


def undecodable(target: Target) -> str | None:
    """Why the target cannot be decoded here, as far as its configuration says; None if it can."""
    try:
        require_decodable(target, None, SamplingConfig(), None)
    except UserError as error:
        return str(error)
    return None


def require_decodable(
    target: Target, proposer: Proposer | None, sampling: SamplingConfig, selection: Selection | None
) -> None:
    """Raise `UserError` when the target, or the proposer with it, cannot be decoded so, whatever the prompts are."""
    if "local" in getattr(target.config, "attention_layers", ()) or getattr(target.config, "model_type", "") == "mpt":
        raise UserError(
            f"{target.name} attends to the last columns of its cache, which in a batch are not the last tokens"
        )
    Columns(target, whole=selection is not None)
    if target.device.type == "mps" and (sampling.temperature > 0 or selection):
        raise UserError("draws are made in float64, which mps does not have: use target.device=cpu, or temperature 0")
    drawn = sampling.proposal == "sampled"
    if selection and drawn:
        raise UserError("self-selection chooses between point masses: it cannot be had with the proposal 'sampled'")
    if (selection or (drawn and proposer)) and not isinstance(proposer, DrafterProposer):
        what = "self-selection" if selection else "the proposal 'sampled'"
        why = (
            "lookup first has none for what it copies"
            if isinstance(proposer, LookupFirst)
            else "there is no drafter here"
        )
        raise UserError(f"{what} draws from a drafter's probabilities, and {why}")
    if selection and (getattr(target.config, "alibi", False) or getattr(target.config, "model_type", "") == "bloom"):
        raise UserError("self-selection verifies a tree, and this target's ALiBi knows the distances of a chain alone")
    if selection and isinstance(proposer, DrafterProposer) and isinstance(proposer.drafter, Domino):
        raise UserError("self-selection draws the slots of a block one by one: Domino's depend on one another")


@dataclass
class _Batch:
    """The rows that are still decoded, and what has come of all."""

    target: Target
    proposer: Proposer | None
    sampling: SamplingConfig
    selection: Selection | None
    eos: frozenset[int]
    limits: Sequence[int]
    record_margins: bool
    on_commit: Callable[[int, list[int], list[bool]], None] | None

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.block = self.proposer.block_size if self.proposer else 1
        self.layer_ids = self.proposer.layer_ids if self.proposer else ()
        self.columns = Columns(self.target)

    def prefill(self, prompts: Sequence[Sequence[int]], uids: Sequence[int], longest: int) -> list[bool]:
        """Read the prompts and commit a token after each. Returns which rows go on; none has more than `longest` tokens."""
        device, count, width = self.target.device, len(prompts), longest + 2 * self.block
        self.out = [Generation(list(prompt)) for prompt in prompts]
        self.rows = list(range(count))  # the row of `out` for each row of the batch
        self.uid = torch.as_tensor(uids, device=device)
        self.ids = torch.zeros(count, width, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        first = int(lengths.max())
        # Padding on the right is harmless under causal attention.
        seen = self.target.run(self.ids[:, :first], self.layer_ids, cache=self.columns.cache)
        self.columns.fill(lengths)
        if self.proposer:
            self.proposer.start(count, width)
            self.proposer.observe(seen.features, torch.arange(first, device=device).expand(count, -1))
        ending = seen.final.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, seen.final.shape[-1]))
        self.anchors = lengths - 1  # position of the last committed token; only the prefill knows its features already
        return self.commit(self.ids[:, :0], self.target.logits(ending), first=True)

    def select(self, active: list[bool]) -> None:
        """Let the other rows leave the batch."""
        if all(active):
            return
        self.rows = [row for row, goes_on in zip(self.rows, active, strict=True) if goes_on]
        kept = torch.tensor([i for i, goes_on in enumerate(active) if goes_on], device=self.ids.device)
        self.uid, self.ids, self.anchors = self.uid[kept], self.ids[kept], self.anchors[kept]
        self.columns.select(kept)
        if self.proposer:
            self.proposer.select(kept)

    def round(self) -> list[bool]:
        """Draft, verify, commit. Returns which rows go on."""
        target, anchors, columns = self.target, self.anchors, self.columns
        candidates, law = self.propose()
        tree = build_tree(self.ids.gather(1, anchors[:, None]), candidates)
        n = tree.tokens.shape[1]
        columns.require_room(n)
        if self.selection:
            mask = tree.sees(columns.held)
        else:
            mask = torch.cat([columns.held, columns.held.new_ones(len(anchors), n)], 1)
        positions = anchors[:, None] + tree.depth
        if target.reach is not None:  # drafts beyond it are past the limit too, never emitted: any position will do
            positions = positions.clamp(max=target.reach - 1)
        seen = target.run(
            tree.tokens,
            self.layer_ids,
            attention_mask=None if mask.all() else mask,
            position_ids=positions,
            cache=columns.cache,
        )
        features, logits = seen.features, target.logits(seen.final)
        best, path = torch.zeros_like(anchors), None
        if self.selection:  # a chain is its own path, and its logits are the round's largest tensor
            best = choose(tree, candidates, logits, self.ids, anchors, self.sampling)
            path = at(tree.path, best)  # b block
            features, logits = along(features, path), along(logits, path)
        if self.proposer:
            self.proposer.observe(features, anchors[:, None] + torch.arange(self.block, device=anchors.device))
        for row, nodes in zip(self.rows, tree.size, strict=True):
            self.out[row].verified += nodes
        before = anchors.clone()
        active = self.commit(at(candidates, best), logits, law)
        # Columns that hold committed tokens: the old anchor and the accepted drafts.
        columns.commit(n, anchors - before, path, used=int(anchors.max()))
        return active

    def propose(self) -> tuple[Int[Tensor, "b candidates k"], Float[Tensor, "b k v"] | None]:
        """The candidate blocks, and the law of a block that was drawn from the drafter; None for the other proposals."""
        proposer, ids, anchors, sampling = self.proposer, self.ids, self.anchors, self.sampling
        if isinstance(proposer, DrafterProposer) and self.selection:
            logits = proposer.logits(ids, anchors)
            return sample_candidates(logits, self.selection, sampling.seed, self.uid, anchors), None
        if isinstance(proposer, DrafterProposer) and sampling.proposal == "sampled":
            after = anchors[:, None] + torch.arange(1, proposer.block_size, device=ids.device)
            numbers = counter_uniform(sampling.seed, PROPOSE, self.uid[:, None], after)
            draft, law = proposer.sample(ids, anchors, sampling.temperature, numbers)
            return draft[:, None], law
        draft = proposer.propose(ids, anchors).to(ids) if proposer else ids[:, :0]  # another's proposer may say int32
        return draft[:, None], None

    def commit(
        self,
        draft: Int[Tensor, "b k"],
        logits: Float[Tensor, "b slots v"],
        law: Float[Tensor, "b k v"] | None = None,
        first: bool = False,
    ) -> list[bool]:
        """Verify `draft` with the target's `logits` of anchor and draft; write tokens into `ids`, advance `anchors` in place.

        `law` is the distribution that the draft was drawn from, None for a point mass. Returns which rows go on.
        """
        ids, anchors, k, seed = self.ids, self.anchors, draft.shape[1], self.sampling.seed
        after = anchors[:, None] + 1 + torch.arange(k + 1, device=ids.device)  # positions that the logits predict
        ids.scatter_(1, after[:, :k], draft)
        logits = warp(logits, ids, anchors + 1 + k, self.sampling)
        if self.sampling.temperature == 0:
            accepted, ending = accept_greedy(draft, logits)
        else:
            chance = logits.softmax(-1)
            accepting = counter_uniform(seed, ACCEPT, self.uid[:, None], after[:, :k])
            drawing = counter_uniform(seed, RESAMPLE, self.uid[:, None], after)
            if law is None:
                accepted, ending = accept_sampled(draft, chance, accepting, drawing)
            else:
                accepted, ending = accept_drawn(draft, chance, law, accepting, drawing)
        ids.scatter_(1, (anchors + 1 + accepted)[:, None], ending[:, None])
        margin = logits.topk(2).values.diff(dim=-1).squeeze(-1).abs().tolist() if self.record_margins else None
        emitted, go_on = ids.gather(1, after).tolist(), list[bool]()
        for i, (row, a) in enumerate(zip(self.rows, accepted.tolist(), strict=True)):
            generation, new = self.out[row], emitted[i][: a + 1]
            stop = next((j for j, token in enumerate(new) if token in self.eos), None)
            new = new if stop is None else new[: stop + 1]
            drafted = [j < a for j in range(len(new))]
            done = len(generation.tokens)
            if not first:
                generation.rounds.append(Round(done - 1, min(a, len(new)), cut=stop is not None and stop < a))
            room = self.limits[row] - done
            generation.tokens += new[:room]
            generation.drafted += drafted[:room]
            if margin is not None:
                generation.margins += margin[i][: len(new[:room])]
            generation.ended = stop is not None and stop < room
            if self.on_commit:  # a listener's time is not decoding time
                told = time.perf_counter()
                self.on_commit(row, new[:room], drafted[:room])
                self.began += time.perf_counter() - told
            generation.seconds = time.perf_counter() - self.began
            go_on.append(stop is None and len(generation.tokens) < self.limits[row])
        anchors += 1 + accepted
        return go_on
