"""Assignment and moves of a simulated pipeline's peer, by `protocol.pipeline.moves`: calls and downloads take time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from swarmtrain.protocol.pipeline.balance import StagePeer, first_stages
from swarmtrain.protocol.pipeline.moves import (
    AskToStay,
    FetchStages,
    LeaveStages,
    MoveCommand,
    Moved,
    MoveEngine,
    MoveEvent,
    MovePolicy,
    Moves,
    PlacesSeen,
    StagesFetched,
    StagesLeft,
    StayAnswer,
    StayAnswered,
    StayAsked,
    StaysHere,
)
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.pipeline.settings import Kind, PipelineMachine, PipelineSettings
from swarmtrain.simulate.systems.network import NetworkPlace

_ANSWER_S = 10.0


class Ground(Protocol):
    """Simulated world, as a peer that moves between stages sees it: clock, records in the DHT, messages, and a log."""

    settings: PipelineSettings
    clock: Clock
    num_moves: int

    @property
    def peers(self) -> Mapping[str, Moving]:
        """Peers that are switched on, by name."""

    def look(self, viewer: str, table: dict[str, StagePeer]) -> None:
        """Update `table`, the records of others that `viewer` knows, to the records that it finds in the DHT now."""

    def send(
        self, src: NetworkPlace, dst: NetworkPlace, call: Callable[..., object], *args: Any, after_s: float = 0.0
    ) -> None:
        """Send one message: `call(*args)` runs when it arrives, `after_s` later than a short one; maybe never, or
        twice."""

    def note(self, peer: str, kind: Kind, reason: str) -> None:
        """Add an event to the log."""

    def left_stage(self, peer: Moving, stages: Sequence[int]) -> None:
        """Record the stages that `peer` has moved away from."""


class Moving(NetworkPlace, Protocol):
    """Simulated peer that holds stages and can move."""

    machine: PipelineMachine
    rng: random.Random
    stages: tuple[int, ...]
    table: dict[str, StagePeer]
    mover: SimulatedMover

    @property
    def world(self) -> Ground:
        """Simulated world that the peer belongs to."""

    @property
    def works(self) -> bool:
        """True unless the peer is switched off or hangs."""

    @property
    def record(self) -> StagePeer:
        """Record of this peer, as it is now."""

    def announce(self) -> None:
        """Publish the record now."""

    def serve(self, stages: tuple[int, ...]) -> None:
        """Serve these stages from now on."""


class SimulatedMover:
    """Decides for one peer which stages it holds, and carries out the moves."""

    def __init__(self, peer: Moving) -> None:
        self.peer, settings, clock = peer, peer.world.settings, peer.world.clock
        policy = MovePolicy(
            rule=settings.rule,
            balance=settings.balance,
            every_s=settings.balance_every_s,
            most_stages=peer.machine.most_stages,
        )
        self.engine = MoveEngine(peer.name, policy, peer.rng, clock.now)
        self.moving_to: tuple[int, ...] = ()

    # ------------------------------------------------------------------ coming

    def arrive(self) -> None:
        """Choose stages, after the machine was switched on and has read the others' records."""
        peer, world = self.peer, self.peer.world
        if not peer.works:
            return
        world.look(peer.name, peer.table)
        stages, reason = first_stages(peer.name, self._view(), world.clock.now, world.settings.rule)
        if not world.settings.placed:
            stages, reason = (peer.rng.randrange(len(world.settings.rule.costs)),), "by chance"
        self.moving_to = stages
        world.note(peer.name, "moves", reason)
        peer.announce()
        world.clock.call_later(peer.machine.fetch_s * len(stages), self._come, stages)

    def _come(self, stages: tuple[int, ...]) -> None:
        if self.peer.works:
            self.moving_to = ()
            self.peer.serve(stages)

    # ------------------------------------------------------------------ whether to move

    def look_again(self) -> None:
        """Check every few seconds whether this peer should move."""
        if not self.peer.works:
            return
        if self.peer.stages and not self.moving_to:
            self.receive(PlacesSeen(self._view(), self.peer.world.clock.now))
        self._look_later()

    def _look_later(self) -> None:
        clock, settings = self.peer.world.clock, self.peer.world.settings
        wakes_s = self.engine.wake_at()
        if wakes_s is not None and wakes_s > clock.now:
            clock.call_at(wakes_s, self.look_again)
        elif settings.balance != "none":  # it moves, or comes
            clock.call_later(settings.look_every_s, self.look_again)

    def _view(self) -> list[StagePeer]:
        return [*self.peer.table.values(), self.peer.record]

    def asked(self, number: int, stage: int, by: SimulatedMover) -> None:
        """Answer peer `by`, which wants to leave `stage` and asks this peer to stay in it."""
        if self.peer.works:
            told = self.peer.table.get(by.peer.name)
            is_known = told is not None and stage in told.stages
            asked = StayAsked(by.peer.name, stage, self.peer.stages, is_known)
            (answer,) = self.engine.receive(asked, self.peer.world.clock.now)
            self.peer.announce()
            self.peer.world.send(self.peer, by.peer, by.answered, number, answer)

    def answered(self, number: int, answer: StayAnswer) -> None:
        """Receive the other peer's answer, or the lack of one."""
        self.receive(StayAnswered(number, answer.lasts_s, answer.reason))

    # ------------------------------------------------------------------ events in, commands out

    def receive(self, event: MoveEvent) -> None:
        """Pass an event to the engine, and carry out its commands."""
        if self.peer.works:
            for command in self.engine.receive(event, self.peer.world.clock.now):
                self._do(command)

    def _do(self, command: MoveCommand) -> None:
        peer, world = self.peer, self.peer.world
        match command:
            case AskToStay():
                if (asked := world.peers.get(command.peer)) is not None:
                    world.send(peer, asked, asked.mover.asked, command.number, command.stage, self)
                silent = StayAnswer(command.stage, 0.0, "no answer from the one who should stay")
                world.clock.call_later(_ANSWER_S, self.answered, command.number, silent)
            case Moves():
                world.num_moves += 1
                self.moving_to = command.change.after
                world.note(peer.name, "moves", command.change.reason)
                peer.announce()
            case FetchStages():
                world.clock.call_later(peer.machine.fetch_s * len(command.stages), self._fetched, command.stages)
            case LeaveStages():
                drain_s = world.settings.drain_s if 0 in command.stages else 0.0
                peer.serve(tuple(stage for stage in peer.stages if stage not in command.stages))
                world.left_stage(peer, command.stages)
                world.clock.call_later(drain_s, self.receive, StagesLeft())
            case Moved():
                self.moving_to = ()
                peer.announce()
            case StaysHere():
                world.note(peer.name, "stays", command.reason)
                if command.had_begun:
                    self.moving_to = ()
                    peer.announce()

    def _fetched(self, stages: tuple[int, ...]) -> None:
        if self.peer.works:
            self.peer.serve(tuple(sorted({*self.peer.stages, *stages})))
            self.receive(StagesFetched(self._view(), self.peer.world.clock.now))
