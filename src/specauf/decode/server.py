"""A running vLLM as the one who decodes: its answers by token ids, and its counters of speculative decoding."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any

from specauf.config import SamplingConfig
from specauf.strict import UserError

COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens)(?:_total)?(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Server:
    """vLLM's OpenAI-compatible server at `url`."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` when there is no such server."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--server: {url!r} is no address like http://127.0.0.1:8000")
        self.model = str(json.loads(self._ask("/v1/models"))["data"][0]["id"])

    def complete(
        self, prompt: Sequence[int], limit: int, sampling: SamplingConfig, stop: Iterable[int], seed: int = 0
    ) -> list[int]:
        """Up to `limit` tokens after `prompt`; one of `stop` ends them and is the last.

        `seed` is of this answer's draws. Its request says every setting: a server may have other defaults.
        """
        request = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": seed,
            "stop_token_ids": sorted(stop),
            "return_token_ids": True,
        }
        (choice,) = json.loads(self._ask("/v1/completions", request))["choices"]
        if choice.get("token_ids") is None:
            raise UserError(f"{self.url} returns no token_ids: a newer vLLM does")
        return list(choice["token_ids"])

    def counters(self) -> tuple[int, int]:
        """(verify rounds, accepted draft tokens) since the server began. Raises `UserError` when it has no drafter."""
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
