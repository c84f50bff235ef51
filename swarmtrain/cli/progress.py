"""How far a command has got that works for a while: a bar on a terminal, else a line now and then on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["long_work"]

_EVERY_S = 10.0
_Advance = Callable[[int], None]


@contextmanager
def long_work(
    what: str, total: int, unit: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[_Advance]:
    """Inside, what it gives is told of every `unit` done; nothing of it is left on a terminal."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _Lines(what, total, unit, stream, clock).advance
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=stream), transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda number: progress.advance(bar, number)


class _Lines:
    """A line each ten seconds: quick work says nothing."""

    def __init__(self, what: str, total: int, unit: str, stream: TextIO, clock: Callable[[], float]) -> None:
        self._what, self._total, self._unit, self._stream, self._clock = what, total, unit, stream, clock
        self._done, self._told_s = 0, clock()

    def advance(self, number: int) -> None:
        """`number` more are done."""
        self._done += number
        if self._clock() < self._told_s + _EVERY_S:
            return
        self._told_s = self._clock()
        self._stream.write(f"{self._what}: {self._done} of {self._total} {self._unit}\n")
        self._stream.flush()
