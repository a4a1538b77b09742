"""A running vLLM beside the target and replay: does it say the target's text, in the rounds that were counted?

The commonest complaint about drafters is a good tau in training and another one when served. Every recorded prompt is sent
by its token ids, greedily, one at a time. The server's counters of speculative decoding, read before and after, tell the
rounds of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specauf.bench.runner import Recorded, departure, near_tie
from specauf.config import SamplingConfig
from specauf.decode.generate import Round, generate
from specauf.decode.server import Server
from specauf.strict import UserError, counted
from specauf.target import Target

TOLERANCE = 0.01
"""How far the number of rounds may differ from replay's over the same text: near ties of the drafter fall either way."""
PATIENCE = 2.0
"""Seconds to wait for counters that stand still: a server answers a moment before it counts."""


@dataclass
class Served:
    """What a server made of a task's prompts."""

    same: int = 0
    """Texts equal to the recording's. Rounds are compared over these alone."""
    near_ties: list[str] = field(default_factory=list)
    """Where a text departs from the recording, and the target's two best tokens are as good as equal."""
    problems: list[str] = field(default_factory=list)
    """Where it departs from it without such a reason."""
    tokens: int = 0
    """Of the equal texts, as are the rounds."""
    rounds: int = 0
    replayed: int = 0

    @property
    def passed(self) -> bool:
        """Whether enough was compared, half of the texts and a round at least, and agrees."""
        apart, compared = abs(self.rounds - self.replayed), self.replayed > 0 and self.same >= len(self.near_ties)
        return compared and not self.problems and apart <= TOLERANCE * self.replayed

    def __str__(self) -> str:
        return "; ".join(
            [
                *self.problems,
                f"{counted(self.rounds, 'rounds')} over {counted(self.same, 'equal texts')}, replay {self.replayed:,}",
                f"{_ratio(self.tokens, self.rounds)} tokens a round, replay {_ratio(self.tokens, self.replayed)}",
                *([counted(len(self.near_ties), "near ties")] if self.near_ties else []),
            ]
        )


def check_server(
    server: Server,
    target: Target,
    task: Recorded,
    rounds: Sequence[Sequence[Round]],
    sampling: SamplingConfig,
    block_size: int,
    on_done: Callable[[int], None] = lambda n: None,
) -> Served:
    """Send a task's prompts, recorded with `sampling` (T=0); compare text with the recording, and rounds with replay's.

    Raises `UserError` when the counters tell of more than these prompts.
    """
    found, seen = Served(), server.counters()
    for trajectory, text, replayed in zip(task.trajectories, task.texts(), rounds, strict=True):
        if server.counters() != seen:
            raise _busy(server)
        tokens = server.complete(trajectory.prompt, task.limit, sampling, target.eos_ids())
        before, seen = seen, _counters(server, seen, len(tokens))
        made, accepted = (now - then for now, then in zip(seen, before, strict=True))
        if made + accepted + 1 >= len(tokens) + block_size:  # a last round may reach beyond the end
            raise _busy(server)
        if tokens == text:
            found.same, found.tokens = found.same + 1, found.tokens + len(tokens)
            found.rounds, found.replayed = found.rounds + made, found.replayed + len(replayed)
        else:
            prompt = [trajectory.prompt]
            (plain,) = generate(target, None, prompt, sampling=sampling, max_new_tokens=task.limit, record_margins=True)
            at = departure(tokens, plain)
            margin = 0.0 if at is None else plain.margins[at]  # the recording itself departs from plain decoding
            told = f"{trajectory.id}: the server departs at token {at}, top-2 margin {margin:.2e}"
            (found.problems if margin > near_tie(target) else found.near_ties).append(told)
        on_done(1)
    return found


def require_target(server: Server, target: Target, prompts: Sequence[list[int]], tokens: int = 64) -> None:
    """Raise `UserError` unless the server says what the target says, near ties apart, in greedy answers to a few prompts."""
    plain = generate(target, None, prompts, max_new_tokens=tokens, record_margins=True)
    compared = 0
    for prompt, answer in zip(prompts, plain, strict=True):
        said = server.complete(prompt, tokens, SamplingConfig(), target.eos_ids())
        at = departure(said, answer)
        if at is not None and answer.margins[at] > near_tie(target):
            raise UserError(
                f"{server.url} does not serve {target.display_name}: its model {server.model!r} departs from it at token {at} "
                f"of a greedy answer, top-2 margin {answer.margins[at]:.2e}. Serve the recipe's target, in its dtype"
            )
        compared += len(said) if at is None else at
    if compared < tokens:
        raise UserError(
            f"{server.url} could not be compared with {target.display_name}: near ties end the greedy answers to "
            f"{counted(len(prompts), 'prompts')} after {counted(compared, 'tokens')} in all"
        )


def _counters(server: Server, before: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The counters when they have the rounds of an answer of so many tokens, or stand still without."""
    now, changed = server.counters(), time.monotonic()
    # The prefill made the first token, each round one more than it accepted.
    while sum(now) - sum(before) + 1 < tokens and time.monotonic() - changed < PATIENCE:
        time.sleep(0.005)
        last, now = now, server.counters()
        changed = time.monotonic() if now != last else changed
    return now


def _busy(server: Server) -> UserError:
    return UserError(f"{server.url} decodes for others too: its counters tell of more than was asked. It must be idle")


def _ratio(tokens: int, rounds: int) -> str:
    return f"{tokens / rounds:.3f}" if rounds else "–"
