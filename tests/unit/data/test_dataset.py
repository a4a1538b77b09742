from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specauf.config import DataConfig
from specauf.data import dataset
from specauf.data.dataset import HELDOUT, META, TOKENS, Prepared, TokenDataset, prepare
from specauf.strict import UserError

CONFIG = DataConfig(max_length=64, heldout=0.2)


def records(n: int = 60) -> list[dict[str, Any]]:
    """Chats of two pieces each; every tenth piece asks what another chat asks."""
    return [
        {
            "id": f"chat{i // 2:03}_{i % 2}",
            "conversations": [
                {"from": "human", "value": f"question {i - (i % 10 == 0) * 3}"},
                {"from": "gpt", "value": f"answer {i} " + "the fox " * (i % 5)},
                {"from": "human", "value": "and then?"},
                {"from": "gpt", "value": "the lazy dog"},
            ],
        }
        for i in range(n)
    ]


Prepare = Callable[..., Prepared]


@pytest.fixture
def run(tokenizer: Any, write_corpus: Callable[..., Path], tmp_path: Path) -> Prepare:
    def run(corpus: list[Any] | None = None, out: str = "out", tok: Any = None, **options: Any) -> Prepared:
        source = write_corpus(records() if corpus is None else corpus)
        fields = {f.name for f in dataclasses.fields(DataConfig)}
        config = dataclasses.replace(CONFIG, **{k: v for k, v in options.items() if k in fields})
        rest = {k: v for k, v in options.items() if k not in fields}
        return prepare(config, tok or tokenizer, tmp_path / out, source=source, **rest)

    return run


def rows(data: TokenDataset) -> list[tuple[int, list[int], list[bool]]]:
    return [(e.uid, e.input_ids.tolist(), e.loss_mask.tolist()) for e in data]  # type: ignore[attr-defined]


def test_examples_have_the_promised_types_and_supervise_the_answers(run: Prepare, tokenizer: Any) -> None:
    data = run().train
    index = data.meta["conversation_ids"].index("chat002_0")
    uid, ids, mask = data[index]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool) and ids.shape == mask.shape and uid >= 0
    assert (
        tokenizer.decode(ids[mask]) == "answer 4 the fox the fox the fox the fox <|im_end|>\nthe lazy dog<|im_end|>\n"
    )
    assert (data.ids.dtype, data.mask.dtype, data.offsets.dtype) == (torch.int32, torch.uint8, torch.int64)
    assert data[-1].uid == data[len(data) - 1].uid
    with pytest.raises(IndexError):
        data[len(data)]


def test_what_is_saved_is_what_is_loaded(run: Prepare, tmp_path: Path) -> None:
    prepared = run()
    loaded = TokenDataset.load(tmp_path / "out")
    assert rows(loaded) == rows(prepared.train)
    assert loaded.meta == prepared.train.meta
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([TOKENS, META, HELDOUT])


@pytest.mark.parametrize("damage", ["no meta", "cut tokens", "foreign tokens"])
def test_a_directory_without_a_whole_dataset_is_refused_and_rebuilt(run: Prepare, tmp_path: Path, damage: str) -> None:
    expected, out = rows(run().train), tmp_path / "out"
    if damage == "no meta":
        (out / META).unlink()
    elif damage == "cut tokens":
        (out / TOKENS).write_bytes((out / TOKENS).read_bytes()[:100])
    else:
        run(out="other", seed=9)
        (tmp_path / "other" / TOKENS).replace(out / TOKENS)
    with pytest.raises(UserError, match="prepare"):
        TokenDataset.load(out)
    again = run()
    assert not again.reused and rows(again.train) == expected


def test_a_smaller_limit_keeps_a_prefix_and_counts_the_rest(run: Prepare) -> None:
    few, more, all_of_them = (run(max_conversations=n, out=f"out{n}") for n in (7, 19, None))
    assert (len(few.train), len(more.train)) == (7, 19)
    assert rows(all_of_them.train)[:19] == rows(more.train) and rows(more.train)[:7] == rows(few.train)
    assert few.ledger.dropped["over the limit"] == len(all_of_them.train) - 7
    assert "over the limit" not in all_of_them.ledger.dropped


def test_threads_render_what_one_does_in_its_order(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    many = run(out="many")
    monkeypatch.setattr(dataset, "THREADS", 1)
    monkeypatch.setattr(dataset, "SLAB", 4)
    one = run(out="one")
    assert (rows(one.train), one.ledger) == (rows(many.train), many.ledger)


def test_the_order_depends_on_the_seed_and_not_on_the_file(run: Prepare) -> None:
    forward, backward = run(out="a"), run(records()[::-1], out="b")
    assert rows(forward.train) == rows(backward.train)
    assert forward.heldout == backward.heldout
    ids = forward.train.meta["conversation_ids"]
    assert ids != [r["id"] for r in records() if r["id"] in ids]
    other = run(seed=5, out="c").train.meta["conversation_ids"]
    assert [i for i in ids if i in other] != [i for i in other if i in ids]


def test_held_out_chats_and_their_questions_are_not_trained_on(run: Prepare) -> None:
    prepared = run()
    trained = set(prepared.train.meta["conversation_ids"])
    assert prepared.heldout and trained
    assert not {i.split("_")[0] for i in trained} & {p.id.split("_")[0] for p in prepared.heldout}
    questions = {r["conversations"][0]["value"] for r in records() if r["id"] in trained}
    assert not questions & {p.messages[-1]["content"] for p in prepared.heldout}
    counts = prepared.train.meta["heldout"]
    assert prepared.ledger.dropped["held out"] == counts["conversations"]
    assert counts["conversations"] == counts["prompts"] + counts["repeated"] + counts["too_long"] + counts["refused"]


def test_held_out_prompts_end_at_the_first_user_turn_are_not_repeated_and_respect_the_limit(
    run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = records()
    corpus[1]["conversations"].insert(0, {"from": "system", "value": "be brief"})
    corpus[4]["conversations"][0]["value"] = "the fox " * 40
    held = run(corpus, heldout=0.8)
    contents = [p.messages[-1]["content"] for p in held.heldout]
    assert len(set(contents)) == len(contents) and held.train.meta["heldout"]["repeated"] > 0
    assert all([m["role"] for m in p.messages] in (["user"], ["system", "user"]) for p in held.heldout)
    longest = max(p.tokens for p in held.heldout)
    monkeypatch.setattr(dataset, "LONGEST_PROMPT", longest - 1)
    shorter = run(corpus, heldout=0.8, out="b")
    assert shorter.train.meta["heldout"]["too_long"] == sum(p.tokens == longest for p in held.heldout) > 0
    assert shorter.heldout == [p for p in held.heldout if p.tokens < longest]
    assert shorter.ledger == held.ledger


def test_nothing_changed_means_nothing_is_read_again(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    monkeypatch.setattr(dataset, "read_conversations", None)
    again = run()
    assert again.reused and not first.reused
    assert rows(again.train) == rows(first.train)
    assert (again.heldout, again.ledger) == (first.heldout, first.ledger)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"max_length": 32},
        {"enable_thinking": True},
        {"excluded_prompts": ["question 4"]},
        {"corpus": records(58)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_what_went_in_rebuilds(run: Prepare, change: dict[str, Any]) -> None:
    run()
    assert not run(**change).reused


def test_another_limit_of_held_out_prompts_rebuilds(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr(dataset, "LONGEST_PROMPT", 9)
    assert not run().reused


@pytest.mark.parametrize("whole", [dataset.WHOLE, 1])
def test_an_edit_in_the_middle_of_a_long_corpus_is_noticed(tmp_path: Path, monkeypatch: Any, whole: int) -> None:
    monkeypatch.setattr(dataset, "WHOLE", whole)
    path = tmp_path / "corpus"
    found = []
    for letter, changed in ((b"a", 1), (b"b", 2)):
        path.write_bytes(b" " * (1 << 20) + letter + b" " * (1 << 20))
        os.utime(path, (changed, changed))
        found.append(dataset._fingerprint(path))
    assert found[0] != found[1]


def test_a_directory_is_known_by_each_of_its_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    found = [dataset._fingerprint(tmp_path)]
    (tmp_path / "README.md").write_text("not data")
    assert dataset._fingerprint(tmp_path) == found[0]
    for name, text in (("b.jsonl", "{} \n"), ("c.jsonl", "")):
        (tmp_path / name).write_text(text)
        found.append(dataset._fingerprint(tmp_path))
    assert len({str(one) for one in found}) == 3


def test_a_corpus_that_grows_while_it_is_read_is_not_stored(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    order = dataset.training_order

    def grows(config: Any, source: Path, *given: Any) -> Any:
        found = order(config, source, *given)
        source.write_text(source.read_text() + " ")
        return found

    monkeypatch.setattr(dataset, "training_order", grows)
    with pytest.raises(UserError, match="changed while it was read"):
        run()


def test_another_template_rebuilds(run: Prepare, make_tokenizer: Callable[..., Any]) -> None:
    run()
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{# changed #}"
    assert not run(tok=tokenizer).reused


def test_the_corpus_may_move_without_a_rebuild(run: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    run()
    moved = (tmp_path / "corpus.json").rename(tmp_path / "moved.json")
    config = dataclasses.replace(CONFIG, path="elsewhere")
    assert prepare(config, tokenizer, tmp_path / "out", source=moved).reused


def test_every_record_is_accounted_for(run: Prepare, make_tokenizer: Callable[..., Any]) -> None:
    corpus = records()
    corpus += [{"id": "e", "conversations": []}, corpus[0], "junk"]
    question = {"from": "human", "value": "the fox " * 200}
    corpus.append({"id": "long", "conversations": [question, {"from": "gpt", "value": "a"}]})
    corpus.append({"id": "odd", "conversations": [{"from": "human", "value": "odd"}, {"from": "gpt", "value": "  a"}]})
    ledger = run(corpus, heldout=0.0, excluded_prompts=["question 4"]).ledger
    assert ledger.records_in == len(corpus) == ledger.kept + sum(ledger.dropped.values())
    assert ledger.dropped == {
        "empty": 1,
        "exact duplicate": 1,
        "malformed": 1,
        "evaluation prompt": 1,
        "nothing supervised within max_length": 1,
        "unstable rendering": 1,
    }
    assert any("conversation odd" in warning for warning in ledger.warnings)


def test_the_metadata_tells_how_the_tokens_were_made(run: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    meta = run(enable_thinking=True).train.meta
    assert meta["template_hash"] == dataset.template_hash(tokenizer)
    assert meta["tokenizer_hash"] == dataset.tokenizer_hash(tokenizer)
    assert (meta["enable_thinking"], meta["max_length"]) == (True, 64)
    assert meta["source"]["bytes"] == (tmp_path / "corpus.json").stat().st_size
    assert json.loads((tmp_path / "out" / META).read_text())["ledger"]["records_in"] == 60


def test_a_template_that_supervises_everything_is_an_error(run: Prepare, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(UserError, match="every token"):
        run(tok=tokenizer)


@pytest.mark.parametrize(
    "reads", ["m['value'] ~ ''", "m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join"]
)
def test_a_template_that_leaves_out_what_is_said_is_an_error(
    run: Prepare, make_tokenizer: Callable[..., Any], reads: str
) -> None:
    template = make_tokenizer().chat_template.replace("m['content']", f"({reads})")
    with pytest.raises(UserError, match="leaves out the text"):
        run(tok=make_tokenizer(template))


def test_a_template_that_supervises_nothing_is_an_error_with_the_ledger(
    run: Prepare, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '<|im_end|>' * loop.length }}{% endfor %}")
    with pytest.raises(UserError, match="no conversation is left") as error:
        run(tok=tokenizer)
    assert "unstable rendering" in str(error.value) and "records in" in str(error.value)
    assert "specauf rollout RECIPE --out DIR" in str(error.value), "which needs no rendered answer"
    assert not (tmp_path / "out" / META).exists()


def test_a_corpus_of_which_nothing_is_left_shows_why(run: Prepare) -> None:
    with pytest.raises(UserError, match=r"first unknown role: 'ai' in record 1 \(id 'x'\)"):
        run([{"id": "x", "conversations": [{"from": "ai", "value": "a"}]}])


def test_an_answer_of_weight_0_is_context_that_is_not_trained_on(run: Prepare, tokenizer: Any) -> None:
    def talk(weight: dict[str, int]) -> dict[str, Any]:
        said = [("user", "q", {}), ("assistant", "the fox", weight), ("assistant", "again", {}), ("user", "and?", {})]
        said.append(("assistant", "the lazy dog", {}))
        return {"id": "a", "messages": [{"role": role, "content": text, **more} for role, text, more in said]}

    plain, weighted = (run([talk(w)], f"out{len(w)}", heldout=0.0) for w in ({}, {"weight": 0}))
    assert plain.train.ids.tolist() == weighted.train.ids.tolist()
    assert plain.train.uid.tolist() == weighted.train.uid.tolist()
    ids, mask = weighted.train[0][1:]
    assert tokenizer.decode(ids[mask]) == "the lazy dog<|im_end|>\n"
    assert tokenizer.decode(ids[plain.train[0].loss_mask]).startswith("the fox\n\nagain<|im_end|>")
    counted = "answers of weight 0 kept as context"
    assert weighted.ledger.changed[counted] == 1 and counted not in plain.ledger.changed


def test_a_corpus_in_one_group_is_warned_about(run: Prepare) -> None:
    corpus = [{**record, "id": f"QWJhYvA_{i}"} for i, record in enumerate(records(30))]
    prepared = run(corpus, heldout=0.02)
    assert prepared.heldout == [] and any("held-out" in warning for warning in prepared.ledger.warnings)


def test_a_missing_corpus_is_a_user_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        prepare(CONFIG, tokenizer, tmp_path / "out", source=tmp_path / "nowhere.json")


def test_a_single_supervised_token_trains_nothing_and_is_dropped(run: Prepare) -> None:
    """An anchor needs the token behind it supervised too."""

    def talk(name: str, question: str) -> dict[str, Any]:
        said = [("human", question), ("gpt", "the fox 0123456789")]
        return {"id": name, "conversations": [{"from": who, "value": text} for who, text in said]}

    corpus = [talk("short_0", "x"), talk("long_0", "café? x " * 4)]
    whole = run(corpus, heldout=0.0).train
    first = int(whole[whole.meta["conversation_ids"].index("long_0")].loss_mask.nonzero()[0])
    for more, kept in ((1, ["short_0"]), (2, ["long_0", "short_0"])):
        found = run(corpus, f"out{more}", heldout=0.0, max_length=first + more)
        assert sorted(found.train.meta["conversation_ids"]) == kept
        assert found.ledger.dropped.get("nothing supervised within max_length", 0) == 2 - len(kept)
