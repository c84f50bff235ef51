"""Record of a run from its start: both losses, what happened around this peer, and the newest text of the model.

A peer records what it sees, and fills the time before it came with what a peer of its invite, or who measures, tells.
`history.pb` in its folder keeps the record (`RunHistory` of the protos), for a report and for the next start.
Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
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
from swarmtrain.network.history import point_of, sample_of, write_history
from swarmtrain.protocol.history import (
    HistoryPoint,
    LossHistory,
    TextSample,
    ToldHistory,
)
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import one_line, stages_in_words

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
        """What this process let the model write."""
        self._told_sample: TextSample | None = None
        self._before: pb.RunHistory | None = None
        self.version = 0
        """Grows with each change of the losses and the sample: what other peers are told."""

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
            self._told_sample = None
            self.version += 1
            before, self._before = self._before, None
            if before is None or before.run_sha256 != run_sha256:
                return
            self._told_sample = sample_of(before.sample) if before.HasField("sample") else None
            for point in before.points:
                self._losses.add(point_of(point))
            self._events = [*before.events, *self._events]
            self._subjects = [("",)] * len(before.events) + self._subjects
            self._trim()

    def add(self, point: HistoryPoint) -> None:
        """Record losses that were measured or told now."""
        with self._lock:
            self.version += self._losses.add(point)

    def fill(self, told: Sequence[ToldHistory]) -> None:
        """Record what the one of these that knows most tells of the time that this peer has not seen, and the newest
        sample."""
        with self._lock:
            self._losses.fill(max((one.points for one in told), key=len, default=()))
            samples = [each for each in (self._told_sample, *(one.sample for one in told)) if each is not None]
            self._told_sample = max(samples, key=lambda sample: sample.run_tokens, default=None)
            self.version += 1

    def add_sample(self, point: HistoryPoint, sample: TextSample | None) -> None:
        """Record what the model was worth at a moment of the run, and what it wrote; None: it has not written yet."""
        with self._lock:
            self._losses.add(point)
            self._sample = sample or self._sample
            self.version += 1

    def take(self, event: Event) -> None:
        """Record an event, if it is one to look back at; one that has no time yet happens now."""
        if not isinstance(event, _NOTED):
            return
        at, words = event.time or self._wall(), one_line(in_words(event))[:_MAX_WORDS]
        noted = pb.NotedEvent(time=at, event=event.event, words=words, count=1, last_time=at, about=_about(event))
        self._note(noted, _subject_of(event))

    def moved(self, peer: str, name: str, before: Sequence[int], after: Sequence[int]) -> None:
        """Record that another peer of a pipeline holds other stages now."""
        at, stages = self._wall(), f"from {stages_in_words(before)} to {stages_in_words(after)}"
        words = one_line(f"peer {name} moved {stages}")[:_MAX_WORDS]
        noted = pb.NotedEvent(time=at, event="moved", words=words, count=1, last_time=at, about=peer)
        self._note(noted, ("moved", peer, stages))

    def _note(self, noted: pb.NotedEvent, subject: tuple[str, ...]) -> None:
        """Add an event, or count it if it is the same as one of the last."""
        with self._lock:
            first = max(0, len(self._events) - _RECENT)
            for place in range(first, len(self._events)):
                if len(subject) > 1 and self._subjects[place] == subject:
                    again = self._events[place]
                    again.count, again.last_time = again.count + 1, noted.last_time
                    return
            self._events.append(noted)
            self._subjects.append(subject)
            self._trim()

    def _trim(self) -> None:
        """Keep the events of the beginning and the last ones."""
        excess = slice(_FIRST_EVENTS, _FIRST_EVENTS + max(0, len(self._events) - MAX_EVENTS))
        del self._events[excess], self._subjects[excess]

    # ------------------------------------------------------------- what it tells

    def message(self) -> pb.RunHistory:
        """Return the record, for the peer's own user and its folder."""
        with self._lock:
            losses, events, sample = self._losses.points(), list(self._events), self.sample
            told = pb.RunHistory(run_sha256=self._run_sha256, total_tokens=self._losses.total_tokens, events=events)
        write_history(told, losses, sample)
        return told

    def losses(self) -> list[HistoryPoint]:
        """Return both curves' points by rising tokens."""
        with self._lock:
            return self._losses.points()

    @property
    def sample(self) -> TextSample | None:
        """Text of the run's model: what this process let it write, else what others told; None if there is none."""
        return self._sample or self._told_sample


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
