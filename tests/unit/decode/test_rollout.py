"""Rollouts are the target's own tokens, in exactly the sequences it would see, whatever is interrupted or batched."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CHATML, make_talker
from tests.fake_server import Fake

from specauf import provenance
from specauf.config import DataConfig, SamplingConfig
from specauf.data.chat import prompt_ids
from specauf.data.dataset import HELDOUT, META, TOKENS, Prompts, TokenDataset, prepare, read_prompts, training_order
from specauf.data.rollouts import SETTINGS, RolloutConfig, _first, rollout_meta
from specauf.data.sources import Ledger
from specauf.decode.generate import generate
from specauf.decode.propose import PromptLookup
from specauf.decode.roller import ANEW, Roller, Sample
from specauf.decode.rollout import PARTS, SHORT, TEXT, rollout
from specauf.decode.server import Server
from specauf.strict import UserError
from specauf.target import Target

DATA = DataConfig(max_length=120, heldout=0.2)
GREEDY = RolloutConfig(max_new_tokens=12, batch_size=4)
SAMPLED = RolloutConfig(turns=1, samples=3, sampling=SamplingConfig(1.0), max_new_tokens=10, batch_size=4)
FILES = (TOKENS, META, HELDOUT, TEXT)
QUESTIONS = ("the quick fox?", "question", "user 17", "why lazy dog", "0123", "brown", "answer the fox", "café?")


@pytest.fixture(scope="module")
def talker(make_tokenizer: Any) -> Target:
    return make_talker(make_tokenizer())


class World:
    """A corpus, prepared, and rollouts of it."""

    def __init__(self, root: Path, target: Target) -> None:
        self.root, self.out, self.target, self.corpus = root, root, target, root / "corpus.json"
        records = []
        for i in range(20):
            asked = [f"{QUESTIONS[(i + k) % 8]} {i} {'the dog ' * 3 * (i % 4)}" for k in range(1 if i % 5 == 0 else 3)]
            turns = [{"from": who, "value": text} for q in asked for who, text in (("human", q), ("gpt", "x"))]
            records.append({"id": f"chat{i}_0", "conversations": turns})
        self.corpus.write_text(json.dumps(records))

    def roller(self, plan: RolloutConfig, data: DataConfig = DATA, **options: Any) -> Roller:
        mask = len(self.target.tokenizer) + 7  # type: ignore[arg-type]
        return Roller(self.target, data, plan, options.pop("mask_token_id", mask), **options)

    def source(self, data: DataConfig = DATA) -> Prompts:
        assert self.target.tokenizer is not None
        return read_prompts(data, self.target.tokenizer, source=self.corpus)

    def roll(
        self, plan: RolloutConfig, out: str = "out", on_progress: Any = lambda *told: None, **options: Any
    ) -> TokenDataset:
        roller = self.roller(plan, **options)
        return rollout(roller, self.source(roller.data), self.out / out, on_progress=on_progress)


def told(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / TEXT).read_text().splitlines()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, talker: Target) -> World:
    world = World(tmp_path_factory.mktemp("world"), talker)
    world.roll(GREEDY, "greedy")
    world.roll(SAMPLED, "sampled")
    return world


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    """The shared corpus and prepared data; new rollouts go into the test's own directory."""
    world = copy.copy(shared)
    world.out = tmp_path
    return world


@pytest.fixture
def greedy(shared: World) -> TokenDataset:
    return TokenDataset.load(shared.root / "greedy")


@pytest.fixture
def sampled(shared: World) -> TokenDataset:
    return TokenDataset.load(shared.root / "sampled")


def rows(data: TokenDataset) -> list[tuple[int, list[int], list[bool]]]:
    return [(e.uid, e.input_ids.tolist(), e.loss_mask.tolist()) for e in data]  # type: ignore[attr-defined]


def by_conversation(data: TokenDataset) -> list[list[tuple[int, list[int], list[bool]]]]:
    pairs = zip(data.meta["conversation_ids"], rows(data), strict=True)
    return [[row for _, row in run] for _, run in groupby(pairs, key=lambda pair: pair[0])]


def answers(mask: list[bool]) -> list[tuple[int, int]]:
    """(first, last + 1) of every run of generated tokens."""
    found, at = [], 0
    for generated, run in groupby(mask):
        n = len(list(run))
        if generated:
            found.append((at, at + n))
        at += n
    return found


def test_every_answer_is_plain_greedy_decoding_of_its_prompt_and_the_mask_is_exactly_the_answers(
    world: World, greedy: TokenDataset
) -> None:
    tokenizer = world.target.tokenizer
    assert tokenizer is not None
    turns = set()
    for (_, ids, mask), text in zip(rows(greedy), told(world.root / "greedy"), strict=True):
        said = [i for i, m in enumerate(text["messages"]) if m["role"] == "assistant"]
        spans = answers(mask)
        turns.add(len(spans))
        assert len(spans) == len(said) and said[-1] == len(text["messages"]) - 1 and mask[-1]
        for (first, last), i in zip(spans, said, strict=True):
            before, content = text["messages"][:i], text["messages"][i]["content"]
            rendered = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(ids[:first]) == rendered
            room = min(GREEDY.max_new_tokens, DATA.max_length - first)
            (alone,) = generate(world.target, None, [ids[:first]], max_new_tokens=room)
            assert alone.tokens == ids[first:last]
            assert tokenizer.decode(ids[first:last]) == content + "<|im_end|>" * alone.ended
            assert alone.ended or last == len(ids), "a turn cut by the limit ends its conversation"
    assert turns == {1, 2, 3}
    assert greedy.meta["ledger"]["changed"].keys() == {"samples cut by the token limit"}
    assert greedy.meta["rollout"]["tokens"] == int(greedy.mask.sum())


def test_an_answer_without_room_is_not_said_to_be_cut_by_the_limit_of_answers(world: World) -> None:
    narrow = dataclasses.replace(DATA, max_length=45)
    data = world.roll(dataclasses.replace(GREEDY, max_new_tokens=200, turns=1), data=narrow)
    assert data.meta["ledger"]["changed"].keys() == {"samples ended at max_length"}


def test_the_first_prompt_is_the_conversations_own(world: World, greedy: TokenDataset) -> None:
    corpus = {r["id"]: r for r in json.loads(world.corpus.read_text())}
    for (_, ids, mask), name in zip(rows(greedy), greedy.meta["conversation_ids"], strict=True):
        question = {"role": "user", "content": corpus[name]["conversations"][0]["value"]}
        assert ids[: mask.index(True)] == prompt_ids(world.target.tokenizer, [question], False)  # type: ignore[arg-type]


def test_samples_of_a_prompt_differ_and_do_not_depend_on_the_batch(world: World, sampled: TokenDataset) -> None:
    assert rows(world.roll(dataclasses.replace(SAMPLED, batch_size=64))) == rows(sampled)
    assert told(world.out / "out") == told(world.root / "sampled")
    assert len(set(sampled.uid.tolist())) == len(sampled)
    runs = [[ids for _, ids, _ in run] for run in by_conversation(sampled)]
    assert len(runs) == len(set(sampled.meta["conversation_ids"])), "samples of a conversation are neighbours"
    assert max(map(len, runs)) == 3 and all(a != b for run in runs for a, b in pairwise(run))
    assert [t["sample"] for t in told(world.root / "sampled")][:2] == [0, 1]
    left_out = sampled.meta["ledger"]["changed"].get(SHORT, 0)
    assert len(sampled) + left_out == 3 * sampled.meta["ledger"]["kept"]


def test_another_seed_samples_other_text(world: World, sampled: TokenDataset) -> None:
    seeded = world.roll(dataclasses.replace(SAMPLED, sampling=SamplingConfig(1.0, seed=1)))
    assert not {tuple(ids) for _, ids, _ in rows(seeded)} & {tuple(ids) for _, ids, _ in rows(sampled)}


def test_a_proposer_changes_no_greedy_token(world: World, greedy: TokenDataset) -> None:
    assert rows(world.roll(GREEDY, proposer=PromptLookup(4))) == rows(greedy)


@pytest.mark.parametrize(("plan", "whole"), [(GREEDY, "greedy"), (SAMPLED, "sampled")], ids=["greedy", "sampled"])
def test_a_server_of_the_target_answers_in_its_place(
    world: World, request: pytest.FixtureRequest, plan: RolloutConfig, whole: str
) -> None:
    """Greedily the same tokens; drawn ones are the server's, each answer's draws by a seed of its own."""
    fake, few = Fake(world.target), dataclasses.replace(DATA, max_conversations=5)
    request.addfinalizer(fake.http.shutdown)
    data = world.roll(plan, data=few, server=Server(fake.url))
    asked = len({(tuple(r["prompt"]), r["seed"]) for r in fake.requests})
    assert asked == len(fake.requests) >= len(data) and all(0 <= r["seed"] < 1 << 31 for r in fake.requests)
    assert rows(world.roll(plan, "again", data=few, server=Server(fake.url))) == rows(data)
    assert data.meta["rollout"]["server"] == "vLLM, m"
    if whole == "greedy":
        assert rows(data) == rows(TokenDataset.load(world.root / whole))[: len(data)]
    with pytest.raises(UserError, match="begun with server None, now 'vLLM, m'"):
        world.out = world.root
        world.roll(plan, whole, server=Server(fake.url))


def test_rollouts_name_the_commit_at_which_they_begin(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = list[Any]()
    monkeypatch.setattr(provenance, "collect", lambda: {"batches answered": len(answered)})
    world.roll(GREEDY, on_progress=lambda *told: answered.append(told))
    assert answered and json.loads((world.out / "out" / "run.json").read_text())["batches answered"] == 0


@pytest.mark.parametrize(("plan", "whole"), [(GREEDY, "greedy"), (SAMPLED, "sampled")], ids=["greedy", "sampled"])
def test_a_killed_run_goes_on_at_the_first_missing_part_to_the_same_bytes(
    world: World, plan: RolloutConfig, whole: str
) -> None:
    parts = 0

    def kill(samples: int, tokens: int, seconds: float) -> None:
        nonlocal parts
        parts += 1
        if parts == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.roll(plan, on_progress=kill)
    with pytest.raises(UserError, match="not finished"):
        rollout_meta(str(world.out / "out"))
    third = max((world.out / "out" / PARTS).iterdir(), key=lambda part: part.stat().st_mtime_ns)
    (third / META).unlink()  # as if killed while writing it
    seconds: list[float] = []
    data = world.roll(plan, on_progress=lambda samples, tokens, spent: seconds.append(spent))
    assert [s > 0 for s in seconds[:3]] == [False, False, True] and len(seconds) > 3
    for name in FILES:
        assert (world.out / "out" / name).read_bytes() == (world.root / whole / name).read_bytes(), name
    assert not (world.out / "out" / PARTS).exists()
    assert rows(world.roll(plan, on_progress=kill)) == rows(data), "finished: read, not made again"


def test_an_unfinished_run_goes_on_with_more_tokens_or_fewer_and_repeats_no_answer(
    world: World, sampled: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled, roll = list[int](), Roller.roll

    def count(roller: Roller, batch: Sequence[Sample]) -> None:
        rolled.extend(s.uid for s in batch)
        roll(roller, batch)

    def kill(samples: int, tokens: int, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Roller, "roll", count)
    for wanted in (10_000, 200):
        with pytest.raises(KeyboardInterrupt):
            world.roll(dataclasses.replace(SAMPLED, max_tokens=wanted), on_progress=kill)
    some = world.roll(dataclasses.replace(SAMPLED, max_tokens=100))
    assert rows(some) == rows(sampled)[: len(some)] and some.meta["rollout"]["max_tokens"] == 100
    assert len(set(rolled)) == len(rolled) and set(rolled) >= set(some.uid.tolist())
    with pytest.raises(UserError, match="begun with max_tokens 100, now 200"):
        world.roll(dataclasses.replace(SAMPLED, max_tokens=200))


def test_settings_that_are_damaged_are_named(world: World) -> None:
    (world.out / "out").mkdir()
    (world.out / "out" / SETTINGS).write_text('{"target": ')
    with pytest.raises(UserError, match=r"rollout\.json is damaged .*: choose another --out"):
        world.roll(GREEDY)


def test_held_out_conversations_never_appear_and_their_prompts_come_along(world: World, greedy: TokenDataset) -> None:
    train, heldout = training_order(DATA, world.corpus, Ledger())
    names = greedy.meta["conversation_ids"]
    assert heldout and names == [c.id for _, c in train] and not set(names) & {c.id for _, c in heldout}
    prepared = prepare(DATA, world.target.tokenizer, world.out / "prepared", source=world.corpus)  # type: ignore[arg-type]
    assert (world.root / "greedy" / HELDOUT).read_bytes() == (world.out / "prepared" / HELDOUT).read_bytes()
    assert prepared.train.meta["key"] == greedy.meta["rollout"]["source"]
    assert greedy.meta["ledger"]["records_in"] == 20 == len(train) + len(heldout)


def test_other_settings_or_a_directory_of_something_else_are_refused(world: World) -> None:
    world.out = world.root
    with pytest.raises(UserError, match="begun with max_new_tokens 12, now 13"):
        world.roll(dataclasses.replace(GREEDY, max_new_tokens=13), "greedy")
    with pytest.raises(UserError, match="source"):
        world.roll(GREEDY, "greedy", data=dataclasses.replace(DATA, seed=1))
    with pytest.raises(UserError, match="something else"):
        world.roll(GREEDY, ".")


@pytest.mark.parametrize("plan", [GREEDY, dataclasses.replace(SAMPLED, max_tokens=150)])
def test_processes_share_a_directory_and_answer_no_conversation_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, plan: RolloutConfig
) -> None:
    """Threads here, whose locks are as separate as those of processes."""
    rolled, roll, whole = list[int](), Roller.roll, rows(world.roll(plan, "alone"))

    def count(roller: Roller, batch: Sequence[Sample]) -> None:
        rolled.extend(s.uid for s in batch)
        time.sleep(0.05)  # so that each has something to wait for
        roll(roller, batch)

    monkeypatch.setattr(Roller, "roll", count)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: rows(world.roll(plan)), range(3)))
    assert made == [whole] * 3
    assert len(set(rolled)) == len(rolled), "each sample was answered once"
    assert not (world.out / "out" / PARTS).exists()
    for name in FILES:
        assert (world.out / "out" / name).read_bytes() == (world.out / "alone" / name).read_bytes(), name


def test_a_batch_that_a_killed_process_had_taken_is_answered_by_another(
    world: World, greedy: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    roll, begun = Roller.roll, list[int]()

    def killed_once(roller: Roller, batch: Sequence[Sample]) -> None:
        begun.append(len(batch))
        if len(begun) == 1:
            time.sleep(0.3)  # the other comes to wait for it
            raise InterruptedError
        roll(roller, batch)

    monkeypatch.setattr(Roller, "roll", killed_once)
    with ThreadPoolExecutor(2) as pool:
        tried = [pool.submit(world.roll, GREEDY) for _ in range(2)]
    killed = [future for future in tried if isinstance(future.exception(), InterruptedError)]
    (made,) = [future.result() for future in tried if future not in killed]
    assert rows(made) == rows(greedy)


def test_a_template_that_rewrites_answers_still_lets_them_be_given(world: World, make_tokenizer: Any) -> None:
    """It opens <think> for the answer to come and drops it from the history: the corpus's answers have no stable place."""
    target, tokenizer = copy.copy(world.target), make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    target.tokenizer, world.target = tokenizer, target
    with pytest.raises(UserError, match="no conversation is left"):
        prepare(DATA, tokenizer, world.out / "prepared", source=world.corpus)
    made = world.roll(dataclasses.replace(GREEDY, turns=1))
    assert made.meta["ledger"]["kept"] == len(made) > 0
    assert made.meta["ledger"]["dropped"].keys() <= {"held out", "no answer of two tokens"}


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_max_tokens_takes_the_shortest_prefix_of_the_training_order(
    world: World, sampled: TokenDataset, batch_size: int
) -> None:
    some = world.roll(dataclasses.replace(SAMPLED, max_tokens=100, batch_size=batch_size))
    assert rows(some) == rows(sampled)[: len(some)]
    made = [sum(sum(mask) for _, _, mask in run) for run in by_conversation(some)]
    assert sum(made) >= 98 and sum(made[:-1]) < 100  # a sample of one token counts and is left out
    assert some.meta["ledger"]["dropped"]["over the limit"] > 0


def test_max_conversations_takes_a_prefix(world: World, sampled: TokenDataset) -> None:
    some = world.roll(SAMPLED, data=dataclasses.replace(DATA, max_conversations=4))
    assert rows(some) == rows(sampled)[: len(some)] and some.meta["ledger"]["kept"] == 4
    assert sampled.meta["conversation_ids"][len(some)] not in some.meta["conversation_ids"]


def test_a_sample_that_draws_the_mask_token_ends_before_it(world: World, greedy: TokenDataset) -> None:
    drawn = greedy.ids[greedy.mask.bool()].tolist()
    mask = next(t for t in drawn if t != world.target.tokenizer.eos_token_id)  # type: ignore[union-attr]
    data = world.roll(GREEDY, mask_token_id=mask)
    assert not any(mask in ids[first:last] for _, ids, m in rows(data) for first, last in answers(m))
    assert data.meta["ledger"]["changed"]["samples ended before an answer with the MASK token"] > 0


THINKER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think></think>' }}{% endif %}"
)
"""As Qwen3's with thinking off: an answer's empty thinking is there while it is given, and gone from the history."""


def test_where_a_template_rewrites_history_every_answer_has_a_row_with_the_prompt_that_a_server_renders(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = world.target.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(tokenizer, "chat_template", THINKER)
    data = world.roll(GREEDY, data=dataclasses.replace(DATA, max_length=200))
    several, texts = 0, {t["id"]: t for t in told(world.out / "out")}
    assert len(texts) == len(told(world.out / "out")) == data.meta["ledger"]["kept"] == len(by_conversation(data))
    for run in by_conversation(data):
        name = data.meta["conversation_ids"][rows(data).index(run[0])]
        messages = texts[name]["messages"]
        prompts = [
            tokenizer.apply_chat_template(messages[:asked], tokenize=False, add_generation_prompt=True)
            for asked in range(1, len(messages), 2)
        ]
        for _, ids, mask in run:
            ((first, last),) = answers(mask)
            turn = prompts.index(tokenizer.decode(ids[:first]))
            (alone,) = generate(world.target, None, [ids[:first]], max_new_tokens=GREEDY.max_new_tokens)
            assert alone.tokens == ids[first:] and last == len(ids)
            assert tokenizer.decode(ids[first:]).removesuffix("<|im_end|>") == messages[2 * turn + 1]["content"]
        assert turn == len(prompts) - 1
        several += len(run) > 1
    assert several > 3 and len(set(data.uid.tolist())) == len(data)
    assert data.meta["ledger"]["changed"][ANEW] >= len(data) - len(texts) > 0
    assert data.meta["rollout"]["tokens"] == int(data.mask.sum())


def test_a_row_begun_anew_has_the_room_of_its_own_prompt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """History that the template drops leaves room: what was said does not fit max_length together."""
    short = THINKER.replace("m['content'] +", "(m['content'] if m['role'] == 'user' or loop.last else '') +")
    monkeypatch.setattr(world.target.tokenizer, "chat_template", short)
    longest = {"max_length": 110}
    data = world.roll(dataclasses.replace(GREEDY, max_new_tokens=30), data=dataclasses.replace(DATA, **longest))
    runs = [sum(len(ids) for _, ids, _ in run) for run in by_conversation(data)]
    assert max(len(ids) for _, ids, _ in rows(data)) <= 110 < max(runs)


def test_conversations_may_share_an_id(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record | {"id": "source"} for record in json.loads(world.corpus.read_text())]
    world.corpus = world.out / "corpus.json"
    world.corpus.write_text(json.dumps(records))
    data = world.roll(SAMPLED)
    assert set(data.meta["conversation_ids"]) == {"source"}
    assert len(set(data.conversations)) == data.meta["ledger"]["kept"] > 4
    few = world.roll(SAMPLED, "few", data=dataclasses.replace(DATA, max_conversations=4))
    assert rows(_first(data, 4)) == rows(few) and _first(data, 4).conversations == few.conversations
    assert _first(data, 4).meta["ledger"]["kept"] == 4


def test_rows_that_go_on_from_another_survive_a_kill_and_a_change_of_max_tokens(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.target.tokenizer, "chat_template", THINKER)
    whole = world.roll(GREEDY, "whole")

    def kill(samples: int, tokens: int, seconds: float) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            world.roll(GREEDY, on_progress=kill)
    some = world.roll(dataclasses.replace(GREEDY, max_tokens=100))
    assert rows(some) == rows(whole)[: len(some)] and 0 < len(some) < len(whole)
    texts = told(world.out / "out")
    assert texts == told(world.out / "whole")[: len(texts)]


def test_a_conversation_ends_before_a_question_that_the_template_refuses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% if messages | length > 2 %}{{ raise_exception('one question, please') }}{% endif %}" + CHATML
    monkeypatch.setattr(world.target.tokenizer, "chat_template", strict)
    data = world.roll(GREEDY)
    assert all(len(answers(mask)) == 1 for _, _, mask in rows(data))
    assert data.meta["ledger"]["changed"]["samples ended at a question that the template refuses"] > 0


def test_prompts_without_room_are_counted(world: World) -> None:
    data = world.roll(GREEDY, data=dataclasses.replace(DATA, max_length=30))
    ledger = data.meta["ledger"]
    assert ledger["dropped"]["prompt fills max_length"] > 0
    assert ledger["records_in"] == ledger["kept"] + sum(ledger["dropped"].values())
    assert int(data.offsets.diff().max()) <= 30


def test_no_question_holds_the_mask_token_either(world: World) -> None:
    """Of a first question the conversation is dropped, before a later one it ends."""
    mask = world.target.tokenizer.encode("0123", add_special_tokens=False)[-1]  # type: ignore[union-attr]
    data = world.roll(GREEDY, mask_token_id=mask)
    assert mask not in data.ids
    ledger = data.meta["ledger"]
    assert ledger["dropped"]["the prompt holds the MASK token"] > 0
    assert ledger["changed"]["samples ended before a question with the MASK token"] > 0


def test_a_batch_reaches_no_further_than_its_members(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt with little room beside a short one with much: each ends within the target's reach."""
    wanted = rows(world.roll(dataclasses.replace(GREEDY, max_new_tokens=40), "far"))
    monkeypatch.setattr(world.target, "reach", DATA.max_length)
    assert rows(world.roll(dataclasses.replace(GREEDY, max_new_tokens=40))) == wanted


def test_several_samples_at_temperature_0_are_refused() -> None:
    with pytest.raises(UserError, match="4 samples at temperature 0"):
        RolloutConfig(samples=4)
