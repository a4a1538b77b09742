"""What a server does differently is told: its text, its rounds, its counters, or that it is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_geometry, make_talker
from tests.fake_server import Fake

from specauf.bench.compare import evaluate
from specauf.bench.runner import Recorded
from specauf.bench.server import Served, _counters, check_server, require_target
from specauf.config import EvalConfig, SamplingConfig
from specauf.decode.generate import Round
from specauf.decode.propose import DrafterProposer
from specauf.decode.replay import record, replay, trajectory_features
from specauf.decode.server import Server
from specauf.drafter.checkpoint import build_drafter
from specauf.strict import UserError
from specauf.target import Target

LIMIT, SAMPLING = 24, SamplingConfig(repetition_penalty=1.2)


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
    found = check_server(Server(fake.url + "/v1/"), target, task, rounds, SAMPLING, 5, done.append)
    total = sum(len(r) for r in rounds)
    assert found.passed and (found.rounds, found.replayed, found.same) == (total, total, len(done)) == (total, total, 8)
    assert str(found).startswith(f"{total} rounds over 8 equal texts, replay {total}; ")


def test_a_round_too_many_on_every_prompt_is_no_near_tie(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    fake.surplus = 1
    found = check_server(Server(fake.url), target, task, rounds, SAMPLING, 5)
    assert not found.passed and not found.problems and found.rounds == found.replayed + 8


def test_other_text_is_told_with_its_place_and_its_rounds_do_not_count(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    fake.wrong = 1
    found = check_server(Server(fake.url), target, task, rounds, SAMPLING, 5)
    assert not found.passed and found.same == found.rounds == found.replayed == 0
    assert len(found.problems) == 8 and "0: the server departs at token 3, top-2 margin" in str(found)


def test_where_every_text_parts_at_a_near_tie_nothing_is_shown_and_the_check_fails(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.wrong = 1
    monkeypatch.setattr("specauf.bench.server.near_tie", lambda target: 1e9)
    found = check_server(Server(fake.url), target, task, rounds, SAMPLING, 5)
    assert not found.problems and len(found.near_ties) == 8 and not found.passed


def test_what_is_no_such_server_is_an_error_that_says_so(target: Target, fake: Fake) -> None:
    for url, told in (
        ("localhost:8000", "no address"),
        ("http://127.0.0.1:1", r"127\.0\.0\.1:1/v1/models cannot be reached"),
        (fake.url + "/other", "/other/v1/models answers 404"),
    ):
        with pytest.raises(UserError, match=told):
            Server(url)
    fake.proposer = None
    for text in (fake.counters(), "vllm:spec_decode_num_drafts NaN\n", "vllm:spec_decode_num_drafts 1e+999\n"):
        fake.counters = lambda text=text: text  # type: ignore[method-assign,misc]
        with pytest.raises(UserError, match="start vLLM with --speculative-config"):
            Server(fake.url).counters()


def test_counters_that_never_move_end_the_wait(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specauf.bench.server.PATIENCE", 0.05)
    server = Server(fake.url)
    assert _counters(server, server.counters(), 10) == (0, 0)


def test_a_server_that_decodes_for_others_is_told(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    complete = fake.complete

    def busy(request: dict[str, Any]) -> str:
        fake.accepted += 30
        said = complete(request)
        fake.rounds += 1
        return said

    fake.complete = busy  # type: ignore[method-assign]
    fake.late = 0.05
    with pytest.raises(UserError, match="decodes for others too"):
        check_server(Server(fake.url), target, task, rounds, SAMPLING, 5)


def test_a_server_that_decodes_for_others_between_two_prompts_is_told(
    target: Target, fake: Fake, task: Recorded, rounds: list[list[Round]]
) -> None:
    def other(n: int) -> None:
        fake.rounds += 1

    with pytest.raises(UserError, match="decodes for others too"):
        check_server(Server(fake.url), target, task, rounds, SAMPLING, 5, other)


def test_too_little_compared_is_no_pass() -> None:
    assert not Served(same=1).passed, "a text of one token has no round"
    assert not Served(same=1, near_ties=["", ""], rounds=2, replayed=2).passed
    assert Served(same=2, near_ties=["", ""], rounds=2, replayed=2).passed


def test_a_server_of_another_model_is_refused(target: Target, fake: Fake, make_tokenizer: Any) -> None:
    require_target(Server(fake.url), target, [[3, 4, 5], [6]])
    with pytest.raises(UserError, match=r"does not serve .* 'm' departs from it at token"):
        require_target(Server(fake.url), make_talker(make_tokenizer()), [[3, 4, 5]])


def test_a_server_that_near_ties_hide_is_refused(target: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.wrong = 1
    monkeypatch.setattr("specauf.bench.server.near_tie", lambda target: 1e9)
    with pytest.raises(UserError, match="near ties end the greedy answers to 2 prompts after 6 tokens in all"):
        require_target(Server(fake.url), target, [[3, 4, 5], [6]])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<html>", "/v1/models does not answer as vLLM does: '<html>'"),
        ('{"data": []}', "does not answer as vLLM does"),
        ('{"data": null}', "does not answer as vLLM does"),
        ("[" * 10**5, "does not answer as vLLM does"),
    ],
)
def test_an_answer_in_another_form_is_no_traceback(fake: Fake, text: str, told: str) -> None:
    fake.models = lambda: text  # type: ignore[method-assign]
    with pytest.raises(UserError, match=told):
        Server(fake.url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://127.0.0.1:1 2", "http://[::1"])
def test_an_address_that_is_none_is_no_traceback(url: str) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        Server(url)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"token_ids": [], "finish_reason": "stop"}, "after 0 of 8 tokens"),
        ({"token_ids": [1, 2], "finish_reason": "abort"}, r"after 2 of 8 tokens.*'abort'"),
        ({}, "returns no token_ids"),
        *(
            ({"token_ids": other}, "does not answer as vLLM")
            for other in (["a"], [1.5], [None], [[]], [-1], 7, {"0": 1})
        ),
    ],
)
def test_an_answer_that_is_not_whole_is_refused(fake: Fake, choice: dict[str, Any], told: str) -> None:
    fake.complete = lambda request: json.dumps({"choices": [choice]})  # type: ignore[method-assign]
    with pytest.raises(UserError, match=told):
        Server(fake.url).complete([1, 2], 8, SAMPLING, {0})


def test_a_failed_request_is_made_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specauf.decode.server.PAUSES", (0.0, 0.0))
    complete, failed = fake.complete, list[int]()

    def fails(request: dict[str, Any]) -> str:
        failed.append(1)
        if len(failed) % 3:
            raise ConnectionError("dropped")
        return complete(request)

    fake.complete = fails  # type: ignore[method-assign]
    monkeypatch.setattr(fake.http, "handle_error", lambda *about: None)
    assert len(Server(fake.url).complete([1, 2], 8, SAMPLING, ())) == 8 and len(failed) == 3


def test_evaluate_compares_with_a_server_at_temperature_0_alone(target: Target, fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at temperature 0"):
        evaluate(
            *(target, {"a": fake.proposer.drafter}, EvalConfig(sampling=SamplingConfig(1.0)), tmp_path, None, 0, None),  # type: ignore[arg-type,attr-defined]
            server=Server(fake.url),
        )
