"""A peer of the simulated pipeline: it serves its stages, drives microbatches if it holds stage 0, and moves.

Serving: one task at a time, in the order in which they came, then a microbatch of its own. Backwards first would seem
to spare memory; but then forwards wait without an end at a peer that is short of time, and their drivers give them up
(134 of 8,000 in a quarter of an hour with sixteen peers, against one). Driving: a microbatch goes forward from stage to
stage by the routers' choice and comes back the same way; where a peer fails, it goes on from that boundary's input.
Moving: `simulate/stage_moves.py`.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from swarmtrain.protocol.balance import StagePeer
from swarmtrain.protocol.microbatches import Kind
from swarmtrain.protocol.routing import WORK_SHARES, Router, most_in_flight
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.messages import Link
from swarmtrain.simulate.stage_moves import Ground, Mover
from swarmtrain.simulate.stage_settings import Machine

__all__ = ["Call", "Microbatch", "StageGround", "StageVolunteer"]

Outcome: TypeAlias = Literal["done", "busy", "left", "lost", "refused"]
_LEARN = 0.05
_AGAIN_S = 0.5
"""After so long a driver chooses again where it found nobody."""


@dataclass(eq=False)
class Microbatch:
    """On its way: `path` has the peer that did each stage's forward."""

    path: list[StageVolunteer | None]
    age: int = 0
    """Of its driver's microbatches when it began: those of an earlier age were given up."""
    began_s: float = 0.0
    tried: set[str] = field(default_factory=set)
    """At the present stage."""


@dataclass(eq=False)
class Call:
    """One question of a driver: a stage's forward, or backward; the last stage's forward is both."""

    driver: StageVolunteer
    peer: StageVolunteer
    microbatch: Microbatch
    stage: int
    kind: Kind
    begun_s: float = 0.0
    came_s: float = 0.0
    """When it stood in the queue."""
    timer: Timer | None = None
    open: bool = True

    @property
    def is_backward(self) -> bool:
        """Else it may be refused."""
        return self.kind == "backward"

    @property
    def share(self) -> float:
        """Of the stage's work."""
        return WORK_SHARES[self.kind]


class StageGround(Ground, Protocol):
    """What is around a peer that serves stages."""

    ghosts: dict[str, StageVolunteer]
    num_late: int
    num_too_old: int

    @property
    def peers(self) -> Mapping[str, StageVolunteer]:
        """Those that are on, by name."""

    def publish(self, name: str, record: StagePeer | None) -> None:
        """Into the DHT."""

    def finished(self, tokens: float) -> None:
        """A microbatch is through."""

    def recount(self) -> None:
        """Who is on, or what somebody serves, has changed."""


class StageVolunteer:
    """One session of a machine: who returns is a new one with the same name."""

    def __init__(self, world: StageGround, machine: Machine, rng: random.Random) -> None:
        self.world, self.machine, self.rng = world, machine, rng
        self.name = machine.name
        self.link = Link(latency_s=world.settings.latency_s / 2)
        self.alive, self.silent, self.hung = True, False, False
        self.stages: tuple[int, ...] = ()
        self.table: dict[str, StagePeer] = {}
        """The others' records, as seen."""
        self.mover = Mover(self)
        self.speed_tokens_per_s = machine.tokens_per_s * math.exp(rng.gauss(0, 0.15))
        """As measured: at first by a short test."""
        self.num_in_flight = 0
        self.most_in_flight = 0
        """Microbatches of its own, by whom it saw last."""
        self._quickest_s: float | None = None
        """What a microbatch of its own took at least."""
        self.age = 0
        self.open_calls: dict[Call, None] = {}
        self.graphs: dict[tuple[Microbatch, int], int] = {}
        """Forwards whose backward has not come, each with the steps that its peer had taken of that stage."""
        self.num_backwards: Counter[int] = Counter()
        """Of each stage: so many batches of them, so many steps."""
        self._backwards: deque[Call] = deque()
        self._forwards: deque[Call] = deque()
        self._busy = False
        self._blocked: list[deque[Microbatch]] = [deque() for _ in world.settings.rule.costs]
        self._retries: list[Timer | None] = [None for _ in world.settings.rule.costs]
        self.routers: list[Router] = [world.settings.router(rng) for _ in world.settings.rule.costs]

    # ------------------------------------------------------------------ its life

    def begin(self, stages: tuple[int, ...]) -> None:
        """It is switched on."""
        settings, clock = self.world.settings, self.world.clock
        if stages:
            self.serve(stages)
        else:
            clock.call_later(settings.record_delay_s[1], self.mover.arrive)  # it reads the DHT first
        clock.call_later(self.rng.uniform(0, settings.announce_every_s), self._announce_again)
        clock.call_later(self.rng.uniform(0, settings.look_every_s), self._look_again)
        knows_s = settings.announce_every_s + settings.record_delay_s[1]  # it has seen everyone's record by then
        clock.call_later(knows_s + self.rng.uniform(0, settings.announce_every_s), self.mover.look_again)

    def die(self, silent: bool) -> None:
        """It is switched off."""
        self.alive, self.silent = False, silent

    def serve(self, stages: tuple[int, ...]) -> None:
        """From here on it serves these."""
        self.stages = stages
        self.announce()
        self.world.recount()
        if stages:
            self.world.note(self.name, "serves", " ".join(map(str, stages)))
        self._look()
        self.pump()

    @property
    def record(self) -> StagePeer:
        """What it says of itself."""
        held = self.stages or self.mover.moving_to or (0,)
        return StagePeer(
            peer=self.name,
            stages=self.stages,
            tokens_per_s=self.speed_tokens_per_s / self.world.settings.rule.cost(held),
            moving_to=self.mover.moving_to,
            bound=self.mover.stays.bound(self.world.clock.now),
            most_stages=self.machine.most_stages,
            move_s=self.machine.fetch_s,
            queue=self.queue,
            seen_s=self.world.clock.now,
        )

    @property
    def queue(self) -> float:
        """Tasks that wait; a driver's next microbatches wait in front of stage 0."""
        drives = 0 in self.stages
        own = self.most_in_flight - self.num_in_flight if drives else 0
        return len(self._backwards) + len(self._forwards) + max(0, own)

    def announce(self) -> None:
        """Say so now."""
        if self.stages or self.mover.moving_to:
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
        if self.num_in_flight or 0 in self.stages:
            for call in [
                call for call in self.open_calls if call.peer.name not in self.table and call.peer is not self
            ]:
                self.replied(call, "refused")  # its presence has expired
            others = [*self.table.values(), self.record]
            holders = [[one for one in others if stage in one.stages] for stage in range(len(self.routers))]
            self.most_in_flight = self._most_in_flight(holders)
            for stage in range(1, len(self.routers)):
                self.routers[stage].set_peers([one.peer for one in holders[stage]])
                self._unblock(stage)

    def _most_in_flight(self, holders: list[list[StagePeer]]) -> int:
        settings = self.world.settings
        if settings.in_flight and all(holders):
            return settings.in_flight
        tokens, batch = settings.microbatch_tokens, settings.batch_microbatches
        return most_in_flight(self.name, holders, self._quickest_s, tokens, batch)

    # ------------------------------------------------------------------ serving

    def arrive(self, call: Call) -> None:
        """A question comes."""
        call.came_s = self.world.clock.now
        if not self.alive or self.hung:
            if not self.silent and not self.hung:
                self._reply(call, "refused")
        elif call.is_backward:
            if self._is_fresh(call):
                self._backwards.append(call)
                self.pump()
            else:
                self._reply(call, "lost")
        elif call.stage not in self.stages:
            self._reply(call, "left")
        elif len(self._forwards) >= self.world.settings.queue:
            self._reply(call, "busy")
        else:
            self._forwards.append(call)
            self.pump()

    def _num_steps(self, stage: int) -> int:
        return self.num_backwards[stage] // self.world.settings.batch_microbatches

    def _is_fresh(self, call: Call) -> bool:
        """Whether its forward was by weights that are a step old at most."""
        then = self.graphs.get((call.microbatch, call.stage))
        if then is not None and then < self._num_steps(call.stage) - 1:
            del self.graphs[call.microbatch, call.stage]
            self.world.num_too_old += 1
            return False
        return then is not None

    def _reply(self, call: Call, outcome: Outcome) -> None:
        told = self, call.driver, call.driver.replied, call, outcome
        if outcome == "done":
            self._send_tensors(*told)
        else:
            self.world.send(*told)

    def _send_tensors(self, *told: Any) -> None:
        """A message, once they are through."""
        if tensors_s := self.world.settings.tensors_s:
            self.world.clock.call_later(tensors_s, self.world.send, *told)
        else:
            self.world.send(*told)

    def pump(self) -> None:
        """Begin the next task, if there is one and it does nothing."""
        if self._busy or not self.alive or self.hung:
            return
        while self._backwards or self._forwards:
            call = self._next()
            if call.is_backward and call.stage and not self._is_fresh(call):
                self._reply(call, "lost")
            elif call.driver.alive:
                self._work(call)
                return
        if 0 in self.stages and self.num_in_flight < self.most_in_flight and not self._blocked[1]:
            self.num_in_flight += 1
            path = [self, *[None] * (len(self.routers) - 1)]
            self._work(Call(self, self, Microbatch(path, age=self.age, began_s=self.world.clock.now), 0, "forward"))

    def _next(self) -> Call:
        """The one that came first."""
        if not self._backwards or (self._forwards and self._forwards[0].came_s < self._backwards[0].came_s):
            return self._forwards.popleft()
        return self._backwards.popleft()

    def _work(self, call: Call) -> None:
        settings = self.world.settings
        work = settings.microbatch_tokens * settings.rule.costs[call.stage] * call.share
        took_s = work / self.machine.tokens_per_s * math.exp(self.rng.gauss(0, settings.jitter))
        self._busy = True
        self.world.clock.call_later(took_s, self._worked, call, work / took_s)

    def _worked(self, call: Call, tokens_per_s: float) -> None:
        self._busy = False
        if not self.alive or self.hung:
            return
        self.speed_tokens_per_s += _LEARN * (tokens_per_s - self.speed_tokens_per_s)
        if call.kind != "forward":
            self.graphs.pop((call.microbatch, call.stage), None)
            self.num_backwards[call.stage] += 1
        elif call.stage > 0:
            self.graphs[call.microbatch, call.stage] = self._num_steps(call.stage)
        if call.driver is self and call.stage == 0:
            self._done_here(call)
        else:
            self._reply(call, "done")
        self.pump()

    # ------------------------------------------------------------------ driving

    def _done_here(self, call: Call) -> None:
        if call.microbatch.age != self.age:
            return
        if call.is_backward:
            self.num_in_flight -= 1
            took_s = self.world.clock.now - call.microbatch.began_s
            self._quickest_s = took_s if self._quickest_s is None else min(self._quickest_s, took_s)
            self.world.finished(self.world.settings.microbatch_tokens)
        else:
            self._forward(call.microbatch, 1)

    def _forward(self, microbatch: Microbatch, stage: int) -> None:
        """On to `stage`, at whichever peer."""
        if self.alive and microbatch.age == self.age:
            self._blocked[stage].append(microbatch)
            self._unblock(stage)

    def _send(self, microbatch: Microbatch, stage: int) -> bool:
        """False if nobody may be asked now."""
        now, router = self.world.clock.now, self.routers[stage]
        kind: Kind = "tail" if stage == len(self.routers) - 1 else "forward"
        work_tokens = self.world.settings.microbatch_tokens * WORK_SHARES[kind]
        name, _ = router.choose(now, work_tokens, microbatch.tried)
        peer = self.world.peers.get(name) or self._ghost(name) if name is not None else None
        if peer is None:
            microbatch.tried.clear()
            if self._retries[stage] is None:
                next_s = min(router.next_s(now) or math.inf, now + _AGAIN_S)
                self._retries[stage] = self.world.clock.call_at(next_s, self._retry, stage)
            return False
        self._ask(peer, microbatch, stage, kind)
        return True

    def _ghost(self, name: str) -> StageVolunteer:
        """One that is gone, as calls find it."""
        return self.world.ghosts[name]

    def _retry(self, stage: int) -> None:
        self._retries[stage] = None
        self._unblock(stage)

    def _unblock(self, stage: int) -> None:
        blocked = self._blocked[stage]
        while blocked and (blocked[0].age != self.age or self._send(blocked[0], stage)):
            blocked.popleft()
        if stage == 1 and not blocked:
            self.pump()

    def _backward(self, microbatch: Microbatch, stage: int) -> None:
        """Back to the peer that did the forward."""
        peer = microbatch.path[stage]
        assert peer is not None
        if stage == 0:
            self._backwards.append(Call(self, self, microbatch, 0, "backward", came_s=self.world.clock.now))
            self.pump()
        else:
            self._ask(peer, microbatch, stage, "backward")

    def _ask(self, peer: StageVolunteer, microbatch: Microbatch, stage: int, kind: Kind) -> None:
        world, tokens = self.world, WORK_SHARES[kind] * self.world.settings.microbatch_tokens
        call = Call(self, peer, microbatch, stage, kind, world.clock.now)
        limit_s = self.routers[stage].limit_s(peer.name, tokens)
        self.routers[stage].begun(peer.name, tokens)
        self.open_calls[call] = None
        call.timer = world.clock.call_later(limit_s, self.replied, call, "late")
        self._send_tensors(self, peer, peer.arrive, call)

    def replied(self, call: Call, outcome: Outcome | Literal["late"]) -> None:
        """What became of a question."""
        if not call.open or not self.alive or self.hung:
            return
        call.open = False
        self.open_calls.pop(call, None)
        if call.timer is not None:
            call.timer.cancel()
        now, router, name = self.world.clock.now, self.routers[call.stage], call.peer.name
        took_s, tokens = now - call.begun_s, call.share * self.world.settings.microbatch_tokens
        if outcome == "done":
            router.finished(name, now, took_s, tokens)
            self._go_on(call)
            return
        if outcome == "busy":
            router.refused_busy(name, now, tokens)
        elif outcome == "late":
            self.world.num_late += 1
            router.timed_out(name, now, took_s, tokens)
        elif outcome == "refused":
            router.failed(name, now, took_s, tokens, "it is gone")
        else:
            router.given_up(name, tokens)
        call.microbatch.path[call.stage] = None
        call.microbatch.tried.add(name)
        self._forward(call.microbatch, call.stage)  # from that boundary's input

    def _go_on(self, call: Call) -> None:
        microbatch, stage = call.microbatch, call.stage
        microbatch.tried.clear()
        if call.kind == "forward":
            microbatch.path[stage] = call.peer
            self._forward(microbatch, stage + 1)
        else:
            self._backward(microbatch, stage - 1)
        self._unblock(stage)

    def drop_microbatches(self) -> None:
        """It gives up what it has begun, and forgets what others have begun with it."""
        self.graphs.clear()
        self.num_in_flight = 0
        self.age += 1
