"""Record of a run from its start: both losses, what happened around this peer, and the newest text of the model.

A peer records what it sees, and fills the time before it came with what others tell. `history.pb` in its folder keeps
the record (`RunHistory` of the protos), for a report and for the next start. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from swarmtrain.events import (
    AssignedEvent,
    CaughtUpEvent,
    ClippedEvent,
    DoneEvent,
    ErrorEvent,
    Event,
    JoinedEvent,
    MovedEvent,
    PausedEvent,
    PeerJoinedEvent,
    PeerLeftEvent,
    PeerLostEvent,
    RefusedEvent,
    ResumedEvent,
    WarningEvent,
    in_words,
)
from swarmtrain.network.history import point_of, sample_of
from swarmtrain.protocol.history import HistoryPoint, LossHistory, TextSample
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import one_line

__all__ = ["HISTORY_NAME", "MAX_EVENTS", "PeerHistory", "read_history"]

HISTORY_NAME = "history.pb"
MAX_EVENTS = 1024
_FIRST_EVENTS = 64
"""Events of the beginning that stay when later ones give way."""
_MAX_WORDS = 400
_MAX_KEPT_BYTES = 4 * 2**20
_NOTED = (
    *(AssignedEvent, CaughtUpEvent, ClippedEvent, DoneEvent, ErrorEvent, JoinedEvent, MovedEvent, PausedEvent),
    *(PeerJoinedEvent, PeerLeftEvent, PeerLostEvent, RefusedEvent, ResumedEvent, WarningEvent),
)
_RECENT = 16
"""Last events among which one that repeats is looked for."""


def read_history(folder: Path) -> pb.RunHistory | None:
    """Return the record that the peer of this folder left; None if there is none or it is malformed."""
    try:
        data = (folder / HISTORY_NAME).read_bytes()
        return pb.RunHistory.FromString(data) if len(data) <= _MAX_KEPT_BYTES else None
    except (OSError, DecodeError):
        return None


class PeerHistory:
    """Record of one run, which is known from `begin` on. `wall` returns the Unix time in seconds."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        self._run_sha256 = ""
        self._losses = LossHistory(1)
        self._events: list[pb.NotedEvent] = []
        self._subjects: list[tuple[str, ...]] = []
        """What each of `_events` is about: one that repeats is counted."""
        self._sample: TextSample | None = None
        self._before: pb.RunHistory | None = None
        self.version = 0
        """Grows with each change."""

    # ------------------------------------------------------------- what it is told

    def remember(self, before: pb.RunHistory | None) -> None:
        """Take over the record of the process that used this folder before, if the run is the same."""
        self._before = before

    def begin(self, run_sha256: str, total_tokens: int) -> None:
        """Record the run of this hash from now on."""
        with self._lock:
            if run_sha256 == self._run_sha256 or not total_tokens:
                return
            self._run_sha256, self._losses = run_sha256, LossHistory(total_tokens)
            before, self._before = self._before, None
            if before is None or before.run_sha256 != run_sha256:
                return
            self._losses.fill(map(point_of, before.points))
            self._events = [*before.events, *self._events]
            self._subjects = [("",)] * len(before.events) + self._subjects
            if before.HasField("sample"):
                self._sample = sample_of(before.sample)
            self.version += 1

    def add(self, point: HistoryPoint) -> None:
        """Record losses that were measured or told now."""
        with self._lock:
            self._losses.add(point)
            self.version += 1

    def fill(self, points: Iterable[HistoryPoint], sample: TextSample | None) -> None:
        """Record what another peer tells of the time that this one has not seen, and its sample if it is newer."""
        with self._lock:
            self._losses.fill(points)
            if sample is not None and (self._sample is None or sample.run_tokens > self._sample.run_tokens):
                self._sample = sample
            self.version += 1

    def add_sample(self, point: HistoryPoint, sample: TextSample) -> None:
        """Record what the model was worth, and what it wrote, at a moment of the run."""
        with self._lock:
            self._losses.add(point)
            self._sample = sample
            self.version += 1

    def take(self, event: Event) -> None:
        """Record an event, if it is one to look back at; one that has no time yet happens now."""
        if not isinstance(event, _NOTED):
            return
        subject, at = _subject_of(event), event.time or self._wall()
        with self._lock:
            self.version += 1
            first = max(0, len(self._events) - _RECENT)
            for place in range(first, len(self._events)):
                if len(subject) > 1 and self._subjects[place] == subject:
                    again = self._events[place]
                    again.count, again.last_time = again.count + 1, at
                    return
            words = one_line(in_words(event))[:_MAX_WORDS]
            noted = pb.NotedEvent(time=at, event=event.event, words=words, count=1, last_time=at, about=_about(event))
            self._events.append(noted)
            self._subjects.append(subject)
            if len(self._events) > MAX_EVENTS:
                del self._events[_FIRST_EVENTS], self._subjects[_FIRST_EVENTS]

    # ------------------------------------------------------------- what it tells

    def message(self) -> pb.RunHistory:
        """Return the record, for the peer's own user and its folder."""
        with self._lock:
            losses, events, sample = self._losses.points(), list(self._events), self._sample
            told = pb.RunHistory(run_sha256=self._run_sha256, total_tokens=self._losses.total_tokens, events=events)
        for point in losses:
            told.points.add(
                round=point.round,
                run_tokens=point.run_tokens,
                loss=point.loss,
                held_out_loss=point.held_out_loss,
                time=point.time,
            )
        if sample is not None:
            told.sample.CopyFrom(
                pb.ModelSample(
                    prompt=sample.prompt,
                    text=sample.text,
                    round=sample.round,
                    run_tokens=sample.run_tokens,
                    time=sample.time,
                )
            )
        return told

    def losses(self) -> list[HistoryPoint]:
        """Return both curves' points by rising tokens."""
        with self._lock:
            return self._losses.points()

    @property
    def sample(self) -> TextSample | None:
        """The newest text of the run's model; None if there is none."""
        return self._sample


def _about(event: Event) -> str:
    """Return the PeerID of the other peer that an event is about; empty for this one."""
    match event:
        case PeerJoinedEvent():
            return event.joined
        case PeerLostEvent():
            return event.lost
        case PeerLeftEvent():
            return event.left
        case RefusedEvent() | ClippedEvent():
            return event.from_peer
        case _:
            return ""


def _subject_of(event: Event) -> tuple[str, ...]:
    """Return what makes an event the same as an earlier one; of one word for events that are never the same."""
    match event:
        case RefusedEvent() | ClippedEvent():
            return event.event, event.from_peer, event.rule
        case WarningEvent():
            return event.event, event.message
        case _:
            return (event.event,)
