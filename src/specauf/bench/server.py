"""A running vLLM server beside replay: does it say the target's text, in the rounds that were counted?

The commonest complaint about drafters is a good tau in training and another one when served. Every recorded prompt is sent
by its token ids, greedily, one at a time. The server's counters of speculative decoding, read before and after, tell the
rounds of each.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specauf.bench.runner import Recorded, departure, near_tie
from specauf.config import SamplingConfig
from specauf.decode.generate import Round, generate
from specauf.strict import UserError, counted
from specauf.target import Target

TOLERANCE = 0.01
"""How far the number of rounds may differ from replay's over the same text: near ties of the drafter fall either way."""
PATIENCE = 2.0
"""Seconds to wait for counters that stand still: a server answers a moment before it counts."""
GREEDY = {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Said in full: a server may have other defaults from the target's generation_config.json."""
COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens)(?:_total)?(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


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
        return not self.problems and abs(self.rounds - self.replayed) <= TOLERANCE * self.replayed

    def __str__(self) -> str:
        return "; ".join(
            [
                *self.problems,
                f"{counted(self.rounds, 'rounds')} over {counted(self.same, 'equal texts')}, replay {self.replayed:,}",
                f"{_ratio(self.tokens, self.rounds)} tokens a round, replay {_ratio(self.tokens, self.replayed)}",
                *([counted(len(self.near_ties), "near ties")] if self.near_ties else []),
            ]
        )


class Server:
    """vLLM's OpenAI-compatible server at `url`, idle and started with the drafter."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` when there is no such server, or it decodes without a drafter."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--server: {url!r} is no address like http://127.0.0.1:8000")
        self.model = str(json.loads(self._ask("/v1/models"))["data"][0]["id"])
        self.counters()

    def counters(self) -> tuple[int, int]:
        """(verify rounds, accepted draft tokens) since the server began."""
        found = {"drafts": 0.0, "accepted_tokens": 0.0}
        lines = COUNTER.findall(self._ask("/metrics"))
        if not lines:
            raise UserError(
                f"{self.url}/metrics has no vllm:spec_decode_ counters: start vLLM with --speculative-config, and without "
                "--disable-log-stats"
            )
        for name, value in lines:  # one a worker
            found[name] += float(value)
        return round(found["drafts"]), round(found["accepted_tokens"])

    def answer(self, prompt: Sequence[int], limit: int, repetition_penalty: float = 1) -> tuple[list[int], int]:
        """Up to `limit` greedy tokens after `prompt`, and the number of verify rounds that they took."""
        rounds, accepted = self.counters()
        wanted = {"max_tokens": limit, "repetition_penalty": repetition_penalty, "return_token_ids": True}
        request = {"model": self.model, "prompt": list(prompt), **wanted, **GREEDY}
        (choice,) = json.loads(self._ask("/v1/completions", request))["choices"]
        if (tokens := choice.get("token_ids")) is None:
            raise UserError(f"{self.url} returns no token_ids: a newer vLLM does")
        made, changed, now = (0, 0), time.monotonic(), time.monotonic()
        # The prefill made the first token, each round one more than it accepted.
        while sum(made) + 1 < len(tokens) and now - changed < PATIENCE:
            last, after = made, self.counters()
            made, now = (after[0] - rounds, after[1] - accepted), time.monotonic()
            changed = now if made != last else changed
        return tokens, made[0]

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise UserError(f"{self.url}{path} answers {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.url}{path} cannot be reached ({error}): is the server running?") from None


def check_server(
    server: Server,
    target: Target,
    task: Recorded,
    rounds: Sequence[Sequence[Round]],
    sampling: SamplingConfig,
    on_done: Callable[[], None] = lambda: None,
) -> Served:
    """Send a task's prompts, recorded with `sampling` (T=0); compare text with the recording, and rounds with replay's."""
    found = Served()
    for trajectory, text, replayed in zip(task.trajectories, task.texts(), rounds, strict=True):
        tokens, made = server.answer(trajectory.prompt, task.limit, sampling.repetition_penalty)
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
        on_done()
    return found


def _ratio(tokens: int, rounds: int) -> str:
    return f"{tokens / rounds:.3f}" if rounds else "–"
