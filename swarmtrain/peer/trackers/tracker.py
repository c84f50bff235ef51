"""A peer's trackers, as the peer sees them: one small process draws in all of them.

The recorder's thread writes points to it and waits for nothing but the pipe, which the process always reads. Another
thread tells what comes back: where the curves are, and once for each tracker that it fails. A process that ends is
started again with the next point, a minute later at the earliest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swarmtrain.environment import BY_TRACKER, minimal_environment
from swarmtrain.events import Event, TrackerEvent, WarningEvent
from swarmtrain.peer.trackers.points import Point
from swarmtrain.peer.trackers.sinks import TrackedPeer
from swarmtrain.words import one_line

_log = logging.getLogger(__name__)
_AGAIN_S = 60.0
_FINISH_S = 3.0
_REASON_CHARACTERS = 300


class Trackers:
    """Trackers of these kinds for one peer. `emit` may be called from another thread."""

    def __init__(self, kinds: Sequence[str], peer: TrackedPeer, emit: Callable[[Event], None]) -> None:
        self._kinds, self._peer, self._emit = kinds, peer, emit
        self._log_path = Path(peer.folder) / "trackers.log"
        self._told, self._closing = set[tuple[str, str]](), False
        self._start()

    def _start(self) -> None:
        self._again_s = time.monotonic() + _AGAIN_S
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "swarmtrain.peer.trackers.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the peer, which ends it
                env=minimal_environment(" ".join(BY_TRACKER[kind] for kind in self._kinds)),
            )
        self._listener = threading.Thread(target=self._listen, args=(self._process,), name="trackers", daemon=True)
        self._listener.start()
        self._write({"kinds": list(self._kinds), "peer": dataclasses.asdict(self._peer)})

    def add(self, point: Point) -> None:
        """Draw a point."""
        if not self._listener.is_alive() and time.monotonic() >= self._again_s:
            self._start()
        self._write({"step": point.step, "time": point.time, "values": dict(point.values)})

    def _write(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, of which the other thread tells
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Wait some seconds for the libraries to finish; then the process has some minutes of its own."""
        self._closing = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._listener.join(_FINISH_S)

    # ------------------------------------------------------------- what is told

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            if "error" in told:
                self._tell_failure(told["kind"], told["error"])
            elif self._is_new(told["kind"], "place"):
                self._tell_place(**told)
        status = process.wait()
        if not self._closing:
            for kind in self._kinds:
                self._tell_failure(kind, f"its process ended with status {status}; see {self._log_path}")

    def _is_new(self, kind: str, what: str) -> bool:
        is_new = (kind, what) not in self._told
        self._told.add((kind, what))
        return is_new

    def _tell_place(self, kind: str, where: str, shown_by: str, offline: str) -> None:
        self._emit(TrackerEvent(tracker=kind, where=where, shown_by=shown_by))
        if offline:
            kept = f"its points are kept in {where}; `{shown_by}` sends them later"
            message = f"{kind} is not online ({_short(offline)}): {kept}"
            self._emit(WarningEvent(message=message, code="tracker-offline"))

    def _tell_failure(self, kind: str, reason: str) -> None:
        """Tell the first failure; later ones are in the log only."""
        _log.info("%s: %s", kind, reason)
        if self._closing or not self._is_new(kind, "failure"):
            return
        message = (
            f"{kind} draws no curves: {_short(reason)}; training goes on, and the tracker is tried again now and then"
        )
        self._emit(WarningEvent(message=message, code="tracker-failed"))


def _short(reason: str) -> str:
    line = one_line(" ".join(reason.split()))
    return line if len(line) <= _REASON_CHARACTERS else f"{line[:_REASON_CHARACTERS]}…"
