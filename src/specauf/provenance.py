"""Where a result comes from: command, commit, versions and machine, as plain JSON types. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import specauf
from specauf.files import atomic_write_text

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "gguf", "accelerate", "pyarrow")
"""Distributions whose version can change a number."""


def collect(config_hash: str | None = None) -> dict[str, Any]:
    """What is needed to tell two runs apart, and nothing that names the user or the host, unless an argument does.

    Keys: `command` (argv), `created` (UTC, ISO 8601), `config_hash`, `specauf`, `git` (see `git_state`), `python`,
    `packages` (name -> version, None when absent), `machine` (see `machine`).
    """
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_hash": config_hash,
        "specauf": specauf.__version__,
        "git": git_state(Path(__file__)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": machine(),
    }


def for_report(config_hash: str | None = None) -> dict[str, Any]:
    """`collect()` as a report's provenance box shows it; the caller adds `target` and `data`."""
    found = collect(config_hash)
    kept = {key: found[key] for key in ("created", "python", "packages", "machine", "config_hash")}
    return {"commit": (found["git"] or {}).get("commit"), "version": found["specauf"], **kept}


def write(path: str | Path, extra: Mapping[str, Any], *, from_step: int = 0) -> None:
    """Write `collect()` with `extra` laid over it (its `config_hash`, say) to the JSON file `path`, atomically.

    A session that goes on `from_step` keeps what the file says of the earlier ones, under `earlier`, oldest first.
    """
    told: dict[str, Any] = collect() | dict(extra)
    if from_step:
        try:
            before = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        session = {key: before[key] for key in (*collect(), "from_step") if key in before}
        told |= {"from_step": from_step, "earlier": [*before.get("earlier", ()), session]}
    atomic_write_text(path, json.dumps(told, indent=2, default=str) + "\n")


def version(distribution: str) -> str | None:
    """The installed version, read without importing the package; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(source: Path) -> dict[str, Any] | None:
    """`{"commit", "dirty"}` of the checkout that tracks the file `source`, else None.

    `dirty`: something in the directory of `source` differs from the commit, files never added included. `source` has to be
    tracked, since a package that merely lies below a checkout (in its `.venv`, say) is not that checkout's code.
    """
    # Variables of an enclosing git (we may run in a hook) would point at another repository.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet, not tracked
        return None


def machine() -> dict[str, Any]:
    """`cpu` (model), `cores` (this process may use), `threads` (OMP_NUM_THREADS or cores), `memory_gb`, `system`."""
    cores = available_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": int(threads) if threads.isdigit() else cores,
        "memory_gb": round(total_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of memory this process can use: the machine's, or its control group's limit when that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return total


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
