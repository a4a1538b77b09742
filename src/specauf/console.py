"""What a person sees: progress bars with an ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import errno
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console as _Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from specauf.files import FULL
from specauf.report.words import clean
from specauf.strict import UserError

PLAIN_EVERY = 15.0
"""Seconds between two plain progress lines."""

FOUND_WITHIN = 1.0
"""What is reported in so few seconds was kept by an earlier run, and says nothing about the rate of this one."""


PATHS = (errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP)
MENDABLE = (*PATHS, *FULL)
"""File system errors that the user's path or disk causes. Any other is a bug of ours and keeps its traceback."""
RESUMABLE = ("train", "rollout", "study", "demo", "eval")
"""Verbs whose work is kept when they are interrupted."""


ROOM = {
    "train": "objective.logits_rows and go on, or begin anew with a lower train.num_anchors or train.batch_size (and a higher "
    "train.accumulation in its place)",
    "rollout": "--batch-size",
    "eval": "--eval.batch-size",
}
"""What a verb that ran out of memory takes less of."""


class Console(Protocol):
    """Where demo and study send their output; `Terminal` prints it, tests inspect it."""

    def say(self, text: str) -> None: ...

    def progress(self, label: str, total: float, done: float = 0) -> AbstractContextManager[Callable[..., None]]:
        """Yield advance(amount, note=""). `done` was completed earlier and does not count in the rate."""


class Rich(_Rich):
    """Prints no control character but its own: a model or a corpus could command the terminal, or write its clipboard."""

    def render(self, *what: Any) -> Iterator[Segment]:
        for text, style, control in super().render(*what):
            yield Segment(text if control else clean(text), style, control)


class Terminal:
    """A `Console` that prints; its `rich` is for output that `say` and `progress` cannot produce."""

    def __init__(self, silent: bool = False) -> None:
        self.rich = Rich(highlight=False, quiet=silent)
        self.lively = sys.stdout is not None and sys.stdout.isatty() and not silent  # None when it was closed (>&-)

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0) -> Iterator[Callable[..., None]]:
        if done >= total:  # nothing to do
            yield lambda amount, note="": None
        elif self.lively:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Progress(*columns, console=self.rich) as bar:
                task = bar.add_task(label, total=total, completed=int(done), note="")
                yield lambda amount, note="": bar.update(task, advance=amount, note=note)
        else:
            began = last = time.perf_counter()
            before = done
            self.say(f"{label} ...")

            def advance(amount: float, note: str = "") -> None:
                nonlocal done, before, last
                done += amount
                now = time.perf_counter()
                if now - began < FOUND_WITHIN:
                    before = done
                if now - last >= PLAIN_EVERY and done > before:
                    last = now
                    left = (now - began) * (total - done) / (done - before)
                    self.say(f"{label}: {done:,.0f}/{total:,.0f}, {left:.0f} s left{', ' + note if note else ''}")

            yield advance
            self.say(f"{label}: done in {time.perf_counter() - began:.0f} s")


def print_results(terminal: Terminal, results: dict[str, Any]) -> None:
    """The tables, sentences and checks of a results dict."""
    from specauf.report import tables

    terminal.say("")
    terminal.say(tables.plain_table(tables.summary_rows(results)))
    terminal.say("")
    for sentence in tables.comparison_sentences(results):
        terminal.say(sentence)
    if len(selected := tables.selection_rows(results)) > 1:
        terminal.say(f"\nself-selection, decoded live:\n{tables.plain_table(selected)}\n")
    for check in results.get("checks", []):
        terminal.say(f"{'ok' if check['passed'] else 'FAILED'}: {check['name']}: {check['value']}")
    for item in results.get("speedups", []):
        terminal.say(f"{item['name']}: {item['ratio']:.1f} times faster ({item['note']})")


def exit_code(results: dict[str, Any]) -> int:
    """1 when a check of the results failed, else 0."""
    return int(not all(check["passed"] for check in results.get("checks", ())))


def quiet_transformers() -> None:
    """Silence its weight-loading bars and notices, which are not this program's output."""
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()


def reported(work: Callable[[], int], arguments: Sequence[str]) -> int:
    """The exit code of a command; what the user can mend is told in one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tau, or a path, in a locale that has no such letter
    try:
        return work()
    except UserError as error:
        print(f"specauf: {clean(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        print(f"specauf: {clean(error.filename or 'writing')}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch's, for a device and for the host, told by name: no command waits for torch to be imported here.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        room = f". Lower {ROOM[verb]}" if (verb := "".join(arguments[:1])) in ROOM else ""
        print(f"specauf: {str(error).partition(' See documentation')[0].rstrip('.')}{room}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command" + " without --fresh" * ("--fresh" in arguments) + " goes on from here"
        print(f"\nspecauf: interrupted{again if {*RESUMABLE} & {*arguments[:1]} else ''}", file=sys.stderr)
        return 130
