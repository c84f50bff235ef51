"""Whole swarms without tensors: sizes, times and states of ten thousand volunteers, by the product's own decisions.

Every volunteer gossips as `simulate.systems.gossip` says. The model is one number, which each volunteer starts with a
different value of: how far apart the values still are at the end says how well the swarm mixes. Results are summed up
as they happen, so that a million rounds need no memory.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.peer.merging.costs import publication_sizes
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.setting import RunOutcome
from swarmtrain.simulate.links import EXACT_UP_TO, link_of, rates
from swarmtrain.simulate.scenario import Scenario, ScenarioChurn
from swarmtrain.simulate.systems.gossip import GossipPeer, GossipSwarm
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.publications import RoundRecord, SimulatedGossipSettings

_DEVIATION_AT_FIRST = 1.0 / math.sqrt(3.0)
"""Standard deviation of numbers that are uniform from -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class MachineDistribution:
    """Distribution of volunteers' machines.

    Speeds and rates are lognormal around these values; spreads are standard deviations of the logarithm.
    """

    number: int
    step_s: float = 1.0
    """Seconds of an inner step."""
    slowdowns: tuple[float, ...] = ()
    """Factors on `step_s`, repeated over the volunteers; empty: all machines are alike."""
    spread: float = 0.0
    link: SimulatedLink = field(default_factory=SimulatedLink)
    link_spread: float = 0.0

    def speed(self, number: int, rng: random.Random) -> float:
        """Draw the inner steps per second of volunteer `number`."""
        slowdown = self.slowdowns[number % len(self.slowdowns)] if self.slowdowns else 1.0
        return rng.lognormvariate(0.0, self.spread) / (self.step_s * slowdown)

    def link_of(self, rng: random.Random) -> SimulatedLink:
        """Draw a volunteer's connection."""
        if not self.link_spread:
            return self.link
        factor = rng.lognormvariate(0.0, self.link_spread)
        up, down = self.link.bytes_per_s * factor, self.link.down_per_s * factor
        return replace(self.link, bytes_per_s=up, down_bytes_per_s=down)

    def round_s(self, settings: SimulatedGossipSettings) -> float:
        """Return the seconds of a round on a machine of ordinary speed."""
        return min(settings.inner_steps * self.step_s, settings.round_limit_s)


class SystemsSwarm(GossipSwarm):
    """Gossip swarm that sums up what happens instead of keeping it."""

    def __init__(
        self, settings: SimulatedGossipSettings, machines: MachineDistribution, churn: ScenarioChurn, seed: int = 0
    ) -> None:
        super().__init__(settings, link=machines.link, seed=seed)
        self.links.exact = machines.number <= EXACT_UP_TO
        self.machines, self.churn = machines, churn
        self.chance = random.Random(f"systems {seed}")
        self.steps = self.steps_lost = 0
        """Inner steps of ended rounds and of volunteers that left: in `steps` those that count, in `steps_lost` those
        that nobody merged."""
        self.num_rounds = self.num_later = self.num_fresh = self.staleness_rounds = self.bytes_down = 0
        self.there_s = self.waited_s = self.able_steps = 0.0
        """Sums over the volunteers that left: seconds present, seconds waited, and inner steps that they could have
        taken."""
        self._since_s: dict[GossipPeer, float] = {}
        """Time since which each present volunteer has been here."""

    def round_over(self, record: RoundRecord) -> None:
        """Add a round to the sums."""
        self.num_rounds += 1
        self.steps += record.steps
        self.bytes_down += record.bytes_down
        if record.round > 0:
            self.num_later += 1
            self.num_fresh += record.partners > 0
            self.staleness_rounds += record.staleness_rounds

    # ------------------------------------------------------------------ who is there

    def populate(self) -> None:
        """Add all volunteers, each with its own number. They begin at random times within one round."""
        a_round_s = self.machines.round_s(self.settings)
        for number in range(self.machines.number):
            speed = self.machines.speed(number, self.chance)
            theta, link = self.chance.uniform(-1.0, 1.0), self.machines.link_of(self.chance)
            self.clock.call_at(self.chance.uniform(0.0, a_round_s), self._come, number, 0, speed, theta, link)

    def _come(self, number: int, times: int, speed: float, theta: float, link: SimulatedLink) -> None:
        name = f"{number:05d}.{times}"
        peer = self._add(name, speed, theta, link)
        self._since_s[peer] = self.clock.now
        peer.deliver(peer.begin if times else peer.start)
        if self.churn.stays_s:
            stays_s = self.chance.expovariate(1.0 / self.churn.stays_s)
            self.clock.call_later(stays_s, self._go, peer, number, times)
        if self.churn.hangs_after_s:
            self.clock.call_later(self.chance.expovariate(1.0 / self.churn.hangs_after_s), self._hang, peer)

    def _go(self, peer: GossipPeer, number: int, times: int) -> None:
        there_s, lost = self.clock.now - self._since_s.pop(peer), peer.steps_unpublished
        self.there_s += there_s
        self.able_steps += there_s * peer.steps_per_s
        self.steps += peer.steps_done - lost
        self.steps_lost += lost
        if self.chance.random() < self.churn.crash_share or peer.frozen:
            self.kill(peer.name)
        else:
            self.leave(peer.name)
        self.forget(peer.name)
        away_s = self.chance.expovariate(1.0 / self.churn.away_s)
        self.clock.call_later(away_s, self._come, number, times + 1, peer.steps_per_s, 0.0, peer.link)

    def _hang(self, peer: GossipPeer) -> None:
        if peer.running:
            self.freeze(peer.name)
            self.clock.call_later(self.chance.expovariate(1.0 / self.churn.hangs_for_s), self._wake, peer)

    def _wake(self, peer: GossipPeer) -> None:
        if peer.alive:
            self.thaw(peer.name)
            self.clock.call_later(self.chance.expovariate(1.0 / self.churn.hangs_after_s), self._hang, peer)

    def took_state(self, peer: GossipPeer, of: str, waited_s: float) -> None:
        """Add the wait and the bytes of a state to the sums."""
        self.waited_s += waited_s
        self.bytes_down += self.settings.state_bytes

    # ------------------------------------------------------------------ what it was like

    def outcome(self) -> RunOutcome:
        """Return the results so far. Finished steps of unfinished rounds count."""
        here = [(peer, self.clock.now - since_s) for peer, since_s in self._since_s.items()]
        there_s = self.there_s + sum(lasted_s for _, lasted_s in here)
        able_steps = self.able_steps + sum(lasted_s * peer.steps_per_s for peer, lasted_s in here)
        steps, step_tokens = self.steps + sum(peer.steps_done for peer, _ in here), self.settings.tokens_per_step
        return RunOutcome(
            held_out_loss=math.nan,
            virtual_time_s=self.clock.now,
            tokens=steps * step_tokens,
            inner_steps=steps,
            sent_bytes=self.bytes_down,
            stall_share=self.waited_s / there_s if there_s else 0.0,
            tokens_lost=self.steps_lost * step_tokens,
            fresh_share=self.num_fresh / max(1, self.num_later),
            throughput_share=steps / able_steps if able_steps else 0.0,
            staleness_rounds=self.staleness_rounds / max(1, self.num_later),
            spread=self.deviation() / _DEVIATION_AT_FIRST,
            received_bytes_a_round=self.bytes_down / max(1, self.num_rounds),
            rounds=self.num_rounds,
        )

    def deviation(self) -> float:
        """Return the standard deviation of the running volunteers' weights, as the mean over the fragments."""
        weights = [peer.model.thetas for peer in self.peers.values() if peer.running]
        return statistics.mean(map(statistics.pstdev, zip(*weights, strict=True))) if weights else 0.0


@contextmanager
def _no_collector() -> Iterator[None]:
    """Turn the garbage collector off inside the context: there are hardly any cycles, and millions of objects to look
    through."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def play(
    settings: SimulatedGossipSettings, machines: MachineDistribution, churn: ScenarioChurn, rounds: int, seed: int = 0
) -> RunOutcome:
    """Play a swarm until all volunteers of ordinary speed have ended `rounds` rounds. They begin within the first
    one."""
    swarm = SystemsSwarm(settings, machines, churn, seed)
    with _no_collector():
        swarm.populate()
        swarm.run_until((rounds + 1) * machines.round_s(settings))
        return swarm.outcome()


def play_scenario(scenario: Scenario, run: RunFile) -> RunOutcome:
    """Play the scenario's swarm, with the run file's model, merging and presences."""
    links, peers, seed = scenario.links, scenario.peers, run.run.seed
    parameters, step_s = num_trained_parameters(run), peers.step_ms / 1000
    round_s = run.merge.inner_steps * step_s
    sizes = publication_sizes(run, parameters, peers.number - 1, round_s, min(rates(links)))
    machines = MachineDistribution(
        number=peers.number,
        step_s=step_s,
        slowdowns=peers.slowdowns,
        spread=peers.spread,
        link=link_of(links, sizes.both, random.Random(seed)),
        link_spread=links.spread,
    )
    settings = replace(SimulatedGossipSettings.of(run, sizes, 8 * parameters), keeps_past=False)
    return play(settings, machines, scenario.churn, scenario.scenario.rounds, seed)
