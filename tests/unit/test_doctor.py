from __future__ import annotations

import collections
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specauf import assets, doctor, provenance

Usage = collections.namedtuple("Usage", "total used free")


def record(present: bool, size: int = 0) -> assets.Status:
    return assets.Status("smollm2", "some-package", "0.1.2", present, size)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine on which all is well; a test spoils one thing."""
    state = SimpleNamespace(total=16.0, available=12.0, disk=50.0, records=[record(True, 10**9)], threads=2, cores=2)
    monkeypatch.delenv("SPECAUF_OFFLINE", raising=False)
    monkeypatch.setattr(assets, "status", lambda: state.records)
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "not" / "made" / "yet")
    monkeypatch.setattr(provenance, "total_memory", lambda: int(state.total * doctor.GIB))
    monkeypatch.setattr(provenance, "available_cores", lambda: state.cores)
    monkeypatch.setattr(doctor, "_available_memory", lambda: int(state.available * doctor.GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(state.disk * doctor.GIB)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: state.threads)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return state


def found(name: str) -> doctor.Check:
    return {check.name: check for check in doctor.examine()}[name]


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    real = provenance.version
    monkeypatch.setattr(provenance, "version", lambda asked: version if asked == name else real(asked))


def test_a_sound_machine_has_nothing_to_mend(machine: SimpleNamespace) -> None:
    assert [check for check in doctor.examine() if check.status != "ok" or check.mend] == []


def test_names_are_unique(machine: SimpleNamespace) -> None:
    names = [check.name for check in doctor.examine()]
    assert len(names) == len(set(names))


def test_whatever_is_not_ok_says_how_to_mend_it(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.total, machine.available, machine.disk, machine.threads = 2.0, 1.0, 0.01, 9
    machine.records = [record(False)]
    monkeypatch.setattr(provenance, "version", lambda _: None)
    checks = [check for check in doctor.examine() if check.status != "ok"]
    assert len(checks) >= 8
    assert [check for check in checks if not check.mend] == []


def test_nothing_is_created(machine: SimpleNamespace, tmp_path: Path) -> None:
    doctor.examine()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("torch", None, "fail"),
        ("torch", "2.5.1", "fail"),
        ("torch", "2.13.0+cpu", "ok"),
        ("transformers", "4.57.0", "fail"),
        ("transformers", "10.0.0", "ok"),
        ("gguf", None, "warn"),
        ("accelerate", None, "warn"),
        ("pyarrow", None, "warn"),
    ],
)
def test_a_package_is_judged_by_its_version(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, status: str
) -> None:
    spoil(monkeypatch, package, version)
    assert found(package).status == status


def test_a_cpu_build_says_so(machine: SimpleNamespace) -> None:
    assert torch.__version__ in found("torch").detail and "CPU build" in found("torch").detail


def test_a_cuda_build_without_a_gpu_is_a_warning(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert found("torch").status == "warn" and "CUDA 13.0" in found("torch").detail


def test_a_gpu_needs_what_triton_compiles_with(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(check.name == "compiler" for check in doctor.examine()), "a CPU does not"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert found("compiler").status == "fail" and found("compiler").detail.startswith("Triton not found")
    monkeypatch.setattr(doctor, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "a C compiler" in found("compiler").detail and "gcc" in found("compiler").mend


@pytest.mark.parametrize(("threads", "status"), [(1, "warn"), (2, "ok"), (3, "warn")])
def test_threads_other_than_cores_are_a_warning(machine: SimpleNamespace, threads: int, status: str) -> None:
    machine.threads = threads
    assert found("threads").status == status
    assert ("OMP_NUM_THREADS" in found("threads").mend) == (status == "warn")


@pytest.mark.parametrize(("total", "available", "status"), [(5.9, 5.0, "fail"), (8.0, 5.9, "warn"), (8.0, 6.1, "ok")])
def test_six_gigabytes_of_memory_are_needed(
    machine: SimpleNamespace, total: float, available: float, status: str
) -> None:
    machine.total, machine.available = total, available
    assert found("memory").status == status


def test_available_memory_is_positive_and_at_most_the_total() -> None:
    assert 0 < doctor._available_memory() <= provenance.total_memory()


@pytest.mark.parametrize(("disk", "present", "status"), [(2.9, 0, "fail"), (3.1, 0, "ok"), (1.1, 2.5, "ok")])
def test_the_cache_needs_three_gigabytes_less_what_it_holds(
    machine: SimpleNamespace, disk: float, present: float, status: str
) -> None:
    machine.disk = disk
    machine.records = [record(present > 0, int(present * doctor.GIB))]
    assert found("disk, cache").status == status


def test_a_directory_that_cannot_be_written_is_named(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    check = found("write, runs")
    assert check.status == "fail" and str(Path.cwd()) in check.detail and "Permission denied" in check.detail


def test_missing_assets_are_listed_with_what_would_be_downloaded(machine: SimpleNamespace) -> None:
    machine.records = [record(True, 5), record(False)]
    check = found("assets")
    assert check.status == "warn" and "some-package==0.1.2" in check.detail


def test_missing_assets_fail_when_fetching_is_forbidden(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.records = [record(False)]
    monkeypatch.setenv("SPECAUF_OFFLINE", "1")
    assert found("assets").status == "fail" and "SPECAUF_OFFLINE" in found("assets").mend


def test_without_gguf_only_a_converted_target_will_do(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "gguf", None)
    assert found("gguf").status == "warn"
    machine.records = [record(False)]
    assert found("gguf").status == "fail"


def test_no_process_is_started_and_no_socket_opened(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the examination must not go out")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    doctor.examine()
