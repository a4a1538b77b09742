"""The target answers a conversation's questions itself: the rows of tokens that become training data.

A row only grows: prompt, sampled tokens with their end of turn, the template's text up to the next answer. Nothing generated
is tokenised again, so training sees the tokens that were drawn. Some templates rewrite history (Qwen3 drops the thinking of
an earlier answer). Then the next answer begins a row of its own, from the prompt that a server would render for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat, takewhile
from typing import Any

from specauf.config import DataConfig
from specauf.data.chat import TemplateRefused, UnstableTemplate, continuation_ids, prompt_ids
from specauf.data.rollouts import RolloutConfig
from specauf.data.sources import Conversation, Message
from specauf.decode.generate import generate
from specauf.decode.propose import Proposer
from specauf.decode.server import Server
from specauf.objective.blocks import counter_hash
from specauf.target import Target

SAMPLE = 21
"""Stream of the counter hash that turns (conversation, sample) into the uid of a rollout, and a row into that of the next."""
SERVED = 23
"""Stream of the seeds that a server is given."""
WHOLE = "all turns answered"
ANEW = "rows that another goes on from, since the template rewrites history"


@dataclass
class Sample:
    """One conversation on its way through the target: a row, and those that go on from it."""

    uid: int
    number: int
    conversation: Conversation
    question: Sequence[Message]
    """What the next answer replies to, not yet in `messages`."""
    pending: list[int]
    """The tokens that lead from `ids` to the next answer."""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 where a token was generated for this row."""
    messages: list[Message] = field(default_factory=list)
    """Everything said so far, in earlier rows too."""
    stop: str = ""
    """Why it ended; empty while it goes on."""
    seconds: float = 0.0
    """Its share of the time that its batch took."""
    next: Sample | None = None
    """The row that goes on where the template rewrote history."""

    def rows(self) -> Iterator[Sample]:
        row: Sample | None = self
        while row:
            yield row
            row = row.next

    def begin_next(self, question: Sequence[Message], prompt: list[int]) -> None:
        """End this row; another answers `question` after `prompt`, which renders all that was said."""
        uid = int(counter_hash(SAMPLE, self.uid, 0))
        self.stop = ANEW
        self.next = Sample(uid, self.number, self.conversation, question, prompt, messages=[*self.messages])


@dataclass(frozen=True)
class Roller:
    """How conversations are answered. `proposer` None is plain decoding."""

    target: Target
    data: DataConfig
    plan: RolloutConfig
    mask_token_id: int
    """No sample may hold it: the drafter would read it as an open slot."""
    proposer: Proposer | None = None
    server: Server | None = None
    """Decodes in the target's place."""

    def begin(self, uid: int, conversation: Conversation) -> list[Sample] | str:
        """The samples of a conversation before its first answer, or why there are none.

        Raises `UnstableTemplate` when the template refuses the prompt.
        """
        question = _question(conversation.messages)
        prompt = prompt_ids(self._tokenizer, question, self.data.enable_thinking)
        if self.data.max_length - len(prompt) < 2:
            return "prompt fills max_length"
        if self.mask_token_id in prompt:
            return "the prompt holds the MASK token"
        uids = [int(counter_hash(SAMPLE, uid, i)) for i in range(self.plan.samples)]
        return [Sample(u, i, conversation, question, prompt) for i, u in enumerate(uids)]

    def roll(self, batch: Sequence[Sample]) -> None:
        """Answer every turn of every sample; the batch goes through the turns together."""
        while going := [row for sample in batch for row in sample.rows() if not row.stop]:
            prompts = [row.ids + row.pending for row in going]
            limits = [min(self.plan.max_new_tokens, self.data.max_length - len(prompt)) for prompt in prompts]
            for row, tokens in zip(going, self._answer(prompts, limits, [row.uid for row in going]), strict=True):
                self._take(row, tokens)

    def _answer(self, prompts: list[list[int]], limits: list[int], uids: list[int]) -> list[list[int]]:
        sampling = self.plan.sampling
        if self.server is None:
            given = (self.target, self.proposer, prompts)
            return [g.tokens for g in generate(*given, sampling=sampling, max_new_tokens=limits, uids=uids)]
        seeds = [
            int(counter_hash(sampling.seed, SERVED, uid, len(p))) >> 32 for uid, p in zip(uids, prompts, strict=True)
        ]
        with ThreadPoolExecutor(len(prompts)) as pool:  # the server makes batches of what comes at once
            ends = repeat(self.target.eos_ids())
            return list(pool.map(self.server.complete, prompts, limits, repeat(sampling), ends, seeds))

    def _take(self, row: Sample, tokens: list[int]) -> None:
        if self.mask_token_id in tokens:
            row.stop = "samples ended before an answer with the MASK token"
            return
        ended = tokens[-1] in self.target.eos_ids()
        answer = str(self._tokenizer.decode(tokens[:-1] if ended else tokens, clean_up_tokenization_spaces=False))
        row.ids += row.pending + tokens
        row.mask += [0] * len(row.pending) + [1] * len(tokens)
        row.messages += [*row.question, Message("assistant", answer)]
        rest = row.conversation.messages[len(row.messages) :]  # answers replace the corpus's one by one
        turns = sum(m.role == "assistant" for m in row.messages)
        if not ended:
            short = len(tokens) < self.plan.max_new_tokens  # data.max_length left no more room
            row.stop = "samples ended at max_length" if short else "samples cut by the token limit"
        elif not rest or turns == self.plan.turns:
            row.stop = WHOLE
        else:
            self._ask(row, _question(rest), tokens[-1])

    def _ask(self, row: Sample, question: Sequence[Message], end: int) -> None:
        said, thinking = row.messages, self.data.enable_thinking
        try:
            pending = continuation_ids(self._tokenizer, said[:-1], said[-1].content, end, question, thinking)
            appends = True
        except TemplateRefused:
            row.stop = "samples ended at a question that the template refuses"
            return
        except UnstableTemplate:
            pending = prompt_ids(self._tokenizer, [*said, *question], thinking)
            appends = False
        if self.data.max_length - appends * len(row.ids) - len(pending) < 2:
            row.stop = "samples ended at max_length"
        elif self.mask_token_id in pending:
            row.stop = "samples ended before a question with the MASK token"
        elif appends:
            row.question, row.pending = question, pending
        else:
            row.begin_next(question, pending)

    @property
    def _tokenizer(self) -> Any:
        return self.target.tokenizer


def _question(messages: Sequence[Message]) -> list[Message]:
    return list(takewhile(lambda m: m.role != "assistant", messages))
