from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy
import pytest

import specauf
from specauf import provenance


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file `package/code.py`, committed, in a repository of its own."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    source = tmp_path / "tree" / "package" / "code.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    git(source.parents[1], "init", "-q")
    git(source.parents[1], "add", ".")
    git(source.parents[1], "commit", "-qm", "first")
    return source


def test_everything_collected_survives_json() -> None:
    record = provenance.collect("abc")
    assert json.loads(json.dumps(record)) == record


def test_the_record_names_command_versions_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specauf", "train", "x.yaml"])
    record = provenance.collect("abc")
    assert record["command"] == ["specauf", "train", "x.yaml"]
    assert record["config_hash"] == "abc"
    assert record["specauf"] == specauf.__version__
    assert record["packages"]["numpy"] == numpy.__version__
    assert {"torch", "transformers", "safetensors", "tokenizers", "scipy"} <= set(record["packages"])


def test_the_time_is_utc_and_now() -> None:
    created = datetime.fromisoformat(provenance.collect()["created"])
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60


def test_an_absent_distribution_has_no_version() -> None:
    assert provenance.version("no-such-distribution-here") is None


def test_a_clean_checkout_gives_its_commit(checkout: Path) -> None:
    assert provenance.git_state(checkout) == {"commit": git(checkout.parent, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize("name", ["code.py", "new.py"], ids=["changed", "never added"])
def test_a_file_that_differs_makes_the_checkout_dirty(checkout: Path, name: str) -> None:
    checkout.with_name(name).write_text("x = 2\n")
    state = provenance.git_state(checkout)
    assert state is not None and state["dirty"]


def test_what_lies_outside_the_package_does_not_make_it_dirty(checkout: Path) -> None:
    (checkout.parents[1] / "notes.txt").write_text("hm")
    state = provenance.git_state(checkout)
    assert state is not None and not state["dirty"]


def test_a_package_that_an_enclosing_checkout_does_not_track_has_no_commit(checkout: Path) -> None:
    installed = checkout.parents[1] / ".venv" / "code.py"
    installed.parent.mkdir()
    installed.write_text("x = 1\n")
    assert provenance.git_state(installed) is None


def test_variables_of_an_enclosing_git_are_not_followed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = provenance.git_state(checkout)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert provenance.git_state(checkout) == expected is not None


def test_no_checkout_and_no_git_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "code.py"
    source.write_text("")
    assert provenance.git_state(source) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(source) is None


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), ("", None), ("many", None)])
def test_threads_follow_the_environment_else_the_cores(
    monkeypatch: pytest.MonkeyPatch, value: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    found = provenance.machine()
    assert found["threads"] == (found["cores"] if threads is None else threads)


def test_the_machine_has_cores_memory_and_a_model() -> None:
    found = provenance.machine()
    assert found["cores"] >= 1 and found["memory_gb"] > 0 and found["cpu"] and found["system"]


def test_what_is_written_lies_over_what_is_collected(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.json"
    provenance.write(path, {"config_hash": "abc", "seed": 3, "out": tmp_path})
    record = json.loads(path.read_text())
    assert (record["config_hash"], record["seed"], record["out"]) == ("abc", 3, str(tmp_path))
    assert record["packages"]["numpy"] == numpy.__version__


def test_no_torch_is_imported() -> None:
    code = "import sys, specauf.provenance as p; p.collect(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
