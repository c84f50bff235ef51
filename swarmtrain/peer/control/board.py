"""Status board: the one place where a peer's status is gathered.

The peer passes its events through the board, names what it is doing where no event says so, and gives the board two
ways to look: a `Pulse`, a few numbers that are read twice a second, and lookers, which fill in the rest when somebody
asks. So the training thread pays nothing for being watched: what changes with each inner step is read by the board,
never reported to it (decision 11).

Thread-safe. Lookers and the pulse run in the asking thread and may only read.
"""

from __future__ import annotations

import os
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from swarmtrain import __version__
from swarmtrain.errors import with_code
from swarmtrain.events import (
    ArchivedEvent,
    CaughtUpEvent,
    DeviceEvent,
    DoneEvent,
    ErrorEvent,
    EvalEvent,
    Event,
    FetchedEvent,
    InviteEvent,
    JoinedEvent,
    PausedEvent,
    PeerJoinedEvent,
    RefusedEvent,
    ResumedEvent,
    RoundEvent,
    StartedEvent,
    WarningEvent,
    data_in_words,
    merge_in_words,
    times_below_allreduce,
)
from swarmtrain.peer.control.growth import Growth
from swarmtrain.peer.control.health import Vitals
from swarmtrain.peer.control.history import PeerHistory
from swarmtrain.peer.estimate import Estimate
from swarmtrain.protocol.history import HistoryPoint
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import short_peer

MAX_LOSSES = 512
_MAX_NOTICES = 8
_IN_ROUNDS = (pb.PEER_STATE_WAITING, pb.PEER_STATE_TRAINING, pb.PEER_STATE_SERVING)
OVER = (pb.PEER_STATE_DONE, pb.PEER_STATE_FAILED)
"""States in which a peer's work has ended."""
_MAX_NAMES = 4096
_WINDOW_S = 30.0
_PATIENCE_S = 60.0
_PROGRESS_BYTES = 65_536
_NAMED = 3
_NAME_CHARACTERS = 16
"""Limit of a name's length in a sentence, in characters; a name itself may have 64."""
_REASONS = {
    "total_tokens": "the run has trained all its tokens",
    "interrupted": "it was interrupted",
    "asked": "you asked it to leave",
}
_NAMES_OF = (("from_peer", "from_name"), ("state_from", "state_from_name"), ("asked", "asked_name"))
"""Event fields that hold a PeerID, each with the field for its name."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*…?")
"""Names that commands accept."""
_PROSE = ("detail", "reason", "message")
_PEER_IDS = re.compile(r"(?:12D3Koo|Qm)[1-9A-HJ-NP-Za-km-z]{30,60}(?:, (?:12D3Koo|Qm)[1-9A-HJ-NP-Za-km-z]{30,60})*")


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """Numbers that change all the time. Read twice a second, so making one must be cheap."""

    state: pb.PeerState
    doing: str
    about: str = ""
    """Part of `doing` that does not count down: if it changes, there is progress."""
    round: int = 0
    inner_steps_done: int = 0
    inner_steps: int = 0
    num_steps: float = 0.0
    """Inner steps since the process began."""
    learnt_share: float = 1.0
    """Share of the tokens read that count, since they are to be learnt; 0 while it is not known."""
    sent_bytes: int = 0
    received_bytes: int = 0
    patience_s: float = _PATIENCE_S
    """See `Vitals`."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Run that the peer takes part in, and what the board reads of it."""

    pulse: Callable[[], Pulse]
    """Called twice a second."""
    peer: str = ""
    name: str = ""
    run_name: str = ""
    run_sha256: str = ""
    total_tokens: int = 0
    shows_invite: bool = False
    """See `run.show_invite` of the run file."""
    vocabulary_size: int = 0
    """Tokens that the model chooses among."""
    tokens_per_step: int = 0
    estimates: Callable[[int], Estimate] | None = None
    """Returns what the run costs each of a number of volunteers that hold the whole model."""


class _LastTold(NamedTuple):
    """What is remembered of a peer: its device, its speed when its count last grew, that count, and its stages."""

    device: str = ""
    tokens_per_s: float = 0.0
    tokens: int = 0
    stages: tuple[int, ...] = ()


class LossCurve:
    """Loss points, oldest first, at most `MAX_LOSSES`: the first, the last, and evenly spaced ones between.

    Points with a held-out loss are kept when others are dropped.
    """

    def __init__(self) -> None:
        self.points: list[pb.LossPoint] = []
        self._stride = 1
        self._in_stride = 0

    def add(self, point: pb.LossPoint) -> None:
        """Add a point newer than all others."""
        if self._in_stride % self._stride and len(self.points) > 1 and not self.points[-1].held_out_loss:
            self.points[-1] = point
        else:
            self.points.append(point)
        self._in_stride += 1
        if len(self.points) > MAX_LOSSES:
            self._thin()

    def _thin(self) -> None:
        first, *middle, last = self.points
        pairs = zip(middle[::2], middle[1::2], strict=False)
        kept = [right if right.held_out_loss and not left.held_out_loss else left for left, right in pairs]
        kept += [point for point in middle[2 * len(kept) :] if point.held_out_loss]
        self.points = [first, *kept, last]
        self._stride, self._in_stride = 2 * self._stride, 1

    def measured(self, round: int, loss: float) -> None:
        """Add the held-out loss after `round`."""
        if self.points and self.points[-1].round == round:
            self.points[-1].held_out_loss = loss


class StatusBoard:
    """Gathers what a peer knows of itself. `now` and `wall` are clocks: seconds, and Unix seconds."""

    def __init__(
        self,
        role: str,
        started_time: float,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.history = PeerHistory(wall)
        """Record of the run, from its start."""
        self._watched: Watched | None = None
        self._now, self._wall = now, wall
        self._lock = threading.Lock()
        self._base = pb.PeerStatus(
            role=role, version=__version__, pid=os.getpid(), started_time=started_time, state=pb.PEER_STATE_STARTING
        )
        self._curve = LossCurve()
        self._names: dict[str, str] = {}
        self._before: pb.PeerStatus | None = None
        self._busy = self._arriving = ""
        self._lookers: list[Callable[[pb.PeerStatus], None]] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._samples: deque[tuple[float, Pulse]] = deque()
        self._run_growth = Growth()
        self._peer_growths: dict[str, Growth] = {}
        self._last_told: dict[str, _LastTold] = {}
        """Of each peer in the last status."""
        self._told_losses: dict[str, float] = {}
        self._beats = 0
        self._seen_beats = 0
        self._progressed_s = now()
        self._sums = _Sums()
        self._learnt_share = 1.0
        """Of the last pulse."""

    def estimate_now(self, status: pb.PeerStatus) -> Estimate | None:
        """Return the expected memory and traffic of this peer, with as many volunteers as `status` shows present; None
        if unknown."""
        present = sum(peer.present and not peer.bootstrap for peer in status.peers)
        estimates = None if self._watched is None else self._watched.estimates
        return estimates(present) if estimates is not None and present else None

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one inner step of this peer that count: those to be learnt, as in `run.total_tokens`. 0 before it
        takes part in a run, or if they are not known."""
        return 0 if self._watched is None else self._watched.tokens_per_step * self._learnt_share

    @property
    def device_in_short(self) -> str:
        """What this peer trains on, for others to see; empty while it is not known."""
        devices, title = self._base.device.device.split(","), self._base.device.title
        kind = title or devices[0].partition(":")[0]
        return kind if len(devices) == 1 else f"{len(devices)} x {kind}"

    # ------------------------------------------------------------- what it is told

    def watch(self, watched: Watched) -> None:
        """Start reading the peer: it takes part in its run."""
        with self._lock:
            self._base.peer, self._base.name = watched.peer, watched.name
            self._base.shows_invite = watched.shows_invite
            self._base.vocabulary_size = watched.vocabulary_size
            self._set_run(watched.run_name, watched.run_sha256, watched.total_tokens)
        self._watched = watched

    def listening(self, emit: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return an `emit` that notes each event here first."""
        return _Listening(self, emit)

    def take(self, event: Event) -> None:
        """Record an event of this peer."""
        with self._lock:
            self._take(event)
        self.history.take(event)
        for listener in self._listeners:
            listener(event)

    def _take(self, event: Event) -> None:
        base = self._base
        base.peer, base.name = event.peer or base.peer, event.name or base.name
        match event:
            case FetchedEvent():
                self._set_run(event.run_name, event.run_sha256, event.total_tokens)
                base.doing = "preparing the text and the model"
            case InviteEvent():
                base.invite_line = event.line
            case JoinedEvent():
                base.round, base.run_tokens = event.round, event.run_tokens
                self._do(pb.PEER_STATE_WAITING, "ready for its first round")
            case DeviceEvent():
                base.device.CopyFrom(_device_status(event))
            case StartedEvent():
                self._sums.num_parameters = event.num_parameters
                self._do(pb.PEER_STATE_TRAINING, "training")
            case ResumedEvent():
                self._do(pb.PEER_STATE_TRAINING, "training again")
            case PausedEvent():
                self._do(pb.PEER_STATE_PAUSED, f"paused: {event.reason}")
            case RoundEvent():
                self._take_round(event)
            case CaughtUpEvent():
                base.round, self._arriving = event.round, ""
            case EvalEvent():
                base.held_out_time = event.time or self._wall()
                self._set_held_out(event)
                self._curve.measured(event.round, event.held_out_loss)
                self._record_held_out(event)
            case PeerJoinedEvent():
                self.know_name(event.joined, event.joined_name)
            case WarningEvent() | ErrorEvent():
                self._notice(event.time, with_code(event.message, event.code))
            case RefusedEvent():
                self._notice(event.time, f"refused what {self._short_name(event.from_peer)} sent: {event.detail}")
            case ArchivedEvent():
                base.archive.num_rounds, base.archive.run_tokens = event.round, event.run_tokens
                base.archive.time, base.archive.path = event.time or self._wall(), event.path
            case DoneEvent():
                if event.held_out_loss:
                    if event.held_out_loss != base.held_out_loss:  # a bootstrap repeats its last one
                        base.held_out_time = event.time or self._wall()
                    self._set_held_out(event)
                base.end_reason = event.reason
            case _:
                pass

    def _record_held_out(self, event: EvalEvent) -> None:
        """Record a held-out loss. A bootstrap's, of its archive, is recorded by whoever measures it."""
        if self._base.role == "bootstrap" and self._base.state == pb.PEER_STATE_SERVING:
            return
        tokens = self._base.archive.run_tokens if self._base.role == "bootstrap" else self._base.run_tokens
        time = event.time or self._wall()
        self.history.add(
            HistoryPoint(run_tokens=tokens, time=time, round=event.round, held_out_loss=event.held_out_loss)
        )

    def _set_held_out(self, event: EvalEvent | DoneEvent) -> None:
        self._base.held_out_loss = event.held_out_loss or 0.0
        of_sources = zip(event.sources, event.source_losses, strict=False)
        del self._base.source_losses[:]
        self._base.source_losses.extend(pb.SourceLoss(name=name, held_out_loss=loss) for name, loss in of_sources)

    def _take_round(self, event: RoundEvent) -> None:
        base = self._base
        base.round, base.run_tokens, self._arriving = event.round + 1, event.run_tokens, ""
        time = event.time or self._wall()
        self._curve.add(pb.LossPoint(round=event.round, run_tokens=event.run_tokens, loss=event.loss, time=time))
        base.times_below_allreduce, base.stall_share = self._sums.after(event)
        base.data = data_in_words(event)
        base.last_merge = "" if event.signer else self.in_names(merge_in_words(event))

    def _notice(self, time: float, message: str) -> None:
        notices = self._base.notices
        kept = [notice for notice in notices if notice.message != message][1 - _MAX_NOTICES :]
        kept.append(pb.Notice(time=time or self._wall(), message=message))
        del notices[:]
        notices.extend(kept)

    def _set_run(self, name: str, sha256: str, total_tokens: int) -> None:
        base = self._base
        base.run_name, base.run_sha256, base.total_tokens = name, sha256, total_tokens
        self.history.begin(sha256, total_tokens)
        before = self._before
        if before is not None and before.run_sha256 == sha256 and not self._curve.points:
            for point in before.losses:
                self._curve.add(point)
            self._names |= {item.peer: item.name for item in before.peers}
            self._last_told = {
                item.peer: _LastTold(item.device, item.last_tokens_per_s, item.tokens) for item in before.peers
            }
            base.own_tokens, base.run_tokens = before.own_tokens, before.run_tokens
            base.held_out_loss, base.held_out_time = before.held_out_loss, before.held_out_time
            base.source_losses.extend(before.source_losses)
            if before.run_tokens >= total_tokens:
                base.end_time = before.end_time
            if before.HasField("archive"):
                base.archive.CopyFrom(before.archive)

    def remember(self, before: pb.PeerStatus) -> None:
        """Take over losses and names from the last status of the process that used this folder before, if the run is
        the same."""
        self._before = before
        self.called(before.name)

    def called(self, name: str) -> None:
        """Set the peer's name, until the peer reports it itself."""
        with self._lock:
            self._base.name = name or self._base.name

    def doing(self, state: pb.PeerState, sentence: str) -> None:
        """Set the activity that the status shows from now on, where no event says it."""
        with self._lock:
            self._do(state, sentence)

    def _do(self, state: pb.PeerState, sentence: str) -> None:
        if self._base.state in OVER:
            return  # a stage's thread may still begin a round while the peer leaves
        self._base.state, self._base.doing, self._arriving = state, sentence, ""
        self._beats += 1

    def arriving(self, sentence: str) -> None:
        """Report that the swarm's present weights are arriving. A peer that was training has fallen behind, and
        continues to train afterwards."""
        with self._lock:
            # A training peer stays in its state: as STARTING it would have no pulse, and count as unhealthy for good.
            if self._base.state != pb.PEER_STATE_TRAINING:
                self._do(pb.PEER_STATE_STARTING, sentence)
            else:
                self._arriving = sentence
                self._beats += 1

    def arrived(self) -> None:
        """Report that the download has ended, complete or not."""
        with self._lock:
            self._arriving = ""

    @contextmanager
    def busy(self, sentence: str) -> Iterator[None]:
        """Show an activity other than inner steps and merges while inside the context."""
        self._busy = sentence
        self._beats += 1
        try:
            yield
        finally:
            self._busy = ""
            self._beats += 1

    def beat(self) -> None:
        """Record progress that the pulse does not show; costs nothing."""
        self._beats += 1

    def ended(self, state: pb.PeerState, reason: str, exit_code: int) -> None:
        """Record the peer's end; later reports change nothing."""
        with self._lock:
            base = self._base
            if self._samples:
                base.round = max(base.round, self._samples[-1][1].round)
            base.state, base.end_reason, base.exit_code, self._arriving = state, reason, exit_code, ""
            base.doing = f"ended: {_REASONS.get(reason, reason)}"

    # ------------------------------------------------------------- where it looks

    def add_looker(self, looker: Callable[[pb.PeerStatus], None]) -> None:
        """Add a function that fills live facts into a status that is asked for."""
        self._lookers.append(looker)

    def add_listener(self, listener: Callable[[Event], None]) -> None:
        """Add a function that gets each event noted here, in the thread that it comes from."""
        self._listeners.append(listener)

    def now(self) -> float:
        """Return the board's clock in seconds."""
        return self._now()

    @property
    def run_tokens(self) -> int:
        """Tokens of the run after this peer's last round, or when it joined."""
        return self._base.run_tokens

    def name_of(self, peer: str) -> str:
        """Return a peer's name for a person; the end of its PeerID if it has none."""
        return self._names.get(peer) or short_peer(peer)

    def _short_name(self, peer: str) -> str:
        """Return a name for use in a sentence, with the PeerID's end where it could pass for another peer's."""
        name = _cut(self._names.get(peer, ""))
        if not _PLAIN_NAME.fullmatch(name):
            return short_peer(peer)
        others = tuple(self._names.items())  # other threads add to it
        is_anothers = any(_cut(other) == name for known, other in others if known != peer)
        return f"{name} ({short_peer(peer)})" if is_anothers else name

    def know_name(self, peer: str, name: str) -> None:
        """Remember what `peer` calls itself, also after it has gone."""
        if name and self._names.get(peer) != name:
            self._names[peer] = name
            while len(self._names) > _MAX_NAMES:  # anybody can make new identities for nothing
                with suppress(RuntimeError):  # every thread that looks learns names
                    self._names.pop(next(iter(self._names)), None)

    def named(self, event: Event) -> Event:
        """Return `event` with the names of the peers it refers to, for a person; PeerIDs in its sentences are replaced
        too.
        """
        changes: dict[str, str] = {}
        for peer, name in _NAMES_OF:
            if (known := self._names.get(getattr(event, peer, ""))) and not getattr(event, name, known):
                changes[name] = known
        for field in _PROSE:
            if isinstance(text := getattr(event, field, None), str) and _PEER_IDS.search(text):
                changes[field] = self.in_names(text)
        return event.model_copy(update=changes) if changes else event

    def in_names(self, sentence: str) -> str:
        """Return `sentence` with names in place of PeerIDs; of a long list the first three and how many more."""

        def names(match: re.Match[str]) -> str:
            peers = match[0].split(", ")
            shown = peers if len(peers) <= _NAMED + 1 else peers[:_NAMED]
            found = [self._short_name(peer) for peer in shown]
            if len(shown) < len(peers):
                found.append(f"{len(peers) - len(shown)} others")
            return " and ".join(part for part in (", ".join(found[:-1]), found[-1]) if part)

        return _PEER_IDS.sub(names, sentence)

    # ------------------------------------------------------------- what it tells

    def tick(self) -> Vitals:
        """Read the pulse, update the rates, and return the inputs of the health decision. Called about twice a
        second."""
        now, pulse = self._now(), self._look()
        with self._lock:
            before = self._samples[-1][1] if self._samples else None
            if self._beats != self._seen_beats or _got_further(before, pulse):
                self._progressed_s, self._seen_beats = now, self._beats
            if (last := pulse or before) is not None:
                self._samples.append((now, last))
                self._learnt_share = last.learnt_share
            while len(self._samples) > 2 and self._samples[1][0] < now - _WINDOW_S:
                self._samples.popleft()
            return Vitals(
                state=self._base.state if pulse is None else pulse.state,
                progressed_s=self._progressed_s,
                patience_s=_PATIENCE_S if pulse is None else pulse.patience_s,
            )

    def _look(self) -> Pulse | None:
        """Return the pulse, if the peer is in its rounds or serves; else None."""
        watched = self._watched
        if watched is None or self._base.state not in _IN_ROUNDS:
            return None
        return watched.pulse()

    def status(self) -> pb.PeerStatus:
        """Return the status with everything that is known now."""
        pulse, now = self._look(), self._now()
        status = pb.PeerStatus()
        with self._lock:
            status.CopyFrom(self._base)
            status.losses.extend(self._curve.points)
            self._fill_rates(status)
        status.time = self._wall()
        if pulse is not None:
            status.state, status.doing = pulse.state, self._busy or self._arriving or pulse.doing
            status.round = max(status.round, pulse.round)
            status.inner_steps_done, status.inner_steps = pulse.inner_steps_done, pulse.inner_steps
            status.sent_bytes, status.received_bytes = pulse.sent_bytes, pulse.received_bytes
        elif doing := self._busy or self._arriving:
            status.doing = doing
        for looker in self._lookers:
            looker(status)
        with self._lock:
            self._fill_speeds(status, now)
            self._fill_end(status, now)
            self._fill_swarm_loss(status)
        return status

    def _fill_rates(self, status: pb.PeerStatus) -> None:
        if not self._samples:
            return
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        status.sent_bytes, status.received_bytes = last.sent_bytes, last.received_bytes
        over_s = last_s - first_s
        if over_s < 1.0 or status.state in OVER:
            return
        if status.state != pb.PEER_STATE_PAUSED:
            status.own_tokens_per_s = _rounded((last.num_steps - first.num_steps) * self.tokens_per_step / over_s)
        status.sent_bytes_per_s = _rounded((last.sent_bytes - first.sent_bytes) / over_s)
        status.received_bytes_per_s = _rounded((last.received_bytes - first.received_bytes) / over_s)

    def _fill_speeds(self, status: pb.PeerStatus, now: float) -> None:
        """Fill in the speeds: this peer's by its steps, the others' by their counts, or by the speeds that they
        advertise before counts are known.

        They are in tokens that count: of the tokens that steps read, others are taken to learn from as many as this
        peer does. The swarm's is the sum. In a pipeline all speeds are by counts, since a step of one stage is only a
        part of a step.
        """
        known, self._peer_growths = self._peer_growths, {}
        has_ended = status.state in OVER
        for item in status.peers:
            if item.bootstrap or not item.present or has_ended:
                item.tokens_per_s = 0.0
                continue
            growth = self._peer_growths[item.peer] = known.get(item.peer) or Growth()
            growth.take(item.tokens, now)
            if item.peer == status.peer and not status.stages:
                item.tokens_per_s = status.own_tokens_per_s
                continue
            per_s = growth.per_s(now)
            item.tokens_per_s = _rounded(item.tokens_per_s * self._learnt_share if per_s is None else per_s)
            if item.peer == status.peer:
                status.own_tokens_per_s = item.tokens_per_s
        status.swarm_tokens_per_s = _rounded(sum(item.tokens_per_s for item in status.peers))
        self._fill_last(status)

    def _fill_last(self, status: pb.PeerStatus) -> None:
        """Fill in what is remembered of peers that have gone: what they trained on, and how fast. Note the moves of
        others between stages, which no event tells."""
        known, self._last_told = self._last_told, {}
        for item in status.peers:
            last = known.get(item.peer, _LastTold())
            device, per_s = item.device or last.device, last.tokens_per_s
            if item.tokens_per_s > 0 and (item.tokens > last.tokens or not per_s):
                per_s = item.tokens_per_s  # not later: the speed of one that hangs is said to fall
            item.device, item.last_tokens_per_s = device, per_s
            stages = tuple(item.stages) or last.stages
            if last.stages and stages != last.stages and item.peer != status.peer:
                self.history.moved(item.peer, item.name, last.stages, stages)
            self._last_told[item.peer] = _LastTold(device, per_s, max(item.tokens, last.tokens), stages)

    def _fill_end(self, status: pb.PeerStatus, now: float) -> None:
        """Fill in when the run will have its tokens at the present speed, or when it had them."""
        growth, left = self._run_growth, status.total_tokens - status.run_tokens
        if status.run_tokens:
            growth.take(status.run_tokens, now)
        if not status.total_tokens:
            return
        if left <= 0:
            self._base.end_time = status.end_time = self._base.end_time or self._wall()
        elif not any(peer.present and not peer.bootstrap for peer in status.peers) and status.peers:
            # Nobody trains: the speed is measured anew once somebody does.
            self._run_growth = Growth()
        elif per_s := growth.per_s(now):
            end_s = max(growth.changed_s + left / per_s, now)
            status.end_time = round(self._wall() - now + end_s)  # whole seconds, so that the figure is stable

    def _fill_swarm_loss(self, status: pb.PeerStatus) -> None:
        """Fill in the median of the losses that volunteers report; a bootstrap, which has none of its own, plots
        that.
        """
        told = [self._told_losses[item.peer] for item in status.peers if self._told_losses.get(item.peer)]
        status.swarm_loss = statistics.median(told) if told else 0.0
        if told and status.state in _IN_ROUNDS:
            point = HistoryPoint(
                run_tokens=status.run_tokens, time=self._wall(), round=status.round, loss=status.swarm_loss
            )
            self.history.add(point)
        points = self._curve.points
        if status.role == "bootstrap" and told and (not points or status.run_tokens > points[-1].run_tokens):
            newest = pb.LossPoint(round=status.round, run_tokens=status.run_tokens, time=round(self._wall(), 1))
            newest.loss = status.swarm_loss
            self._curve.add(newest)

    def tell_losses(self, losses: Mapping[str, float]) -> None:
        """Set the training losses that volunteers report, by PeerID."""
        with self._lock:
            self._told_losses = dict(losses)


@dataclass
class _Sums:
    """Sums over the rounds of this process."""

    num_parameters: int = 0
    shared_steps: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0

    def after(self, event: RoundEvent) -> tuple[float, float]:
        """Return (how many times fewer bytes than an all-reduce, the share of time in which the trainer waited)."""
        if event.times_below_allreduce is not None:
            self.shared_steps += event.inner_steps
            self.shared_bytes += event.bytes_sent
        self.seconds += event.seconds
        self.stall_s += event.stall_s
        below = times_below_allreduce(self.num_parameters, self.shared_steps, self.shared_bytes)
        return below or 0.0, self.stall_s / self.seconds if self.seconds else 0.0


def _device_status(event: DeviceEvent) -> pb.DeviceStatus:
    return pb.DeviceStatus(
        device=event.device,
        title=event.title,
        precision=event.precision,
        compiled=event.compiled,
        microbatch_sequences=event.microbatch_sequences,
        why=event.why,
    )


def _got_further(before: Pulse | None, pulse: Pulse | None) -> bool:
    """Return whether anything moved between two pulses: a step, a round, a merge's decision, a piece of a transfer."""
    if before is None or pulse is None:
        return before is not pulse
    was = (before.state, before.about, before.round, before.inner_steps_done, before.num_steps)
    moved = was != (pulse.state, pulse.about, pulse.round, pulse.inner_steps_done, pulse.num_steps)
    moved_bytes = abs(pulse.received_bytes - before.received_bytes) + abs(pulse.sent_bytes - before.sent_bytes)
    return moved or moved_bytes > _PROGRESS_BYTES


def _rounded(value: float) -> float:
    """Round to three digits: enough for a person, and stable from one look to the next."""
    return float(f"{value:.3g}")


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…"


class _Listening:
    def __init__(self, board: StatusBoard, emit: Callable[[Event], None]) -> None:
        self._board, self._emit = board, emit
        self.identify: Callable[[str, str], None] = getattr(emit, "identify", lambda peer, name: None)

    def __call__(self, event: Event) -> None:
        event = self._board.named(event)
        self._board.take(event)
        self._emit(event)
