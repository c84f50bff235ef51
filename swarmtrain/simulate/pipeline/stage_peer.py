"""A peer of the simulated pipeline: it serves its stages, drives microbatches if it holds the first, and moves.

It serves one piece of work at a time, by `protocol.pipeline.stage_queue`; with several stages it takes them in turn.
Driving is in `simulate/pipeline/stage_driver.py`, moving in `simulate/pipeline/stage_moves.py`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import Protocol

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.driver import Fault, NotTold, StageCallDone, StageCallFailed, ToldOf
from swarmtrain.protocol.pipeline.ledger import Add, LedgerLimits, StageLedger, Subtract
from swarmtrain.protocol.pipeline.router import WORK_SHARES
from swarmtrain.protocol.pipeline.stage_queue import (
    AnswerStageCalls,
    Closed,
    Compute,
    Computed,
    Free,
    Late,
    QueueCommand,
    QueueEvent,
    Refuse,
    Settles,
    StageCallReceived,
    StageQueue,
)
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.pipeline.settings import PipelineMachine
from swarmtrain.simulate.pipeline.stage_driver import Call, DriverReport, DrivingGround, StageDriver
from swarmtrain.simulate.pipeline.stage_moves import SimulatedMover
from swarmtrain.simulate.systems.messages import SimulatedLink

_LEARN = 0.05
_GONE = "it does not hold this stage"


class StageGround(DrivingGround, Protocol):
    """Simulated world, as a peer that serves stages sees it."""

    @property
    def peers(self) -> Mapping[str, StageVolunteer]:
        """Peers that are switched on, by name."""

    def publish(self, name: str, record: StagePeer | None) -> None:
        """Store a record in the DHT; None is a goodbye."""

    def recount(self) -> None:
        """Recompute the rates, because peers were switched on or off, or one serves other stages."""


class StageVolunteer:
    """One session of a machine, from being switched on to being switched off. A machine that returns is a new session
    with the same name."""

    def __init__(self, world: StageGround, machine: PipelineMachine, rng: random.Random) -> None:
        self.world, self.machine, self.rng = world, machine, rng
        self.name = machine.name
        self.link = SimulatedLink(latency_s=world.settings.latency_s / 2)
        self.alive, self.silent, self.hung = True, False, False
        self.stages: tuple[int, ...] = ()
        self.table: dict[str, StagePeer] = {}
        """Records of other peers, as this one has read them."""
        self.mover = SimulatedMover(self)
        self.driver: StageDriver | None = None
        self.speed_tokens_per_s = machine.tokens_per_s * math.exp(rng.gauss(0, 0.15))
        """Speed as the peer measures it; at first by a short test."""
        self.queues: dict[int, StageQueue] = {}
        """Queues of the stages that the peer serves. That of the first stage stays until its microbatches under way are
        finished."""
        self._calls: dict[int, Call] = {}
        """Unanswered calls, by the number of the asker."""
        self._askers = itertools.count()
        self._busy = False
        self._alarm: Timer | None = None

    # ------------------------------------------------------------------ its life

    def begin(self, stages: tuple[int, ...]) -> None:
        """Start after the machine was switched on."""
        settings, clock = self.world.settings, self.world.clock
        if stages:
            self.serve(stages)
        else:
            self.announce()  # before the others choose, who must know it
            clock.call_later(settings.record_delay_s[1], self.mover.arrive)  # it reads the DHT first
        clock.call_later(self.rng.uniform(0, settings.announce_every_s), self._announce_again)
        clock.call_later(self.rng.uniform(0, settings.look_every_s), self._look_again)
        knows_s = settings.announce_every_s + settings.record_delay_s[1]  # it has seen everyone's record by then
        clock.call_later(knows_s + self.rng.uniform(0, settings.announce_every_s), self.mover.look_again)

    def die(self, silent: bool) -> None:
        """Stop, because the machine was switched off."""
        self.alive, self.silent = False, silent

    def serve(self, stages: tuple[int, ...]) -> None:
        """Serve these stages from now on."""
        for stage in [stage for stage in self.stages if stage not in stages]:
            self._leave(stage)
        self.stages = stages
        for stage in stages:
            if stage not in self.queues:
                self.queues[stage] = StageQueue(StageLedger(self._limits, int(self.world.clock.now * 1e6) + 1))
        if 0 in stages and self.driver is None:
            self.driver = StageDriver(self)
        self.announce()
        self.world.recount()
        if stages:
            self.world.note(self.name, "serves", " ".join(map(str, stages)))
        self._look()
        self.pump()

    @property
    def record(self) -> StagePeer:
        """Record of this peer, as it is now."""
        planned = self.stages or self.mover.moving_to
        return StagePeer(
            peer=self.name,
            stages=self.stages,
            tokens_per_s=self.speed_tokens_per_s / (self.world.settings.rule.cost(planned) if planned else 1.0),
            moving_to=self.mover.moving_to,
            bound=self.mover.engine.bound(self.world.clock.now) if self.stages else (),
            most_stages=self.machine.most_stages,
            move_s=self.machine.fetch_s,
            queue=self.queue,
            seen_s=self.world.clock.now,
        )

    @property
    def queue(self) -> float:
        """Number of tasks that wait."""
        return sum(queue.num_waiting for queue in self.queues.values())

    @property
    def works(self) -> bool:
        """True unless the peer is switched off or hangs."""
        return self.alive and not self.hung

    @property
    def _limits(self) -> LedgerLimits:
        settings = self.world.settings
        return LedgerLimits(batch_tokens=settings.microbatch_tokens * settings.batch_microbatches)

    def announce(self) -> None:
        """Publish the record now."""
        self.world.publish(self.name, self.record)

    def _announce_again(self) -> None:
        if self.alive:
            self.announce()
            self.world.clock.call_later(self.world.settings.announce_every_s, self._announce_again)

    def _look_again(self) -> None:
        if self.alive:
            self._look()
            self.world.clock.call_later(self.world.settings.look_every_s, self._look_again)

    def _look(self) -> None:
        self.world.look(self.name, self.table)
        if self.driver is not None:
            self.driver.see([*self.table.values(), self.record])

    def _leave(self, stage: int) -> None:
        """Leave a stage. The first stage is left some seconds later, so that microbatches under way can finish."""
        driver, self.driver = (self.driver, None) if stage == 0 else (None, self.driver)
        if driver is None:
            self._receive(stage, Closed())
            del self.queues[stage]
        else:
            driver.stop()
            self.world.clock.call_later(self.world.settings.drain_s, self._drained, driver)

    def _drained(self, driver: StageDriver) -> None:
        driver.give_up()
        if 0 not in self.stages and 0 in self.queues:
            self._receive(0, Closed())
            del self.queues[0]

    # ------------------------------------------------------------------ serving

    def arrive(self, call: Call) -> None:
        """Receive a driver's call."""
        ask = call.ask
        if not self.works:
            if not self.silent and not self.hung:
                self._fail(call, "unreachable", "it is gone")
        elif ask.stage not in self.queues:
            self._fail(call, "gone", _GONE)
        else:
            asker = next(self._askers)
            self._calls[asker] = call
            self._receive(ask.stage, StageCallReceived(asker, ask.key, ask.kind, ask.tokens))
            self.pump()

    def settle(self, told: DriverReport) -> None:
        """Receive a driver's settlement."""
        if not self.works:
            if not self.silent and not self.hung:
                self._say(told.driver, NotTold(told.call, "it is gone"))
        elif (queue := self.queues.get(told.stage)) is None:
            self._say(told.driver, NotTold(told.call, _GONE))
        else:
            (late,) = queue.receive(Settles(told.driver.peer.name, told.settlement), self.world.clock.now)
            assert isinstance(late, Late)
            self._say(told.driver, ToldOf(told.call, late.keys))
            self.pump()

    def _say(
        self, driver: StageDriver, event: NotTold | ToldOf | StageCallFailed | StageCallDone, after_s: float = 0.0
    ) -> None:
        if driver.peer is self:
            driver.receive(event)
        else:
            self.world.send(self, driver.peer, driver.receive, event, after_s=after_s)

    def _fail(self, call: Call, why: Fault, reason: str) -> None:
        self._say(call.driver, StageCallFailed(call.ask.call, why, reason))

    def _receive(self, stage: int, event: QueueEvent) -> None:
        """Pass an event to a stage's queue, and carry out its commands."""
        queue = self.queues[stage]
        self._do(stage, queue, queue.receive(event, self.world.clock.now))

    def _do(self, stage: int, queue: StageQueue, commands: list[QueueCommand]) -> bool:
        """Carry out commands; return whether this peer computes now."""
        for command in commands:
            if isinstance(command, AnswerStageCalls):
                for asker in command.askers:
                    call = self._calls.pop(asker)
                    done = StageCallDone(call.ask.call, queue.ledger.incarnation, 1.0)
                    self._say(call.driver, done, self.world.settings.tensors_s)
            elif isinstance(command, Refuse):
                for asker in command.askers:
                    self._fail(self._calls.pop(asker), command.why, command.reason)
            elif isinstance(command, Compute):
                self._work(stage, queue, command, WORK_SHARES[command.kind])
            elif isinstance(command, Subtract | Add):
                self._work(stage, queue, None, 1.0)
        return self._busy

    def pump(self) -> None:
        """Begin the next piece of work, if there is one and the peer is idle."""
        if self._busy or not self.works:
            return
        now, wakes_s = self.world.clock.now, math.inf
        for stage, queue in list(self.queues.items()):
            while True:
                commands = queue.receive(Free(), now)
                if self._do(stage, queue, commands):
                    return
                if not commands:
                    break
            if (wake_s := queue.wake_at()) is not None:
                wakes_s = min(wakes_s, wake_s)
        if wakes_s < math.inf:
            self._alarm = self.world.clock.call_by(self._alarm, wakes_s, self.pump)

    def _work(self, stage: int, queue: StageQueue, what: Compute | None, share: float) -> None:
        settings = self.world.settings
        work = settings.microbatch_tokens * settings.rule.costs[stage] * share
        took_s = work / self.machine.tokens_per_s * math.exp(self.rng.gauss(0, settings.jitter))
        self._busy = True
        self.world.clock.call_later(took_s, self._worked, stage, queue, what, work / took_s)

    def _worked(self, stage: int, queue: StageQueue, what: Compute | None, tokens_per_s: float) -> None:
        self._busy = False
        if not self.works:
            return
        self.speed_tokens_per_s += _LEARN * (tokens_per_s - self.speed_tokens_per_s)
        if what is not None and self.queues.get(stage) is queue:
            self._receive(stage, Computed(what.key, what.kind))
        if stage in self.queues:  # the others first
            self.queues[stage] = self.queues.pop(stage)
        self.pump()
