"""Whole files or none: written under a temporary name beside the destination, then renamed over it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specauf.strict import UserError

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk or quota, on which there may be room later."""


def at_home(path: str | Path) -> Path:
    """`path` with its leading ~ or ~name replaced. Raises `UserError` when that home directory is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home directory is not known: set HOME, or write the path in full") from None


def make_dir(path: Path) -> Path:
    """Make the directory and its parents. Raises `UserError` on a file system that takes none, such as /proc."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no directory can be made there") from None
    return path


def _destination(path: str | Path) -> Path:
    """The real path (links are followed, so that they survive); its parents are made."""
    real = Path(os.path.realpath(path))
    make_dir(real.parent)
    return real


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _siblings(path: Path, kind: str) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.{kind}"))


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`, which is deleted at the end, with those that killed writers of `path` left.

    A lock tells theirs from one in use. One that is still empty may be in use and not locked yet.
    """
    for rest in _siblings(path, "tmp"):
        with contextlib.suppress(OSError), _locked(rest, fcntl.LOCK_NB):
            if any(rest.iterdir()):
                shutil.rmtree(rest)
    temporary = _sibling(path, "tmp")
    try:
        temporary.mkdir()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is cleared away
                stack.enter_context(_locked(temporary))
            yield temporary
    except FileNotFoundError:
        if temporary.exists():
            raise
        raise UserError(
            f"{path.parent} was removed while {path.name} was written there: run the command again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path, option: int = 0) -> Iterator[None]:
    number = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | option)
        yield
    finally:
        os.close(number)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write the file at; it replaces `path` on a clean exit and is deleted on any other."""
    path = _destination(path)
    with _temporary(path) as directory:
        yield directory / path.name
        os.replace(directory / path.name, path)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8. Readers see the old content or the new, never a part; parents are made."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


class Journal:
    """An unbuffered file of lines. Lines that a full disk refuses are kept and written with the next one."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self._file = path.open("ab" if append else "wb", buffering=0)
        self._late = b""

    def write(self, line: str) -> None:
        """Raises `OSError` for anything but a full disk or quota."""
        self._late += line.encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            done = self._file.write(self._late)
        except OSError as error:
            if error.errno not in FULL:
                raise
            done = 0
        if done == len(self._late):
            self._late = b""
        elif done:
            self._file.truncate(start)  # no half lines

    def close(self) -> None:
        self._flush()
        if self._late:
            log.warning("%s: the disk is full, its last %d lines are lost", self._file.name, self._late.count(b"\n"))
        self._file.close()


def json_text(value: Any) -> str:
    """`value` as JSON, ending in a newline, with null for infinities and NaN, which JSON does not have."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises `OSError` on a system error such as a full disk, as any other write does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=metadata)  # makes a file that its owner alone can read
        path.chmod(mode)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory to fill; it becomes `path` on a clean exit and is deleted on any other.

    An existing directory is replaced whole; nothing is merged. That takes two renames: a process killed between them
    leaves the old content beside `path`, and `recover_dir` puts it back. Raises NotADirectoryError, before anything is
    written, when `path` is a file.
    """
    path = _destination(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, where a directory is to be written", str(path))
    old = _sibling(path, "old")
    try:
        with _temporary(path) as temporary:
            yield temporary
            _settle(temporary)
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, old)
                os.rename(temporary, path)
            except BaseException:  # including Ctrl-C between the two renames
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
    finally:
        for rest in _siblings(path, "old") if path.exists() else ():
            shutil.rmtree(rest, ignore_errors=True)


def _settle(directory: Path) -> None:
    """Have the disk hold every file, so that a power cut finds the new content or the old, and not a new name for nothing."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as held:
                os.fsync(held)


def recover_dir(path: str | Path) -> None:
    """Put back the directory of a process killed between `atomic_dir`'s two renames, and delete other leftovers.

    Several processes may call this at once, but not while another writes `path`.
    """
    path = _destination(path)
    for old in _siblings(path, "old"):
        with contextlib.suppress(OSError):  # somebody else was faster
            if not path.exists():
                os.rename(old, path)
    for rest in (*_siblings(path, "tmp"), *_siblings(path, "old")):
        shutil.rmtree(rest, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename `path` to `<name>.before`, replacing an earlier one; does nothing when `path` does not exist."""
    if path.exists():
        before = path.with_name(f"{path.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        os.replace(path, before)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file of ours holds. Raises `UserError` with the `remedy` when something else has written in it."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines log, up to the first line that a kill cut short; none when there is no log."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
