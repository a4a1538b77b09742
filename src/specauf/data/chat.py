"""Conversations through the tokenizer's own chat template, with a loss mask from render boundaries.

What an assistant turn adds to the rendering, from the generation prompt to its end, is supervised, unless the corpus gives
it weight 0. The boundaries come from rendering prefixes of the conversation and never from looking for markers in the text,
so they hold for any template under which a longer conversation only appends. Some templates rewrite an answer once another
question follows (Qwen3 drops its think block). Such an answer is supervised as the history has it; rendering another text in
its place shows where it lies.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from specauf.data.sources import Context, Message, decodable
from specauf.strict import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Message] | Sequence[Mapping[str, str]]
TODAY = date(2024, 7, 26)
"""The date that templates are told, so that a command has the same tokens on every day. Llama 3's write it when told none."""
# A template is given data alone, no functions, so what it calls for the date is shadowed in its own language.
SAID = "".join(f".replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSwyY")
DATED = "{% macro strftime_now(format) %}{{ format" + SAID + " }}{% endmacro %}{{ '' }}"


class Rendered(NamedTuple):
    input_ids: list[int]
    loss_mask: list[bool]
    """True where the token is part of an assistant turn (its end-of-turn included)."""


class UnstableTemplate(Exception):
    """A prefix of the conversation does not render, or tokenise, to a prefix of the whole."""

    reason = "unstable rendering"


class TemplateRefused(UnstableTemplate):
    """The template itself raised an error on this conversation."""

    reason = "refused by the chat template"


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, enable_thinking: bool, max_length: int | None = None
) -> Rendered:
    """Token ids of the whole conversation (one tokenisation of the full text) and their loss mask, cut to `max_length`.

    Turns that begin beyond `max_length` tokens may go unchecked. Raises `UnstableTemplate` when a boundary does not hold:
    the last answer does not begin with its generation prompt, an earlier one cannot be located, or a token straddles the
    boundary; `UserError` when the tokenizer has no offsets.
    """
    turns = _plain(messages)
    full = text = _render_text(tokenizer, turns, enable_thinking)
    spans: list[tuple[int, int]] = []
    enough = 4 * max_length if max_length else len(full) + 1  # characters after which to check if these tokens suffice
    encoded = None
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or isinstance(messages[i], Context):
            continue
        start = _render_text(tokenizer, turns[:i], enable_thinking, generation_prompt=True)
        end = _render_text(tokenizer, turns[: i + 1], enable_thinking)
        span: tuple[int, int] | None = None
        if len(start) < len(end) and full.startswith(start) and full.startswith(end):
            span = len(start), len(end)
        elif i + 1 < len(turns):
            span = _in_history(tokenizer, turns, i, full, enable_thinking)
        if span is None:
            raise UnstableTemplate(f"message {i} ({_differ(full, start, end)})")
        spans.append(span)
        if span[1] >= enough and _splits_at(tokenizer, full, span[1]):
            encoded = _encode(tokenizer, full[: span[1]])
            if len(encoded[0]) >= (max_length or 0):
                text = full[: span[1]]
                break
            encoded, enough = None, 2 * span[1]
    ids, offsets = encoded or _encode(tokenizer, full)
    starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
    limit = len(ids) if max_length is None else min(max_length, len(ids))
    mask = [False] * len(ids)
    for span in spans:
        first, last = (_token_at(tokenizer, text, ids, starts, ends, boundary) for boundary in span)
        if first >= limit:
            break
        mask[first:last] = [True] * (last - first)
    return Rendered(ids[:limit], mask[:limit])


ELSEWHERE = "\ue000elsewhere\ue000"
"""Private-use characters, rendered in place of an answer to locate it."""


def require_text(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> None:
    """Raises `UserError` when the chat template leaves out what an answer says: Jinja renders an unknown name as nothing."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ELSEWHERE}]
    try:
        text = _render_text(tokenizer, said, enable_thinking)
    except TemplateRefused:  # counted for each conversation
        return
    if ELSEWHERE not in text:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} leaves out the text of messages: it reads another field than "
            "`content`, or a list of parts there, as templates for images do. Put a template for text beside the tokenizer "
            "as chat_template.jinja"
        )


def _in_history(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], i: int, full: str, thinking: bool
) -> tuple[int, int] | None:
    """The span in `full` of answer `i`, which the template rewrites later, end of turn included; None when not found.

    Another text is rendered in its place: what then differs is the answer, whatever the template strips from it.
    """
    other = [*turns[:i], {**turns[i], "content": ELSEWHERE}]
    head, found, rest = _render_text(tokenizer, [*other, *turns[i + 1 :]], thinking).partition(ELSEWHERE)
    first, bare = len(head), len(full) - len(rest)
    if not found or ELSEWHERE in rest or not (full.startswith(head) and full.endswith(rest) and first < bare):
        return None
    last = bare + _common(rest, _render_text(tokenizer, other, thinking).rpartition(ELSEWHERE)[2])
    while bare < last < len(full) and not _splits_at(tokenizer, full, last):
        last -= 1  # the next turn may begin with the same characters as the rest of this one
    # A template may end an answer differently in history (gpt-oss): without a common end of turn, none is supervised.
    return (first, last) if last > bare or _splits_at(tokenizer, full, bare) else None


def _common(a: str, b: str) -> int:
    """Length of the longest prefix of both."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, enable_thinking: bool) -> list[int]:
    """Ids of the conversation with the header of the next assistant turn. Raises `TemplateRefused`, `UserError`."""
    text = decodable(_render_text(tokenizer, _plain(messages), enable_thinking, generation_prompt=True))
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, before: Messages, answer: str, end: int, after: Messages, enable_thinking: bool
) -> list[int]:
    """What follows the end-of-turn token `end` of `answer` up to the header of the next assistant turn.

    `before` are the messages that were answered, `after` those that come next. Raises `UnstableTemplate` when the longer
    conversation does not merely append to the prompt, the answer and its end: then the tokens so far are not a prefix of
    its rendering.
    """
    prior = _plain(before)
    stem = _render_text(tokenizer, prior, enable_thinking, generation_prompt=True) + answer
    turns = [*prior, {"role": "assistant", "content": answer}, *_plain(after)]
    full = _render_text(tokenizer, turns, enable_thinking, generation_prompt=True)
    if not full.startswith(stem):
        raise UnstableTemplate(f"message {len(prior)} ({_differ(full, stem, stem)})")
    # The end token is tokenised too: some tokenizers put a blank before text that begins a string.
    ids = list(tokenizer(full[len(stem) :], add_special_tokens=False, verbose=False)["input_ids"])
    if ids[:1] != [end]:
        raise UnstableTemplate(f"message {len(prior)} (the target ends it with token {end}, the template otherwise)")
    return ids[1:]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text. Raises `UserError` when there is none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: put one beside it as chat_template.jinja, "
            "or use the instruction-tuned version of the target"
        ) from None


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Twelve hex digits of the chat template's text. Raises `UserError` when there is none."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()[:12]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Twelve hex digits of the tokenizer's vocabulary and pipeline; padding and truncation settings do not count."""
    _require_fast(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def colour(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> Text:
    """The decoded conversation, supervised tokens in green, the others dim."""
    text = Text()
    for supervised, run in groupby(zip(rendered.input_ids, rendered.loss_mask, strict=True), key=lambda pair: pair[1]):
        # Whole runs are decoded, since one character can be several tokens.
        text.append(str(tokenizer.decode([token for token, _ in run])), style="green" if supervised else "dim")
    return text


def _plain(messages: Messages) -> list[dict[str, str]]:
    return [m._asdict() if isinstance(m, Message) else dict(m) for m in messages]


def _render_text(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], thinking: bool, generation_prompt: bool = False
) -> str:
    template = chat_template(tokenizer)
    try:
        rendered: Any = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            chat_template=DATED + template if "strftime_now" in template else None,
            add_generation_prompt=generation_prompt,
            enable_thinking=thinking,
        )
    except Exception as error:  # a template may fail as any program
        raise TemplateRefused(str(error)) from None
    return str(rendered)


def _require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets, which the loss mask needs: use a fast tokenizer "
            "(a tokenizer.json in the target's directory)"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    _require_fast(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _token_at(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], starts: list[int], ends: list[int], boundary: int
) -> int:
    """Index of the first token after the character `boundary`, which no token may straddle."""
    index = bisect_left(starts, boundary)
    before = ends[index - 1] if index else 0
    after = starts[index] if index < len(starts) else len(text)
    if before == boundary == after:
        return index
    if before <= boundary:  # the offsets leave a gap here (trimmed blanks, say): only tokenising the prefix can tell
        prefix, _ = _encode(tokenizer, text[:boundary])
        if ids[: len(prefix)] == prefix:
            return len(prefix)
    raise UnstableTemplate(f"a token straddles {text[max(0, boundary - 20) : boundary]!r} and what follows")


def _splits_at(tokenizer: PreTrainedTokenizerBase, text: str, position: int) -> bool:
    """Whether a special token begins at `position`: tokenizers split there first, so what precedes stands alone."""
    return any(
        text.startswith(token.content, position)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.lstrip or token.single_word or token.normalized)
    )


def _differ(full: str, start: str, end: str) -> str:
    for prefix in (start, end):
        if not full.startswith(prefix):
            at = _common(prefix, full)
            return f"its prefix renders {prefix[at : at + 20]!r} where the whole has {full[at : at + 20]!r}"
    return "it adds nothing to the rendering"
