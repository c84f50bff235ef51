"""Moves of a peer from stage to stage: when it checks, what it decides, and in which order it takes and leaves stages.

`balance` decides who moves. `StageLeases` ensures that no move empties a stage: a peer that leaves one has first asked
another holder to stay for a while. It takes the new stage before it leaves the old one if its memory holds both.

Everything here is pure: events go in, commands come out. Several commands are to be executed one after the other.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.balance import (
    Rule,
    StageChange,
    StagePeer,
    anchor,
    change_by_queues,
    may_move_again,
    my_change,
)
from swarmtrain.words import short_peer

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PlacesSeen:
    """Records of all peers, this one included, at the records' time; wanted at `wake_at`."""

    peers: Sequence[StagePeer]
    records_s: float


@dataclass(frozen=True, slots=True)
class StayAsked:
    """Another peer wants to leave a stage, and asks this one to stay.

    `holds` are this peer's stages. `is_known`: this peer knows that the other one holds the stage.
    """

    mover: str
    stage: int
    holds: Sequence[int]
    is_known: bool


@dataclass(frozen=True, slots=True)
class StayAnswered:
    """Ends `AskToStay`: for how many seconds the other peer stays, 0 if it refuses, and why."""

    number: int
    lasts_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class StagesFetched:
    """The new stages are here and served. The event has the records of all peers at that moment."""

    peers: Sequence[StagePeer]
    records_s: float


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The new stages cannot be fetched."""

    reason: str


@dataclass(frozen=True, slots=True)
class StagesLeft:
    """The old stages are left."""


MoveEvent: TypeAlias = PlacesSeen | StayAsked | StayAnswered | StagesFetched | FetchFailed | StagesLeft


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class AskToStay:
    """Ask a peer to stay in a stage; ended by `StayAnswered`."""

    number: int
    peer: str
    stage: int


@dataclass(frozen=True, slots=True)
class StayAnswer:
    """Answer the peer that asked: for how many seconds this one stays in the stage, 0 if it refuses, and why."""

    stage: int
    lasts_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Moves:
    """Advertise the stages that this peer is moving to."""

    change: StageChange


@dataclass(frozen=True, slots=True)
class FetchStages:
    """Fetch these stages and serve them; ended by `StagesFetched` or `FetchFailed`."""

    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaveStages:
    """Leave these stages; ended by `StagesLeft`."""

    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """The move is complete: advertise it."""

    change: StageChange


@dataclass(frozen=True, slots=True)
class StaysHere:
    """The move is given up. If it had been advertised (`had_begun`), advertise that too."""

    change: StageChange
    reason: str
    had_begun: bool


MoveCommand: TypeAlias = AskToStay | StayAnswer | Moves | FetchStages | LeaveStages | Moved | StaysHere


# ---------------------------------------------------------------- state


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePolicy:
    """Conditions under which a peer moves. `balance` is the value of the run file."""

    rule: Rule
    balance: Literal["none", "queues", "rates"]
    every_s: float
    """Mean seconds between two checks."""
    most_stages: int
    """Stages that fit into the peer's memory."""


@dataclass(slots=True)
class _Move:
    """Move under way, and how far it is."""

    change: StageChange
    peers: Sequence[StagePeer]
    records_s: float
    request: tuple[int, LeaseRequest] | None = None
    """Open question to an anchor, with its number."""
    has_begun: bool = False
    has_fetched: bool = False
    has_left: bool = False


class MoveEngine:
    """Decides whether one peer should hold other stages, and orders the steps of the move."""

    def __init__(self, me: str, policy: MovePolicy, rng: random.Random, now: float) -> None:
        self.me, self.policy, self.rng, self.stays = me, policy, rng, StageLeases(me)
        self._moved_s = float("-inf")
        self._move: _Move | None = None
        self._numbers = itertools.count()
        self._wait(now)

    @property
    def change(self) -> StageChange | None:
        """Change that is under way, if any."""
        return None if self._move is None else self._move.change

    def bound(self, now: float) -> tuple[int, ...]:
        """Return the stages that this peer must not leave, for its presence record."""
        return self.stays.bound(now)

    def wake_at(self) -> float | None:
        """Return the time at which to send `PlacesSeen`; None during a move, or if peers never move."""
        return None if self._move is not None or self.policy.balance == "none" else self._next_s

    def receive(self, event: MoveEvent, now: float) -> list[MoveCommand]:
        """Return the commands that follow from an event."""
        if isinstance(event, PlacesSeen):
            return self._look(event, now)
        if isinstance(event, StayAsked):
            return [self._answer(event, now)]
        move = self._move
        if isinstance(event, StayAnswered):
            if move is None or move.request is None or move.request[0] != event.number:
                return []  # the move was given up before the answer came
            return self._answered(move, event, now)
        if move is None:
            return []  # the move was given up: what it had fetched is being left
        if isinstance(event, FetchFailed):
            return self._stay(move, event.reason)
        if isinstance(event, StagesFetched):
            move.has_fetched, move.peers, move.records_s = True, event.peers, event.records_s
        else:
            move.has_left = True
        return self._go_on(move, now)

    # ------------------------------------------------------------- whether

    def _wait(self, now: float) -> None:
        """Schedule the next check, 20 % earlier or later at random, so that not all peers check at once."""
        self._next_s = now + self.policy.every_s * self.rng.uniform(0.8, 1.2)

    def _look(self, seen: PlacesSeen, now: float) -> list[MoveCommand]:
        when_s = self.wake_at()
        if when_s is None or now < when_s:
            return []
        self._wait(now)
        decide = change_by_queues if self.policy.balance == "queues" else my_change
        change, _ = decide(self.me, seen.peers, seen.records_s, self.policy.rule)
        if change is None or not may_move_again(change, seen.peers, now - self._moved_s)[0]:
            return []
        self._move = _Move(change, seen.peers, seen.records_s)
        return self._go_on(self._move, now)

    # ------------------------------------------------------------- promises

    def _answer(self, asked: StayAsked, now: float) -> StayAnswer:
        """Answer a request to stay. Only a known holder of the stage can bind this peer to it."""
        if not asked.is_known:
            return StayAnswer(asked.stage, 0.0, f"nobody here knows that you hold stage {asked.stage}")
        request = LeaseRequest(stage=asked.stage, mover=asked.mover, anchor=self.me, asked_s=now)
        lease, reason = self.stays.asked(request, asked.holds, now)
        return StayAnswer(asked.stage, 0.0 if lease is None else lease.lasts_s, reason)

    def _ask(self, move: _Move, stage: int, now: float) -> list[MoveCommand]:
        """Ask an anchor to stay in this stage, or give up the move."""
        may, reason = self.stays.wants_to_leave(stage, now)
        if may:
            peer = anchor(self.me, move.peers, stage, move.records_s, self.policy.rule)
            if peer is not None:
                number = next(self._numbers)
                move.request = number, LeaseRequest(stage=stage, mover=self.me, anchor=peer, asked_s=now)
                return [AskToStay(number, peer, stage)]
            reason = "nobody else holds it"
        return self._stay(move, f"does not leave stage {stage}: {reason}")

    def _answered(self, move: _Move, event: StayAnswered, now: float) -> list[MoveCommand]:
        assert move.request is not None
        (_, request), move.request = move.request, None
        if not event.lasts_s:
            return self._stay(move, f"does not leave stage {request.stage}: {event.reason}")
        self.stays.granted(StageLease(request=request, lasts_s=event.lasts_s))
        return self._go_on(move, now)

    def _stay(self, move: _Move, reason: str) -> list[MoveCommand]:
        """Give up the move, and leave the stages that were fetched for it."""
        self._over(move)
        stays = StaysHere(move.change, reason, move.has_begun)
        return [LeaveStages(move.change.enters), stays] if move.has_fetched and move.change.enters else [stays]

    def _over(self, move: _Move) -> None:
        self._move = None
        for stage in move.change.leaves:
            self.stays.over(stage)

    # ------------------------------------------------------------- moving

    def _go_on(self, move: _Move, now: float) -> list[MoveCommand]:
        """Return the next command of the move.

        An anchor must have promised to stay in each stage that is left, both when the move begins and at the moment of
        leaving.
        """
        change, done = move.change, list[MoveCommand]()
        if not move.has_left:
            for stage in change.leaves:
                if not self.stays.may_leave(stage, now)[0]:
                    return self._ask(move, stage, now)
        if not move.has_begun:
            move.has_begun = True
            done.append(Moves(change))
        fits = len({*change.before, *change.after}) <= self.policy.most_stages
        if change.enters and not move.has_fetched and (fits or move.has_left):
            return [*done, FetchStages(change.enters)]
        if change.leaves and not move.has_left:
            return [*done, LeaveStages(change.leaves)]
        self._moved_s = now
        self._over(move)
        return [*done, Moved(change)]


@dataclass(frozen=True, kw_only=True)
class LeaseRequest:
    """Request of `mover`, which wants to leave `stage`, that `anchor` stay."""

    stage: int
    mover: str
    anchor: str
    asked_s: float
    """Time of the request by the mover's clock. It comes back with the lease and means nothing to the anchor."""


@dataclass(frozen=True, kw_only=True)
class StageLease:
    """Promise of the request's anchor to hold the stage for at least `lasts_s` seconds."""

    request: LeaseRequest
    lasts_s: float

    def holds(self, now: float) -> bool:
        """Return whether the mover can rely on the lease, by the mover's clock."""
        return now < self.request.asked_s + self.lasts_s


@dataclass
class StageLeases:
    """Leases that one peer has given and received. `lasts_s` is the duration of those that it gives."""

    me: str
    lasts_s: float = 60.0
    _bound_until_s: dict[int, float] = field(default_factory=dict)
    """Time until which this peer must stay in each stage."""
    _leaving: dict[int, StageLease | None] = field(default_factory=dict)
    """Stages that this peer wants to leave, with the lease that it received for each."""

    # ------------------------------------------------------------------ who is asked

    def asked(self, request: LeaseRequest, stages: Collection[int], now: float) -> tuple[StageLease | None, str]:
        """Decide whether to give a lease, and record it if so. Return (lease or None, reason). `stages` are those that
        this peer serves now."""
        if request.anchor != self.me or request.mover == self.me:
            return None, "it was not this peer that was asked"
        if request.stage not in stages:
            return None, f"{short_peer(self.me)} does not serve stage {request.stage}"
        # Two holders that want to leave at the same time refuse each other, and both stay.
        if request.stage in self._leaving:
            return None, f"{short_peer(self.me)} wants to leave stage {request.stage} itself"
        until_s = max(now + self.lasts_s, self._bound_until_s.get(request.stage, now))
        self._bound_until_s[request.stage] = until_s
        return StageLease(request=request, lasts_s=self.lasts_s), f"it stays for {self.lasts_s:g} s"

    def bound(self, now: float) -> tuple[int, ...]:
        """Return the stages that this peer has promised not to leave, for its presence record."""
        return tuple(sorted(stage for stage, until_s in self._bound_until_s.items() if now < until_s))

    def bound_s(self, stage: int, now: float) -> float:
        """Return for how many seconds this peer must stay in the stage; 0 if it need not."""
        return max(0.0, self._bound_until_s.get(stage, now) - now)

    # ------------------------------------------------------------------ who leaves

    def wants_to_leave(self, stage: int, now: float) -> tuple[bool, str]:
        """Record that this peer wants to leave `stage`, unless it has promised to stay. Return (True if it may ask
        others to stay there, reason). If so, it gives no more leases for that stage."""
        if self.bound_s(stage, now) > 0:
            return False, f"it has promised to stay in stage {stage} for {self.bound_s(stage, now):.0f} s more"
        self._leaving.setdefault(stage, None)
        return True, f"nobody was promised that it stays in stage {stage}"

    def granted(self, lease: StageLease) -> None:
        """Record a lease that this peer received."""
        if lease.request.mover == self.me and lease.request.stage in self._leaving:
            self._leaving[lease.request.stage] = lease

    def may_leave(self, stage: int, now: float) -> tuple[bool, str]:
        """Return (True if this peer may leave the stage at this moment; reason)."""
        if self.bound_s(stage, now) > 0:
            return False, f"it has promised to stay in stage {stage}"
        lease = self._leaving.get(stage)
        if lease is None:
            return False, f"nobody has promised to stay in stage {stage}"
        if not lease.holds(now):
            return False, f"the promise to stay in stage {stage} has ended: it asks again"
        return True, f"{short_peer(lease.request.anchor)} stays in stage {stage}"

    def over(self, stage: int) -> None:
        """End the attempt to leave `stage`: this peer has left it, or wants to stay after all."""
        self._leaving.pop(stage, None)


_NEARLY = 0.95
"""Share of the run's tokens that counts as nearly all: the rounds under way are not counted yet."""
_LAST_ROUND_S = 30.0
"""Seconds that the other drivers have to end their last round."""


def stage_costs(measured: Sequence[float]) -> tuple[float, ...]:
    """Return each stage's share of the whole model's computation; the shares add up to one."""
    return tuple(cost / sum(measured) for cost in measured)


def places_of(infos: Iterable[PeerInfo]) -> list[StagePeer]:
    """Return the stages and speeds that these peers advertise, of those that do."""
    return [info.place for info in infos if info.place is not None]


@dataclass
class FirstStageWatch:
    """Watches whether all of the run's tokens have passed the first stage, so that no more reach the later ones.

    They have if every driver says so: while they drive, drivers need each other. A driver that never says so holds
    nobody up for ever: once most drivers say so, or one does and this peer has itself counted nearly as many tokens,
    the others have `_LAST_ROUND_S` left. If nobody drives, the word of a driver that has left is believed at once if
    this peer has counted nearly as many tokens, and otherwise after that time, because a view of the DHT may miss live
    drivers for a moment.
    """

    total_tokens: int
    is_over: bool = False
    _claimed_s: float = math.inf
    """Time since which most drivers have said so, or one has while this peer has counted nearly as many tokens; without
    interruption."""

    def look(self, here: Iterable[PeerInfo], known: Iterable[PeerInfo], counted_tokens: int, now: float) -> bool:
        """Return whether the first stage is done; once True it remains so. `counted_tokens` is the run's total by this
        peer's own count."""
        total = self.total_tokens
        told = [info.run_tokens for info in here if _drives(info)]
        said = max(told, default=0) >= total or any(info.run_tokens >= total for info in known if _drives(info))
        is_near = said and counted_tokens >= _NEARLY * total
        is_sure = min(told) >= total if told else is_near
        # The lower median: half of the drivers, or a single liar of two, are not enough.
        is_claimed = is_near or (statistics.median_low(told) >= total if told else said)
        self._claimed_s = min(self._claimed_s, now) if is_claimed else math.inf
        self.is_over = self.is_over or is_sure or now >= self._claimed_s + _LAST_ROUND_S
        return self.is_over


def _drives(info: PeerInfo) -> bool:
    return info.place is not None and 0 in info.place.planned
