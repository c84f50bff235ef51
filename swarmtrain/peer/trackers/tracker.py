"""One tracker as its peer sees it: points wait here until the tracker's process takes them.

Whoever adds a point never waits. A thread of its own starts the process, hands it one point after the other, and waits
for each answer. A tracker that fails, or gives no answer for some time, is told of once; its process is ended and
started again later, with the points that were not taken. Points that are too many to wait are dropped and counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtrain.environment import BY_TRACKER, minimal_environment
from swarmtrain.events import Event, TrackerEvent, WarningEvent
from swarmtrain.peer.trackers.points import Point
from swarmtrain.peer.trackers.sinks import TrackedPeer
from swarmtrain.words import one_line

__all__ = ["MAX_WAITING", "Tracker", "TrackerLimits"]

_log = logging.getLogger(__name__)
_MODULE = "swarmtrain.peer.trackers.process"
MAX_WAITING = 2000
"""Points that wait at most: some hours' worth."""
_REASON_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class TrackerLimits:
    """How long a tracker is waited for, in seconds."""

    answer_s: float = 120.0
    """For a point to be taken; W&B's server alone may take a minute at the start."""
    retry_s: float = 60.0
    """After a failure, before the process is started again; doubled with each further one."""
    longest_retry_s: float = 3600.0
    finish_s: float = 10.0
    """At the peer's end, for the points that wait."""


class _TrackerFailed(Exception):  # noqa: N818 - it says what has happened
    """The tracker's process could not take a point."""


class Tracker:
    """Tracker of one kind for one peer. `emit` may be called from its thread."""

    def __init__(
        self, kind: str, peer: TrackedPeer, emit: Callable[[Event], None], limits: TrackerLimits | None = None
    ) -> None:
        self.kind = kind
        self.num_taken = self.num_dropped = 0
        self._peer, self._emit, self._limits = peer, emit, limits or TrackerLimits()
        self._log_path = Path(peer.folder) / f"{kind}.log"
        self._waiting: deque[Point] = deque()
        self._changed = threading.Condition()
        self._closing, self._last_s = False, 0.0
        self._asked_s: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_late = self._has_told = self._has_placed = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {kind}", daemon=True)
        self._thread.start()

    def add(self, point: Point) -> None:
        """Add a point; the oldest one is dropped if too many wait."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()
                self.num_dropped += 1
            self._waiting.append(point)
            self._changed.notify_all()

    def check(self, now: float | None = None) -> None:
        """End the process if it has given no answer for too long; to be called now and then. `now` is monotonic."""
        now = time.monotonic() if now is None else now
        asked_s, process = self._asked_s, self._process
        if asked_s is not None and process is not None and now - asked_s > self._limits.answer_s:
            self._is_late = True
            _end(process)

    def finish(self) -> None:
        """Take no further point; those that wait are still handed over."""
        with self._changed:
            self._closing, self._last_s = True, time.monotonic() + self._limits.finish_s
            self._changed.notify_all()

    def close(self) -> None:
        """Wait some seconds, from `finish` on, until the process has all points and has ended."""
        self._thread.join(max(0.0, self._last_s - time.monotonic()))
        if self._thread.is_alive() and self._process is not None and self._asked_s is not None:
            _end(self._process)  # else it has all points, and ends by itself once they are sent
        with self._changed:
            self.num_dropped += len(self._waiting)
            self._waiting.clear()
        _log.info("%s took %d points; %d were dropped", self.kind, self.num_taken, self.num_dropped)

    # ------------------------------------------------------------- its thread

    def _run(self) -> None:
        retry_s = self._limits.retry_s
        while True:
            try:
                self._serve()
                return
            except (_TrackerFailed, OSError, ValueError) as error:
                self._tell(str(error))
            finally:
                self._end_failed()
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, retry_s):
                    return
            retry_s = min(2 * retry_s, self._limits.longest_retry_s)

    def _end_failed(self) -> None:
        """End the process, unless it has ended or, at the peer's end, finishes by itself."""
        process = self._process
        if process is not None and process.returncode is None and not self._closing:
            _end(process)
            process.wait()

    def _serve(self) -> None:
        """Start the process and hand it points until the tracker is closed. Raises if one is not taken."""
        self._is_late = False
        with self._log_path.open("wb") as log:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, self.kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the peer, which ends it
                env=minimal_environment(BY_TRACKER[self.kind]),
            )
        assert process.stdin is not None and process.stdout is not None
        with process.stdin, process.stdout:
            self._place(self._ask(process, dataclasses.asdict(self._peer)))
            while (point := self._next()) is not None:
                self._ask(process, {"step": point.step, "time": point.time, "values": dict(point.values)})
                with self._changed:
                    self.num_taken += 1
                    if self._waiting and self._waiting[0] is point:
                        self._waiting.popleft()
            process.stdin.close()
            process.wait()

    def _next(self) -> Point | None:
        """Return the oldest point that waits, once there is one; None if there is none and the tracker is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
            return self._waiting[0] if self._waiting else None

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
        """Write a line to the process and return its answer. Raises if it answers with an error or not at all."""
        assert process.stdin is not None and process.stdout is not None
        self._asked_s = time.monotonic()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its last words are in its answer
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            self._asked_s = None
        if not line:
            _end(process)  # it may have left others
        if self._is_late:
            raise _TrackerFailed(f"it gave no answer for {self._limits.answer_s:.0f} s")
        if not line:
            raise _TrackerFailed(f"its process ended with status {process.wait()}; see {self._log_path}")
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            raise _TrackerFailed(error)
        return answer

    # ------------------------------------------------------------- what is told

    def _place(self, answer: dict[str, Any]) -> None:
        """Tell once where the curves are."""
        if self._has_placed:
            return
        self._has_placed = True
        where, shown_by = answer["where"], answer["shown_by"]
        self._emit(TrackerEvent(tracker=self.kind, where=where, shown_by=shown_by))
        if answer["offline"]:
            message = (
                f"{self.kind} is not online ({_short(answer['offline'])}): its points are kept in {where}; "
                f"`{shown_by}` sends them later"
            )
            self._emit(WarningEvent(message=message, code="tracker-offline"))

    def _tell(self, reason: str) -> None:
        """Tell the first failure; later ones are in the log only."""
        _log.info("%s: %s", self.kind, reason)
        if self._has_told or self._closing:
            return
        self._has_told = True
        message = (
            f"{self.kind} draws no curves: {_short(reason)}; training goes on, the points are kept for a while, and it "
            "is tried again now and then"
        )
        self._emit(WarningEvent(message=message, code="tracker-failed"))


def _short(reason: str) -> str:
    line = one_line(" ".join(reason.split()))
    return line if len(line) <= _REASON_CHARACTERS else f"{line[:_REASON_CHARACTERS]}…"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
