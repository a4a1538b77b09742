"""A running vLLM as the one who decodes: its answers by token ids, and its counters of speculative decoding."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from http.client import HTTPException
from typing import Any

from specauf.config import SamplingConfig
from specauf.strict import UserError

COUNTER = re.compile(
    r"^vllm:spec_decode_num_(drafts|accepted_tokens)(?:_total)?(\{[^}]*\})? (\d+(?:\.\d+)?(?:e\+\d\d)?)$", re.MULTILINE
)
PAUSES = (0.5, 5.0, 30.0)
"""Seconds before a failed request for an answer is made again: whoever waits for hundreds should not lose them to one."""


class Server:
    """vLLM's OpenAI-compatible server at `url`. Whatever it answers that is not vLLM's form is a `UserError`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--server: {url!r} is no address like http://127.0.0.1:8000")
        self.model = self._read("/v1/models", lambda found: str(found["data"][0]["id"]))

    def complete(
        self, prompt: Sequence[int], limit: int, sampling: SamplingConfig, stop: Collection[int], seed: int = 0
    ) -> list[int]:
        """Up to `limit` tokens after `prompt`; one of `stop` ends them and is the last.

        `seed` is of this answer's draws. The request says every setting: a server may have other defaults.
        """
        request = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": seed,
            "stop_token_ids": sorted(stop),
            "return_token_ids": True,
        }
        choice = self._read("/v1/completions", _choice, request)
        if (tokens := choice.get("token_ids")) is None:
            raise UserError(f"{self.url} returns no token_ids: a newer vLLM does")
        if not tokens or (tokens[-1] not in stop and len(tokens) != limit):
            raise UserError(
                f"{self.url} ended an answer after {len(tokens)} of {limit} tokens, at none that ends a text "
                f"(finish_reason {choice.get('finish_reason')!r})"
            )
        return list(tokens)

    def counters(self) -> tuple[int, int]:
        """(verify rounds, accepted draft tokens) since the server began. Raises `UserError` when it has no drafter."""
        found = {"drafts": 0.0, "accepted_tokens": 0.0}
        lines = COUNTER.findall(self._ask("/metrics"))
        if not lines:
            raise UserError(
                f"{self.url}/metrics has no vllm:spec_decode_ counters: start vLLM with --speculative-config, and without "
                "--disable-log-stats"
            )
        for name, _, value in lines:  # one an engine
            found[name] += float(value)
        return round(found["drafts"]), round(found["accepted_tokens"])

    def _read(self, path: str, pick: Callable[[Any], Any], body: dict[str, Any] | None = None) -> Any:
        text = self._ask(path, body)
        try:
            return pick(json.loads(text))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"{self.url}{path} does not answer as vLLM does: {text[:200]!r}") from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        for pause in (*(PAUSES if body else ()), None):
            try:
                request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=None if body else 60) as response:
                    return str(response.read().decode(errors="replace"))
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                if error.code < 500 or pause is None:
                    raise UserError(f"{self.url}{path} answers {error.code}: {said}") from None
            except (OSError, ValueError, HTTPException) as error:
                if pause is None:
                    raise UserError(f"{self.url}{path} cannot be reached ({error}): is the server running?") from None
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _choice(found: Any) -> dict[str, Any]:
    choice = dict(found["choices"][0])
    if not all(type(token) is int and token >= 0 for token in list(choice.get("token_ids") or ())):
        raise TypeError("a token's id is a whole number")
    return choice
