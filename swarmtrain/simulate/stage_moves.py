"""How a peer of the simulated pipeline comes to its stages, and moves: `protocol.balance` decides, a promise by a
call makes sure of it, then the new stage is fetched, before the old one is left if memory holds both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from swarmtrain.protocol.balance import (
    Change,
    Joiner,
    StagePeer,
    anchor,
    change_by_queues,
    may_move_again,
    my_change,
    stages_for_joiner,
)
from swarmtrain.protocol.promises import Promise, Request, Stays
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.network import Place
from swarmtrain.simulate.stage_settings import Kind, Machine, PipelineSettings

__all__ = ["Ground", "Mover", "Moving"]

_ANSWER_S = 5.0


class Ground(Protocol):
    """Where peers move: the clock, the DHT's records, messages to the others, and who takes note."""

    settings: PipelineSettings
    clock: Clock
    num_moves: int

    @property
    def peers(self) -> Mapping[str, Moving]:
        """Those that are on, by name."""

    def look(self, viewer: str, table: dict[str, StagePeer]) -> None:
        """Bring what `viewer` knows of the others up to what it finds now."""

    def send(self, src: Place, dst: Place, call: Callable[..., object], *args: Any, after_s: float = 0.0) -> None:
        """One message: `call(*args)` when it arrives, `after_s` later than a short one; maybe never, or twice."""

    def note(self, peer: str, kind: Kind, reason: str) -> None:
        """For the log."""

    def left_stage(self, peer: Moving, stages: Sequence[int]) -> None:
        """It has moved away from them."""


class Moving(Place, Protocol):
    """The peer that holds stages."""

    alive: bool
    hung: bool
    machine: Machine
    rng: random.Random
    stages: tuple[int, ...]
    table: dict[str, StagePeer]
    speed_tokens_per_s: float
    mover: Mover

    @property
    def world(self) -> Ground:
        """Where it is."""

    @property
    def record(self) -> StagePeer:
        """What it says of itself."""

    def announce(self) -> None:
        """Say so now."""

    def serve(self, stages: tuple[int, ...]) -> None:
        """From here on it serves these."""


class Mover:
    """The part of a peer that decides what it holds."""

    def __init__(self, peer: Moving) -> None:
        self.peer = peer
        self.stays = Stays(peer.name)
        self.moving_to: tuple[int, ...] = ()
        self.change: Change | None = None
        self._moved_s = -math.inf
        self._asking: set[int] = set()
        """Stages for which it waits for a promise."""

    # ------------------------------------------------------------------ coming

    def arrive(self) -> None:
        """It has just been switched on: to which stages?"""
        peer, world = self.peer, self.peer.world
        if not peer.alive:
            return
        world.look(peer.name, peer.table)
        joiner = Joiner(peer=peer.name, tokens_per_s=peer.speed_tokens_per_s, most_stages=peer.machine.most_stages)
        stages, reason = stages_for_joiner(joiner, peer.table.values(), world.clock.now, world.settings.rule)
        if not world.settings.placed:
            stages, reason = (peer.rng.randrange(len(world.settings.rule.costs)),), "by chance"
        self.moving_to = stages
        world.note(peer.name, "moves", reason)
        peer.announce()
        world.clock.call_later(peer.machine.fetch_s * len(stages), self._serve, stages)

    def _serve(self, stages: tuple[int, ...]) -> None:
        if self.peer.alive and not self.peer.hung:
            if self.change is not None:
                self._moved_s = self.peer.world.clock.now
            self.moving_to, self.change = (), None
            self.peer.serve(stages)

    # ------------------------------------------------------------------ whether to move

    def look_again(self) -> None:
        """From time to time."""
        peer, world = self.peer, self.peer.world
        if peer.alive and not peer.hung and world.settings.balance != "none":
            if peer.stages and not self.moving_to and self.change is None:
                self._consider()
            world.clock.call_at(self.next_look_s(), self.look_again)

    def next_look_s(self) -> float:
        """By SWARM's rule all at one moment, so that only one moves; else one after the other."""
        now, every_s = self.peer.world.clock.now, self.peer.world.settings.balance_every_s
        if self.peer.world.settings.balance == "queues":
            return (math.floor(now / every_s) + 1) * every_s
        return now + every_s

    def _view(self) -> list[StagePeer]:
        return [*self.peer.table.values(), self.peer.record]

    def _consider(self) -> None:
        peer, world = self.peer, self.peer.world
        now, rule = world.clock.now, world.settings.rule
        view, by_queues = self._view(), world.settings.balance == "queues"
        change, _ = (change_by_queues if by_queues else my_change)(peer.name, view, now, rule)
        if change is None or not may_move_again(change, view, now - self._moved_s)[0]:
            return
        if by_queues:
            self._start(change)
            return
        if not all(self.stays.wants_to_leave(stage, now)[0] for stage in change.leaves):
            self._give_up(change, "")
            return
        self.change = change
        self._ask_for_promises()

    def _ask_for_promises(self) -> None:
        """Of an anchor of each stage that it leaves; then `_promised`."""
        assert self.change is not None
        world, now = self.peer.world, self.peer.world.clock.now
        self._asking = set(self.change.leaves)
        if not self._asking:
            self._promised()
        others = list(self.peer.table.values())
        for stage in self.change.leaves:
            name = anchor(self.peer.name, others, stage, now, world.settings.rule)
            asked = world.peers.get(name) if name is not None else None
            if asked is not None and name is not None:
                request = Request(stage=stage, mover=self.peer.name, anchor=name, asked_s=now)
                world.send(self.peer, asked, asked.mover.asked, request, self)
        if self._asking:
            world.clock.call_later(_ANSWER_S, self._no_answer, self.change)

    def asked(self, request: Request, by: Mover) -> None:
        """Another peer wants this one to stay."""
        world = self.peer.world
        if self.peer.alive and not self.peer.hung:
            promise, reason = self.stays.asked(request, self.peer.stages, world.clock.now)
            self.peer.announce()
            world.send(self.peer, by.peer, by.answered, request.stage, promise, reason)

    def answered(self, stage: int, promise: Promise | None, reason: str) -> None:
        """What the anchor said."""
        if not self.peer.alive or self.peer.hung or stage not in self._asking:
            return
        if promise is None:
            self._give_up(self.change, reason)
            return
        self.stays.promised(promise)
        self._asking.discard(stage)
        if not self._asking:
            self._promised()

    def _no_answer(self, change: Change) -> None:
        if self.change is change and self._asking:
            self._give_up(change, "no answer from the one who should stay")

    def _give_up(self, change: Change | None, reason: str) -> None:
        if change is not None:
            for stage in change.leaves:
                self.stays.over(stage)
            if reason:
                self.peer.world.note(self.peer.name, "stays", reason)
            was_moving, self.moving_to = self.moving_to, ()
            if was_moving:
                self.peer.announce()
        self._asking, self.change = set(), None

    # ------------------------------------------------------------------ moving

    def _promised(self) -> None:
        """Everyone who should stay has promised to."""
        assert self.change is not None
        if self.moving_to:
            self._arrived(self.change)  # it has fetched, and asked once more
        else:
            self._start(self.change)

    def _start(self, change: Change) -> None:
        peer, world = self.peer, self.peer.world
        self.change = change
        world.num_moves += 1
        self.moving_to = change.after
        world.note(peer.name, "moves", change.reason)
        fetch_s = peer.machine.fetch_s * len(change.enters)
        if not change.enters:
            self._arrived(change)
        elif len({*change.before, *change.after}) <= peer.machine.most_stages:
            peer.announce()
            world.clock.call_later(fetch_s, self._fetched, change)
        elif self._leave(change):
            peer.serve(tuple(stage for stage in change.before if stage in change.after))
            world.left_stage(peer, change.leaves)
            world.clock.call_later(world.settings.drain_s, self._drained, change, fetch_s)

    def _drained(self, change: Change, fetch_s: float) -> None:
        if self.peer.alive and self.change is change:
            self.peer.world.clock.call_later(fetch_s, self._serve, change.after)

    def _fetched(self, change: Change) -> None:
        """The new stage is there beside the old one: now it may leave that, if the promise still holds."""
        peer, now = self.peer, self.peer.world.clock.now
        if not peer.alive or peer.hung or self.change is not change:
            return
        held = all(self.stays.may_leave(stage, now)[0] for stage in change.leaves)
        if held or peer.world.settings.balance == "queues":
            self._arrived(change)
        else:
            self._ask_for_promises()

    def _arrived(self, change: Change) -> None:
        if self._leave(change):
            self._serve(change.after)
            self.peer.world.left_stage(self.peer, change.leaves)

    def _leave(self, change: Change) -> bool:
        now = self.peer.world.clock.now
        asks = self.peer.world.settings.balance != "queues"
        for stage in change.leaves if asks else ():
            may, reason = self.stays.may_leave(stage, now)
            if not may:
                self._give_up(change, reason)
                return False
        for stage in change.leaves:
            self.stays.over(stage)
        return True
