"""Synthetic results: everything the schema has, the least it allows, and one full of strings that mean harm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

CURVES = {  # alpha_1.. on two tasks
    "decay": ([0.121, 0.16, 0.21, 0.25, 0.2, 0.5, None], [0.139, 0.21, 0.24, 0.22, 0.3, 0.3, 0.5]),
    "auf": ([0.182, 0.24, 0.29, 0.33, 0.31, 0.4, 0.4], [0.196, 0.26, 0.31, 0.34, 0.36, 0.3, 0.4]),
    "auf@decay-steps": ([0.148, 0.2, 0.25, 0.3, 0.28, 0.33, 0.5], [0.171, 0.23, 0.28, 0.3, 0.33, 0.3, 0.3]),
    "prompt-lookup": ([0.31, 0.71, 0.83, 0.88, 0.91, 0.93, 0.94], [0.16, 0.52, 0.66, 0.74, 0.8, 0.84, 0.88]),
}


def scores(alpha: list[float | None]) -> dict[str, Any]:
    survived = np.cumprod([a or 0.0 for a in alpha]).tolist()
    tau = 1 + sum(survived)
    width = 0.15 * (tau - 1) + 0.01
    return {
        "tau": tau, "interval": [tau - width, tau + width], "alpha": alpha, "survival": survived,
        "rounds": round(2048 / tau), "cut_share": 0.004, "engine_tau": tau - 0.008,
    }  # fmt: skip


def log(name: str, steps: int) -> list[dict[str, Any]]:
    noise, records = np.random.default_rng(len(name)), []
    for step in range(5, steps + 1, 5):
        t = step / 700
        tau = 1.01 + 0.24 * (1 - math.exp(-2 * t)) * (1.25 if "auf" in name else 0.8) + noise.normal(0, 0.02)
        active = 1.0 if name == "decay" else tau / 7
        records.append({
            "step": step, "seconds": step * 0.5, "loss": 3.4 + 6.5 * math.exp(-4 * t) + noise.normal(0, 0.2),
            "r_active": active, "a_support": 0.03 + 0.09 * t if name == "decay" else max(0.0, tau - 1) / tau,
            "common_accuracy": 0.02 + 0.06 * t + noise.normal(0, 0.005) if step % 10 == 0 else None,
            "simulated_tau": max(tau, 1.0), "head_rows_per_block": 7.0 if name == "decay" else tau,
        })  # fmt: skip
    return records


@pytest.fixture
def results() -> dict[str, Any]:
    return full()


@pytest.fixture(scope="session")
def everything() -> dict[str, Any]:
    return full()


def full() -> dict[str, Any]:
    evaluation = {
        task: {
            "label": label, "prompts": 16, "note": "", "repeated_share": repeated,
            "methods": {name: scores(curves[i]) for name, curves in CURVES.items()},
        }
        for i, (task, label, repeated) in enumerate((("humaneval", "HumanEval", 0.27), ("heldout", "ShareGPT held-out", 0.08)))
    }  # fmt: skip
    answer = [("    for", "draft"), (" i", "target"), (" in", "draft"), (" range", "draft"), ("(len", "target"),
              ("(numbers", "draft"), ("))", "draft"), (":\n", "draft"), ("       ", "target"), (" for", "draft"),
              (" j", "draft"), (" in range(i + 1, len(", "target"), ("numbers", "draft"), (")):\n", "target"),
              ("            if abs(numbers[i] - numbers[j]) <", "target"), (" threshold", "draft"), (":\n", "draft"),
              ("                return", "target"), (" True", "draft"), ("\n", "draft"), ("    return", "target"),
              (" False", "draft")]  # fmt: skip
    return {
        "title": "First light: AUF against decay on SmolLM2-135M",
        "created": "2026-09-02T10:41:00+00:00",
        "command": "specauf demo --minutes 12 --out runs/demo",
        "provenance": {
            "commit": "4f1c2d9", "version": "0.1.0", "python": "3.11.2",
            "packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
            "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_gb": 7.6, "threads": 2},
            "target": {"name": "SmolLM2-135M-Instruct, Q4_1 dequantised", "fingerprint": "b7e0a41c55d2"},
            "data": {"name": "ShareGPT V3", "fingerprint": "09aa1f3e77c0"}, "config_hash": "c0ffee123456",
        },
        "settings": {"block size": 8, "draft layers": 2, "anchors": 32, "learning rate": 6e-4, "temperature": 0.0},
        "ledger": {
            "records_in": 17671, "kept": 16021, "dropped": {"exact duplicate": 882, "empty": 126, "too short": 642},
            "changed": {"leading assistant turn removed": 6361},
            "warnings": ["sg_90k_part1.json ends inside a record: 1,204 bytes were lost"],
        },
        "methods": [
            {"name": "decay", "label": "Decay", "kind": "drafter", "steps": 340, "seconds_per_step": 1.04,
             "train_seconds": 354, "tokens_seen": 522240, "blocks_seen": 43520, "head_rows_per_block": 7.0},
            {"name": "auf", "label": "AUF", "kind": "drafter", "steps": 722, "seconds_per_step": 0.49,
             "train_seconds": 354, "tokens_seen": 1108992, "blocks_seen": 92416, "head_rows_per_block": 1.19},
            {"name": "auf@decay-steps", "label": "AUF, equal steps", "kind": "drafter", "steps": 340,
             "seconds_per_step": 0.49, "train_seconds": 167, "tokens_seen": 522240, "blocks_seen": 43520,
             "head_rows_per_block": 1.14},
            {"name": "prompt-lookup", "label": "Prompt lookup", "kind": "lookup", "steps": None, "note": "3- to 1-grams"},
        ],
        "evaluation": evaluation,
        "comparisons": [
            {"task": "humaneval", "a": "auf", "b": "decay", "condition": "equal time", "difference": 0.104,
             "interval": [0.061, 0.147], "ratio": 1.71},
            {"task": "heldout", "a": "auf", "b": "decay", "condition": "equal time", "difference": 0.087,
             "interval": [0.052, 0.121], "ratio": 1.48},
            {"task": "humaneval", "a": "auf@decay-steps", "b": "decay", "condition": "equal steps", "difference": 0.041,
             "interval": [0.012, 0.07], "ratio": 1.29},
            {"task": "heldout", "a": "auf@decay-steps", "b": "decay", "condition": "equal steps", "difference": 0.021,
             "interval": [-0.008, 0.051], "ratio": 1.2},
        ],
        "training": {name: log(name, n) for name, n in (("decay", 340), ("auf", 722), ("auf@decay-steps", 340))},
        "checks": [
            {"name": "replay equals live decoding, round for round", "value": "32 of 32 prompts", "passed": True},
            {"name": "greedy output equals the target's own", "value": "31 of 32 prompts", "passed": False},
            {"name": "smallest top-2 margin", "value": "0.00031", "passed": None},
        ],
        "selection": [
            {"name": "auf", "task": "humaneval", "how": "self-selection, K=8, T_s=1.5", "tau": 1.412, "interval": [1.35, 1.47],
             "gain": 0.167, "gain_interval": [0.11, 0.22], "nodes": 41.3, "rounds": 1450},
        ],
        "speedups": [
            {"name": "AUF's step over the full block's", "ratio": 2.12, "note": "alternating, idle machine"},
            {"name": "replay over live decoding, batch 1", "ratio": 41.3, "note": "features cached"},
        ],
        "live": [{
            "task": "humaneval", "id": "HumanEval/0", "segments": [{"text": t, "kind": k} for t, k in answer],
            "prompt": "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n    \"\"\"Check if in given "
            "list of numbers, are any two numbers closer to each other than given threshold.\"\"\"",
            "tau": 1.41, "rounds": 91, "tokens_per_second": 24.8, "plain_tokens_per_second": 27.3,
        }],
    }  # fmt: skip


@pytest.fixture
def minimal() -> dict[str, Any]:
    return {
        "title": "Nothing but a tau",
        "methods": [{"name": "auf"}],
        "evaluation": {"chat": {"methods": {"auf": {"tau": 1.25}}}},
    }


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://evil.example/x onerror=alert(2)>',
    "a|b|c",
    "$x^2$ $",
    "_hidden `code` [link](https://evil.example)",
    "two\nlines\x00\ud800",
    "{{ 7 * 7 }}{% raw %}",
    "</svg></style></pre>",
)


def poison(value: Any, turn: list[int]) -> Any:
    """`value` with every string replaced by the next hostile one, keys of free dicts included; names stay consistent."""
    if isinstance(value, dict):
        return {k: poison(v, turn) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v, turn) for v in value]
    if isinstance(value, str):
        turn[0] += 1
        return HOSTILE[turn[0] % len(HOSTILE)]
    return value


@pytest.fixture
def hostile() -> dict[str, Any]:
    results = full()
    rename = {name: f"{name}{HOSTILE[i % len(HOSTILE)]}" for i, name in enumerate(CURVES)}
    retask = {"humaneval": f"t{HOSTILE[0]}", "heldout": f"t{HOSTILE[1]}"}
    turn = [0]
    bad = poison(results, turn)
    for new, old in zip(bad["methods"], results["methods"], strict=True):
        new.update(name=rename[old["name"]], kind=old["kind"])
    bad["evaluation"] = {
        retask[t]: {**bad["evaluation"][t], "methods": {rename[n]: s for n, s in facts["methods"].items()}}
        for t, facts in results["evaluation"].items()
    }
    for new, old in zip(bad["comparisons"], results["comparisons"], strict=True):
        new.update(a=rename[old["a"]], b=rename[old["b"]], task=retask[old["task"]])
    bad["training"] = {rename[n]: log for n, log in results["training"].items()}
    bad["live"][0]["segments"][0]["kind"] = "draft"
    bad["ledger"]["dropped"] = dict.fromkeys(HOSTILE, 1)
    bad["settings"] = dict(zip(HOSTILE, reversed(HOSTILE), strict=True))
    return bad
