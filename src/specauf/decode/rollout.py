"""Rollouts: the target's own answers to training prompts, as a directory of training data.

Draws are counter-based: a sample is a function of (seed, conversation, sample, position), whatever batch it was in. The plan
is a function of the settings. So a new run can use the files of a killed one, and several may share the work.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specauf import provenance
from specauf.config import digest
from specauf.data.chat import UnstableTemplate
from specauf.data.dataset import META, Prompts, TokenDataset, write_heldout
from specauf.data.rollouts import SETTINGS, RolloutConfig
from specauf.data.sources import Ledger, Message
from specauf.decode.roller import ANEW, WHOLE, Roller, Sample
from specauf.files import atomic_file, atomic_write_text, read_json
from specauf.locks import claim, turn
from specauf.strict import UserError, to_dict

if TYPE_CHECKING:
    from specauf.data.dataset import Identified

Advance = Callable[[int, int, float], None]
"""Called after every batch: samples, generated tokens, seconds spent on them (0 when they were found on disk)."""
WINDOW = 8
"""Batches whose samples are sorted by prompt length together, so that little of a prefill is padding."""
PARTS, TEXT = "parts", "rollouts.jsonl"
SHORT = "samples of fewer than two tokens left out"
HASHES = ("template_hash", "tokenizer_hash", "excluded_prompts")
INHERITED = ("format", "enable_thinking", "max_length", "heldout", "split", "kept_out", *HASHES)
"""Fields of `meta.json` that are copied from the prepared corpus."""

Planned = tuple[str, list[Sample]]
"""Why a conversation is dropped (empty when it is not), and its samples."""
Answered = tuple[list[int], list[int], str, list[Message], float]
"""Ids, mask, stop, messages and seconds of a row that has ended."""


def rollout(
    roller: Roller,
    source: Prompts,
    out: Path,
    *,
    drafter: str | None = None,
    on_progress: Advance = lambda samples, tokens, seconds: None,
) -> TokenDataset:
    """Answer the training conversations of `source` into the directory `out`. Its ledger balances afterwards.

    Answers that `out` has already are kept if it was begun with the same settings, `drafter` (a digest) among them. Several
    processes may share `out`: each takes batches that no other has, and all return the same. With `max_tokens`, the result is
    the shortest prefix of the conversations with that many generated tokens; an unfinished directory may go on with another
    `max_tokens`. Raises `UserError` when `out` was begun with other settings or holds something else, or when nothing is left
    to train on.
    """
    plan = roller.plan
    made_of = {
        "target": roller.target.fingerprint(),
        "eos": sorted(roller.target.eos_ids()),
        "source": source.meta["key"],
        "mask_token_id": roller.mask_token_id,
        "drafter": drafter,
        "server": roller.server and f"vLLM, {roller.server.model}",
        **to_dict(plan),
    }
    there = {p.name for p in out.glob("[!.]*")} - {"lock"}
    if there and SETTINGS not in there:
        raise UserError(f"{out} holds something else than rollouts: choose another --out")
    with _turn(out):
        _begin(out, made_of)
    made_by = provenance.collect()  # now: a commit made while this runs is not what it runs
    planned, queue = list[Planned](), begin_all(roller, source.train)
    found = dict(answer for part in sorted((out / PARTS).glob("*")) for answer in _read(part).items())
    tokens, seconds = 0, 0.0
    while not (out / META).is_file() and (window := _window(queue, planned, plan, tokens, roller.data.max_length)):
        batches = [window[i : i + plan.batch_size] for i in range(0, len(window), plan.batch_size)]
        for batch, spent in _answer(roller, out, batches, found):
            made = _generated(rows := _rows(batch))
            tokens, seconds = tokens + made, seconds + sum(row.seconds for row in rows)
            on_progress(len(batch), made, spent)
    with _turn(out):
        if not (out / META).is_file():
            speed = {"generated": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
            _save(
                out, planned, source, made_of, {**made_by, "config_hash": digest(made_of), "rollout": made_of, **speed}
            )
        shutil.rmtree(out / PARTS, ignore_errors=True)  # another process may be looking for one
    return TokenDataset.load(out)


def _save(out: Path, planned: Sequence[Planned], source: Prompts, made_of: dict[str, Any], run: dict[str, Any]) -> None:
    kept = _settle(planned, len(source.train), source.ledger, made_of["max_tokens"])
    if not kept:
        raise UserError("\n".join([f"{out}: no rollout is left to train on", *source.ledger.lines()]))
    _begin(out, made_of)  # once more: another process may have changed max_tokens
    provenance.write(out / "run.json", run)
    _write_text(out / TEXT, kept)
    write_heldout(out, source.heldout)
    meta = {name: source.meta[name] for name in INHERITED} | {
        "key": digest(made_of),
        "conversation_ids": [row.conversation.id for row in kept],
        "conversation_numbers": _numbers(kept),
        "ledger": source.ledger.to_dict(),
        "rollout": {**made_of, "tokens": _generated(kept)},
    }
    TokenDataset.from_rows([_tensors(row) for row in kept], meta).save(out)


def _turn(directory: Path) -> AbstractContextManager[None]:
    """A lock on `directory`. Where the disk has none, processes only repeat each other's work."""
    return turn(directory, lambda: None, optional=True)


def _begin(out: Path, made_of: dict[str, Any]) -> None:
    """Write the settings into a new directory, or make sure that an old one was begun with them.

    `max_tokens` may change until the rollouts are finished: each number takes a prefix of the same samples.
    """
    path = out / SETTINGS
    found: dict[str, Any] = {}
    if path.is_file():
        found = read_json(path, "choose another --out, or delete the directory and its answers")
        free = () if (out / META).is_file() else ("max_tokens",)
        changed = [
            f"{k} {found.get(k)!r}, now {v!r}" for k, v in made_of.items() if found.get(k) != v and k not in free
        ]
        if changed:
            raise UserError(f"{out} was begun with {'; '.join(changed)}: repeat that command, or choose another --out")
    if found != made_of:
        atomic_write_text(path, json.dumps(made_of, indent=1) + "\n")


def begin_all(roller: Roller, conversations: Sequence[Identified]) -> Iterator[Planned]:
    """The samples of every conversation before their first answer, or why there are none."""
    begun = 0
    for uid, conversation in conversations:
        if begun == roller.data.max_conversations:
            return
        try:
            begin = roller.begin(uid, conversation)
        except UnstableTemplate as error:
            yield error.reason, []
        else:
            begun += not isinstance(begin, str)
            yield (begin, []) if isinstance(begin, str) else ("", begin)


def _window(
    queue: Iterator[Planned], planned: list[Planned], plan: RolloutConfig, tokens: int, max_length: int
) -> list[Sample]:
    """The next samples to answer, whole conversations, sorted by prompt length; they join `planned` in training order.

    Near `max_tokens` the window shrinks to what cannot overshoot, one batch at the least.
    """
    wanted = WINDOW * plan.batch_size
    if plan.max_tokens is not None:
        most = max_length if plan.turns == "all" else min(max_length, plan.turns * plan.max_new_tokens)
        left = plan.max_tokens - tokens
        wanted = 0 if left <= 0 else min(wanted, max(1, left // (most * plan.batch_size)) * plan.batch_size)
    window: list[Sample] = []
    while len(window) < wanted and (entry := next(queue, None)):
        planned.append(entry)
        window += entry[1]
    return sorted(window, key=lambda s: len(s.pending))


def _answer(
    roller: Roller, out: Path, batches: Sequence[list[Sample]], found: dict[int, Answered]
) -> Iterator[tuple[list[Sample], float]]:
    """Answer the batches, those that another process has last. Yields each with the seconds that this process spent on it.

    `found` are the answers that are known to be on disk. Ends early when another process has finished the rollouts.
    """
    others = []
    for batch in batches:
        part = out / PARTS / digest([s.uid for s in batch])
        if _reuse(batch, found):
            yield batch, 0.0
            continue
        with claim(part, optional=True) as mine:
            spent = _make(roller, out, part, batch) if mine else None
        if spent is None:
            others.append((part, batch))
        else:
            yield batch, spent
    for part, batch in others:
        with _turn(part):
            spent = _make(roller, out, part, batch)
        if spent is None:
            return
        yield batch, spent


def _reuse(batch: Sequence[Sample], found: dict[int, Answered]) -> bool:
    """Give the samples their answers in `found`. Returns whether these are all."""
    for sample in batch:
        for row in sample.rows():
            if not row.stop and row.uid in found:
                row.ids, row.mask, row.stop, row.messages, row.seconds = found[row.uid]
                if row.stop == ANEW:
                    row.begin_next([], [])  # what it asked is in the messages that `found` has for it
    return all(sample.stop for sample in batch)


def _make(roller: Roller, out: Path, part: Path, batch: Sequence[Sample]) -> float | None:
    """Answer what `part` lacks of the batch, and put it there. Returns the seconds spent, None when the rollouts are finished.

    The caller holds `part`.
    """
    if _reuse(batch, _read(part)):
        return 0.0
    if (out / META).is_file():
        return None
    began, rest = time.perf_counter(), [s for s in batch if not s.stop]
    roller.roll(rest)
    seconds = time.perf_counter() - began
    for s in rest:
        s.seconds = seconds / len(rest)
    rows = _rows(batch)
    told = [{"stop": row.stop, "messages": _plain(row.messages)} for row in rows]
    meta = {"key": part.name, "seconds": sum(row.seconds for row in rows), "samples": told}
    TokenDataset.from_rows([_tensors(row) for row in rows], meta).save(part)
    return seconds


def _read(part: Path) -> dict[int, Answered]:
    """The rows that a part has, by uid; none when it is not there, or was cut by a kill."""
    try:
        data = TokenDataset.load(part)
    except UserError:
        return {}
    share, found = float(data.meta["seconds"]) / len(data), dict[int, Answered]()
    for i, (uid, told) in enumerate(zip(data.uid.tolist(), data.meta["samples"], strict=True)):
        row, messages = data[i], [Message(**m) for m in told["messages"]]
        found[uid] = row.input_ids.tolist(), row.loss_mask.int().tolist(), told["stop"], messages, share
    return found


def _settle(planned: Sequence[Planned], total: int, ledger: Ledger, max_tokens: int | None) -> list[Sample]:
    """The rows to keep, in training order, of `total` conversations: the shortest prefix with `max_tokens` tokens."""
    kept: list[Sample] = []
    ledger.kept = tokens = used = 0
    for reason, samples in planned:
        if max_tokens is not None and tokens >= max_tokens:
            break
        rows = _rows(samples)
        used, tokens = used + 1, tokens + _generated(rows)
        whole = [r for r in rows if any(a and b for a, b in pairwise(r.mask))]  # an anchor needs its successor too
        short = [SHORT] * (len(rows) - len(whole))
        for end in [r.stop for r in rows if r.stop != WHOLE] + short:
            ledger.change(end)
        if whole:
            ledger.kept += 1
            kept += whole
        else:
            ledger.drop(reason or "no answer of two tokens")
    ledger.drop("over the limit", total - used)
    ledger.check()
    return kept


def _numbers(rows: Sequence[Sample]) -> list[int]:
    """Which conversation each row is of: several may have one id."""
    groups = groupby(rows, key=lambda row: id(row.conversation))
    return [number for number, (_, group) in enumerate(groups) for _ in group]


def _rows(samples: Sequence[Sample]) -> list[Sample]:
    return [row for sample in samples for row in sample.rows()]


def _generated(rows: Sequence[Sample]) -> int:
    return sum(sum(row.mask) for row in rows)


def _write_text(path: Path, rows: Sequence[Sample]) -> None:
    """One line a sample: its last row has what the earlier ones have."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for _, sample in groupby(rows, key=lambda row: (id(row.conversation), row.number)):
            *_, last = sample
            told = {"id": last.conversation.id, "sample": last.number, "messages": _plain(last.messages)}
            file.write(json.dumps(told, ensure_ascii=False) + "\n")


def _tensors(row: Sample) -> tuple[int, torch.Tensor, torch.Tensor]:
    return row.uid, torch.tensor(row.ids, dtype=torch.int32), torch.tensor(row.mask, dtype=torch.uint8)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [m._asdict() for m in messages]
