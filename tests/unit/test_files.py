from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from specauf.files import (
    Journal,
    at_home,
    atomic_dir,
    atomic_file,
    atomic_write_text,
    recover_dir,
    save_tensors,
    set_aside,
)
from specauf.strict import UserError


def test_text_is_written_as_utf8_and_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write_text(path, "τ = 1\n")
    assert path.read_bytes() == "τ = 1\n".encode()
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["b.txt"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "\ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["b.txt"]


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write_text(tmp_path / "atomic", "")
    save_tensors({}, tmp_path / "tensors")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_path_that_leads_nowhere_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="/proc/nope/x: no directory can be made there"):
        atomic_write_text("/proc/nope/x/results.json", "")
    with pytest.raises(UserError, match="~nosuch/x: the home directory is not known"):
        at_home("~nosuch/x")


def test_a_link_survives_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_nothing_is_at_the_destination_until_the_directory_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with atomic_dir(path) as temporary:
        (temporary / "x").write_text("1")
        assert temporary.parent == path.parent and not path.exists()
    assert (path / "x").read_text() == "1" and os.listdir(path.parent) == ["out"]


def test_a_directory_takes_its_name_when_the_disk_has_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave the new name for empty files, and the old directory deleted."""
    done: list[str] = []
    settle, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or settle(file))
    monkeypatch.setattr(os, "rename", lambda a, b: done.append("rename") or rename(a, b))
    with atomic_dir(tmp_path / "out") as directory:
        (directory / "inner").mkdir()
        (directory / "a").write_text("a")
        (directory / "inner" / "b").write_text("b")
    assert done.count("fsync") == 2 and done[:2] == ["fsync"] * 2


def test_a_directory_is_replaced_and_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "stale").write_text("")
    with atomic_dir(path) as temporary:
        (temporary / "fresh").write_text("")
        assert (path / "stale").exists()
    assert os.listdir(path) == ["fresh"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_directory_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(error), atomic_dir(path) as temporary:
        (temporary / "half").write_text("")
        raise error
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("")
    rename = os.rename

    def refuse(source: Path, destination: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"), atomic_dir(path):
        pass
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_way_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious")
    with pytest.raises(NotADirectoryError, match="out"), atomic_dir(path):
        pytest.fail("the body must not run")
    assert path.read_text() == "precious"


def test_what_a_kill_between_the_two_renames_left_is_put_back(tmp_path: Path) -> None:
    path, old = tmp_path / "a[1]", tmp_path / ".a[1].0123abcd.old"
    recover_dir(path)
    assert not path.exists(), "nothing was left"
    old.mkdir()
    (old / "x").write_text("then")
    recover_dir(path)
    assert (path / "x").read_text() == "then" and not old.exists()
    old.mkdir()
    (tmp_path / ".a[1].89abcdef.tmp").mkdir()
    (tmp_path / ".a2.89abcdef.tmp").mkdir()
    recover_dir(path)
    assert {p.name for p in tmp_path.iterdir()} == {"a[1]", ".a2.89abcdef.tmp"}, "what a kill left is cleared away"
    assert (path / "x").read_text() == "then"


@pytest.mark.parametrize("whole", [atomic_file, atomic_dir])
def test_what_a_killed_writer_left_is_cleared_by_the_next_and_what_is_in_use_is_not(tmp_path: Path, whole: Any) -> None:
    path = tmp_path / "out"
    if not (child := os.fork()):
        with whole(path) as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            os._exit(0)  # as a kill, without cleaning up
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    with whole(path) as ours:
        (ours / "x" if ours.is_dir() else ours).write_text("ours")
        assert len(os.listdir(tmp_path)) == 1
        with whole(path) as theirs:
            (theirs / "x" if theirs.is_dir() else theirs).write_text("theirs")
    assert (path / "x" if path.is_dir() else path).read_text() == "ours" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("whole", [atomic_file, atomic_dir])
def test_a_directory_that_is_removed_meanwhile_is_named(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(UserError, match="run was removed while x was written"), whole(tmp_path / "run" / "x"):
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "run" / "x"):
        (tmp_path / "nowhere").read_text()


def test_the_next_directory_clears_what_a_kill_between_the_two_renames_left(tmp_path: Path) -> None:
    for name in (".out.0123abcd.old", ".out.b.0123abcd.old"):
        (tmp_path / name).mkdir()
    with atomic_dir(tmp_path / "out"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.b.0123abcd.old"}, "that one is out.b's"


def test_what_is_set_aside_replaces_what_was_before(tmp_path: Path) -> None:
    set_aside(tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / "x").write_text(text)
        (tmp_path / "log").write_text(text)
        set_aside(tmp_path / "checkpoint")
        set_aside(tmp_path / "log")
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.before", "log.before"}
    assert (tmp_path / "checkpoint.before" / "x").read_text() == (tmp_path / "log.before").read_text() == "second"


def test_a_full_disk_is_an_os_error_for_tensors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_tensors({}, tmp_path / "x")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "x")


def test_a_journal_keeps_what_a_full_disk_refuses_and_writes_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        """A file with room for so many bytes."""

        def __init__(self, path: Path, room: int) -> None:
            self.file, self.room, self.name = path.open("ab", buffering=0), room, str(path)

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[: self.room])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    journal, path = Journal(tmp_path / "log", append=False), tmp_path / "log"
    journal.write("one")
    whole, journal._file = journal._file, Full(path, 2)  # type: ignore[assignment]
    journal.write("two")
    assert path.read_text() == "one\n", "no half lines"
    journal._file.room = 0  # type: ignore[union-attr]
    journal.write("three")
    journal._file = whole
    journal.write("four")
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    journal._file = Full(path, 0)  # type: ignore[assignment]
    journal.write("five")
    journal.close()
    assert "its last 1 lines are lost" in caplog.text
