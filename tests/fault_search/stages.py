"""Schedules of faults in a pipeline whose peers move between stages, and the invariants that must hold.

- A peer that has promised to stay in a stage stays.
- A move leaves no stage empty, whatever records say, while nobody dies that has promised to stay.
- Once the faults are over each stage is held again, by peers that do it, and microbatches come through.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fault_search.faults import declare, end_faults
from fault_search.schedule import FaultSchedule, FaultSpan, Played, ScheduledFault, Violation, draw_faults
from swarmtrain.protocol.pipeline.balance import Rule, StagePeer
from swarmtrain.protocol.pipeline.moves import StayAnswer
from swarmtrain.simulate.pipeline.settings import PipelineMachine, PipelineSettings
from swarmtrain.simulate.pipeline.stage_moves import Moving, SimulatedMover
from swarmtrain.simulate.pipeline.stage_peer import StageVolunteer
from swarmtrain.simulate.pipeline.world import PipelineWorld
from swarmtrain.simulate.systems.network import NetworkPlace

_RECOVERY_S = 200.0
"""Seconds until an empty stage is held again.

A record expires (30 s), everyone looks (10 s), promises end (60 s), somebody downloads (10 s each).
"""
_RATE_S = 40.0
_LONGEST_CALL_S = 300.0
"""Most seconds until what was lost without a word is asked again: `Router.most_limit_s`."""
_PROMISED_S = 60.0
_SPAN = FaultSpan(10.0, 110.0, 60.0)
_LEAST_S = 60.0
_GONE = ("kill", "vanish", "leave", "restart", "freeze")
_KINDS = {
    "kill": 3, "vanish": 2, "leave": 2, "restart": 2, "freeze": 2, "partition": 2, "cut": 2, "delay": 1, "loss": 2,
    "twice": 2, "late": 2, "slow": 3, "join": 3, "lie: claims": 1, "lie: speed": 1, "lie: slow": 1, "lie: moves": 1,
    "lie: is bound": 1, "lie: promises": 1, "lie: breaks": 1,
}  # fmt: skip


def draw_stages(rng: random.Random) -> FaultSchedule:
    """Draw a pipeline of two to four stages and a few peers, piled or spread, and its faults."""
    num_stages = rng.choice((2, 3, 3, 4))
    speeds = tuple(rng.choice((300.0, 500.0, 800.0)) for _ in range(num_stages + rng.choice((0, 1, 1, 2, 3))))
    options = [("stages", float(num_stages))]
    if rng.random() < 0.6:
        options.append(("piled", float(rng.randrange(1, len(speeds)))))
    if rng.random() < 0.4:
        options.append(("most_stages", 1.0))
    if rng.random() < 0.5:
        options.append(("stale", 1.0))
    return FaultSchedule(
        world="stages",
        speeds=speeds,
        faults=draw_faults(rng, _KINDS, len(speeds), _SPAN, lambda kind: rng.randrange(64)),
        options=tuple(options),
        seed=rng.randrange(2**16),
    )


# ---------------------------------------------------------------- liars


class LyingMover(SimulatedMover):
    """Mover that promises to stay in any stage that it is asked for."""

    def asked(self, number: int, stage: int, by: SimulatedMover) -> None:
        """Promise to stay."""
        if "promises" not in getattr(self.peer, "lies", ()):
            super().asked(number, stage, by)
            return
        answer = StayAnswer(stage, _PROMISED_S, "it stays, it says")
        self.peer.world.send(self.peer, by.peer, by.answered, number, answer)


class StageLiar(StageVolunteer):
    """Simulated peer that works as the others do, but lies about it."""

    def __init__(self, world: PipelineWorld, machine: PipelineMachine, rng: random.Random) -> None:
        self._lies: frozenset[str] = frozenset()
        super().__init__(world, machine, rng)
        self.mover = LyingMover(self)

    @property
    def lies(self) -> frozenset[str]:
        """Kinds of lies in the peer's record. A change is announced at once."""
        return self._lies

    @lies.setter
    def lies(self, lies: frozenset[str]) -> None:
        self._lies = lies
        self.announce()

    @property
    def record(self) -> StagePeer:
        """Record of this peer, altered by its lies."""
        told, every = super().record, tuple(range(self.world.settings.rule.num_stages))
        if "claims" in self.lies:
            told = replace(told, stages=every, tokens_per_s=100 * told.tokens_per_s)
        if "speed" in self.lies or "slow" in self.lies:
            told = replace(told, tokens_per_s=told.tokens_per_s * (1000 if "speed" in self.lies else 0.001))
        if "moves" in self.lies:
            told = replace(told, moving_to=every[:1])
        return replace(told, bound=every) if "is bound" in self.lies else told


class SearchedPipeline(PipelineWorld):
    """Simulated pipeline with peers that may lie. It records which peers have promised to stay."""

    def __init__(self, schedule: FaultSchedule) -> None:
        self.schedule = schedule
        self.broken: list[Violation] = []
        self._stays_until_s: dict[tuple[NetworkPlace, int], float] = {}
        num_stages = int(schedule.option("stages", 2))
        rule = Rule(costs=(1 / num_stages,) * num_stages, live_s=30.0)
        self.liars = schedule.liars
        # Views that are older and differ more than real ones: what is decided from them must still be safe.
        settings = PipelineSettings(rule=rule, microbatch_tokens=8192, balance_every_s=5.0)
        if schedule.option("stale", 0):
            settings = replace(settings, record_delay_s=(0.5, 20.0), missed=0.3)
        super().__init__(settings, seed=schedule.seed)
        self.clock.most_events = 200_000

    def _make(self, machine: PipelineMachine) -> StageVolunteer:
        return (StageLiar if machine.name in self.liars else StageVolunteer)(
            self, machine, random.Random(self.rng.random())
        )

    def machine(self, name: str) -> PipelineMachine:
        """Return a peer's machine. Newcomers have the first peer's."""
        speeds = dict(zip(self.schedule.names, self.schedule.speeds, strict=True))
        most = int(self.schedule.option("most_stages", 2))
        return PipelineMachine(name=name, tokens_per_s=speeds.get(name, speeds["p0"]), fetch_s=10.0, most_stages=most)

    def come(self, name: str, checkpoint: int) -> object:
        """Start a newcomer, or a peer that has died. In a pipeline neither has anything."""
        return self.join(self.machine(name))

    def send(
        self, src: NetworkPlace, dst: NetworkPlace, call: Callable[..., object], *args: Any, after_s: float = 0.0
    ) -> None:
        """Send a message, and record promises."""
        for answer in (one for one in args if isinstance(one, StayAnswer) and one.lasts_s):
            self._stays_until_s[src, answer.stage] = self.clock.now + answer.lasts_s
        super().send(src, dst, call, *args, after_s=after_s)

    def left_stage(self, peer: Moving, stages: Sequence[int]) -> None:
        """Check that the peer leaves no stage in which it had promised to stay."""
        super().left_stage(peer, stages)
        for stage in stages if peer.name not in self.liars else ():
            if (left_s := self._stays_until_s.get((peer, stage), 0.0) - self.clock.now) > 0:
                detail = f"{peer.name} leaves stage {stage} at {self.clock.now:.1f} s, {left_s:.1f} s too early"
                self.broken.append(Violation("promises are kept", detail))


# ---------------------------------------------------------------- play


def play_stages(schedule: FaultSchedule) -> Played:
    """Play the schedule, and return the violations."""
    world = SearchedPipeline(schedule)
    num_stages, piled = world.settings.rule.num_stages, int(schedule.option("piled", 0))
    for i, name in enumerate(schedule.names):
        world.join(world.machine(name), (0 if i < piled else i % num_stages,))
    for index, fault in enumerate(schedule.faults):
        _declare(world, fault, schedule.name(fault), index)
    world.run_until(schedule.faults_end_s(_LEAST_S))
    end_faults(world, world.liars)
    world.run_until(world.clock.now + _RECOVERY_S)
    found: list[Violation] = [*world.broken, *_emptied(world, schedule), *_unserved(world, schedule)]
    world.measure_from_here()
    world.run_until(world.clock.now + _RATE_S)
    if not world.tokens_per_s and not found:
        world.run_until(world.clock.now + max(0.0, _LONGEST_CALL_S - _RECOVERY_S) + _RATE_S)
    due_tokens = world.share_of_assignment * world.ideal_per_s * _RATE_S
    if not found and not world.tokens_per_s and due_tokens > 6 * world.settings.microbatch_tokens:
        found.append(Violation("microbatches come through", "none, though every stage is held"))
    return Played(found, f"{world.clock.num_events} events, {len(world.log)} moments, {world.tokens_per_s}")


def _declare(world: SearchedPipeline, fault: ScheduledFault, name: str, index: int) -> None:
    def leave_stage() -> None:
        if (peer := world.peers.get(name)) is not None and peer.stages:
            peer.serve((fault.detail % world.settings.rule.num_stages,))

    def slow() -> None:
        if name in world.peers:
            world.slow(name, 2.0 + fault.detail % 9)

    match fault.kind:
        case "vanish":
            world.at(fault.at_s, world.kill, name, True)
        case "slow":
            world.at(fault.at_s, slow)
        case "lie: breaks":
            world.at(fault.at_s, leave_stage)
        case _:
            declare(world, fault, name, index, world.come)


# ---------------------------------------------------------------- what must hold


def _suffice(world: SearchedPipeline, schedule: FaultSchedule) -> bool:
    """Return whether the peers that are left can hold all stages."""
    return len(world.peers) * int(schedule.option("most_stages", 2)) >= world.settings.rule.num_stages


def _emptied(world: SearchedPipeline, schedule: FaultSchedule) -> Iterable[Violation]:
    """Check that no move emptied a stage, except where a peer was gone that had promised to stay."""
    if schedule.has("lie: promises", "lie: breaks"):
        return
    gone_s = [fault.at_s for fault in schedule.faults if fault.kind in _GONE]
    gone_s += [schedule.faults_end_s(_LEAST_S)] if world.liars else []
    for at_s, stage in world.emptied:
        if not any(at_s - _PROMISED_S <= one_s <= at_s for one_s in gone_s):
            yield Violation("no move empties a stage", f"stage {stage} at {at_s:.1f} s")


def _unserved(world: SearchedPipeline, schedule: FaultSchedule) -> Iterable[Violation]:
    if not _suffice(world, schedule):
        return
    for stage, number in enumerate(world.holders()):
        if not number:
            held = {name: peer.stages for name, peer in world.peers.items()}
            yield Violation("every stage is held again", f"nobody serves stage {stage} of {held}")
