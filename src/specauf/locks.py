"""Locks on a directory, held on a file in it. The system releases them when their holder ends, however it ends.

They work between processes of one machine, on a local disk; on network file systems they may not.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specauf.strict import UserError


@contextlib.contextmanager
def claim(directory: Path, *, optional: bool = False) -> Iterator[bool]:
    """Yield True when this process holds `directory` (made if need be) until the block ends, False when another does.

    On a file system without locks raises `UserError`, or yields True to every process when the lock is `optional`.
    """
    with _lock_file(directory) as file:  # closing the file releases the lock
        yield _lock(file, directory, optional)


@contextlib.contextmanager
def turn(directory: Path, on_wait: Callable[[], None], *, optional: bool = False) -> Iterator[None]:
    """Wait until no other process holds `directory`, then hold it until the block ends. Calls `on_wait` if it must wait."""
    with _lock_file(directory) as file:
        if not _lock(file, directory, optional):
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hold(directory: Path) -> Any:
    """Hold `directory` for as long as the returned object lives. Raises `UserError` when another process holds it.

    On a file system without locks the user has to take care.
    """
    file = _lock_file(directory)
    if not _lock(file, directory, optional=True):
        file.close()
        raise UserError(f"{directory}: another process works there: wait for it, or choose another `out`")
    return file


def _lock(file: Any, directory: Path, optional: bool) -> bool:
    """Whether the lock was free; this process has it then."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if not optional:
            told = f"this file system has no locks ({error.strerror}): put `out` on a local disk"
            raise UserError(f"{directory}: {told}") from None
    return True


def _lock_file(directory: Path) -> Any:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return (directory / "lock").open("a")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from None
