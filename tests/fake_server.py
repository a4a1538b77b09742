"""A stand-in for vLLM's server: its three addresses, with this library's decoding behind them."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from specauf.config import SamplingConfig
from specauf.decode.generate import generate
from specauf.decode.propose import Proposer
from specauf.target import Target


class Fake:
    """Serves `target` until `http.shutdown()`; what it counts and says can be falsified."""

    def __init__(self, target: Target, proposer: Proposer | None = None) -> None:
        self.target, self.proposer = target, proposer
        self.rounds = self.accepted = 0
        self.surplus = self.wrong = self.late = 0.0
        self.lock, self.decoding = threading.Lock(), threading.Lock()
        self.requests = list[dict[str, Any]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told = {"/v1/models": outer.models, "/metrics": outer.counters}.get(self.path)
                self.reply(told() if told else "", 200 if told else 404)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(outer.complete(json.loads(body)), 200)

            def reply(self, text: str, code: int) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def models(self) -> str:
        return json.dumps({"data": [{"id": "m"}]})

    def counters(self) -> str:
        if self.proposer is None:
            return "# HELP other Something else.\nother 1.0\n"
        labels = '{engine="0",model_name="m"}'
        return (
            "# TYPE vllm:spec_decode_num_drafts_total counter\n"
            f"vllm:spec_decode_num_drafts_total{labels} {float(self.rounds)}\n"
            f"vllm:spec_decode_num_drafts_created{labels} 1.7e+09\n"
            f"vllm:spec_decode_num_draft_tokens_total{labels} 99.0\n"
            f"vllm:spec_decode_num_accepted_tokens_total{labels} {float(self.accepted)}\n"
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} 7.0\n'
        )

    def complete(self, request: dict[str, Any]) -> str:
        assert request["model"] == "m"
        assert request["min_p"] == request["presence_penalty"] == request["frequency_penalty"] == 0
        names = ("temperature", "top_p", "repetition_penalty", "seed")
        with self.decoding:
            self.requests.append(request)
            (made,) = generate(
                *(self.target, self.proposer, [request["prompt"]]),
                sampling=SamplingConfig(top_k=max(0, request["top_k"]), **{name: request[name] for name in names}),
                max_new_tokens=request["max_tokens"],
                eos_ids=frozenset(request["stop_token_ids"]),
            )

        def count() -> None:
            time.sleep(self.late)
            with self.lock:
                self.rounds += len(made.rounds) + int(self.surplus)
                self.accepted += sum(r.accepted for r in made.rounds)

        threading.Thread(target=count).start()
        tokens = [*made.tokens]
        if self.wrong:
            at = min(3, len(tokens) - 1)
            tokens[at] += 1
        return json.dumps({"choices": [{"text": "...", "token_ids": tokens}]})
