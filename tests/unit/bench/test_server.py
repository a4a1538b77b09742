"""What a server does differently is told: its text, its rounds, its counters, or that it is not there."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_geometry

from specauf.bench.compare import evaluate
from specauf.bench.runner import Recorded
from specauf.bench.server import Server, check_server
from specauf.config import EvalConfig, SamplingConfig
from specauf.decode.generate import Round, generate
from specauf.decode.propose import DrafterProposer, Proposer
from specauf.decode.replay import record, replay, trajectory_features
from specauf.drafter.checkpoint import build_drafter
from specauf.strict import UserError
from specauf.target import Target

LIMIT, SAMPLING = 24, SamplingConfig(repetition_penalty=1.2)


class Fake:
    """vLLM's three addresses, with this library's decoding behind them."""

    def __init__(self, target: Target, proposer: Proposer) -> None:
        self.target, self.proposer = target, proposer
        self.rounds = self.accepted = 0
        self.surplus = self.wrong = self.late = 0.0
        self.metrics, self.ids = True, True
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
        if not self.metrics:
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
        assert request["model"] == "m" and request["temperature"] == 0
        sampling = SamplingConfig(repetition_penalty=request["repetition_penalty"])
        wanted = {"sampling": sampling, "max_new_tokens": request["max_tokens"]}
        (made,) = generate(self.target, self.proposer, [request["prompt"]], **wanted)

        def count() -> None:
            time.sleep(self.late)
            self.rounds += len(made.rounds) + int(self.surplus)
            self.accepted += sum(r.accepted for r in made.rounds)

        threading.Thread(target=count).start()
        tokens = [*made.tokens]
        if self.wrong:
            tokens[3] += 1
        return json.dumps({"choices": [{"text": "...", **({"token_ids": tokens} if self.ids else {})}]})


@pytest.fixture
def proposer(target: Target) -> DrafterProposer:
    return DrafterProposer(build_drafter(make_geometry(target), seed=0).to(target.embed_weight), target)


@pytest.fixture
def fake(target: Target, proposer: DrafterProposer) -> Iterator[Fake]:
    fake = Fake(target, proposer)
    yield fake
    fake.http.shutdown()


@pytest.fixture
def task(target: Target, prompts: list[list[int]]) -> Recorded:
    dialogues = [(str(i), p) for i, p in enumerate(prompts)]
    return Recorded(
        "Birds",
        record(target, dialogues, limit=LIMIT, block_size=5, sampling=SAMPLING),
        LIMIT,
        [*range(len(prompts))],
    )


@pytest.fixture
def rounds(target: Target, proposer: DrafterProposer, task: Recorded) -> list[list[Round]]:
    features = trajectory_features(target, task.trajectories, proposer.layer_ids)
    return replay(proposer, task.trajectories, features, LIMIT)


def test_a_server_that_decodes_as_we_do_agrees_even_if_it_counts_a_moment_later(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    fake.late, done = 0.05, []
    found = check_server(Server(fake.url + "/v1/"), target, task, rounds, SAMPLING, lambda: done.append(1))
    total = sum(len(r) for r in rounds)
    assert found.passed and (found.rounds, found.replayed, found.same) == (total, total, len(done)) == (total, total, 8)
    assert str(found).startswith(f"{total} rounds over 8 equal texts, replay {total}; ")


def test_a_round_too_many_on_every_prompt_is_no_near_tie(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    fake.surplus = 1
    found = check_server(Server(fake.url), target, task, rounds, SAMPLING)
    assert not found.passed and not found.problems and found.rounds == found.replayed + 8


def test_other_text_is_told_with_its_place_and_its_rounds_do_not_count(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    fake.wrong = 1
    found = check_server(Server(fake.url), target, task, rounds, SAMPLING)
    assert not found.passed and found.same == found.rounds == found.replayed == 0
    assert len(found.problems) == 8 and "0: the server departs at token 3, top-2 margin" in str(found)


def test_what_is_no_such_server_is_an_error_that_says_so(target: Target, fake: Fake) -> None:
    for url, told in (
        ("localhost:8000", "no address"),
        ("http://127.0.0.1:1", r"127\.0\.0\.1:1/v1/models cannot be reached"),
        (fake.url + "/other", "/other/v1/models answers 404"),
    ):
        with pytest.raises(UserError, match=told):
            Server(url)
    fake.ids = False
    with pytest.raises(UserError, match="returns no token_ids"):
        Server(fake.url).answer([1, 2], 4)
    fake.metrics = False
    with pytest.raises(UserError, match="start vLLM with --speculative-config"):
        Server(fake.url)


def test_counters_that_never_move_end_the_wait(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specauf.bench.server.PATIENCE", 0.05)
    fake.late = 0.5
    tokens, made = Server(fake.url).answer([1, 2], LIMIT)
    assert len(tokens) == LIMIT and made == 0


def test_evaluate_has_the_server_among_its_checks(target: Target, fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at temperature 0"):
        evaluate(
            *(target, {"a": fake.proposer.drafter}, EvalConfig(sampling=SamplingConfig(1.0)), tmp_path, None, 0, None),  # type: ignore[arg-type,attr-defined]
            server=Server(fake.url),
        )
