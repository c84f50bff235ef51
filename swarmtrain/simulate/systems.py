"""Whole swarms without tensors: sizes, times and states of ten thousand volunteers, by the product's own decisions.

Every volunteer gossips as `simulate.gossip` says; the model is one number, which all start with a different value of:
how far apart they still are at the end says how well the swarm mixes. What happened is added up as it happens, so that
a million rounds need no memory.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from swarmtrain.algorithm.quantize import encoded_size_bytes
from swarmtrain.membership.pulls import SectionBytes
from swarmtrain.model.gpt import num_parameters
from swarmtrain.network.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.run import RunFile
from swarmtrain.simulate.gossip import GossipPeer, GossipSettings, GossipSwarm, RoundRecord
from swarmtrain.simulate.learning.setting import Outcome
from swarmtrain.simulate.messages import Link
from swarmtrain.simulate.scenario import Scenario

__all__ = ["Machines", "Stays", "SystemsSwarm", "play", "play_scenario"]

_UNLIMITED_BYTES_PER_S = 1e12
_DEVIATION_AT_FIRST = 1.0 / math.sqrt(3.0)
"""Of numbers that are uniform from -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What volunteers have. Speeds and rates are lognormal around these: spreads are deviations of the logarithm."""

    number: int
    step_s: float = 1.0
    """Of an inner step."""
    slowdowns: tuple[float, ...] = ()
    """Times that, gone through again and again; none: all alike."""
    spread: float = 0.0
    link: Link = field(default_factory=Link)
    link_spread: float = 0.0

    def speed(self, number: int, rng: random.Random) -> float:
        """Inner steps a second of volunteer `number`."""
        slowdown = self.slowdowns[number % len(self.slowdowns)] if self.slowdowns else 1.0
        return rng.lognormvariate(0.0, self.spread) / (self.step_s * slowdown)

    def link_of(self, rng: random.Random) -> Link:
        """A volunteer's connection."""
        if not self.link_spread:
            return self.link
        factor = rng.lognormvariate(0.0, self.link_spread)
        return Link(
            latency_s=self.link.latency_s,
            bytes_per_s=self.link.bytes_per_s * factor,
            down_bytes_per_s=self.link.down_per_s * factor,
            drop=self.link.drop,
        )


@dataclass(frozen=True, kw_only=True)
class Stays:
    """How volunteers come and go: all times are means of exponential ones; 0: nobody goes, or hangs."""

    stays_s: float = 0.0
    away_s: float = 60.0
    crash_share: float = 0.5
    """Of those who go; the others say goodbye."""
    hangs_after_s: float = 0.0
    hangs_for_s: float = 60.0


class SystemsSwarm(GossipSwarm):
    """Adds up instead of keeping."""

    def __init__(self, settings: GossipSettings, machines: Machines, stays: Stays, seed: int = 0) -> None:
        super().__init__(settings, link=machines.link, seed=seed)
        self.machines, self.stays = machines, stays
        self.chance = random.Random(f"systems {seed}")
        self.tokens = self.num_rounds = self.num_later = self.num_fresh = self.num_gradients = 0
        self.staleness_rounds = 0
        self.bytes_down = self.tokens_lost = self.num_joins = 0
        self.there_s = self.waited_s = self.able_steps = 0.0
        self._since_s: dict[str, float] = {}

    def round_over(self, record: RoundRecord) -> None:
        """Add it up."""
        self.num_rounds += 1
        self.tokens += record.steps * self.settings.tokens_per_step
        self.bytes_down += record.bytes_down
        self.num_gradients += record.partners
        if record.round > 0:
            self.num_later += 1
            self.num_fresh += record.partners > 0
            self.staleness_rounds += record.staleness_rounds

    # ------------------------------------------------------------------ who is there

    def populate(self) -> None:
        """All at once, each with its own number; they begin within a round, as nobody's rounds begin together."""
        a_round_s = self.settings.inner_steps * self.machines.step_s
        for number in range(self.machines.number):
            speed = self.machines.speed(number, self.chance)
            theta, link = self.chance.uniform(-1.0, 1.0), self.machines.link_of(self.chance)
            self.clock.call_at(self.chance.uniform(0.0, a_round_s), self._come, number, 0, speed, theta, link)

    def _come(self, number: int, times: int, speed: float, theta: float, link: Link) -> None:
        name = f"{number:05d}.{times}"
        peer = self._add(name, speed, theta, link)
        self._since_s[name] = self.clock.now
        peer.deliver(peer.begin if times else peer._start_round)
        self.num_joins += times > 0
        if self.stays.stays_s:
            stays_s = self.chance.expovariate(1.0 / self.stays.stays_s)
            self.clock.call_later(stays_s, self._go, peer, number, times)
        if self.stays.hangs_after_s:
            self.clock.call_later(self.chance.expovariate(1.0 / self.stays.hangs_after_s), self._hang, peer)

    def _go(self, peer: GossipPeer, number: int, times: int) -> None:
        self._count_time(peer)
        if self.chance.random() < self.stays.crash_share:
            self.tokens_lost += peer.steps_unpublished * self.settings.tokens_per_step
            self.kill(peer.name)
        elif peer.running:
            self.leave(peer.name)
        else:
            self.kill(peer.name)
        self.forget(peer.name)
        away_s = self.chance.expovariate(1.0 / self.stays.away_s)
        self.clock.call_later(away_s, self._come, number, times + 1, peer.steps_per_s, 0.0, peer.link)

    def _hang(self, peer: GossipPeer) -> None:
        if peer.running:
            self.freeze(peer.name)
            self.clock.call_later(self.chance.expovariate(1.0 / self.stays.hangs_for_s), self._wake, peer)

    def _wake(self, peer: GossipPeer) -> None:
        if peer.alive:
            self.thaw(peer.name)
            self.clock.call_later(self.chance.expovariate(1.0 / self.stays.hangs_after_s), self._hang, peer)

    def begun(self, peer: GossipPeer, waited_s: float) -> None:
        """It has a state, and trains."""
        self.waited_s += waited_s

    def _count_time(self, peer: GossipPeer) -> None:
        there_s = self.clock.now - self._since_s.pop(peer.name)
        self.there_s += there_s
        self.able_steps += there_s * peer.steps_per_s

    # ------------------------------------------------------------------ what it was like

    def outcome(self) -> Outcome:
        """So far."""
        for name in list(self._since_s):
            self._count_time(self.peers[name])
        able_tokens = self.able_steps * self.settings.tokens_per_step
        return Outcome(
            held_out_loss=math.nan,
            virtual_time_s=self.clock.now,
            tokens=self.tokens,
            inner_steps=self.tokens // self.settings.tokens_per_step,
            sent_bytes=self.bytes_down,
            stall_share=self.waited_s / self.there_s if self.there_s else 0.0,
            tokens_lost=self.tokens_lost,
            fresh_share=self.num_fresh / max(1, self.num_later),
            throughput_share=self.tokens / able_tokens if able_tokens else 0.0,
            staleness_rounds=self.staleness_rounds / max(1, self.num_later),
            spread=self.deviation() / _DEVIATION_AT_FIRST,
            received_bytes_a_round=self.bytes_down / max(1, self.num_rounds),
            rounds=self.num_rounds,
        )

    def deviation(self) -> float:
        """Of the running volunteers' weights."""
        weights = [peer.theta for peer in self.peers.values() if peer.running]
        return statistics.pstdev(weights) if len(weights) > 1 else 0.0


@contextmanager
def _no_collector() -> Iterator[None]:
    """Hardly anything here is garbage in circles, and there are millions of objects to look through for it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def play(settings: GossipSettings, machines: Machines, stays: Stays, rounds: int, seed: int = 0) -> Outcome:
    """A swarm until those of ordinary speed have ended `rounds` rounds."""
    swarm = SystemsSwarm(settings, machines, stays, seed)
    with _no_collector():
        swarm.populate()
        swarm.run_until((rounds + 0.5) * settings.inner_steps * machines.step_s)
        return swarm.outcome()


def play_scenario(scenario: Scenario, run: RunFile) -> Outcome:
    """The scenario's swarm, with the run file's model, merging and presences."""
    links, peers, churn = scenario.links, scenario.peers, scenario.churn
    up, down = (rate * BYTES_PER_S_OF_MBIT or _UNLIMITED_BYTES_PER_S for rate in (links.up_mbit, links.down_mbit))
    link = Link(
        latency_s=links.rtt_ms / 4000,  # each end has half of one way
        bytes_per_s=up,
        down_bytes_per_s=down,
        drop=links.loss_percent / 100,
    )
    machines = Machines(
        number=peers.number,
        step_s=peers.step_ms / 1000,
        slowdowns=peers.slowdowns,
        spread=peers.spread,
        link=link,
        link_spread=links.spread,
    )
    stays = Stays(
        stays_s=churn.stays_s,
        away_s=churn.away_s,
        crash_share=churn.crash_share,
        hangs_after_s=churn.hangs_after_s,
        hangs_for_s=churn.hangs_for_s,
    )
    size, merge = [num_parameters(run.model)], run.merge
    weights, gradient = (encoded_size_bytes(form, size) for form in (merge.theta_format, merge.gradient_format))
    settings = replace(GossipSettings.of(run, SectionBytes(weights=weights, gradient=gradient)), keeps_past=False)
    return play(settings, machines, stays, scenario.scenario.rounds, run.run.seed)
