from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specauf.data import records as files
from specauf.data import sources
from specauf.data.records import read_records
from specauf.data.sources import Conversation, Ledger, Message, normalise, read_conversations, split
from specauf.strict import UserError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def share(*turns: tuple[str, str], id: str | None = None) -> dict[str, Any]:
    return {"id": id, "conversations": [{"from": role, "value": value} for role, value in turns]}


def pair(question: str, answer: str = "a", id: str = "x_0") -> dict[str, Any]:
    return share(("human", question), ("gpt", answer), id=id)


def one(record: Any) -> tuple[Conversation | None, Ledger]:
    ledger = Ledger()
    return normalise(record, ledger), ledger


# --- reading


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_cut_anywhere_gives_its_whole_records_and_the_exact_bytes_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, ascii_only: bool
) -> None:
    records = [pair("café 🙂 ]", '"\\', id="é_1"), pair("two", "z" * 70), {"n": []}]
    data = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()
    starts, ends = [], []
    for record in records:
        text = json.dumps(record, ensure_ascii=ascii_only).encode()
        start = data.index(text) if indent is None else data.index(b"\n  {", ends[-1] if ends else 0) + 3
        starts.append(start)
        ends.append(start + len(text) if indent is None else data.index(b"\n  }", start) + 4)
    path = tmp_path / "cut.json"
    for cut in range(2, len(data)):
        monkeypatch.setattr(files, "CHUNK", 7 + cut % 40)  # records and characters lie across chunks
        path.write_bytes(data[:cut])
        ledger = Ledger()
        whole = sum(end <= cut for end in ends)
        assert list(read_records(path, ledger)) == records[:whole]
        assert ledger.records_in == whole
        (warning,) = ledger.warnings
        lost = max(0, cut - starts[whole]) if whole < len(records) else 0
        assert f"the last {lost:,} bytes of {cut:,} are lost" in warning


def test_a_whole_array_gives_no_warning_whatever_the_chunk_size(
    write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [pair(f"question {i} é") for i in range(20)]
    path = write_corpus(records)
    for size in (1, 13, 1 << 20):
        monkeypatch.setattr(files, "CHUNK", size)
        ledger = Ledger()
        assert list(read_records(path, ledger)) == records
        assert not ledger.warnings


@pytest.mark.parametrize("chunk", [12, 1 << 20])
def test_bytes_after_the_array_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}]\n[2]')
    ledger = Ledger()
    assert list(read_records(tmp_path / "x.json", ledger)) == [{"a": 1}]
    assert "4 bytes after the end" in ledger.warnings[0]


@pytest.mark.parametrize("name", ["c.jsonl", "c.json"])
def test_a_broken_line_is_dropped_counted_and_named_and_the_others_survive(tmp_path: Path, name: str) -> None:
    lines = [json.dumps(pair("a")), "", "{broken", json.dumps(pair("b")), '"\xff', "also broken"]
    (tmp_path / name).write_bytes("\n".join(lines).encode("latin-1") + b"\n")
    ledger = Ledger()
    kept = read_conversations(tmp_path / name, ledger)
    assert [c.first_user for c in kept] == ["a", "b"]
    assert ledger.dropped == {"not JSON": 3} and ledger.records_in == 5
    assert ledger.warnings == [f"{name}: 3 lines are not JSON, the first is line 3"]


def test_a_cut_last_line_is_reported_with_its_bytes(tmp_path: Path) -> None:
    cut = '{"id": "é'.encode()
    (tmp_path / "c.jsonl").write_bytes(json.dumps(pair("a")).encode() + b"\n" + cut)
    ledger = Ledger()
    assert len(read_conversations(tmp_path / "c.jsonl", ledger)) == 1
    assert ledger.warnings == [f"c.jsonl: the last line (2) is cut; its {len(cut)} bytes are lost"]


@pytest.mark.parametrize("text", [json.dumps(pair("a"), indent=1), "not\nJSON"])
def test_what_is_no_jsonl_at_all_is_not_called_cut(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    ledger = Ledger()
    assert read_conversations(tmp_path / "c.json", ledger) == []
    assert ledger.warnings == ["c.json: no line is a record. A single JSON object? Give an array or JSONL"]


def test_parquet_reads_as_the_same_conversations_as_json(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    records = [pair("a", "b", id="1"), pair("c", "d", id="2")]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    expected = read_conversations(write_corpus(records), Ledger())
    assert read_conversations(tmp_path / "c.parquet", Ledger()) == expected


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install 'pyarrow>=18'"):
        list(read_records(tmp_path / "c.parquet", Ledger()))


def test_a_broken_parquet_file_is_a_user_error_that_names_it(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"c\.parquet"):
        list(read_records(tmp_path / "c.parquet", Ledger()))


def test_a_missing_file_is_a_user_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        read_conversations(tmp_path / "nowhere.json", Ledger())


# --- repairing


@pytest.mark.parametrize(
    ("alias", "role"),
    [("human", "user"), ("prompter", "user"), ("user", "user"), ("system", "system"), ("developer", "system")]
    + [(name, "assistant") for name in ("gpt", "Assistant", "chatgpt", "bing", "bard", "model")],
)
def test_role_aliases_are_mapped(alias: str, role: str) -> None:
    turns = [("human", "q"), ("gpt", "a")]
    turns[role == "assistant"] = (alias, "text")
    conversation, _ = one(share(*turns, ("human", "q2"), ("gpt", "a2")))
    assert conversation is not None
    assert Message(role, "text") in conversation.messages


def test_openai_messages_with_text_parts_equal_the_sharegpt_form() -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    openai, _ = one({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]})
    sharegpt, _ = one(share(("human", "two parts"), ("gpt", "a")))
    assert openai == sharegpt


def test_a_null_key_of_the_other_form_hides_nothing() -> None:
    turns = (("user", "q"), ("assistant", "a"))
    sharegpt = [{"role": None, "content": None, "from": role, "value": text} for role, text in turns]
    openai = [{"role": role, "content": text, "from": None, "value": None} for role, text in turns]
    expected, _ = one(share(*turns))
    assert one({"messages": sharegpt}) == one({"messages": openai}) == (expected, Ledger())


@pytest.mark.parametrize(
    ("turns", "kept", "changed"),
    [
        ("A:x U:q A:a", "U:q A:a", "leading assistant turns removed"),
        ("S:s A:x U:q A:a", "S:s U:q A:a", "leading assistant turns removed"),
        ("U:q U:r A:a", "U:q+r A:a", "same-role neighbours merged"),
        ("U:q A:a A:b", "U:q A:a+b", "same-role neighbours merged"),
        ("U:q A: A:a", "U:q A:a", "empty messages removed"),
        ("U:q A:a U:r", "U:q A:a", "turns after the last answer removed"),
        ("U:q A:a U:r A:", "U:q A:a", "empty messages removed,turns after the last answer removed"),
        ("U:q A: U:r A:b", "U:q+r A:b", "empty messages removed,same-role neighbours merged"),
        ("U:q A:a", "U:q A:a", ""),
    ],
)
def test_repairs_keep_the_record_and_are_counted(turns: str, kept: str, changed: str) -> None:
    roles = {"U": "user", "A": "assistant", "S": "system"}
    conversation, ledger = one(share(*((roles[t[0]], t[2:]) for t in turns.split())))
    assert conversation is not None
    assert [(m.role, m.content) for m in conversation.messages] == [
        (roles[t[0]], t[2:].replace("+", "\n\n")) for t in kept.split()
    ]
    assert ledger.changed == {reason: 1 for reason in changed.split(",") if reason}
    assert not ledger.dropped


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (share(), "empty"),
        (share(("human", "  "), ("gpt", "\n")), "empty"),
        (share(("gpt", "only an answer")), "no answer to a user turn"),
        (share(("human", "only a question"), ("gpt", "")), "no answer to a user turn"),
        (share(("human", "q"), ("tool", "t"), ("gpt", "a")), "tool turn"),
        (share(("human", "q"), ("narrator", "t"), ("gpt", "a")), "unknown role"),
        ({"text": "raw"}, "neither conversations nor messages"),
        ({"messages": "[]"}, "messages is text, not a list"),
        ("a string", "malformed"),
        ({"messages": ["hello"]}, "malformed"),
        ({"messages": [{"role": "user", "content": 3}]}, "malformed"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is not text"),
    ],
)
def test_an_unusable_record_is_dropped_for_one_counted_reason_and_not_as_a_repair(record: Any, reason: str) -> None:
    conversation, ledger = one(record)
    assert conversation is None
    assert ledger.dropped == {reason: 1} and not ledger.changed


def test_the_first_record_that_is_dropped_for_a_reason_is_shown(write_corpus: Callable[..., Path]) -> None:
    odd = [share(("human", "q"), ("ai", text), id="x") for text in "ab"]
    call = share(("human", "q"), ("function_call", "f()"), ("gpt", "a"))
    nested: Any = "z" * 10_000
    for _ in range(900):
        nested = [nested]
    ledger = Ledger()
    read_conversations(
        write_corpus([pair("a"), *odd, call, {"text": "raw"}, {"messages": [{"content": nested}]}]), ledger
    )
    assert ledger.dropped["unknown role"] == 2
    assert ledger.warnings[:3] == [
        "first unknown role: 'ai' in record 2 (id 'x')",
        "first tool turn: 'function_call' in record 4",
        "first neither conversations nor messages: ['text'] in record 5",
    ]
    assert len(ledger.warnings[3]) < 100, "however much there is to show"


def test_a_system_prompt_beside_the_turns_is_one() -> None:
    conversation, _ = one({"system": "be brief", **share(("human", "q"), ("gpt", "a"))})
    inside, _ = one(share(("system", "be brief"), ("human", "q"), ("gpt", "a")))
    assert conversation == inside
    both, _ = one({"system": "be long", **share(("system", "be brief"), ("human", "q"), ("gpt", "a"))})
    assert both == inside


def test_what_a_template_is_not_given_is_counted() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    conversation, ledger = one({"messages": turns, "tools": [{"name": "search"}]})
    assert conversation is not None
    assert ledger.changed == {"reasoning left out": 1, "tools left out": 1}


def test_half_a_surrogate_pair_is_replaced_and_counted() -> None:
    conversation, ledger = one(
        json.loads(
            '{"conversations": [{"from": "human", "value": "q \\ud83d"}, '
            '{"from": "gpt", "value": "ok \\ud83d\\ude42"}]}'
        )
    )
    assert conversation is not None
    assert [m.content for m in conversation.messages] == ["q \ufffd", "ok 🙂"]
    assert ledger.changed == {"undecodable characters replaced": 1}


def test_an_id_that_is_no_text_is_repaired_too(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"id": "\ud83d_1", "conversations": turns}) + "\n")
    (found,) = read_conversations(path, Ledger())
    assert found.id == "\ufffd_1" and split([found], 0.5, 0)


def test_the_list_that_holds_something_is_the_conversation() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = normalise({"conversations": [], "messages": turns}, Ledger())
    assert found is not None and len(found.messages) == 2


def test_what_is_no_corpus_is_refused_by_what_it_is(tmp_path: Path) -> None:
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    for path, told in ((packed, "is compressed: unpack it first"), (tmp_path, "holds compressed files")):
        with pytest.raises(UserError, match=told):
            list(read_records(path, Ledger()))
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"id": "a", "conversations": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    ledger = Ledger()
    assert list(read_records(deep, ledger)) == [] and ledger.dropped == {"not JSON": 1}
    for bad in ("[" * 200_000 + "]" * 200_000, "1" * 5000):
        array, ledger = tmp_path / "array.json", Ledger()
        array.write_text(f'[{{"id": "a"}}, {bad}, {{"id": "b"}}]')
        assert list(read_records(array, ledger)) == [{"id": "a"}]
        assert "is cut or broken in record 2" in ledger.warnings[0]


def test_a_directory_is_read_file_by_file_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [share(("human", f"q{i}"), ("gpt", f"a{i}"), id=f"chat{i}") for i in range(4)]
    (tmp_path / "b.JSON").write_text(json.dumps([*records[2:], {"id": "odd"}]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records[:2], records[3]]))
    for other in ("README.md", ".a.json", "c.txt"):
        (tmp_path / other).write_text("[]")
    (tmp_path / "sub.json").mkdir()
    listed = Path.glob
    for turn in (1, -1):
        monkeypatch.setattr(Path, "glob", lambda *given, turn=turn: sorted(listed(*given))[::turn])
        ledger = Ledger()
        assert [c.id for c in read_conversations(tmp_path, ledger)] == ["chat0", "chat1", "chat3", "chat2"]
        assert ledger.records_in == 6 == ledger.kept + sum(ledger.dropped.values())
        assert ledger.warnings[0].endswith(": not read: README.md, c.txt, sub.json")
        assert "record 3 of b.JSON (id 'odd')" in ledger.warnings[1]
        assert Ledger(**ledger.to_dict()).lines() == ledger.lines()


def test_a_directory_with_files_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds b\.jsonl, which cannot be read"):
        list(read_records(tmp_path, Ledger()))
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"compressed files \(c\.jsonl\.gz\)"):
        list(read_records(tmp_path, Ledger()))


def test_a_missing_id_becomes_a_hash_of_the_content() -> None:
    first, _ = one(share(("human", "q"), ("gpt", "a")))
    same, _ = one({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    other, _ = one(share(("human", "q"), ("gpt", "b")))
    assert first is not None and same is not None and other is not None
    assert first.id == same.id != other.id


def test_content_cannot_be_moved_between_turns_without_changing_the_hash() -> None:
    messages = [Message("user", "ab"), Message("user", "c")]
    assert sources.content_hash(messages) != sources.content_hash([Message("user", "a"), Message("user", "bc")])


# --- duplicates, evaluation prompts, ledger


def test_duplicates_are_found_after_repair_and_whatever_their_ids(write_corpus: Callable[..., Path]) -> None:
    records = [
        pair("q", "a", id="one_0"),
        pair("q", "a", id="two_0"),
        share(("gpt", "x"), ("human", "q"), ("gpt", "a"), id="three_0"),
        pair("q", "b", id="four_0"),
    ]
    ledger = Ledger()
    assert [c.id for c in read_conversations(write_corpus(records), ledger)] == ["one_0", "four_0"]
    assert ledger.dropped == {"exact duplicate": 2}


def test_evaluation_prompts_are_dropped_in_any_user_turn_but_not_in_answers(write_corpus: Callable[..., Path]) -> None:
    records = [
        pair("Write  a\nSORT ", id="a"),
        share(("human", "hi"), ("gpt", "ho"), ("human", "write a sort"), ("gpt", "ok"), id="b"),
        pair("what do you say?", "write a sort", id="c"),
        pair("write a sort in C", id="d"),
    ]
    ledger = Ledger()
    kept = read_conversations(write_corpus(records), ledger, ["write a sort"])
    assert [c.id for c in kept] == ["c", "d"]
    assert ledger.dropped == {"evaluation prompt": 2}


turns = st.lists(
    st.tuples(st.sampled_from(["human", "gpt", "system", "tool"]), st.sampled_from(["", " ", "a", "b"])), max_size=5
)
anything = st.one_of(turns.map(lambda t: share(*t)), st.none(), st.integers(), st.just({"messages": "no"}), st.just({}))


@QUICK
@given(records=st.lists(anything, max_size=12), tail=st.sampled_from(["", "{", '{"a": 1}', "]"]))
def test_the_ledger_balances_over_any_records(tmp_path: Path, records: list[Any], tail: str) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join([*map(json.dumps, records), tail]))
    ledger = Ledger()
    kept = read_conversations(path, ledger, ["b"])
    assert ledger.records_in == len(records) + bool(tail) == len(kept) + sum(ledger.dropped.values())
    for conversation in kept:
        roles = [m.role for m in conversation.messages]
        assert roles[-1] == "assistant" and "user" in roles
        assert all(a != b for a, b in pairwise(roles))
        assert all(m.content.strip() for m in conversation.messages)
        assert roles[: roles.index("user")] in ([], ["system"])


def test_a_ledger_that_lost_a_record_raises() -> None:
    ledger = Ledger(records_in=3, kept=1)
    ledger.drop("empty")
    with pytest.raises(RuntimeError, match="balance by 1"):
        ledger.check()
    ledger.drop("other")
    ledger.check()


def test_a_ledger_survives_json_and_prints_every_count() -> None:
    ledger = Ledger(1234, 1230, {"empty": 4}, {"merged": 9}, ["12 bytes lost"])
    assert Ledger(**json.loads(json.dumps(ledger.to_dict()))) == ledger
    assert [line.split() for line in ledger.lines()] == [
        ["records", "in", "1,234"],
        ["-", "empty", "4"],
        ["=", "kept", "1,230"],
        ["~", "merged", "9"],
        ["warning:", "12", "bytes", "lost"],
    ]


# --- splitting


def chats(keys: list[tuple[int, int]]) -> list[Conversation]:
    return [
        Conversation(f"chat{a:03}_{i}", (Message("user", f"question  {q}"), Message("assistant", str(i))))
        for i, (a, q) in enumerate(keys)
    ]


links = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30).map(chats)


@QUICK
@given(conversations=links, seed=st.integers(0, 50))
def test_neither_a_chat_nor_a_first_turn_is_on_both_sides(conversations: list[Conversation], seed: int) -> None:
    train, held = split(conversations, 0.5, seed)
    assert sorted(train + held) == sorted(conversations)
    assert not {c.id.split("_")[0] for c in train} & {c.id.split("_")[0] for c in held}
    assert not {c.first_user for c in train} & {c.first_user for c in held}


@QUICK
@given(conversations=links, order=st.randoms(), seed=st.integers(0, 50))
def test_the_split_does_not_depend_on_the_order_of_the_file(
    conversations: list[Conversation], order: Any, seed: int
) -> None:
    shuffled = list(conversations)
    order.shuffle(shuffled)
    assert set(split(conversations, 0.5, seed)[1]) == set(split(shuffled, 0.5, seed)[1])


def test_numbered_ids_are_not_the_parts_of_one_chat() -> None:
    """`train_17` is record 17 of a file: a group of all of them would be held out as a whole, or not at all."""
    for name in ("train", "example", "train01", "gsm8k_train"):
        numbered = [c._replace(id=f"{name}_{i}") for i, c in enumerate(chats([(0, i) for i in range(400)]))]
        assert 15 < len(split(numbered, 0.1, 0)[1]) < 70, name


def test_the_split_keeps_the_share_and_depends_on_the_seed() -> None:
    conversations = chats([(i, i) for i in range(4000)])
    held = [set(split(conversations, 0.1, seed)[1]) for seed in (0, 1)]
    assert all(330 < len(side) < 470 for side in held)  # four standard deviations
    assert len(held[0] & held[1]) < 100
    assert split(conversations, 0.0, 0)[1] == []


def test_groups_are_linked_through_chains() -> None:
    chain = chats([(0, 0), (1, 0), (1, 1), (2, 1)])
    assert {len(split(chain, 0.5, seed)[1]) for seed in range(20)} == {0, 4}


def test_an_id_that_names_the_source_is_no_conversation(write_corpus: Callable[..., Path]) -> None:
    def chat(i: int, name: str) -> dict[str, Any]:
        return {"id": name, "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}

    for names in (1, 3):
        path = write_corpus([chat(i, f"source {i % names}") for i in range(400)])
        found = read_conversations(path, Ledger())
        assert len({c.id for c in found}) == 400 and 15 < len(split(found, 0.1, 0)[1]) < 70
    few = read_conversations(write_corpus([chat(i, f"chat {i % 20}") for i in range(400)]), Ledger())
    assert {c.id for c in few} == {f"chat {i}" for i in range(20)}, "twenty parts of a chat are its own"
