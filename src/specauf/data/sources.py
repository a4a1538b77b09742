"""Chat corpora as they come: repaired, de-duplicated and split, with a ledger of every record that went in.

Nothing is lost silently: a record is kept or dropped for a counted reason.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from specauf.data.records import read_records

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOLS = ("tool", "function", "function_call", "observation", "ipython")
"""Roles of a tool's answer, or of its call."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_PART = re.compile(r"(.+)_\d+")
"""An id that may name a part: of a chat, as ShareGPT's QWJhYvA_12 does, or of a file, as train_12."""
LONGEST_CHAT = 128
"""Ids that share a name are the parts of one chat if there are at most this many: ShareGPT's longest here has 89."""


class Message(NamedTuple):
    role: str
    """`system`, `user` or `assistant`."""
    content: str


class Context(Message):
    """An answer that is not to be trained on (`"weight": 0`); equal to its message, for hashes and templates."""


class Conversation(NamedTuple):
    id: str
    messages: tuple[Message, ...]

    @property
    def first_user(self) -> str:
        """The first user turn, white space squeezed; empty when there is none."""
        return next((squeeze(m.content) for m in self.messages if m.role == "user"), "")


@dataclass
class Ledger:
    """What became of every record: `records_in == kept + sum(dropped)`, which `check` enforces."""

    records_in: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    """Repairs of records, by reason, where the fault did not drop the record; a record counts once per reason."""
    warnings: list[str] = field(default_factory=list)
    file: tuple[str, int] = ("", 0)
    """Of several files the one that is read, and how many records came before it. Not stored."""

    @property
    def place(self) -> str:
        """The record that is read, for a reader with the file open."""
        name, before = self.file
        return f"record {self.records_in - before:,}{name and f' of {name}'}"

    def drop(self, reason: str, count: int = 1, example: str = "") -> None:
        if example and reason not in self.dropped:
            self.warnings.append(f"first {reason}: {example}")
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def change(self, reason: str) -> None:
        self.changed[reason] = self.changed.get(reason, 0) + 1

    def check(self) -> None:
        """Raises `RuntimeError` when a record went missing or was counted twice."""
        lost = self.records_in - self.kept - sum(self.dropped.values())
        if lost:
            raise RuntimeError(f"the data ledger does not balance by {lost} records: {self.to_dict()}")

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "file"}

    def lines(self) -> list[str]:
        """A plain-text table: records in, each drop, kept, then the repairs and the warnings."""
        rows = [("records in", self.records_in)]
        rows += [(f"- {reason}", count) for reason, count in self.dropped.items()]
        rows += [("= kept", self.kept)]
        rows += [(f"~ {reason}", count) for reason, count in self.changed.items()]
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  {count:>9,}" for name, count in rows]
        return table + [f"warning: {text}" for text in self.warnings]


def squeeze(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())


class _Unusable(Exception):
    """Its arguments: the ledger's reason and, if there is one, what shows the fault. No text, which reports may not show."""


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise _Unusable("malformed", type(item).__name__)
    # A parquet file with both forms gives each message all four keys, those of the other form as null.
    item = {key: value for key, value in item.items() if value is not None}
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value", ""))
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
            raise _Unusable("content that is not text", kinds)
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Unusable("malformed", {key: type(value).__name__ for key, value in item.items()})
    if (role := role.strip().lower()) not in ROLES:
        raise _Unusable("tool turn" if role in TOOLS else "unknown role", role)
    unweighted = ROLES[role] == "assistant" and item.get("weight") == 0
    return (Context if unweighted else Message)(ROLES[role], content)


def decodable(text: str) -> str:
    """`text` without lone surrogates, which cannot be hashed or tokenised."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _strip_leading(messages: list[Message]) -> list[Message]:
    first = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))
    return [m for i, m in enumerate(messages) if i > first or m.role != "assistant"]


def _merge(messages: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            kind = Context if Context in (type(merged[-1]), type(message)) else Message
            message = kind(message.role, f"{merged.pop().content}\n\n{message.content}")
        merged.append(message)
    return merged


def _strip_trailing(messages: list[Message]) -> list[Message]:
    return messages[: max((i for i, m in enumerate(messages, 1) if m.role == "assistant"), default=0)]


_LEFT_OUT = {
    "tools": "tools left out",
    "tool_calls": "tool calls left out",
    "function_call": "tool calls left out",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning left out"),
}
"""Fields of a record or a message that are not passed to the chat template, and what the ledger calls their loss."""


def _left_out(record: dict[str, Any], items: list[dict[str, Any]]) -> list[str]:
    return sorted({why for part in (record, *items) for key, why in _LEFT_OUT.items() if part.get(key)})


_STEPS = (
    ("leading assistant turns removed", _strip_leading),
    ("same-role neighbours merged", _merge),
    ("turns after the last answer removed", _strip_trailing),
)


def content_hash(messages: Iterable[Message]) -> str:
    """64 hex digits; roles, contents and the boundaries between them count."""
    digest = hashlib.sha256()
    for role, content in messages:
        data = content.encode()
        digest.update(f"{role}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def normalise(record: Any, ledger: Ledger) -> Conversation | None:
    """A conversation of non-empty `system`, `user` and `assistant` turns that ends in an assistant turn, or None.

    Takes ShareGPT (`conversations`: `from`, `value`) and OpenAI (`messages`: `role`, `content`) records, with an `id` and a
    `system` prompt beside them if there are any. Empty messages, assistant turns before the first user turn and what
    follows the last answer are removed; neighbours of one role are merged. `ledger.changed` counts each repair, and tools
    and reasoning that are left out; `ledger.dropped` counts each None.
    """
    repairs = []
    try:
        if not isinstance(record, dict):
            raise _Unusable("malformed", type(record).__name__)
        turns = [record[k] for k in ("conversations", "messages") if k in record]
        lists = [found for found in turns if isinstance(found, list)]
        items = next(filter(None, lists), lists[0] if lists else None)
        if items is None:
            text = any(isinstance(found, str) for found in turns)
            why = "messages is text, not a list" if text else "neither conversations nor messages"
            raise _Unusable(why, list(record))
        raw = [_message(item) for item in items]
        if (system := record.get("system")) and not (raw and raw[0].role == "system"):
            raw.insert(0, _message({"role": "system", "content": system}))
        repairs += _left_out(record, items)
        messages = [m._replace(content=decodable(m.content)) for m in raw]
        repairs += ["undecodable characters replaced"] if messages != raw else []
        filled = [m for m in messages if m.content.strip()]
        if not filled:
            raise _Unusable("empty")
        repairs += ["empty messages removed"] if len(filled) < len(messages) else []
        for reason, step in _STEPS:
            after = step(filled)
            repairs += [reason] if len(after) < len(filled) else []
            filled = after
        if not filled:
            raise _Unusable("no answer to a user turn")
        repairs += ["answers of weight 0 kept as context"] if any(isinstance(m, Context) for m in filled) else []
    except _Unusable as unusable:
        reason, *shown = unusable.args
        name = f" (id {short(record['id'])})" if isinstance(record, dict) and record.get("id") else ""
        ledger.drop(reason, example=" in ".join([*map(short, shown), ledger.place + name]))
        return None
    for reason in repairs:
        ledger.change(reason)
    identity = record.get("id")
    return Conversation(decodable(str(identity)) if identity not in (None, "") else content_hash(filled), tuple(filled))


def read_conversations(path: Path, ledger: Ledger, excluded_prompts: Iterable[str] = ()) -> list[Conversation]:
    """Every usable conversation of `path`, once, in the order of `read_records`; `ledger` balances afterwards.

    An id that too many share to be parts of one chat names their source, and each gets a hash of its content instead.
    A conversation with a user turn equal to one of `excluded_prompts` (white space and case aside) is dropped as
    `evaluation prompt`. Raises `UserError` as `read_records` does.
    """
    excluded = {squeeze(prompt).casefold() for prompt in excluded_prompts}
    seen: set[str] = set()
    kept = []
    for record in read_records(path, ledger):
        conversation = normalise(record, ledger)
        if conversation is None:
            continue
        if (key := content_hash(conversation.messages)) in seen:
            ledger.drop("exact duplicate")
            continue
        seen.add(key)
        if excluded & {squeeze(m.content).casefold() for m in conversation.messages if m.role == "user"}:
            ledger.drop("evaluation prompt")
            continue
        kept.append(conversation)
    ledger.kept = len(kept)
    ledger.check()
    shared = Counter(c.id for c in kept)
    return [c if shared[c.id] <= LONGEST_CHAT else c._replace(id=content_hash(c.messages)) for c in kept]


def split(
    conversations: Iterable[Conversation], heldout: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), each in the given order. `heldout` is the expected share of *groups* that are held out.

    Conversations with the same first user turn, or with ids that name parts of one chat (`QWJhYvA_12`), are linked into one
    group, so that neither a first turn nor a chat occurs on both sides. Ids that number the records of a file (`train_12`) link
    nothing. Which groups are held out depends on the seed and on a group's own members, not on the order of the file.
    """
    conversations = list(conversations)
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    chats = zip(_chats(conversations), conversations, strict=True)
    keys = [(f"id:{chat}", f"turn:{c.first_user}") for chat, c in chats]
    for pair in keys:
        low, high = sorted(map(root, pair))
        parent[high] = low  # a root is always the least key of its group
    held = {key: counter(seed, "heldout", key) < heldout for key in {root(k) for k, _ in keys}}
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation, (key, _) in zip(conversations, keys, strict=True):
        sides[held[root(key)]].append(conversation)
    return sides


def _chats(conversations: list[Conversation]) -> list[str]:
    """The chat that each conversation is part of; its own id where that names no part."""
    names = [part[1] if (part := _PART.fullmatch(c.id)) else c.id for c in conversations]
    count = Counter(names)
    return [name if count[name] <= LONGEST_CHAT else c.id for name, c in zip(names, conversations, strict=True)]


def counter(seed: int, stream: str, key: object) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{stream}:{key}".encode()).digest()[:6], "big") / 2**48
