"""Ctrl-C once: finish the step, say goodbye, exit 0. Twice: now. SIGTERM is like Ctrl-C.

SIGUSR1 writes what the peer is waiting for to its log.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from swarmtrain.peer.stopping import StopFlag

__all__ = ["stop_on_signals"]

_INTERRUPTED = 130


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that the first SIGINT or SIGTERM sets; the second SIGINT ends the process at once."""
    stop = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            os._exit(_INTERRUPTED)  # the daemon dies with us
        stop.stop()

    def explain(number: int, frame: FrameType | None) -> None:
        stop.explain()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, explain)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
