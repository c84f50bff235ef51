"""Driver of a simulated pipeline's peer: it asks, waits and reports as `protocol.pipeline.driver` commands."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.driver import (
    AskStage,
    Back,
    CancelStageCall,
    DrawMicrobatch,
    DriverEngine,
    DriverPace,
    DrivingCommand,
    DrivingEvent,
    GiveUp,
    MicrobatchDrawn,
    PeersSeen,
    Shut,
    Tell,
    TimeCame,
)
from swarmtrain.protocol.pipeline.ledger import Settlement
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.pipeline.stage_moves import Ground
from swarmtrain.simulate.systems.network import NetworkPlace


@dataclass(slots=True, eq=False)
class Call:
    """Driver's call to a stage, under way in the simulated network."""

    driver: StageDriver
    ask: AskStage


@dataclass(slots=True, eq=False)
class DriverReport:
    """Driver's settlement, under way in the simulated network: which of its microbatches count."""

    driver: StageDriver
    call: int
    stage: int
    settlement: Settlement


class DrivenPeer(NetworkPlace, Protocol):
    """Simulated peer of a stage, as drivers see it: it receives their calls and settlements."""

    def arrive(self, call: Call) -> None:
        """Receive a driver's call."""

    def settle(self, told: DriverReport) -> None:
        """Receive a driver's settlement."""


class DrivingGround(Ground, Protocol):
    """Simulated world, as a driver sees it."""

    num_late: int

    def whom(self, name: str) -> DrivenPeer:
        """Return the peer of this name, also if it has left the swarm."""

    def finished(self, tokens: float) -> None:
        """Count the tokens of a microbatch that has passed all stages and is back."""


class Drives(DrivenPeer, Protocol):
    """Simulated peer that can be a driver itself."""

    rng: random.Random

    @property
    def world(self) -> DrivingGround:
        """Simulated world that the peer belongs to."""

    @property
    def works(self) -> bool:
        """True unless the peer is switched off or hangs."""


class StageDriver:
    """One period of driving, from taking the first stage to leaving it."""

    def __init__(self, peer: Drives) -> None:
        self.peer, settings, clock = peer, peer.world.settings, peer.world.clock
        routers = [settings.router(peer.rng) for _ in settings.rule.costs[1:]]
        pace = DriverPace(settings.in_flight, settings.microbatch_tokens, settings.batch_microbatches)
        self.engine = DriverEngine(peer.name, routers, int(clock.now * 1e6), pace)
        self._timer: Timer | None = None

    def see(self, places: list[StagePeer]) -> None:
        """Give the engine the records of all peers, this one included."""
        stages = range(self.engine.num_stages)
        self.receive(
            PeersSeen({stage: [one.peer for one in places if stage in one.stages] for stage in stages}, places)
        )

    def stop(self) -> None:
        """Begin no more microbatches."""
        self.receive(Shut())

    def give_up(self) -> None:
        """Give up all microbatches that are still under way."""
        for sequence in self.engine.open_sequences():
            self.receive(GiveUp(sequence))

    def receive(self, event: DrivingEvent) -> None:
        """Give the engine an event, and carry out its commands."""
        if not self.peer.works:
            return
        clock = self.peer.world.clock
        for command in self.engine.receive(event, clock.now):
            self._do(command)
        if (wakes_s := self.engine.wake_at()) is not None:
            self._timer = clock.call_by(self._timer, wakes_s, self._time_came)

    def _time_came(self) -> None:
        self.receive(TimeCame())

    def _do(self, command: DrivingCommand) -> None:
        peer, world = self.peer, self.peer.world
        if isinstance(command, AskStage):
            if command.peer == peer.name:
                peer.arrive(Call(self, command))
            else:
                whom = world.whom(command.peer)
                world.send(peer, whom, whom.arrive, Call(self, command), after_s=world.settings.tensors_s)
        elif isinstance(command, Tell):
            told = DriverReport(self, command.call, command.stage, command.settlement)
            if command.peer == peer.name:
                peer.settle(told)
            else:
                whom = world.whom(command.peer)
                world.send(peer, whom, whom.settle, told)
        elif isinstance(command, DrawMicrobatch):
            self.receive(MicrobatchDrawn(world.settings.microbatch_tokens))
        elif isinstance(command, Back) and not command.given_up:
            world.finished(world.settings.microbatch_tokens)
        elif isinstance(command, CancelStageCall):
            world.num_late += 1
