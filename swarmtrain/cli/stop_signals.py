"""Signals that end a peer.

- Ctrl-C (SIGINT) once: finish the step, leave the swarm, exit with 0. Twice: end at once.
- SIGTERM, and SIGHUP (the terminal was closed) unless it was ignored from the start (`nohup`): like Ctrl-C once.
- SIGTERM twice: skip the bootstrap's last archive. SIGTERM after Ctrl-C does not skip it, since both arrive when a
  terminal and a parent process end a peer.
- SIGUSR1: does not end the peer; a volunteer logs what it is waiting for (`peer/lifecycle/stop.py`).
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from swarmtrain.errors import INTERRUPTED
from swarmtrain.peer.lifecycle.stop import StopFlag


@contextmanager
def stop_on_signals(at_once: Callable[[], None] = lambda: None) -> Iterator[StopFlag]:
    """Yield a flag that the first SIGINT, SIGTERM or SIGHUP sets; a second SIGINT ends the process at once.

    `at_once`: see `StopFlag`.
    """
    stop = StopFlag(at_once)
    seen: set[int] = set()

    def handle(number: int, frame: FrameType | None) -> None:
        if number not in seen:
            seen.add(number)
            stop.stop()
        elif number == signal.SIGINT:
            os._exit(INTERRUPTED)  # the network daemon ends with this process
        else:
            stop.insist()

    def hang_up(number: int, frame: FrameType | None) -> None:
        _let_go_of_terminal()
        stop.stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _let_go_of_terminal() -> None:
    """Redirect output from a closed terminal to nowhere: failing writes would spoil the clean end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
