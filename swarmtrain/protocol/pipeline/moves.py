"""Moves of a peer from stage to stage: when it checks, what it decides, and in which order it takes and leaves stages.

`balance` decides who moves. `stage_leases` ensures that no move empties a stage: a peer that leaves one has first asked
another holder to stay for a while. It takes the new stage before it leaves the old one if its memory holds both.

Everything here is pure: events go in, commands come out. Several commands are to be executed one after the other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.balance import (
    Rule,
    StageChange,
    StagePeer,
    anchor,
    change_by_queues,
    may_move_again,
    my_change,
)
from swarmtrain.protocol.pipeline.stage_leases import LeaseRequest, StageLease, StageLeases

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
