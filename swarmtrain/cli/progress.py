"""Progress of a command that works for a while: a bar on a terminal, else a line now and then on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from swarmtrain.words import time_in_words

_EVERY_S = 10.0
_AGAIN_S = 60.0
_Advance = Callable[[int], None]


@contextmanager
def long_work(
    what: str, total: int, unit: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[_Advance]:
    """Yield a function to call with the number of `unit` done. A terminal shows a bar, which is removed at the end."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _Lines(what, total, unit, stream, clock).advance
        return
    from rich.progress import Progress

    from swarmtrain.cli.terminal import TerminalConsole

    with Progress(console=TerminalConsole(file=stream), transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda number: progress.advance(bar, number)


@contextmanager
def said_meanwhile(words: Callable[[], str]) -> Iterator[None]:
    """Without a terminal, print `words` and the time so far after ten seconds, and then each minute.

    For work that reports only when a large piece of it is done.
    """
    out, done, began_s = sys.stderr, threading.Event(), time.monotonic()

    def say() -> None:
        pause_s = _EVERY_S
        while not done.wait(pause_s):
            pause_s = _AGAIN_S
            with contextlib.suppress(OSError, ValueError):  # a reader that is gone must not end the work
                out.write(f"{words()}, after {time_in_words(time.monotonic() - began_s)}\n")
                out.flush()

    if out.isatty():
        yield
        return
    thread = threading.Thread(target=say, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Lines:
    """Progress lines, one every ten seconds; quick work prints nothing."""

    def __init__(self, what: str, total: int, unit: str, stream: TextIO, clock: Callable[[], float]) -> None:
        self._what, self._total, self._unit, self._stream, self._clock = what, total, unit, stream, clock
        self._done, self._told_s = 0, clock()

    def advance(self, number: int) -> None:
        """Count `number` more as done."""
        self._done += number
        if self._clock() < self._told_s + _EVERY_S:
            return
        self._told_s = self._clock()
        self._stream.write(f"{self._what}: {self._done} of {self._total} {self._unit}\n")
        self._stream.flush()
