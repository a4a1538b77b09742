"""Prepared conversations on disk: tokens and loss masks in one flat file, held-out prompts and the ledger beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specauf.config import DataConfig, digest
from specauf.data.chat import (
    Rendered,
    UnstableTemplate,
    prompt_ids,
    render,
    require_text,
    template_hash,
    tokenizer_hash,
)
from specauf.data.records import corpus_files
from specauf.data.sources import Conversation, Ledger, Message, content_hash, counter, read_conversations, split
from specauf.files import atomic_file, atomic_write_text, save_tensors
from specauf.strict import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Row = tuple[int, Tensor, Tensor]
    Identified = tuple[int, Conversation]

FORMAT = 2
"""Part of the key: raised when the same corpus is read, split or rendered differently."""
WHOLE = 1 << 30
"""A corpus of fewer bytes is told from another by all of them."""
THREADS, SLAB = 8, 256
"""Threads that render, and how many conversations are handed to them at once. Tokenizers let go of Python's lock."""
LONGEST_PROMPT = 256
"""Tokens of a held-out prompt at most."""
TOKENS, META, HELDOUT = "tokens.safetensors", "meta.json", "heldout.json"


class Example(NamedTuple):
    uid: int
    """Identity of the conversation, for counter-based randomness: never its position in the dataset."""
    input_ids: Tensor
    """int64 [s]"""
    loss_mask: Tensor
    """bool [s]"""


class Prompt(NamedTuple):
    id: str
    messages: list[dict[str, str]]
    """The first user turn, after the system turn if there is one."""
    tokens: int
    """Length of the rendered prompt, generation prompt included."""


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """n conversations, flat: conversation i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Tensor
    """int32 [tokens]"""
    mask: Tensor
    """uint8 [tokens], 1 where the token is supervised"""
    offsets: Tensor
    """int64 [n + 1]"""
    uid: Tensor
    """int64 [n], not negative"""
    meta: dict[str, Any]
    """`conversation_ids`, `ledger`, `template_hash`, `tokenizer_hash`, `enable_thinking`, `max_length`, ..."""

    def __len__(self) -> int:
        return len(self.uid)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        low, high = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        return Example(int(self.uid[index]), self.ids[low:high].long(), self.mask[low:high].bool())

    @property
    def conversations(self) -> list[Any]:
        """Which conversation each row is of. Rollouts have several rows of one, next to each other; a corpus has one each."""
        if numbers := self.meta.get("conversation_numbers"):
            return list(numbers)
        return list(self.meta["conversation_ids"] if "rollout" in self.meta else range(len(self)))

    @classmethod
    def from_rows(cls, rows: Sequence[Row], meta: dict[str, Any]) -> TokenDataset:
        """`rows` are (uid, input ids int32 [s], loss mask uint8 [s]); at least one."""
        uids, ids, masks = zip(*rows, strict=True)
        offsets = torch.tensor([0] + [len(row) for row in ids]).cumsum(0)
        return cls(torch.cat(ids), torch.cat(masks), offsets, torch.tensor(uids), meta)

    def save(self, directory: Path) -> None:
        """Write both files, `meta.json` last: without it the directory holds no dataset."""
        (directory / META).unlink(missing_ok=True)
        with atomic_file(directory / TOKENS) as temporary:
            tensors = {name: getattr(self, name) for name in ("ids", "mask", "offsets", "uid")}
            save_tensors(tensors, temporary, metadata={"key": str(self.meta.get("key"))})
        atomic_write_text(directory / META, json.dumps(self.meta, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, directory: Path) -> TokenDataset:
        """Raises `UserError` when `directory` holds no whole dataset."""
        try:
            meta = dict(json.loads((directory / META).read_text(encoding="utf-8")))
            with safe_open(directory / TOKENS, "pt") as file:
                if (file.metadata() or {}).get("key") != str(meta.get("key")):
                    raise ValueError("its two files do not belong together")
                return cls(**{name: file.get_tensor(name) for name in file.keys()}, meta=meta)  # noqa: SIM118
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"{directory} holds no prepared data ({error}): run `specauf prepare` again") from None


class Prepared(NamedTuple):
    train: TokenDataset
    heldout: list[Prompt]
    ledger: Ledger
    reused: bool
    """Whether the directory already held exactly this."""


class Prompts(NamedTuple):
    """A corpus whose answers are not rendered: all that the target needs in order to answer it itself."""

    train: list[Identified]
    """The conversations to train on, in training order."""
    heldout: list[Prompt]
    meta: dict[str, Any]
    """Settings and split as in `meta.json` of the prepared corpus, and the same `key`."""
    ledger: Ledger


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    source: Path,
    excluded_prompts: Iterable[str] = (),
    kept_out: Sequence[str] = (),
) -> Prepared:
    """Read, split, render and store the corpus `source` in `out`, or reuse what is there if nothing changed.

    Training conversations come in the order of a hash of (seed, uid), so a smaller `max_conversations` takes a prefix
    of a larger one. Held-out prompts longer than `LONGEST_PROMPT`, or repeated, are left out and counted in
    `train.meta["heldout"]`. `kept_out` names the tasks that `excluded_prompts` come from. Raises `UserError` when the corpus
    or the template leaves nothing to train on.
    """
    excluded = sorted(set(excluded_prompts))
    key = _settings(config, tokenizer, source, excluded)["key"]
    if (reused := _reuse(out, key)) is not None:
        return reused
    train, prompts, meta, ledger = read_prompts(
        config, tokenizer, source=source, excluded_prompts=excluded, kept_out=kept_out
    )
    rows, names = _render_rows(train, config, tokenizer, ledger)
    ledger.kept = len(rows)
    ledger.check()
    _require_supervision(rows, ledger, source)
    dataset = TokenDataset.from_rows(rows, meta | {"conversation_ids": names, "ledger": ledger.to_dict()})
    (out / META).unlink(missing_ok=True)
    write_heldout(out, prompts)
    dataset.save(out)
    return Prepared(dataset, prompts, ledger, reused=False)


def read_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Path,
    excluded_prompts: Iterable[str] = (),
    kept_out: Sequence[str] = (),
) -> Prompts:
    """Read and split the corpus as `prepare` does, without rendering its answers, which some templates do not allow."""
    require_text(tokenizer, config.enable_thinking)
    excluded, ledger = sorted(set(excluded_prompts)), Ledger()
    before = _fingerprint(source)
    train, heldout = training_order(config, source, ledger, excluded)
    prompts, counts = _heldout_prompts(heldout, config, tokenizer)
    meta = _settings(config, tokenizer, source, excluded) | {
        "source_path": str(source.resolve()),
        "enable_thinking": config.enable_thinking,
        "max_length": config.max_length,
        "heldout": counts,
        "split": {"seed": config.seed, "heldout": config.heldout},
        "kept_out": list(kept_out),
    }
    if meta["source"] != before:
        raise UserError(f"{source} changed while it was read (is it still being written?): run the command again")
    return Prompts(train, prompts, meta, ledger)


def _settings(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: Path, excluded: list[str]
) -> dict[str, Any]:
    """What prepared data depends on, and its digest as `key`."""
    meta: dict[str, Any] = {
        "format": FORMAT,
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "path"},
        "template_hash": template_hash(tokenizer),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "source": _fingerprint(source),
        "excluded_prompts": digest(excluded),
        "max_prompt_tokens": LONGEST_PROMPT,
    }
    return meta | {"key": digest(meta)}


def training_order(
    config: DataConfig, source: Path, ledger: Ledger, excluded_prompts: Iterable[str] = ()
) -> tuple[list[Identified], list[Identified]]:
    """(training, held-out) conversations of a corpus, each in the order of a hash of (seed, uid).

    `ledger` counts the held-out ones as dropped.
    """
    train, heldout = split(read_conversations(source, ledger, excluded_prompts), config.heldout, config.seed)
    ledger.drop("held out", len(heldout))
    if config.heldout and not heldout:
        ledger.warnings.append(f"{source.name}: no group of conversations fell into the held-out {config.heldout:.1%}")
    return _hash_order(train, config.seed), _hash_order(heldout, config.seed)


def write_heldout(directory: Path, prompts: Sequence[Prompt]) -> None:
    text = json.dumps([prompt._asdict() for prompt in prompts], indent=1, ensure_ascii=False)
    atomic_write_text(directory / HELDOUT, text)


def read_heldout(directory: Path) -> list[Prompt]:
    return [Prompt(**prompt) for prompt in json.loads((directory / HELDOUT).read_text(encoding="utf-8"))]


def read_split(directory: Path) -> dict[str, Any] | None:
    """The settings that split the corpus into training and held-out conversations; None where they were not stored."""
    try:
        split: dict[str, Any] | None = json.loads((directory / META).read_text(encoding="utf-8")).get("split")
    except (OSError, ValueError):  # whoever reads the data reports it
        return None
    return split


def conversation_uid(conversation: Conversation) -> int:
    """63 bits of the id and the content."""
    text = f"{conversation.id}\0{content_hash(conversation.messages)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _hash_order(conversations: Iterable[Conversation], seed: int) -> list[Identified]:
    pairs = ((conversation_uid(c), c) for c in conversations)
    return sorted(pairs, key=lambda pair: (counter(seed, "order", pair[0]), pair[0]))


def _render_rows(
    conversations: list[Identified], config: DataConfig, tokenizer: PreTrainedTokenizerBase, ledger: Ledger
) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    names: list[str] = []
    rendered = _rendered(conversations, config, tokenizer)
    for done, ((uid, conversation), found) in enumerate(zip(conversations, rendered, strict=True)):
        if len(rows) == config.max_conversations:
            ledger.drop("over the limit", len(conversations) - done)
            break
        if isinstance(found, UnstableTemplate):
            ledger.drop(found.reason, example=f"conversation {conversation.id}, {found}")
            continue
        ids, mask = found
        if not any(a and b for a, b in pairwise(mask)):  # an anchor needs itself and its successor supervised
            ledger.drop("nothing supervised within max_length")
            continue
        rows.append((uid, torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.uint8)))
        names.append(conversation.id)
    return rows, names


def _rendered(
    conversations: list[Identified], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Rendered | UnstableTemplate]:
    """What each conversation renders to, or why it does not, in their order."""

    def one(identified: Identified) -> Rendered | UnstableTemplate:
        messages = identified[1].messages
        try:
            return render(tokenizer, messages, enable_thinking=config.enable_thinking, max_length=config.max_length)
        except UnstableTemplate as error:
            return error

    # The first call settles the tokenizer's state, which threads must not change.
    yield from map(one, conversations[:1])
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for start in range(1, len(conversations), SLAB):
            yield from pool.map(one, conversations[start : start + SLAB])


def _require_supervision(rows: list[Row], ledger: Ledger, source: Path) -> None:
    if not rows:
        table = "\n".join([f"{source}: no conversation is left to train on", *ledger.lines()])
        if any(reason.startswith("unstable") for reason in ledger.dropped):
            table += (
                "\nThe template renders answers in another way than it prompts for them. The target's own answers can be\n"
                "trained on: specauf rollout RECIPE --out DIR"
            )
        raise UserError(table)
    if all(bool(mask.all()) for _, _, mask in rows):
        raise UserError(
            f"{source}: the chat template puts every token of every conversation into assistant turns, so the loss "
            "mask masks nothing; check the tokenizer's chat template"
        )


def _heldout_prompts(
    conversations: list[Identified], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], dict[str, int]]:
    counts = {"conversations": len(conversations), "prompts": 0, "repeated": 0, "too_long": 0, "refused": 0}
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for _, conversation in conversations:
        if (first := conversation.first_user) in seen:
            counts["repeated"] += 1
            continue
        seen.add(first)
        end = next(i for i, m in enumerate(conversation.messages, 1) if m.role == "user")
        messages: tuple[Message, ...] = conversation.messages[:end]
        try:
            tokens = len(prompt_ids(tokenizer, messages, config.enable_thinking))
        except UnstableTemplate:
            counts["refused"] += 1
            continue
        if tokens > LONGEST_PROMPT:
            counts["too_long"] += 1
        else:
            prompts.append(Prompt(conversation.id, [m._asdict() for m in messages], tokens))
    counts["prompts"] = len(prompts)
    return prompts, counts


def _fingerprint(source: Path) -> dict[str, Any]:
    """A hash of the file, or of each in a directory.

    Of one that takes long to read: its size, time of change, and a hash of its first and last MiB.
    """
    files = corpus_files(source)
    if source.is_dir():
        return {file.name: _fingerprint(file) for file in files}
    found = source.stat()
    size = found.st_size
    with source.open("rb") as file:
        if size < WHOLE:
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        hasher = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        hasher.update(file.read())
    return {"bytes": size, "sha256_of_ends": hasher.hexdigest(), "changed": found.st_mtime_ns}


def _reuse(out: Path, key: str) -> Prepared | None:
    try:
        dataset = TokenDataset.load(out)
        if dataset.meta["key"] != key:
            return None
        return Prepared(dataset, read_heldout(out), Ledger(**dataset.meta["ledger"]), reused=True)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours: build it
