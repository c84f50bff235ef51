"""Being asked to end: the flag, and what is raised because of it.

Imports nothing heavy, so that Ctrl-C is heard from the start.
"""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import time
from collections.abc import Callable, Iterator

from swarmtrain.errors import Problem, RunTimeError

__all__ = ["Interrupted", "StopFlag", "StopTraining", "explained_on_signal"]


class StopTraining(Exception):  # noqa: N818 - a signal, not an error
    """Raised by an `Exchange` to end training between two steps."""


class Interrupted(StopTraining):
    """The person asked to stop."""


class StopFlag:
    """Set once by Ctrl-C, a signal, or a failure that ends the peer."""

    def __init__(self, at_once: Callable[[], None] = lambda: None) -> None:
        """As long as there is nothing else to end, until `begin`, `at_once` ends the process when that is asked for."""
        # Not a threading.Event: a signal handler that sets one while the same thread waits for it never returns.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._set = self._insisted = False
        self._until_s = math.inf
        self._last_work: StopFlag | None = None
        self.reason = "interrupted"
        self.failure: Problem | None = None
        self._at_once, self._has_begun = at_once, False

    def begin(self) -> None:
        """From now on there is something to end; raises as `check` does."""
        self._has_begun = True
        self.check()

    @contextlib.contextmanager
    def before_it_begins(self) -> Iterator[None]:
        """Inside, a person is asked something, and there is nothing else to end; then as `begin`."""
        self._has_begun = False
        yield
        self.begin()

    def stop(self, reason: str = "interrupted") -> None:
        """Ask for a clean end; `reason` is the one that the `done` event tells."""
        if not self._set:
            self.reason = reason
        self._set = True
        self._wake.put(None)
        if not self._has_begun:
            self._at_once()

    def insist(self) -> None:
        """The end is asked for again: what `last_work` is for is left undone."""
        self.stop()
        self._insisted = True
        if self._last_work is not None:
            self._last_work.stop()

    def last_work(self, limit_s: float) -> StopFlag:
        """A flag for what is still to be done once an end was asked for: set after `limit_s`, or by `insist`."""
        flag = self._last_work = StopFlag()
        flag._until_s = time.monotonic() + limit_s
        if self._insisted:
            flag.stop()
        return flag

    def fail(self, problem: Problem) -> None:
        """The peer cannot go on: `check` will raise RunTimeError."""
        self.failure = problem
        self.insist()

    def is_set(self) -> bool:
        """Whether an end was asked for, or the time is over."""
        return self._set or time.monotonic() >= self._until_s

    def check(self) -> None:
        """Raise Interrupted if an end was asked for, RunTimeError if the peer failed."""
        if self.failure is not None:
            raise RunTimeError(self.failure)
        if self.is_set():
            raise Interrupted

    def sleep(self, seconds: float) -> None:
        """Wait, and raise as `check` does as soon as an end is asked for."""
        if not self._set:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=max(0.0, min(seconds, self._until_s - time.monotonic())))
        self.check()


@contextlib.contextmanager
def explained_on_signal(explain: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGUSR1 calls `explain`, which writes to the log what this peer is waiting for. In the main thread."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: explain())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
