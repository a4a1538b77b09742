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
def claim(directory: Path) -> Iterator[bool]:
    """Yield True when this process holds `directory` (made if need be) until the block ends, False when another does."""
    with _lock_file(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError as error:
            raise _unlockable(directory, error) from None
        else:
            yield True  # closing the file releases the lock


@contextlib.contextmanager
def turn(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Wait until no other process holds `directory`, then hold it until the block ends. Calls `on_wait` if it must wait."""
    with _lock_file(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise _unlockable(directory, error) from None
        yield


def _unlockable(directory: Path, error: OSError) -> UserError:
    return UserError(f"{directory}: this file system has no locks ({error.strerror}): put `out` on a local disk")


def _lock_file(directory: Path) -> Any:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return (directory / "lock").open("a")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from None


def hold(directory: Path) -> Any:
    """Hold `directory` for as long as the returned object lives. Raises `UserError` when another process holds it."""
    file = _lock_file(directory)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{directory}: another process works there: wait for it, or choose another `out`") from None
    except OSError:  # a file system without locks: the user has to take care
        pass
    return file
