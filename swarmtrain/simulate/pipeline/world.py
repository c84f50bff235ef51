"""A pipeline in memory: peers that hold stages, come, go and move, and microbatches that pass through them.

The peers (`simulate/pipeline/stage_peer.py`) drive, queue, count and move by the product's `driver`, `stage_queue`,
`ledger` and `moves` of `protocol.pipeline`. This module is what surrounds them: machines, calls, records in the DHT,
and measurements.

Modelled are the time of a task (the machine's speed, the stage's cost, chance), a latency for each call, records that
are seconds old and differ between viewers, the download of a stage, and peers that die with or without a goodbye. Not
modelled are links that share their bandwidth, memory of activations, and training itself.

Throughput is measured in tokens of finished microbatches, as a share of the ideal: the most that any assignment of one
stage to each machine could do, for the machines that are on at each moment, loading or not. That is an upper bound, not
the best assignment found; no assignment quite reaches it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.peer.estimate import activation_wire_bytes
from swarmtrain.protocol.pipeline.balance import Rule, StagePeer
from swarmtrain.protocol.pipeline.router import Router
from swarmtrain.rehearsal import LinksSection
from swarmtrain.run import RunFile
from swarmtrain.simulate.links import latency_s, rates
from swarmtrain.simulate.pipeline.settings import Kind, PipelineMachine, PipelineSettings
from swarmtrain.simulate.pipeline.stage_driver import StageDriver
from swarmtrain.simulate.pipeline.stage_moves import Moving, SimulatedMover
from swarmtrain.simulate.pipeline.stage_peer import StageVolunteer
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.network import MessageFaults


@dataclass(frozen=True)
class PipelineMoment:
    """Event of the log."""

    time_s: float
    peer: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class _Record:
    published_s: float
    record: StagePeer | None
    """Record; None if the peer said goodbye."""


@dataclass
class _Sums:
    tokens: float = 0.0
    ideal_tokens: float = 0.0
    bottleneck_tokens: float = 0.0
    since_s: float = 0.0


class PipelineWorld(MessageFaults):
    """Machines, the peers on them, and the log of what they did."""

    def __init__(self, settings: PipelineSettings | None = None, *, seed: int = 0) -> None:
        self.settings = settings or PipelineSettings()
        super().__init__(seed, self._stands_still)
        self.rng = random.Random(seed)
        self.peers: dict[str, StageVolunteer] = {}
        """Peers that are switched on, by name."""
        self.ghosts: dict[str, StageVolunteer] = {}
        """Last session of each machine that is switched off."""
        self.num_late = self.num_moves = 0
        """Number of calls that took too long, and number of moves between stages."""
        self.log: list[PipelineMoment] = []
        self.emptied: list[tuple[float, int]] = []
        """(time, stage) of each move that left a stage without a peer. Must stay empty."""
        self._frozen: dict[str, list[tuple[Callable[..., object], tuple[Any, ...]]]] = {}
        """Calls that have reached each frozen peer since it froze."""
        self._records: dict[str, list[_Record]] = {}
        self._delays_s: dict[str, dict[str, float]] = {}
        self._sums = _Sums()
        self._ideal_per_s = self._bottleneck_per_s = 0.0
        self._counted_s = 0.0

    # ------------------------------------------------------------------ machines

    def join(self, machine: PipelineMachine, stages: Sequence[int] = ()) -> StageVolunteer:
        """Switch a machine on. With `stages` it serves them at once, as if it had been there."""
        assert machine.name not in self.peers
        peer = self._make(machine)
        self.peers[machine.name] = peer
        self.note(peer.name, "joined", f"{machine.tokens_per_s:.0f} tokens/s")
        peer.begin(tuple(stages))
        self.recount()
        return peer

    def _make(self, machine: PipelineMachine) -> StageVolunteer:
        return StageVolunteer(self, machine, random.Random(self.rng.random()))

    def kill(self, name: str, silent: bool = False) -> None:
        """Switch a machine off. With `silent`, calls to it get no answer; otherwise they are refused at once."""
        self._frozen.pop(name, None)
        if (peer := self.peers.pop(name, None)) is not None:
            peer.die(silent)
            self.ghosts[name] = peer
            self.note(name, "died", "silently" if silent else "")
            self.recount()

    def leave(self, name: str) -> None:
        """Let a peer say goodbye, then switch its machine off."""
        if name in self.peers:
            self.publish(name, None)
            self.kill(name)

    def slow(self, name: str, factor: float) -> None:
        """Make a machine `factor` times slower."""
        peer = self.peers[name]
        peer.machine = replace(peer.machine, tokens_per_s=peer.machine.tokens_per_s / factor)
        self.recount()

    def hang(self, name: str) -> None:
        """Hang a peer's stages: it takes calls and answers none, and renews its record as before."""
        self.peers[name].hung = True
        self.recount()

    def freeze(self, name: str) -> None:
        """Freeze a peer as SIGSTOP does: everything that reaches it waits until `thaw`, its timers included."""
        if name in self.peers:
            self._frozen.setdefault(name, [])

    def thaw(self, name: str) -> None:
        """Let a frozen peer continue, as SIGCONT does."""
        for call, args in self._frozen.pop(name, ()):
            call(*args)

    def _stands_still(self, call: Callable[..., object], args: tuple[Any, ...]) -> bool:
        if not self._frozen:
            return False
        owner = getattr(call, "__self__", None)
        peer = owner.peer if isinstance(owner, SimulatedMover | StageDriver) else owner
        if not isinstance(peer, StageVolunteer) or self.peers.get(peer.name) is not peer:
            return False
        if (waits := self._frozen.get(peer.name)) is None:
            return False
        waits.append((call, args))
        return True

    def delay(self, name: str, latency_s: float | None = None) -> None:
        """Set the one-way latency of a peer's link from now on; None restores the original one."""
        if name in self.peers:
            at_first_s = self.settings.latency_s / 2
            self.peers[name].link = SimulatedLink(latency_s=at_first_s if latency_s is None else latency_s)

    def whom(self, name: str) -> StageVolunteer:
        """Return the peer of this name, also if it has left the swarm."""
        return self.peers.get(name) or self.ghosts[name]

    # ------------------------------------------------------------------ records

    def publish(self, name: str, record: StagePeer | None) -> None:
        """Store a record in the DHT; None for a goodbye."""
        known = self._records.setdefault(name, [])
        known.append(_Record(self.clock.now, record))
        while len(known) > 1 and known[1].published_s <= self.clock.now - self.settings.record_delay_s[1]:
            del known[0]  # nobody finds it any more

    def look(self, viewer: str, table: dict[str, StagePeer]) -> None:
        """Update `table`, the records of others that `viewer` knows, to the records that it finds in the DHT now."""
        now, settings = self.clock.now, self.settings
        delays_s, chance, missed = self._delays_s.setdefault(viewer, {}), self.rng.random, settings.missed
        for name, records in self._records.items():
            if name == viewer or chance() < missed or not self._is_read(viewer, name):
                continue
            if (delay_s := delays_s.get(name)) is None:
                delay_s = delays_s[name] = self.rng.uniform(*settings.record_delay_s)
            before_s = now - delay_s
            for one in reversed(records):
                if one.published_s <= before_s:
                    if one.record is not None:
                        table[name] = one.record
                    else:
                        table.pop(name, None)
                    break
        for name in [name for name, record in table.items() if now - record.seen_s > settings.rule.live_s]:
            del table[name]

    def _is_read(self, viewer: str, name: str) -> bool:
        """Return whether the record of `name` is on the viewer's side of a partition."""
        return not self._side or self._side.get(viewer) == self._side.get(name)

    # ------------------------------------------------------------------ what is measured

    def note(self, peer: str, kind: Kind, reason: str) -> None:
        """Add an event to the log."""
        self.log.append(PipelineMoment(self.clock.now, peer, kind, reason))

    def finished(self, tokens: float) -> None:
        """Count a microbatch that has passed all stages and is back."""
        self._sums.tokens += tokens

    def recount(self) -> None:
        """Recompute the rates, because peers were switched on or off, or one serves other stages."""
        self._count()
        on = [peer for peer in self.peers.values() if not peer.hung]
        costs = self.settings.rule.costs
        self._ideal_per_s = best_bottleneck([peer.machine.tokens_per_s for peer in on], costs)
        self._bottleneck_per_s = min(self.rates())

    def _count(self) -> None:
        passed_s = self.clock.now - self._counted_s
        self._sums.ideal_tokens += passed_s * self._ideal_per_s
        self._sums.bottleneck_tokens += passed_s * self._bottleneck_per_s
        self._counted_s = self.clock.now

    def rates(self) -> list[float]:
        """Return the tokens per second that each stage can do now, by the machines' true speeds."""
        rule = self.settings.rule
        rates = [0.0] * rule.num_stages
        for peer in self.peers.values():
            for stage in peer.stages if not peer.hung else ():
                rates[stage] += peer.machine.tokens_per_s / rule.cost(peer.stages)
        return rates

    def holders(self) -> list[int]:
        """Return the number of peers that serve each stage."""
        return [sum(stage in peer.stages for peer in self.peers.values()) for stage in self._stages()]

    def _stages(self) -> range:
        return range(self.settings.rule.num_stages)

    def left_stage(self, peer: Moving, stages: Sequence[int]) -> None:
        """Record the stages that `peer` has moved away from, if that left one empty."""
        holders = self.holders()
        self.emptied.extend((self.clock.now, stage) for stage in stages if not holders[stage])

    def measure_from_here(self) -> None:
        """Reset the measurements."""
        self._count()
        self._sums, self.num_moves, self.num_late = _Sums(since_s=self.clock.now), 0, 0

    def run_until(self, end_s: float) -> None:
        """Run until `end_s`, in virtual seconds."""
        self.clock.run_until(end_s)
        self._count()

    @property
    def ideal_per_s(self) -> float:
        """Upper bound of the tokens per second of any assignment of the machines that are on now."""
        return self._ideal_per_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of finished microbatches, since the measurements were reset."""
        return self._sums.tokens / max(self.clock.now - self._sums.since_s, 1e-9)

    @property
    def share(self) -> float:
        """Share of the ideal throughput that was achieved since the measurements were reset."""
        return self._sums.tokens / max(self._sums.ideal_tokens, 1e-9)

    @property
    def share_of_assignment(self) -> float:
        """Share of the ideal throughput that the slowest stage could do. The difference to `share` is what the
        assignment could do and did not."""
        return self._sums.bottleneck_tokens / max(self._sums.ideal_tokens, 1e-9)


def best_bottleneck(speeds: Sequence[float], costs: Sequence[float]) -> float:
    """Return an upper bound of the tokens per second through stages of these costs, whatever the assignment.

    The k fastest peers are in k stages at most, so that the others serve at least the rest of the stages, of which the
    cheapest cannot be faster than all of those peers together. The bound is the least over all k; 0 with fewer peers
    than stages.
    """
    num_stages = len(costs)
    if len(speeds) < num_stages:
        return 0.0
    rest, cheapest = sorted(speeds), sorted(costs)
    return min(sum(rest[: len(rest) - k]) / sum(cheapest[: num_stages - k]) for k in range(num_stages))


def stage_parameters(run: RunFile) -> int:
    """Return the parameters of a stage, as if all stages were equal."""
    return math.ceil(num_trained_parameters(run) / run.pipeline.stages)


def stage_bytes(run: RunFile) -> int:
    """Return the bytes of a stage's weights and momentum, which a joiner downloads."""
    return 8 * stage_parameters(run)


def settings_of(run: RunFile, links: LinksSection) -> PipelineSettings:
    """Return the settings of a run's swarm, with stages of equal cost.

    A message with tensors takes, in addition, the time of its bytes on the slower side of the link.
    """
    stages, tensors_bytes = run.pipeline.stages, activation_wire_bytes(run)
    return PipelineSettings(
        rule=Rule(costs=(1 / stages,) * stages, live_s=run.network.presence_ttl_s),
        balance=run.pipeline.balance,
        balance_every_s=run.pipeline.balance_every_s,
        router=partial(Router, variant=run.pipeline.wiring),
        microbatch_tokens=run.microbatch_sequences * run.model.context_tokens,
        batch_microbatches=run.batch_microbatches,
        in_flight=run.pipeline.in_flight,
        latency_s=2 * latency_s(links, tensors_bytes, random.Random(run.run.seed)),
        tensors_s=tensors_bytes / min(rates(links)),
    )


def place(world: PipelineWorld, machine: PipelineMachine) -> tuple[int, ...]:
    """Return the stage that a joiner with full knowledge would take: the slowest."""
    rates = world.rates()
    return (min(range(len(rates)), key=lambda stage: (rates[stage], stage)),)
