"""Recorder: draws a peer's curves in the trackers that its user has named.

It listens to the events that `watch` and `--json` show. A volunteer's curves are its own, a point for each round; a
bootstrap's are those of the whole run, from its status every some seconds. The thread that emits an event only puts it
into a queue: the recorder's thread makes the points.

The folder remembers the curves' identity and how far they are (`trackers.json`), so that a peer that is killed and
started again continues the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from swarmtrain.events import EvalEvent, Event, InviteEvent, RoundEvent, StageThroughputEvent, StartedEvent
from swarmtrain.machine_memory import machine_memory
from swarmtrain.network.files import write_atomically
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.trackers.points import Curves, Point, Position
from swarmtrain.peer.trackers.sinks import TrackedPeer
from swarmtrain.peer.trackers.tracker import Trackers
from swarmtrain.run import run_sha256
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import short_peer

_log = logging.getLogger(__name__)
_SAMPLE_EVERY_S = 15.0
_MAX_EVENTS = 1024
_JOIN_S = 15.0
_NAME = "trackers.json"
_ID_BYTES = 4
_TAKEN = (EvalEvent, InviteEvent, RoundEvent, StageThroughputEvent, StartedEvent)

MakeTrackers = Callable[[TrackedPeer], Trackers]
"""Makes the trackers for a peer."""


class CurveRecorder:
    """Makes points of a peer's events and status, and gives them to its trackers, from `start` to `close`."""

    def __init__(
        self,
        folder: Path,
        board: StatusBoard,
        make_trackers: MakeTrackers,
        *,
        before: pb.PeerStatus | None = None,
        sample_every_s: float = _SAMPLE_EVERY_S,
    ) -> None:
        """`before` is the last status of the process that used the folder before, if there was one."""
        self._folder, self._board, self._make_trackers = folder, board, make_trackers
        self._before, self._sample_every_s = before, sample_every_s
        self._events: queue.Queue[tuple[float, Event] | None] = queue.Queue(_MAX_EVENTS)
        self._is_bootstrap = board.status().role == "bootstrap"
        self._trackers: Trackers | None = None
        self._curves: Curves | None = None
        self._id = ""
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Begin to take events."""
        self._thread.start()

    def take(self, event: Event) -> None:
        """Take an event of the peer; never waits. From any thread."""
        if isinstance(event, _TAKEN):
            try:
                self._events.put_nowait((event.time or time.time(), event))
            except queue.Full:
                _log.info("a %s event makes no point: too many wait", event.event)

    def close(self) -> None:
        """Draw what is left, and end the trackers; within some seconds, whatever they do."""
        with suppress(queue.Full):  # its thread is not coming on: it is left behind, and the trackers' process ends
            self._events.put(None, timeout=_JOIN_S)
        self._thread.join(_JOIN_S)

    # ------------------------------------------------------------- its thread

    def _run(self) -> None:
        while True:
            try:
                item = self._events.get(timeout=self._sample_every_s)
            except queue.Empty:
                self._guarded(self._look)
                continue
            if item is None:
                break
            self._guarded(partial(self._draw, *item))
        self._guarded(self._look)
        if self._trackers is not None:
            self._trackers.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # a task boundary: a curve that lacks a point is better than none
            _log.exception("a point could not be drawn")

    def _draw(self, time: float, event: Event) -> None:
        if isinstance(event, InviteEvent if self._is_bootstrap else StartedEvent):
            self._begin(time)
        elif self._curves is not None and (point := self._curves.of_event(event, self._board.status(), time)):
            self._add([point])

    def _look(self) -> None:
        """Draw the run where no event tells how it is going on."""
        if self._curves is not None and self._is_bootstrap:
            point = self._curves.of_status(self._board.status(), time.time())
            self._add([] if point is None else [point])

    def _begin(self, time: float) -> None:
        """Begin the curves, once the run is known and, of a volunteer, what it trains on."""
        if self._curves is not None:
            return
        status, run_file = self._board.status(), (self._folder / "run.toml").read_bytes()
        run, sha256 = tomllib.loads(run_file.decode()), run_sha256(run_file)  # a bootstrap's status is told of it later
        self._id, position = self._kept()
        self._curves = Curves(position)
        peer = TrackedPeer(
            folder=str(self._folder),
            id=self._id,
            run=run["run"]["name"],
            group=f"{run['run']['name']}-{sha256[:12]}",
            name=status.name or short_peer(status.peer),
            role=status.role,
            step=position.step,
            run_file=run_file.decode(),
            config={"run": run, "machine": _machine(status)},
        )
        self._trackers = self._make_trackers(peer)
        before = self._before
        if before is not None and before.run_sha256 == sha256:
            # Not of the present status: it may have rounds already whose events are still to be drawn.
            self._add(self._curves.of_past(before.losses, time))

    def _add(self, points: Sequence[Point]) -> None:
        """Give the points to all trackers, once the folder knows their steps: no process after this one has lower
        ones."""
        assert self._curves is not None and self._trackers is not None
        if not points:
            return
        kept = {"id": self._id, **dataclasses.asdict(self._curves.position)}
        try:
            write_atomically(self._folder / _NAME, json.dumps(kept).encode())
        except OSError as error:  # a full disk: other warnings say so
            _log.info("%s cannot be written: %s", self._folder / _NAME, error.strerror)
        for point in points:
            self._trackers.add(point)

    def _kept(self) -> tuple[str, Position]:
        """Return the curves' identity and how far they are; new ones if the folder has none."""
        try:
            kept = json.loads((self._folder / _NAME).read_bytes())
            names = [field.name for field in dataclasses.fields(Position)]
            return str(kept["id"]), Position(**{name: int(kept[name]) for name in names})
        except (OSError, ValueError, KeyError, TypeError):
            return secrets.token_hex(_ID_BYTES), Position()


def _machine(status: pb.PeerStatus) -> dict[str, Any]:
    """Return what a peer computes with: nothing that tells whose machine it is."""
    machine = {
        "cores": psutil.cpu_count() or 1,
        "memory_gb": round(machine_memory().total_bytes / 1e9, 1),
        "swarmtrain": status.version,
    }
    if status.HasField("device"):
        device = status.device
        machine |= {"device": device.device, "card": device.title, "precision": device.precision}
    return machine


@contextmanager
def recording(
    folder: Path,
    board: StatusBoard,
    kinds: Sequence[str],
    emit: Callable[[Event], None],
    before: pb.PeerStatus | None = None,
) -> Iterator[None]:
    """Draw a peer's curves in the trackers of these kinds while inside the context; `before` as for `CurveRecorder`."""
    recorder = CurveRecorder(folder, board, lambda peer: Trackers(kinds, peer, emit), before=before)
    board.add_listener(recorder.take)
    recorder.start()
    try:
        yield
    finally:
        recorder.close()
