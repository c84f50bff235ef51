"""Process of a peer's trackers: draws the points that the peer writes to its standard input.

The peer (`tracker.py`) writes a line of JSON that names the trackers and itself, then one for each point. Each tracker
works in a thread of its own, so that one that hangs or fails costs nobody else anything. Lines to the peer say where a
tracker's curves are, and what fails. When standard input ends, also because the peer was killed, the libraries finish,
and the process ends within three minutes even if one of them hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

from swarmtrain.peer.trackers.sinks import SINKS, Sink, TrackedPeer

_log = logging.getLogger(__name__)
_FINISH_S = 180
"""Seconds in which the libraries must have finished, as they may still send points to their servers."""
_HANGS_S = 120.0
"""Seconds for a point to be taken; W&B's server alone may take a minute at the start."""
_AGAIN_S = 60.0
"""Seconds after a failure before a tracker is begun anew; doubled with each further one, up to an hour."""
_MAX_WAITING = 2000
"""Points that wait for a tracker: some hours' worth. Further ones are not drawn."""
_NICENESS = 10

_Point = dict[str, Any]
_Tell = Callable[[dict[str, Any]], None]


def main() -> None:
    """Serve the trackers that the first line names, until standard input ends."""
    # Libraries print, and some ask: the peer's lines are theirs neither to read nor to mix with.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    draw(requests, replies, lambda: signal.alarm(_FINISH_S))  # nobody handles the signal: it ends the process
    os._exit(0)  # a library may have threads, and work of its own at the exit, that never end


def draw(requests: Iterable[bytes], replies: IO[bytes], on_end: Callable[[], object]) -> None:
    """Draw the points in the lines of `requests` until they end; then call `on_end`, and wait for the libraries."""
    lock = threading.Lock()

    def tell(reply: dict[str, Any]) -> None:
        with lock, contextlib.suppress(OSError):  # the peer is gone
            replies.write(json.dumps(reply).encode() + b"\n")

    lines = iter(requests)
    head = json.loads(next(lines, b'{"kinds": []}'))
    workers = [_Worker(kind, TrackedPeer(**head["peer"]), tell) for kind in head["kinds"]]
    for line in lines:
        point = json.loads(line)
        for worker in workers:
            worker.add(point)
    on_end()
    waited_for = [worker for worker in workers if not worker.has_failed]
    for worker in waited_for:
        worker.points.put(None)
    for worker in waited_for:
        worker.thread.join()


class _Worker:
    """One tracker, in its thread."""

    def __init__(self, kind: str, peer: TrackedPeer, tell: _Tell) -> None:
        self._kind, self._peer = kind, peer
        self._tell: _Tell = lambda reply: tell({"kind": kind, **reply})
        self.points: queue.Queue[_Point | None] = queue.Queue(_MAX_WAITING)
        self._busy_s: float | None = None
        """When it began with what it does; None if it does nothing."""
        self.has_failed = False
        """True from a failure until it is begun anew."""
        self.thread = threading.Thread(target=self._run, name=kind, daemon=True)
        self.thread.start()

    def add(self, point: _Point) -> None:
        """Have it draw a point."""
        busy_s = self._busy_s
        if busy_s is not None and time.monotonic() > busy_s + _HANGS_S:
            self._tell({"error": f"it gave no answer for {_HANGS_S:.0f} s"})
        with contextlib.suppress(queue.Full):
            self.points.put_nowait(point)

    def _run(self) -> None:
        sink: Sink | None = None
        point: _Point | None = {}  # nothing to draw, but to begin
        again_s, wait_s = 0.0, _AGAIN_S
        while point is not None:
            self._busy_s = time.monotonic()
            try:
                if sink is None and self._busy_s >= again_s:
                    begun = SINKS[self._kind]()
                    self._tell(dataclasses.asdict(begun.begin(self._peer)))
                    sink, self.has_failed = begun, False
                if sink is not None and point:
                    sink.log(point["step"], point["time"], point["values"])
            except BaseException as error:  # whatever a library raises
                _log.warning("%s fails", self._kind, exc_info=error)
                self.has_failed = True
                self._tell({"error": f"{type(error).__name__}: {error}"})
                self._end(sink)
                sink, again_s, wait_s = None, time.monotonic() + wait_s, min(2 * wait_s, 3600.0)
            self._busy_s = None
            point = self.points.get()
        self._end(sink)

    def _end(self, sink: Sink | None) -> None:
        """Have a tracker write what it has taken."""
        if sink is not None:
            try:
                sink.end()
            except BaseException as error:
                _log.warning("%s does not end well", self._kind, exc_info=error)
                self._tell({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
