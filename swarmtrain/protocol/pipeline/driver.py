"""Driver of microbatches through the stages: who computes each part, and what happens when a peer fails.

The driver keeps the input of every stage until the microbatch has come all the way back, so that any peer of a stage
can take over from there. A failed forward is asked of another peer. A backward is asked again of the peer that has the
forward, which repeats its answer. If that peer is gone, the microbatch starts again at that stage, and the gradients
that later stages computed for it are dropped. When a microbatch is back, every peer that has a part in it is told,
again and again until it confirms (decision 26).

As many microbatches are under way as `most_in_flight` says. None starts while some stage is empty, or while this peer's
own stage does not compute.

Everything here is pure: events go in, commands come out. The caller keeps the tensors: the input of each stage, and the
last gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NamedTuple, TypeAlias

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.ledger import Acknowledged, Key, Kind, Settlement
from swarmtrain.protocol.pipeline.router import WORK_SHARES, Router, most_in_flight

_BACKWARD_ATTEMPTS = 3
"""Attempts at a backward before the microbatch starts again at that stage."""
_ALL_FAILED_S = 2.0
"""Pause before a microbatch starts again one stage earlier, after all peers of a stage have failed with its input."""
_POLL_INTERVAL_S = 0.5
"""Seconds between two checks whether a stage has a peer that can be asked."""
_AGAIN_S, _MOST_AGAIN_S = 0.5, 5.0
"""Pause before a call is repeated; for settlements it doubles each time, up to `_MOST_AGAIN_S`."""
_SETTLE_LIMIT_S = 5.0
"""Time limit of a call that delivers a settlement."""
_MOST_SETTLED = 1024
"""Limit of acknowledged, and of dropped microbatches in one settlement."""
_GIVE_UP_S = 60.0
"""Seconds after which a settlement that cannot be delivered is given up: the peer is dead, or subtracts what is not
acknowledged."""
_ANY_INCARNATION = 0
"""Incarnation to put into a settlement that acknowledges nothing, so that it applies to any incarnation."""
_HERE_S = 30.0
"""Longest silence towards a peer that computes for this driver, in seconds: stages forget the microbatches of a silent
driver."""


# ---------------------------------------------------------------- state


@dataclass(frozen=True, slots=True)
class DriverPace:
    """Inputs for the number of microbatches under way; `in_flight` is the run file's number, 0 to let the driver
    compute it."""

    in_flight: int
    microbatch_tokens: int
    batch_microbatches: int


@dataclass(slots=True, eq=False)
class _Due:
    """Base of the objects that have a timer, due at `due_s`."""

    due_s: float | None = field(default=None, init=False)


@dataclass(slots=True, eq=False)
class _Way(_Due):
    """Microbatch under way. It waits for a call, or until `due_s`."""

    sequence: int
    tokens: int
    began_s: float
    places: list[tuple[str, Key] | None]
    """Peer that computed each stage, and its key there."""
    attempts: list[int]
    """Number of the next attempt at each stage."""
    incarnations: list[int]
    """Incarnation of the peer that computed each stage's gradient."""
    stage: int = 0
    goes_back: bool = False
    attempts_left: int = 0
    """Remaining attempts at this stage's backward."""
    loss: float = 0.0
    asked: set[str] = field(default_factory=set)
    """Peers that have failed with this stage's input."""
    all_failed: bool = False
    """True if all peers of the stage have failed: at `due_s` the microbatch starts again one stage earlier."""
    call: int | None = None


@dataclass(slots=True, eq=False)
class _Wait(_Due):
    """Call that waits for an answer; calls to later stages are given up at `due_s`."""

    way: _Way
    stage: int
    peer: str
    work_tokens: float
    began_s: float
    limit_s: float


class _Whom(NamedTuple):
    """Recipient of settlements: one incarnation of a peer, for one stage."""

    peer: str
    stage: int
    incarnation: int


@dataclass(slots=True, eq=False)
class _Settling(_Due):
    """News for one incarnation of a peer about one stage.

    The news are being sent while there is a `call`, and are sent again at `due_s`.
    """

    whom: _Whom
    acknowledged: dict[Key, float] = field(default_factory=dict)
    """Acknowledged microbatches, with their loss."""
    dropped: dict[Key, None] = field(default_factory=dict)
    call: int | None = None
    said: Settlement | None = None
    """Settlement that the present call delivers."""
    give_up_s: float = 0.0
    again_s: float = _AGAIN_S


class _Rest(_Due):
    """Vacant place of a microbatch that this peer's own stage gave up; another microbatch starts when the timer
    fires."""


class _Word(_Due):
    """Timer of the regular settlement to peers that compute for this driver, by which they know that it lives."""


class DriverEngine:
    """Decisions about the microbatches of one driver."""

    def __init__(self, me: str, routers: Sequence[Router], next_sequence: int, pace: DriverPace | None = None) -> None:
        self.me, self.routers, self.pace = me, routers, pace
        """PeerID of this driver; routers of all stages but the first, which is this peer's own; inputs for `most`."""
        self.next_sequence = next_sequence
        """Number of the next microbatch. It must exceed all that earlier processes of this peer have used, since others
        remember those."""
        self.most = 0
        """Number of microbatches that may be under way."""
        self.quickest_s: float | None = None
        """Shortest time of a microbatch so far, forward and back; None before the first."""
        self._ways: dict[int, _Way] = {}
        self._waits: dict[int, _Wait] = {}
        self._settling: dict[_Whom, _Settling] = {}
        self._telling: dict[int, _Settling] = {}
        self._touched: dict[_Whom, None] = {}
        """Peers that this driver has news for."""
        self._rests: set[_Rest] = set()
        self._word = _Word()
        self._said_s: dict[tuple[str, int], float] = {}
        """Time when this driver last sent anything to each peer of a stage."""
        self._drawing = 0
        """Microbatches that were ordered and not drawn yet."""
        self._is_shut = False
        self._calls = itertools.count()
        self._due: list[tuple[float, int, _Due]] = []
        """Heap of timers; an entry is valid while its time is the object's `due_s`."""
        self._out: list[DrivingCommand] = []

    @property
    def num_stages(self) -> int:
        """Number of stages, the first included."""
        return len(self.routers) + 1

    @property
    def num_under_way(self) -> int:
        """Microbatches under way or being drawn, and the places of those that this peer's own stage has just
        given up."""
        return len(self._ways) + len(self._rests) + self._drawing

    @property
    def oldest_open(self) -> int:
        """Number of the oldest microbatch of which anything is still needed."""
        return next(iter(self._ways), self.next_sequence)

    @property
    def has_told_all(self) -> bool:
        """True if every peer has confirmed what counts, or was given up."""
        return not self._settling

    def open_sequences(self) -> list[int]:
        """Return the numbers of the microbatches under way."""
        return list(self._ways)

    def wake_at(self) -> float | None:
        """Return the time at which to send `TimeCame`; None: not before another event."""
        due = self._due
        while due and due[0][2].due_s != due[0][0]:
            heappop(due)
        return due[0][0] if due else None

    def receive(self, event: DrivingEvent, now: float) -> list[DrivingCommand]:
        """Return the commands that follow from an event."""
        if isinstance(event, StageCallDone):
            self._done(event, now)
        elif isinstance(event, StageCallFailed):
            self._failed(event, now)
        elif isinstance(event, TimeCame):
            self._time_came(now)
        elif isinstance(event, ToldOf):
            if (settling := self._telling.pop(event.call, None)) is not None:
                self._settled(settling, event.late, "it was told too late, or began anew", now)
        elif isinstance(event, NotTold):
            if (settling := self._telling.pop(event.call, None)) is not None:
                self._not_told(settling, event.reason, now)
        elif isinstance(event, MicrobatchDrawn):
            self._drawing = max(0, self._drawing - 1)
            self._begin(event.tokens, now)
        elif isinstance(event, NoMicrobatch):
            self._drawing, self.most = max(0, self._drawing - 1), 0
        elif isinstance(event, PeersSeen):
            self._seen(event)
        elif isinstance(event, GiveUp):
            if (way := self._ways.get(event.sequence)) is not None:
                self._give_up(way)
        else:
            self._is_shut, self._drawing = True, 0
        for whom in self._touched:
            if (settling := self._settling.get(whom)) is not None:  # otherwise it was given up since
                self._tell(settling, now)
        self._touched.clear()
        while not self._is_shut and self.num_under_way < self.most:
            self._drawing += 1
            self._out.append(DrawMicrobatch())
        out, self._out = self._out, []
        return out

    def _at(self, when_s: float, what: _Due) -> None:
        what.due_s = when_s
        heappush(self._due, (when_s, next(self._calls), what))

    def _time_came(self, now: float) -> None:
        """Fire all timers that are due."""
        while (when_s := self.wake_at()) is not None and when_s <= now:
            what = heappop(self._due)[2]
            what.due_s = None
            if isinstance(what, _Way):
                self._go_on(what, now)
            elif isinstance(what, _Settling):
                self._settling_time_came(what, now)
            elif isinstance(what, _Wait):
                self._timed_out(what, now)
            elif isinstance(what, _Rest):
                self._rests.discard(what)
            else:
                self._say_here(now)

    # ------------------------------------------------------------- how many

    def _seen(self, event: PeersSeen) -> None:
        """Update the stages' peers.

        A peer that has left or was lost gets only the shortest time limit for its open calls: the limit of one that has
        not answered yet, or was slow, would be minutes.
        """
        for stage, router in enumerate(self.routers, start=1):
            router.set_peers(event.peers[stage])
        for wait in self._waits.values():
            if wait.stage:
                router = self.routers[wait.stage - 1]
                least_s = wait.began_s + router.least_limit_s
                if wait.due_s is not None and wait.due_s > least_s and not router.has(wait.peer):
                    self._at(least_s, wait)
        self.most = self._most(event)

    def _most(self, event: PeersSeen) -> int:
        pace = self.pace
        if pace is None or not all(event.peers.values()):
            return 0
        if pace.in_flight:
            return pace.in_flight
        places = {one.peer: one for one in event.places}
        holders = [[places[peer] for peer in of if peer in places] for _, of in sorted(event.peers.items())]
        return most_in_flight(self.me, holders, self.quickest_s, pace.microbatch_tokens, pace.batch_microbatches)

    # ------------------------------------------------------------- there

    def _begin(self, tokens: int, now: float) -> None:
        sequence, stages = self.next_sequence, self.num_stages
        self.next_sequence += 1
        way = _Way(sequence, tokens, now, [None] * stages, [0] * stages, [0] * stages)
        self._ways[sequence] = way
        if self._word.due_s is None:
            self._at(now + _HERE_S, self._word)
        self._ask_there(way, now)

    def _go_on(self, way: _Way, now: float) -> None:
        """Continue a microbatch whose timer has fired."""
        if way.goes_back:
            self._ask_back(way, now)
        elif way.all_failed:
            self._begin_again(way, way.stage - 1, now)
        else:
            self._ask_there(way, now)

    def _begin_again(self, way: _Way, stage: int, now: float) -> None:
        """Start a microbatch again from the input of `stage`; results of that and later stages must not count."""
        for later in range(stage, self.num_stages):
            self._drop_place(way, later)
        way.stage, way.goes_back, way.all_failed = stage, False, False
        way.asked.clear()
        self._ask_there(way, now)

    def _ask_there(self, way: _Way, now: float) -> None:
        """Ask a peer of the present stage for the forward.

        If all its peers have failed with this input, the input itself may be wrong: after a pause the microbatch starts
        again one stage earlier.
        """
        stage = way.stage
        kind: Kind = "tail" if stage == len(self.routers) else "forward"
        peer: str | None = self.me
        if stage:
            router = self.routers[stage - 1]
            if way.asked and way.asked.issuperset(router.peers) and router.peers:
                way.all_failed = True
                self._at(now + _ALL_FAILED_S, way)
                return
            peer, _ = router.choose(now, way.tokens * WORK_SHARES[kind], way.asked)
            if peer is None:
                next_s = router.next_s(now)
                self._at(now + _POLL_INTERVAL_S if next_s is None else min(now + _POLL_INTERVAL_S, next_s), way)
                return
        assert peer is not None
        key = Key(self.me, way.sequence, way.attempts[stage])
        way.attempts[stage] += 1
        way.places[stage] = peer, key
        self._ask(way, kind, peer, key, now)

    def _ask(self, way: _Way, kind: Kind, peer: str, key: Key, now: float) -> None:
        call, stage = next(self._calls), way.stage
        wait = _Wait(way, stage, peer, way.tokens * WORK_SHARES[kind], now, 0.0)
        if stage:
            router = self.routers[stage - 1]
            wait.limit_s = router.limit_s(peer, wait.work_tokens)
            router.begun(peer, wait.work_tokens)
            self._at(now + wait.limit_s, wait)
        way.call, self._waits[call], self._said_s[peer, stage] = call, wait, now
        self._out.append(AskStage(call, kind, stage, peer, key, way.tokens))

    # ------------------------------------------------------------- back

    def _ask_back(self, way: _Way, now: float) -> None:
        """Ask the peer that has the forward for the backward."""
        place = way.places[way.stage]
        assert place is not None
        self._ask(way, "backward", *place, now)

    # ------------------------------------------------------------- what became of a call

    def _ended(self, call: int) -> _Wait | None:
        """End a call; None if nobody waits for it any more."""
        wait = self._waits.pop(call, None)
        if wait is not None:
            wait.due_s = wait.way.call = None
        return wait

    def _done(self, event: StageCallDone, now: float) -> None:
        """Continue a microbatch after an answer: to the next stage, on the way back, or to its end."""
        if (wait := self._ended(event.call)) is None:
            return
        way, stage = wait.way, wait.stage
        if stage:
            self.routers[stage - 1].finished(wait.peer, now, now - wait.began_s, wait.work_tokens)
        if not way.goes_back and stage < len(self.routers):
            way.stage += 1
            way.asked.clear()
            self._ask_there(way, now)
            return
        way.incarnations[stage] = event.incarnation
        if not way.goes_back:
            way.goes_back, way.loss = True, event.loss
        if not stage:
            self._come_back(way, now)
            return
        way.stage, way.attempts_left = stage - 1, _BACKWARD_ATTEMPTS
        self._ask_back(way, now)

    def _come_back(self, way: _Way, now: float) -> None:
        del self._ways[way.sequence]
        took_s = now - way.began_s
        self.quickest_s = took_s if self.quickest_s is None else min(self.quickest_s, took_s)
        for stage, place in enumerate(way.places):
            assert place is not None
            peer, key = place
            # The incarnation that computed the gradient is named: a peer that died, came back and was asked again by a
            # late call once took a repeated acknowledgement for that call's (decision 26).
            self._settling_of(_Whom(peer, stage, way.incarnations[stage])).acknowledged[key] = way.loss
        self._out.append(Back(way.sequence, way.loss))

    def _timed_out(self, wait: _Wait, now: float) -> None:
        call = wait.way.call
        assert call is not None
        self._ended(call)
        took_s = now - wait.began_s
        self._out.append(CancelStageCall(call))
        self.routers[wait.stage - 1].timed_out(wait.peer, now, took_s, wait.work_tokens)
        self._ask_otherwise(wait, "unreachable", f"no answer within {min(took_s, wait.limit_s):.1f} s", now)

    def _failed(self, event: StageCallFailed, now: float) -> None:
        """Report a failed call to the stage's router, and ask otherwise."""
        if (wait := self._ended(event.call)) is None:
            return
        if wait.stage:
            router = self.routers[wait.stage - 1]
            if event.why == "busy":
                router.refused_busy(wait.peer, now, wait.work_tokens)
            elif event.why == "gone":  # no fault: it has moved, or its weights have
                router.given_up(wait.peer, wait.work_tokens)
            else:
                router.failed(wait.peer, now, now - wait.began_s, wait.work_tokens, event.reason)
                if event.why == "wrong":
                    self._out.append(Wrong(wait.peer, event.reason, event.code))
        self._ask_otherwise(wait, event.why, event.reason, now)

    def _ask_otherwise(self, wait: _Wait, why: Fault, reason: str, now: float) -> None:
        """Continue after a failed call: ask another peer, or the same one again.

        If this peer's own stage is being merged or left ("gone" at stage 0), the microbatch is given up.
        """
        way, stage = wait.way, wait.stage
        if why == "busy":
            if way.goes_back:
                self._at(now + _AGAIN_S, way)
                return
            way.places[stage] = None
            if stage:
                self._ask_there(way, now)
            else:
                self._at(now + _POLL_INTERVAL_S, way)
            return
        if way.goes_back:
            self._ask_back_otherwise(wait, why, reason, now)
            return
        self._drop_place(way, stage)
        if not stage and why == "gone":
            self._give_up(way)
            rest = _Rest()
            self._rests.add(rest)
            self._at(now + _POLL_INTERVAL_S, rest)
            self._out.append(Back(way.sequence, 0.0, reason))
            return
        way.asked.add(wait.peer)
        self._out.append(Retried(way.sequence, stage, wait.peer, reason))
        if stage:
            self._ask_there(way, now)
        else:
            self._at(now + _AGAIN_S, way)

    def _ask_back_otherwise(self, wait: _Wait, why: Fault, reason: str, now: float) -> None:
        """Ask the same peer again while it is there; otherwise start again at this stage."""
        way, stage = wait.way, wait.stage
        way.attempts_left -= 1
        self._out.append(Retried(way.sequence, stage, wait.peer, reason))
        is_here = stage == 0 or self.routers[stage - 1].has(wait.peer)
        if not way.attempts_left or not is_here or why in ("gone", "wrong"):
            self._begin_again(way, stage, now)
        else:
            self._at(now + _AGAIN_S, way)

    def _give_up(self, way: _Way) -> None:
        """End a microbatch that must not count at any stage."""
        del self._ways[way.sequence]
        way.due_s = None
        if (call := way.call) is not None and (wait := self._ended(call)) is not None:
            self._out.append(CancelStageCall(call))
            if wait.stage:
                self.routers[wait.stage - 1].given_up(wait.peer, wait.work_tokens)
        for stage in range(self.num_stages):
            self._drop_place(way, stage)

    # ------------------------------------------------------------- what counts

    def _drop_place(self, way: _Way, stage: int) -> None:
        """Record that the result of `stage` for this microbatch must not count."""
        place, way.places[stage] = way.places[stage], None
        if place is not None:
            peer, key = place
            self._settling_of(_Whom(peer, stage, _ANY_INCARNATION)).dropped[key] = None

    def _settling_of(self, whom: _Whom) -> _Settling:
        self._touched[whom] = None
        if (settling := self._settling.get(whom)) is None:
            settling = self._settling[whom] = _Settling(whom)
        return settling

    def _tell(self, settling: _Settling, now: float) -> None:
        """Start to send a settlement to a peer. It is repeated until the peer confirms it or is given up."""
        if settling.call is not None or settling.due_s is not None:
            return
        settling.give_up_s, settling.again_s = now + _GIVE_UP_S, _AGAIN_S
        self._tell_now(settling, now)

    def _tell_now(self, settling: _Settling, now: float) -> None:
        whom, call = settling.whom, next(self._calls)
        acknowledged = itertools.islice(settling.acknowledged.items(), _MOST_SETTLED)
        said = tuple(Acknowledged(key, loss) for key, loss in acknowledged)
        dropped = tuple(itertools.islice(settling.dropped, _MOST_SETTLED))
        settling.said = Settlement(whom.incarnation, said, dropped, self._oldest_unreported(whom))
        settling.call, self._telling[call] = call, settling
        self._said_s[whom.peer, whom.stage] = now
        self._at(now + _SETTLE_LIMIT_S, settling)
        self._out.append(Tell(call, whom.peer, whom.stage, settling.said))

    def _settling_time_came(self, settling: _Settling, now: float) -> None:
        if (call := settling.call) is None:
            self._tell_now(settling, now)
            return
        self._out.append(CancelStageCall(call))
        del self._telling[call]
        self._not_told(settling, f"no answer within {_SETTLE_LIMIT_S:g} s", now)

    def _not_told(self, settling: _Settling, reason: str, now: float) -> None:
        if now >= settling.give_up_s:
            assert settling.said is not None
            # The peer never confirmed, so its gradients may have been subtracted: they are reported as lost.
            late = [each.key for each in settling.said.acknowledged]
            self._settled(settling, late, f"it does not answer ({reason})", now)
            return
        settling.call = None
        self._at(now + settling.again_s, settling)
        settling.again_s = min(2 * settling.again_s, _MOST_AGAIN_S)

    def _settled(self, settling: _Settling, late: Collection[Key], reason: str, now: float) -> None:
        """Forget the news that a peer has confirmed, report acknowledged gradients in `late` as lost, and send what is
        new since."""
        said, whom = settling.said, settling.whom
        assert said is not None
        settling.call = settling.due_s = settling.said = None
        for key, _ in said.acknowledged:
            if key in late:
                self._out.append(Lost(whom.stage, whom.peer, key, reason))
            del settling.acknowledged[key]
        for key in said.dropped:
            del settling.dropped[key]
        if settling.acknowledged or settling.dropped:
            self._tell(settling, now)
        else:
            del self._settling[whom]

    def _say_here(self, now: float) -> None:
        places = {(place[0], stage) for way in self._ways.values() for stage, place in enumerate(way.places) if place}
        self._said_s = {place: said_s for place, said_s in self._said_s.items() if place in places}
        for peer, stage in sorted(places):
            if stage and self._said_s[peer, stage] <= now - _HERE_S:
                self._settling_of(_Whom(peer, stage, _ANY_INCARNATION))
        if self._ways:
            self._at(now + _HERE_S, self._word)

    def _oldest_unreported(self, whom: _Whom) -> int:
        """Return the oldest microbatch of which that peer must keep anything.

        An acknowledged one is kept until the peer has confirmed it, because the acknowledgement may have to be
        repeated.
        """
        oldest = self.oldest_open
        for other, each in self._settling.items():
            if each.acknowledged and other[:2] == whom[:2]:
                oldest = min(oldest, min(key.sequence for key in each.acknowledged))
        return oldest


Fault: TypeAlias = Literal["busy", "gone", "unreachable", "wrong"]
"""Why a call has no result.

- "busy": the peer's queue is full;
- "gone": the peer has moved, or does not have what is needed any more; nobody's fault;
- "unreachable": no answer;
- "wrong": the answer was invalid.
"""


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class MicrobatchDrawn:
    """A microbatch of this driver's data starts now. Its number is the engine's `next_sequence`."""

    tokens: int


@dataclass(frozen=True, slots=True)
class NoMicrobatch:
    """There is no data for the microbatch that was to start, or the first stage does not compute now. None is drawn
    before the next `PeersSeen`."""


@dataclass(frozen=True, slots=True)
class PeersSeen:
    """The peers that hold each stage now, this peer included, and what they advertise."""

    peers: Mapping[int, Collection[str]]
    places: Sequence[StagePeer] = ()


@dataclass(frozen=True, slots=True)
class StageCallDone:
    """A call was answered by a peer; `incarnation` numbers that peer's process since its last start. `loss`: mean nats
    per
    token, of the last stage."""

    call: int
    incarnation: int
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class StageCallFailed:
    """A call has no result."""

    call: int
    why: Fault
    reason: str
    code: str = ""
    """Code of the error."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The caller gives up a microbatch: none of its gradients may count."""

    sequence: int


@dataclass(frozen=True, slots=True)
class ToldOf:
    """A peer has received a settlement. The microbatches in `late` came too late to count there."""

    call: int
    late: Collection[Key]


@dataclass(frozen=True, slots=True)
class NotTold:
    """A settlement could not be delivered."""

    call: int
    reason: str


@dataclass(frozen=True, slots=True)
class Shut:
    """No more microbatches start."""


@dataclass(frozen=True, slots=True)
class TimeCame:
    """The time that `DriverEngine.wake_at` asked for has come."""


DrivingEvent: TypeAlias = (
    MicrobatchDrawn
    | NoMicrobatch
    | PeersSeen
    | StageCallDone
    | StageCallFailed
    | GiveUp
    | ToldOf
    | NotTold
    | Shut
    | TimeCame
)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class DrawMicrobatch:
    """Draw the next microbatch of the data."""


@dataclass(frozen=True, slots=True)
class AskStage:
    """Ask `peer` for one part of a microbatch; at the first stage this is the driver itself.

    The input of a forward and of a tail is the stage's stored input; that of a backward is the last gradient received.
    """

    call: int
    kind: Kind
    stage: int
    peer: str
    key: Key
    tokens: int
    """Tokens of the microbatch."""


@dataclass(frozen=True, slots=True)
class CancelStageCall:
    """Stop waiting for this call."""

    call: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell a peer of a stage which microbatches count and which do not; ended by `ToldOf` or `NotTold`."""

    call: int
    peer: str
    stage: int
    settlement: Settlement


@dataclass(frozen=True, slots=True)
class Back:
    """A microbatch has come all the way back, with its loss in mean nats per token.

    If `given_up` is not empty, the microbatch was given up for that reason, because this peer's own stage computes
    nothing now.
    """

    sequence: int
    loss: float
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class Retried:
    """One part of a microbatch is asked for again, of the same peer or another."""

    sequence: int
    stage: int
    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """A peer sent an invalid answer."""

    peer: str
    reason: str
    code: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The gradient of a microbatch does not count at this stage, although it was computed."""

    stage: int
    peer: str
    key: Key
    reason: str


DrivingCommand: TypeAlias = DrawMicrobatch | AskStage | CancelStageCall | Tell | Back | Retried | Wrong | Lost
