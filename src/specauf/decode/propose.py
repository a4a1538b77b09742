"""Proposers of a block: a trained drafter, prompt lookup (the competitor that needs no parameters), or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

from specauf.decode.verify import draw
from specauf.drafter.dflash import ContextKV, DFlash
from specauf.drafter.domino import Corrected, Domino, pool_mask
from specauf.drafter.vocabulary import draft_head
from specauf.objective.blocks import block_inputs, prefix_tokens
from specauf.objective.wavefront import Head, RowSource
from specauf.strict import UserError
from specauf.target import Target

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Proposer(Protocol):
    """Proposes the B-1 tokens after each row's last committed token. Rows of a batch may differ in length."""

    block_size: int

    @property
    def layer_ids(self) -> Sequence[int]:
        """Target layers whose outputs `observe` wants."""

    def start(self, rows: int, max_length: int) -> None:
        """Begin a batch of `rows` sequences of at most `max_length` tokens."""

    def observe(self, features: Float[Tensor, "b s taps_h"], positions: Int[Tensor, "b s"]) -> None:
        """Features of verified inputs. Those past a row's last committed token are overwritten later."""

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows of the batch."""

    def propose(self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, " b"]) -> Int[Tensor, "b k"]:
        """`ids[i, : anchors[i] + 1]` are committed. Returns B-1 draft tokens per row."""


class DrafterProposer:
    """A drafter and its context keys and values, kept per row at the absolute position.

    Indexing by position makes ragged batches trivial: whatever lies at or beyond the anchor is masked, as in training. With
    `candidate_pool` a Domino drafter corrects only that many entries of the vocabulary, as SGLang does to save time. 0
    corrects all of them, which is exact.
    """

    def __init__(self, drafter: DFlash, target: Target, candidate_pool: int = 0) -> None:
        for what in ("hidden_size", "vocab_size"):
            have, want = getattr(drafter.config, what), int(getattr(target.config, what))
            if have != want:
                raise UserError(f"this drafter is for a target with {what} {have}; that of {target.name} is {want}")
        deepest = max(drafter.config.target_layer_ids)
        if deepest >= target.num_layers - 1:
            raise UserError(f"this drafter reads layer {deepest} of its target; {target.name} has {target.num_layers}")
        self.drafter, self.target = drafter.eval(), target
        self.head = draft_head(drafter, target.head)
        if candidate_pool and not isinstance(drafter, Domino):
            raise UserError("a candidate pool limits what a Domino drafter corrects; this one corrects nothing")
        if candidate_pool < 0:
            raise UserError(f"a candidate pool has at least 0 tokens (0: all of them), got {candidate_pool}")
        self.candidate_pool = candidate_pool if candidate_pool < drafter.config.vocab_size else 0
        self.block_size = drafter.config.block_size
        self.layer_ids = drafter.config.target_layer_ids
        self._context: list[ContextKV] = []

    def start(self, rows: int, max_length: int) -> None:
        config = self.drafter.config
        shape = (rows, config.num_key_value_heads, max_length + self.block_size, config.head_dim)
        like = self.drafter.fc.weight
        self._context = [
            ContextKV(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)
        ]

    @torch.no_grad()
    def observe(self, features: Tensor, positions: Tensor) -> None:
        fresh = self.drafter.context(features.to(self.drafter.fc.weight.dtype), positions)
        for kept, new in zip(self._context, fresh, strict=True):
            index = positions[:, None, :, None].expand_as(new.key)
            kept.key.scatter_(2, index, new.key)
            kept.value.scatter_(2, index, new.value)

    def select(self, rows: Tensor) -> None:
        self._context = [ContextKV(kv.key[rows], kv.value[rows]) for kv in self._context]

    def propose(self, ids: Tensor, anchors: Tensor) -> Tensor:
        return self._chosen(ids, anchors, None)[0]

    def sample(
        self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, " b"], temperature: float, numbers: Float[Tensor, "b k"]
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k v"]]:
        """A block drawn from the drafter with one number in [0, 1) per token, and the law that each token was drawn from."""

        def choose(i: int, logits: Tensor) -> Tensor:
            return draw((logits / temperature).softmax(-1), numbers[:, i : i + 1]).squeeze(1)

        tokens, logits = self._chosen(ids, anchors, choose)
        return tokens, (logits / temperature).softmax(-1)

    @torch.no_grad()
    def _chosen(
        self, ids: Tensor, anchors: Tensor, choose: Callable[[int, Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(self.drafter, Domino):
            z, anchor = self._now(ids, anchors), self.target.embed(ids.gather(1, anchors[:, None])[:, 0])
            return self.drafter.unroll(z, self.head.read(z), anchor, self.target.embed, choose, self.candidate_pool)
        logits = self.logits(ids, anchors)
        if choose is None:
            return logits.argmax(-1), logits
        return torch.stack([choose(i, logits[:, i]) for i in range(logits.shape[1])], 1), logits

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, " b"]) -> Float[Tensor, "b k v"]:
        """Logits of each slot's marginal, for a drafter that predicts the slots side by side.

        A block's law is the product of the marginals. They cover the target's vocabulary: -inf for tokens not in the
        drafter's.
        """
        return self.head.spread(self.head.read(self._now(ids, anchors)))

    def _now(self, ids: Tensor, anchors: Tensor) -> Float[Tensor, "b k h"]:
        width = int(anchors.max())
        context = [ContextKV(kv.key[:, :, :width], kv.value[:, :, :width]) for kv in self._context]
        return self.hidden(ids, anchors[:, None], context)[:, 0]

    def hidden(
        self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], context: list[ContextKV]
    ) -> Float[Tensor, "b n k h"]:
        """Final hidden states of the predicted slots of any blocks of `ids`."""
        return self.drafter.predictions(self.drafter(self._embeds(ids, anchors), anchors, context))

    def reading(
        self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], context: list[ContextKV]
    ) -> tuple[RowSource, Head]:
        """The rows that the head reads of any blocks of `ids`, computed on demand, and the head.

        Domino's rows follow the tokens of `ids`, which is what decoding reads as long as every draft agrees with them.
        """
        pending = self.drafter.pending(self._embeds(ids, anchors), anchors, context)
        if not isinstance(self.drafter, Domino):
            return pending, self.head
        said = self.target.embed(prefix_tokens(ids, anchors, self.block_size - 1))
        return Corrected(self.drafter, pending, said), self.head._replace(expansion=self.drafter.expansion)

    @torch.no_grad()
    def one(
        self, ids: Int[Tensor, "1 s"], anchors: Int[Tensor, "1 1"], context: list[ContextKV], number: int
    ) -> Float[Tensor, " rows"]:
        """The head's logits of one prediction (0 is the first) of one block."""
        rows, head = self.reading(ids, anchors, context)
        todo = torch.arange(self.block_size - 1, device=ids.device)[None, None] == number
        width = self.drafter.config.hidden_size
        row = rows.rows(todo)[0]
        return head.read(row[:width]) + (0 if head.expansion is None else head.expansion @ row[width:])

    @torch.no_grad()
    def pooled(
        self, ids: Int[Tensor, "b s"], anchors: Int[Tensor, "b n"], context: list[ContextKV]
    ) -> Int[Tensor, "b n k"]:
        """What a Domino drafter with a candidate pool proposes, each prediction given the tokens of `ids` before it."""
        assert isinstance(self.drafter, Domino)
        z = self.hidden(ids, anchors, context)
        base = self.target.logits(z)
        state = self.drafter.prefix(self.target.embed(prefix_tokens(ids, anchors, z.shape[2])).to(z.dtype))
        number = torch.arange(z.shape[2], device=z.device)
        final = base + F.linear(self.drafter.codes(z, state, number), self.drafter.expansion)
        pool = pool_mask(base, self.candidate_pool)
        assert pool is not None
        closed = ~pool[:, :, None] & (number >= self.drafter.pure)[..., None]
        return final.masked_fill(closed, -torch.inf).argmax(-1)

    def _embeds(self, ids: Tensor, anchors: Tensor) -> Tensor:
        config = self.drafter.config
        tokens = block_inputs(ids, anchors, config.block_size, config.mask_token_id)
        return self.target.embed(tokens).to(self.drafter.fc.weight.dtype)


class PromptLookup:
    """Copy what followed the latest earlier occurrence of the last three, else two, else one tokens.

    Where that reaches the end of the text, copying goes on with what was copied, as a loop does.
    """

    layer_ids: Sequence[int] = ()

    def __init__(self, block_size: int, longest: int = 3) -> None:
        if block_size < 2:
            raise UserError(f"prompt lookup needs a block size of at least 2, anchor included; got {block_size}")
        self.block_size, self.longest = block_size, longest
        self._seen: list[_Ngrams] = []
        self.matched: list[int] = []
        """Per row of the latest proposal: how many tokens matched, 0 where there was nothing to copy."""

    def start(self, rows: int, max_length: int) -> None:
        self._seen = [_Ngrams(self.longest) for _ in range(rows)]

    def observe(self, features: Tensor, positions: Tensor) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        self._seen = [self._seen[i] for i in rows.tolist()]

    def propose(self, ids: Tensor, anchors: Tensor) -> Tensor:
        ends = [a + 1 for a in anchors.tolist()]
        texts = ids[:, : max(ends)].tolist()  # at once: the host waits for the device at every transfer
        rows = [text[:end] for text, end in zip(texts, ends, strict=True)]
        found = [seen.continuation(row, self.block_size - 1) for seen, row in zip(self._seen, rows, strict=True)]
        self.matched = [n for _, n in found]
        return torch.tensor([draft for draft, _ in found], device=ids.device)

    def along(self, tokens: list[int], anchors: Sequence[int]) -> list[tuple[list[int], int]]:
        """What a text's proposals are at its anchors, ascending, each with the number of tokens that matched."""
        seen = _Ngrams(self.longest)
        return [seen.continuation(tokens[: a + 1], self.block_size - 1) for a in anchors]


class LookupFirst:
    """Prompt lookup where the last `ngram` tokens occurred before, the drafter elsewhere.

    This measures what a drafter adds to the competitor that costs nothing. Both proposals depend on the committed text
    alone, so verification is as exact for the two together as for each. Where one proposes fewer tokens than the other, its
    block is filled with the drafter's mask token, which hardly any target emits.
    """

    def __init__(self, drafter: DrafterProposer, ngram: int, block_size: int | None = None) -> None:
        """`block_size` is the lookup's, the drafter's when not given."""
        if ngram < 1:
            raise UserError(f"lookup needs at least one token to match, got ngram {ngram}")
        self.drafter, self.ngram = drafter, ngram
        self.lookup = PromptLookup(block_size or drafter.block_size, max(3, ngram))
        self.block_size = max(self.lookup.block_size, drafter.block_size)
        self.layer_ids: Sequence[int] = drafter.layer_ids
        self.filler = drafter.drafter.config.mask_token_id

    def start(self, rows: int, max_length: int) -> None:
        self.lookup.start(rows, max_length)
        self.drafter.start(rows, max_length)

    def observe(self, features: Tensor, positions: Tensor) -> None:
        self.drafter.observe(features, positions)

    def select(self, rows: Tensor) -> None:
        self.lookup.select(rows)
        self.drafter.select(rows)

    def propose(self, ids: Tensor, anchors: Tensor) -> Tensor:
        copied = self.lookup.propose(ids, anchors)
        found = torch.tensor([n >= self.ngram for n in self.lookup.matched], device=ids.device)
        own = copied[:, :0] if found.all() else self.drafter.propose(ids, anchors)
        return torch.where(found[:, None], self.fill(copied), self.fill(own))

    def asks_drafter(self, tokens: list[int]) -> bool:
        """Whether the drafter proposes after these committed tokens, taken as a sequence of its own."""
        return self.lookup.along(tokens, [len(tokens) - 1])[0][1] < self.ngram

    def fill(self, draft: Int[Tensor, "b k"]) -> Int[Tensor, "b block_1"]:
        return F.pad(draft, (0, self.block_size - 1 - draft.shape[1]), value=self.filler)


class _Ngrams:
    """For each n-gram of a growing sequence, the index of the token after its latest occurrence."""

    def __init__(self, longest: int) -> None:
        self.longest, self.read = longest, 0
        self.last: dict[tuple[int, ...], int] = {}

    def continuation(self, tokens: list[int], length: int) -> tuple[list[int], int]:
        """(`length` tokens after the latest match, how many matched); the last token alone where nothing does."""
        for end in range(self.read + 1, len(tokens)):  # n-grams that end before the last token have a successor
            for n in range(1, min(self.longest, end) + 1):
                self.last[tuple(tokens[end - n : end])] = end
        self.read = len(tokens) - 1
        for n in range(self.longest, 0, -1):
            start = self.last.get(tuple(tokens[-n:]))
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + i % period] for i in range(length)], n
        return [tokens[-1]] * length, 0
