"""What `specauf eval` and `generate` say of a drafter's training and of a text that is not plain decoding's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from specauf import show as showing
from specauf.bench.runner import near_tie
from specauf.config import EvalConfig, SamplingConfig
from specauf.console import Terminal
from specauf.data.chat import template_hash
from specauf.decode.generate import generate
from specauf.decode.propose import PromptLookup
from specauf.show import exposed, mismatches, show
from specauf.strict import counted
from specauf.target import Target
from tests.conftest import make_target

EVAL = EvalConfig(tasks=("gsm8k", "humaneval", "heldout"))


@pytest.mark.parametrize(
    ("trained", "seen"),
    [
        ({}, ""),
        ({"data": {"kept_out": None}}, ""),
        ({"data": {"kept_out": ["GSM8K", "HumanEval"]}}, ""),
        ({"data": {"kept_out": ["HumanEval"]}}, "GSM8K"),
        ({"data": {"kept_out": []}}, "GSM8K, HumanEval"),
        ({"data": None, "init_from": {"trained": {"data": {"kept_out": ["GSM8K"]}}}}, "HumanEval"),
        (
            {"data": {"kept_out": ["GSM8K"]}, "init_from": {"trained": {"data": {"kept_out": ["HumanEval"]}}}},
            "GSM8K, HumanEval",
        ),
    ],
)
def test_tasks_that_a_drafter_may_have_seen_are_named(trained: dict[str, Any], seen: str) -> None:
    told = f"the prompts of {seen} were not kept out of its training data"
    assert exposed(trained, EVAL) == ([told] if seen else [])


def test_held_out_chat_is_named_when_a_stage_held_out_other_conversations(tmp_path: Path) -> None:
    here, there = {"seed": 0, "heldout": 0.02}, {"seed": 1, "heldout": 0.02}
    (tmp_path / "meta.json").write_text(json.dumps({"split": here}))
    trained = {"data": {"split": here}, "init_from": {"trained": {"data": {"split": there}}}}
    assert exposed(trained, EVAL, tmp_path) == ["the prompts of Held-out chat were not kept out of its training data"]
    assert exposed({"data": {"split": here}}, EVAL, tmp_path) == exposed(trained, EVAL) == []
    assert exposed({"data": {}}, EVAL, tmp_path) == [], "older checkpoints do not say"


def test_another_template_thinking_flag_or_target_than_in_training_is_told(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    here = make_target()
    here.tokenizer = make_tokenizer()
    trained = {
        "template_hash": template_hash(here.tokenizer),
        "enable_thinking": False,
        "target_fingerprint": here.fingerprint(),
    }
    assert mismatches(here, trained, False) == mismatches(here, {}, True) == []
    assert mismatches(here, trained, True) == ["this drafter was trained with enable_thinking=False"]
    (told,) = mismatches(here, {**trained, "template_hash": "0"}, False)
    assert "another chat template" in told
    (told,) = mismatches(here, {**trained, "target_fingerprint": "0", "target_dtype": "float32"})
    assert "another target (" in told
    (told,) = mismatches(here, {**trained, "target_fingerprint": "0", "target_dtype": "bfloat16"})
    assert "another target, or for this one in bfloat16 (" in told


@pytest.mark.parametrize(("margin", "passes"), [(1e-5, True), (1e-2, False)])
def test_a_text_that_parts_from_plain_decoding_passes_at_a_near_tie_alone(
    make_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    margin: float,
    passes: bool,
) -> None:
    target = make_target(vocab=len(tokenizer := make_tokenizer()) + 8)
    target.tokenizer = tokenizer

    def parting(target: Target, proposer: Any, *args: Any, **options: Any) -> Any:
        (made,) = generate(target, proposer, *args, **options)
        if proposer is None and len(made.tokens) > 3:  # not what warms the kernels up
            made.tokens[3] += 1
            made.margins[3] = margin
        return (made,)

    monkeypatch.setattr(showing, "generate", parting)
    assert show(Terminal(), target, PromptLookup(4), [1, 2, 3], SamplingConfig(), 8, None) is passes
    told = capsys.readouterr().out
    assert f"{'is' if passes else 'is NOT'} the target's own" in told and "plain decoding's at token 3" in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_two_steps_of_a_logit_or_the_claim_of_float32(target: Target, dtype: torch.dtype) -> None:
    other = make_target()
    other.embed_weight = torch.nn.Parameter(other.embed_weight.to(dtype), requires_grad=False)
    steps = 2 * 16 * torch.finfo(dtype).eps
    assert near_tie(other) == (steps if dtype.itemsize == 2 else 1e-4)


def test_one_is_singular() -> None:
    assert [counted(n, "near ties") for n in (0, 1, 2)] == ["0 near ties", "1 near tie", "2 near ties"]
    assert counted(1, "too long") == "1 too long"
