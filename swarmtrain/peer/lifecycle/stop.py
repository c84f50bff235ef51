"""Ask a peer to end: the flag, and the exceptions raised because of it.

Imports nothing heavy, so that Ctrl-C works from the start.
"""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import time
from collections.abc import Callable, Iterator

from swarmtrain.errors import Problem, RunTimeError


class StopTraining(Exception):  # noqa: N818 - a signal, not an error
    """Raised by an `Exchange` to end training between two steps."""


class Interrupted(StopTraining):
    """Raised when the person asked to stop."""


class StopFlag:
    """Flag that Ctrl-C, a signal, or a failure of the peer sets once. Any thread may set and read it."""

    def __init__(self, at_once: Callable[[], None] = lambda: None) -> None:
        """Until `begin` there is nothing to end cleanly: a stop asked for before then calls `at_once`, which ends the
        process.
        """
        # Not a threading.Event: a signal handler that sets one while the same thread waits for it never returns.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._set = self._insisted = False
        self._until_s = math.inf
        self._last_work: StopFlag | None = None
        self.reason = "interrupted"
        self.failure: Problem | None = None
        self._at_once, self._has_begun = at_once, False

    def begin(self) -> None:
        """Declare that there is something to end cleanly from now on; raises as `check` does."""
        self._has_begun = True
        self.check()

    @contextlib.contextmanager
    def before_it_begins(self) -> Iterator[None]:
        """Return to the state before `begin` while a person is asked something, then call `begin`."""
        self._has_begun = False
        yield
        self.begin()

    def stop(self, reason: str = "interrupted") -> None:
        """Ask for a clean end; the `done` event reports `reason`."""
        if not self._set:
            self.reason = reason
        self._set = True
        self._wake.put(None)
        if not self._has_begun:
            self._at_once()

    def insist(self) -> None:
        """Ask for the end again: the work that `last_work` allows is abandoned."""
        self.stop()
        self._insisted = True
        if self._last_work is not None:
            self._last_work.stop()

    def last_work(self, limit_s: float) -> StopFlag:
        """Return a flag for the work left after an end was asked for: it is set after `limit_s` seconds, or by
        `insist`.
        """
        flag = self._last_work = StopFlag()
        flag._until_s = time.monotonic() + limit_s
        if self._insisted:
            flag.stop()
        return flag

    def fail(self, problem: Problem) -> None:
        """Record that the peer cannot continue: `check` raises RunTimeError from then on."""
        self.failure = problem
        self.insist()

    def is_set(self) -> bool:
        """Return whether an end was asked for, or the time limit of `last_work` has passed."""
        return self._set or time.monotonic() >= self._until_s

    def check(self) -> None:
        """Raise Interrupted if an end was asked for, RunTimeError if the peer failed."""
        if self.failure is not None:
            raise RunTimeError(self.failure)
        if self.is_set():
            raise Interrupted

    def sleep(self, seconds: float) -> None:
        """Sleep; raise as `check` does as soon as an end is asked for."""
        if not self._set:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=max(0.0, min(seconds, self._until_s - time.monotonic())))
        self.check()


@contextlib.contextmanager
def explained_on_signal(explain: Callable[[], None]) -> Iterator[None]:
    """Call `explain`, which logs what this peer is waiting for, on SIGUSR1. For the main thread."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: explain())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
