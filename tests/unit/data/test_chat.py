from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from specauf.data import chat
from specauf.data.chat import (
    Rendered,
    TemplateRefused,
    UnstableTemplate,
    colour,
    continuation_ids,
    prompt_ids,
    render,
    template_hash,
    tokenizer_hash,
)
from specauf.data.sources import Message
from specauf.strict import UserError

Make = Callable[..., Any]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As reasoning models do: the last answer carries a think block that earlier ones lose.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
BLANK_AT_THE_BOUNDARY = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"


def talk(*contents: str) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]


def supervised(tokenizer: Any, rendered: Rendered) -> str:
    return str(tokenizer.decode([t for t, m in zip(*rendered, strict=True) if m]))


def test_exactly_the_answers_and_their_ends_of_turn_are_supervised(tokenizer: Any) -> None:
    rendered = render(tokenizer, talk("hello", "the fox 🙂", "<|im", "ça va"), enable_thinking=False)
    assert supervised(tokenizer, rendered) == "the fox 🙂<|im_end|>\nça va<|im_end|>\n"
    unsupervised = tokenizer.decode([t for t, m in zip(*rendered, strict=True) if not m])
    assert unsupervised == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        "<|im_start|>user\n<|im<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_that_repeats_the_markers_of_a_turn_is_still_supervised_whole(tokenizer: Any) -> None:
    answer = "a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc"
    rendered = render(tokenizer, talk("q", answer), enable_thinking=False)
    assert supervised(tokenizer, rendered) == answer + "<|im_end|>\n"


contents = st.lists(st.text(st.sampled_from("ab é🙂\n0<|"), min_size=1, max_size=60), min_size=2, max_size=12)


@QUICK
@given(contents=contents, limit=st.integers(1, 80))
def test_a_limit_gives_the_head_of_the_tokenised_whole_conversation(
    tokenizer: Any, contents: list[str], limit: int
) -> None:
    messages = talk(*(f"x{c}" for c in contents))
    whole = render(tokenizer, messages, enable_thinking=False)
    text = tokenizer.apply_chat_template([m._asdict() for m in messages], tokenize=False)
    assert whole.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert render(tokenizer, messages, enable_thinking=False, max_length=limit) == Rendered(
        whole.input_ids[:limit], whole.loss_mask[:limit]
    )


@QUICK
@given(contents=contents)
def test_a_prompt_is_the_unsupervised_head_of_the_rendered_conversation(tokenizer: Any, contents: list[str]) -> None:
    messages = talk("q", "a", *(f"x{c}" for c in contents), "the question", "the answer")
    messages = messages[: len(messages) // 2 * 2]
    whole = render(tokenizer, messages, enable_thinking=False)
    prompt = prompt_ids(tokenizer, messages[:-1], enable_thinking=False)
    assert whole.input_ids[: len(prompt)] == prompt
    assert not whole.loss_mask[len(prompt) - 1] and all(whole.loss_mask[len(prompt) :])


def test_a_long_conversation_takes_one_tokenisation_and_a_limit_shortens_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = chat._encode
    monkeypatch.setattr(chat, "_encode", lambda tok, text: lengths.append(len(text)) or encode(tok, text))
    messages = talk(*["the quick brown fox " * 5 + "."] * 100)
    render(tokenizer, messages, enable_thinking=False)
    assert len(lengths) == 1
    render(tokenizer, messages, enable_thinking=False, max_length=50)
    assert sum(lengths[1:]) < lengths[0] / 10


def test_a_cut_is_made_only_where_a_special_token_begins(make_tokenizer: Make) -> None:
    # Without markers between turns the last token of a turn can reach into the next one.
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = talk("<|im_end|>", "the qui", "ck brown fox " * 40, "x")
    with pytest.raises(UnstableTemplate, match="straddles"):
        render(tokenizer, messages, enable_thinking=False, max_length=2)


@pytest.mark.parametrize(("thinking", "last"), [(False, "b"), (True, "<think>\n\n</think>\n\nb")])
@pytest.mark.parametrize("first", ["a", "d", "<", "<b", "assistant\n", " the <think> "])
def test_an_answer_that_the_template_rewrites_later_is_supervised_as_the_history_has_it(
    make_tokenizer: Make, thinking: bool, last: str, first: str
) -> None:
    tokenizer = make_tokenizer(THINKING)
    rendered = render(tokenizer, talk("q", first, "r", "<think", "s", "b"), enable_thinking=thinking)
    assert supervised(tokenizer, rendered) == f"{first}<|im_end|>\n<think<|im_end|>\n{last}<|im_end|>\n"
    whole = str(tokenizer.decode(rendered.input_ids))
    assert whole.count("</think>") == 1, "the whole conversation is what the template shows, earlier answers rewritten"
    assert supervised(tokenizer, render(tokenizer, talk("q", "a"), enable_thinking=False)) == "a<|im_end|>\n"


def test_an_answer_whose_thinking_is_stripped_from_the_history_is_supervised_without_it(make_tokenizer: Make) -> None:
    stripped = "m['content'].split('</think>')[-1].lstrip('\\n')"
    tokenizer = make_tokenizer(THINKING.replace("m['content'] +", f"(m['content'] if loop.last else {stripped}) +"))
    turns = talk("q", "<think>\nwhy\n</think>\n\nthe fox", "r", "<think></think>\ndog", "s", "b")
    rendered = render(tokenizer, turns, enable_thinking=False)
    assert supervised(tokenizer, rendered) == "the fox<|im_end|>\ndog<|im_end|>\nb<|im_end|>\n"


def test_an_answer_that_ends_otherwise_in_the_history_is_supervised_without_its_end(make_tokenizer: Make) -> None:
    """gpt-oss: the last answer ends with <|return|>, the earlier ones with <|end|>."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if m['role'] == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    marks = ("<|start|>", "<|message|>", "<|end|>", "<|return|>")
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    rendered = render(tokenizer, talk("q", "the answer", "r", "b"), enable_thinking=False)
    assert supervised(tokenizer, rendered) == "the answerb<|return|>"


def test_a_template_that_ends_every_rendering_is_no_obstacle(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}")
    rendered = render(tokenizer, talk("q", "a", "r", "b"), enable_thinking=False)
    assert supervised(tokenizer, rendered) == "a<|im_end|>\nb<|im_end|>\n<|im_end|>"


def test_an_earlier_answer_that_the_history_does_not_repeat_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(CHATML.replace("m['content']", "(m['content'] if loop.last else '...')"))
    with pytest.raises(UnstableTemplate, match="message 1"):
        render(tokenizer, talk("q", "answer", "r", "b"), enable_thinking=False)


def test_a_generation_prompt_that_the_history_does_not_repeat_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(CHATML.replace("assistant\\n' }}", "assistant\\n<think></think>' }}"))
    with pytest.raises(UnstableTemplate, match=r"renders '<think>.*where the whole has 'answer"):
        render(tokenizer, talk("q", "answer " * 9), enable_thinking=False)


def test_enable_thinking_reaches_the_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(THINKING)
    rendered = render(tokenizer, talk("q", "a"), enable_thinking=True)
    assert supervised(tokenizer, rendered) == "<think>\n\n</think>\n\na<|im_end|>\n"
    off, on = (tokenizer.decode(prompt_ids(tokenizer, talk("q"), thinking)) for thinking in (False, True))
    assert "<think>" in off and "<think>" not in on


def test_a_token_across_a_boundary_is_refused_even_when_its_offsets_hide_the_blank(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(BLANK_AT_THE_BOUNDARY)
    with pytest.raises(UnstableTemplate, match="straddles"):
        render(tokenizer, talk("q", "the answer"), enable_thinking=False)  # the token is " the"


@pytest.mark.parametrize(("answer", "stable"), [(" the fox", True), ("  the fox", False), ("\n\nthe fox", False)])
def test_a_blank_at_the_start_of_an_answer_counts_with_it_or_refuses(tokenizer: Any, answer: str, stable: bool) -> None:
    if stable:
        rendered = render(tokenizer, talk("q", answer), enable_thinking=False)
        assert supervised(tokenizer, rendered) == answer + "<|im_end|>\n"
    else:  # the header's new line and the blanks are one token
        with pytest.raises(UnstableTemplate, match="straddles"):
            render(tokenizer, talk("q", answer), enable_thinking=False)


def test_a_template_that_trims_is_stable(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(TRIMMING)
    rendered = render(tokenizer, talk(" q\n", "\n\n the fox ", "r", " a"), enable_thinking=False)
    assert supervised(tokenizer, rendered) == "the fox<|im_end|>a<|im_end|>"


def test_a_template_s_own_error_is_a_refusal_with_its_reason(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(NO_SYSTEM)
    with pytest.raises(TemplateRefused, match="no system role here"):
        render(tokenizer, [Message("system", "s"), *talk("q", "a")], enable_thinking=False)
    assert TemplateRefused.reason != UnstableTemplate.reason
    for fails in ("messages[0].content + 1", "1 // 0", "'{1}'.format(0)"):
        with pytest.raises(TemplateRefused):
            prompt_ids(make_tokenizer(f"{{{{ {fails} }}}}"), talk("q"), False)


def test_a_template_that_writes_the_date_renders_alike_on_every_day(make_tokenizer: Make) -> None:
    """Llama-3.2's asks `strftime_now`; recordings and rollouts go on tomorrow, with the tokens of today."""
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    dated, plain = make_tokenizer("\n" + asks + CHATML), make_tokenizer("\n26 Jul 2024" + CHATML)
    assert prompt_ids(dated, talk("q"), False) == prompt_ids(plain, talk("q"), False)
    assert template_hash(dated) != template_hash(make_tokenizer(asks + CHATML)), "of the template as it is"


def test_half_a_surrogate_pair_in_a_prompt_is_replaced(tokenizer: Any) -> None:
    assert prompt_ids(tokenizer, talk("a \ud83d b"), False) == prompt_ids(tokenizer, talk("a \ufffd b"), False)


def test_a_tokenizer_without_offsets_is_a_user_error(tokenizer: Any) -> None:
    slow = SimpleNamespace(
        is_fast=False,
        get_chat_template=tokenizer.get_chat_template,
        apply_chat_template=tokenizer.apply_chat_template,
    )
    with pytest.raises(UserError, match="fast tokenizer"):
        render(slow, talk("q", "a"), enable_thinking=False)


def test_a_tokenizer_without_a_template_is_a_user_error_everywhere(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    for act in (
        lambda: template_hash(tokenizer),
        lambda: prompt_ids(tokenizer, talk("q"), False),
        lambda: render(tokenizer, talk("q", "a"), enable_thinking=False),
    ):
        with pytest.raises(UserError, match=r"chat_template\.jinja"):
            act()


def test_hashes_follow_the_content_and_not_the_padding_settings(make_tokenizer: Make) -> None:
    tokenizer, other = make_tokenizer(), make_tokenizer(TRIMMING)
    assert template_hash(tokenizer) != template_hash(other) and len(template_hash(tokenizer)) == 12
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    other.backend_tokenizer.enable_padding(length=7)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    other.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


def test_colour_shows_the_whole_text_and_marks_the_supervised_part(tokenizer: Any) -> None:
    rendered = render(tokenizer, talk("q é", "🙂 a"), enable_thinking=False)
    text = colour(tokenizer, rendered)
    assert text.plain == tokenizer.decode(rendered.input_ids)
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert green == ["🙂 a<|im_end|>\n"]


ASKED = [Message("user", "the quick fox?")]
NEXT = [Message("user", "and the dog?")]


def test_a_continuation_appends_to_what_was_generated_up_to_the_next_answer(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    answer = tokenizer.encode("jumps over", add_special_tokens=False)
    ids = prompt_ids(tokenizer, ASKED, False) + answer + [end]
    ids += continuation_ids(tokenizer, ASKED, "jumps over", end, NEXT, False)
    assert ids == prompt_ids(tokenizer, [*ASKED, Message("assistant", "jumps over"), *NEXT], False)


@pytest.mark.parametrize(
    ("template", "answer", "end", "told"),
    [
        (THINKING, "jumps", "<|im_end|>", "its prefix renders"),
        (TRIMMING, " jumps", "<|im_end|>", "its prefix renders"),
        (CHATML, "jumps", "<|im_start|>", "the target ends it with token 0"),
    ],
    ids=["earlier turns are rewritten", "blanks are trimmed", "another end"],
)
def test_a_continuation_that_does_not_merely_append_is_refused(
    make_tokenizer: Make, template: str, answer: str, end: str, told: str
) -> None:
    tokenizer = make_tokenizer(template)
    with pytest.raises(UnstableTemplate, match=told):
        continuation_ids(tokenizer, ASKED, answer, tokenizer.convert_tokens_to_ids(end), NEXT, False)
