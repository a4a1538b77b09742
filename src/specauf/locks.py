"""Who works in a directory: locks on a file in it, which the system takes back when their holder ends, however it ends.

They work between processes of one machine, on its own disk; on network file systems they may not.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specauf.strict import UserError


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[bool]:
    """Whether `directory` (made if need be) is this process's until the block ends; False when another has it."""
    with _lock_file(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True  # closing the file gives the lock back


@contextlib.contextmanager
def turn(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Wait until `directory` is nobody else's, and hold it until the block ends. `on_wait` is called if it has to."""
    with _lock_file(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(directory: Path) -> Any:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return (directory / "lock").open("a")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from None


def hold(directory: Path) -> Any:
    """Take `directory` until what is returned is let go of. Raises `UserError` when another process has it."""
    file = _lock_file(directory)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{directory}: another process trains there: wait for it, or choose another `out`") from None
    except OSError:  # a file system without locks: as careful as its user
        pass
    return file
