"""Plays some rounds of a part of a swarm in virtual time, from which `plan.py` extrapolates to all of it.

Gossip is played by `simulate/systems/gossip.py`, synchronous rounds by `simulate/systems/world.py`, stages by
`simulate/pipeline/world.py` and then gossip. With a server nobody waits for anybody, and the result is arithmetic. To
play a run by another simulator, replace the function `lived`.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from swarmtrain.algorithm.pacing import reference_speed, round_inner_steps
from swarmtrain.algorithm.quantize import encoded_size_bytes
from swarmtrain.errors import UserError
from swarmtrain.methods import load_object
from swarmtrain.peer.estimate import activation_wire_bytes, merge_bytes
from swarmtrain.peer.merging.costs import publication_sizes
from swarmtrain.protocol.gossip.fragments import COPY_S, published, publishes_every
from swarmtrain.protocol.gossip.pulls import PublicationBytes
from swarmtrain.rehearsal import LinksSection, RehearsalChurn, RehearsalFile, SeedSection, fault_events
from swarmtrain.run import RunFile
from swarmtrain.run_batch import BatchTarget
from swarmtrain.simulate.links import latency_s, link_of, rates
from swarmtrain.simulate.pipeline.settings import PipelineMachine, PipelineSettings
from swarmtrain.simulate.pipeline.world import PipelineWorld, place, settings_of, stage_bytes, stage_parameters
from swarmtrain.simulate.systems.gossip import GossipSwarm
from swarmtrain.simulate.systems.messages import Settings
from swarmtrain.simulate.systems.publications import RoundRecord, SimulatedGossipSettings
from swarmtrain.simulate.systems.world import SynchronousWorld
from swarmtrain.words import counted

_MOST_GOSSIPING, _MOST_ON_A_ROSTER, _MOST_IN_STAGES = 64, 16, 48
"""Limits of the volunteers that are played: with gossip, on a roster, in stages.

More take longer and see the same: with gossip nobody knows more than a sample, and the cost of a roster hardly depends
on its length. The volunteers played are taken evenly by speed, the fastest and the slowest among them.
"""
_WARM_ROUNDS, _ROUNDS = 2, 8
_MOST_WAITED_S = 60.0
"""Seconds of waiting up to which synchronous rounds are played.

Peers that wait for a roster ask each other every other second, which takes long to simulate.
"""
_MICROBATCHES, _ONE_AFTER_THE_OTHER = 4000, 10
_MERGE_S = 9.0e-9
"""Seconds per parameter of one outer step by one thread.

Measured with 10 and 50 million parameters, as `COPY_S` was; with 0.46 million and four publications that comes to the 8
to 11 ms a round of results, section 8.
"""
_AWAY_AGAIN_S = 10.0
"""Seconds from the start of a process to its first step: 9 s when the engine restarts a container (results, section
10)."""


@dataclass(frozen=True, kw_only=True)
class PlaybackMachines:
    """Machines of the volunteers: seconds of an inner step of each, and how they come and go."""

    step_s: tuple[float, ...]
    churn: RehearsalChurn = field(default_factory=RehearsalChurn)

    @property
    def num(self) -> int:
        """Number of volunteers."""
        return len(self.step_s)

    @property
    def away_share(self) -> float:
        """Share of their time in which volunteers are away, or back but not training yet."""
        if not self.churn.every_s:
            return 0.0
        return min(0.9, (self.churn.away_s + _AWAY_AGAIN_S) / (self.churn.every_s * self.num))

    def at_most(self, number: int) -> PlaybackMachines:
        """Return at most `number` of these machines, chosen evenly by speed.

        Churn that strikes one of all strikes one of fewer less often in proportion.
        """
        if self.num <= number:
            return self
        ascending = sorted(self.step_s)
        some = tuple(ascending[round(i * (self.num - 1) / (number - 1))] for i in range(number))
        every_s = self.churn.every_s * self.num / number
        return replace(self, step_s=some, churn=self.churn.model_copy(update={"every_s": every_s}))


@dataclass(frozen=True, kw_only=True)
class PlaybackResult:
    """Results of the rounds played: one number for each volunteer, or the mean over them. Bytes are payload."""

    by: str
    """Way in which the result was found, in words for a person."""
    round_s: tuple[float, ...]
    """Seconds of each volunteer's round, merging and waiting included."""
    stall_s: tuple[float, ...]
    """Seconds of each volunteer's round in which it waited or merged."""
    tokens: tuple[float, ...]
    """Tokens that each volunteer trains on in a round."""
    down_bytes: float
    up_bytes: float
    """Bytes that a volunteer sends in a round, and in `down_bytes` those that it receives."""
    partners: float
    """Partners whose pseudo-gradients were merged in a round."""
    fresh_share: float
    """Share of the rounds that merged a partner's pseudo-gradient."""
    sizes: PublicationBytes
    """Bytes of a round that one partner pulls. Where all volunteers average whole pseudo-gradients, these contain no
    weights."""
    activation_bytes: float = 0.0
    """Part of `down_bytes`, and equally of `up_bytes`, that passes between stages."""


Lives: TypeAlias = Callable[[RunFile, PlaybackMachines, LinksSection, int], PlaybackResult]
"""Function that plays some rounds of whole models, with a seed."""


def lived(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int) -> PlaybackResult:
    """Play some rounds of these volunteers, or of a sample of them."""
    if run.pipeline.stages > 1:
        return _stages(run, machines, links, seed)
    return lives_of(run)(run, machines, links, seed)


def lives_of(run: RunFile) -> Lives:
    """Return the function that plays the run's method."""
    lives: Lives = load_object(run.merge.kind.lives)
    return lives


def _steps(run: RunFile, step_s: Sequence[float], num_peers: int = 0) -> list[int]:
    """Return the inner steps of each volunteer's round, as the product paces them; of one large batch its share, among
    `num_peers` such volunteers (0: these).
    """
    merge, speeds = run.merge, [1 / one for one in step_s]
    if merge.kind.common_step:
        steps = run.batch_target.mean_tokens / run.tokens_per_step
        a_speed = steps * len(speeds) / (sum(speeds) * max(num_peers, len(speeds)))
        return [max(1, round(a_speed * speed)) for speed in speeds]
    usual, limit_s = [reference_speed(speeds)], merge.round_limit_s
    return [round_inner_steps(one, usual, merge.inner_steps, paced=merge.pacing, limit_s=limit_s) for one in speeds]


def _merge_s(run: RunFile, publications: int = 1) -> float:
    """Return the seconds of a round that publishing and merging keep the trainer from training."""
    return stage_parameters(run) * ((1 + publications) * COPY_S + _MERGE_S)


# ---------------------------------------------------------------- gossip


def _publications(run: RunFile, round_s: float) -> int:
    """Return how often a peer publishes in a round of `round_s` seconds."""
    merge, number, parts = run.merge, run.merge.num_fragments, run.merge.publications_per_round
    every = publishes_every(parts, number, round_s, stage_parameters(run))
    return len(published(merge.inner_steps, parts, number, every))


def by_gossip(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int) -> PlaybackResult:
    """Play gossip in virtual time."""
    some = machines.at_most(_MOST_GOSSIPING)
    steps = _steps(run, some.step_s)
    longest_s = max(number * one for number, one in zip(steps, some.step_s, strict=True))
    sizes = publication_sizes(run, stage_parameters(run), machines.num - 1, longest_s, min(rates(links)))
    swarm = _gossiping(run, links, seed, sizes)
    draw = random.Random(f"begins {seed}")  # nobody's rounds begin together; the slow see others, and are paced
    begins_s = sorted(draw.uniform(0.0, longest_s) for _ in some.step_s)
    for begin_s, (number, step_s) in zip(begins_s, sorted(enumerate(some.step_s), key=lambda one: one[1]), strict=True):
        swarm.at(begin_s, partial(swarm.found, f"v{number}", steps_per_s=1 / step_s))
    warm_s = _WARM_ROUNDS * longest_s
    end_s = warm_s + _ROUNDS * longest_s
    _befall(swarm, some, longest_s, end_s, seed)
    swarm.run_until(end_s)
    kept = [record for record in swarm.rounds if record.started_s >= warm_s]
    if not kept:
        raise UserError(
            f"--churn: no volunteer stays as long as a round, {longest_s:.0f} s; lower merge.inner_steps or raise "
            "--churn",
            code="too-much-churn",
        )
    by_peer: dict[str, list[RoundRecord]] = defaultdict(list)
    for record in kept:
        by_peer[record.peer.partition(".")[0]].append(record)
    stall_s = _merge_s(run, _publications(run, longest_s))
    down_bytes = statistics.mean(record.bytes_down for record in kept)
    rounds = counted(round(len(kept) / len(by_peer)), "round")
    return PlaybackResult(
        by=f"gossip of {_some(some, machines)} through {rounds} of each, in virtual time",
        round_s=tuple(stall_s + statistics.mean(one.ended_s - one.started_s for one in of) for of in by_peer.values()),
        stall_s=(stall_s,) * len(by_peer),
        tokens=tuple(run.tokens_per_step * statistics.mean(one.steps for one in of) for of in by_peer.values()),
        down_bytes=down_bytes,
        up_bytes=down_bytes,
        partners=statistics.mean(record.partners for record in kept),
        fresh_share=statistics.mean(record.partners > 0 for record in kept),
        sizes=sizes,
    )


def _gossiping(run: RunFile, links: LinksSection, seed: int, sizes: PublicationBytes) -> GossipSwarm:
    """Return a swarm of this run, without any peer."""
    link = link_of(links, sizes.both, random.Random(seed))
    return GossipSwarm(SimulatedGossipSettings.of(run, sizes, stage_bytes(run)), link=link, seed=seed)


def _befall(
    swarm: GossipSwarm | SynchronousWorld, machines: PlaybackMachines, from_s: float, end_s: float, seed: int
) -> None:
    """Schedule volunteers to be killed or to leave, and to come back as new volunteers. All are present when this
    begins."""
    churn = machines.churn.model_copy(update={"away_s": machines.churn.away_s + _AWAY_AGAIN_S})
    rehearsal = RehearsalFile(churn=churn, rehearsal=SeedSection(seed=seed))
    names = {f"v{number}": f"v{number}" for number in range(machines.num)}
    returns = itertools.count(1)

    def go(name: str, cleanly: bool) -> None:
        (swarm.leave if cleanly else swarm.kill)(names[name])

    def come(name: str) -> None:
        names[name] = f"{name}.{next(returns)}"
        swarm.join(names[name], steps_per_s=1 / machines.step_s[int(name[1:])])

    for one in itertools.takewhile(lambda one: from_s + one.at_s < end_s, fault_events(rehearsal, list(names))):
        swarm.at(from_s + one.at_s, go, one.who[0], one.do == "leave")
        swarm.at(from_s + one.at_s + one.for_s, come, one.who[0])


def _some(some: PlaybackMachines, machines: PlaybackMachines) -> str:
    of = counted(machines.num, "volunteer")
    return of if some.num == machines.num else f"{some.num} of {of}"


# ---------------------------------------------------------------- rosters, a server, stages


def by_rosters(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int) -> PlaybackResult:
    """Play synchronous rounds in virtual time, or compute them where playing would take long."""
    some, parameters, others = machines.at_most(_MOST_ON_A_ROSTER), stage_parameters(run), machines.num - 1
    steps, (sent, _) = _steps(run, some.step_s, machines.num), merge_bytes(run, parameters, others)
    alone_s = [one * step_s for one, step_s in zip(steps, some.step_s, strict=True)]
    wire_s = sent / min(rates(links)) + 6 * 4 * latency_s(links, sent, random.Random(seed))
    if max(alone_s) - min(alone_s) + wire_s > _MOST_WAITED_S:
        by, round_s, share = "arithmetic: the slowest's steps, then the wire", max(alone_s) + wire_s, 1.0
    else:
        by = f"synchronous rounds of {_some(some, machines)} in virtual time"
        round_s, share = _on_rosters(run, some, links, others, seed)
        round_s = max(round_s, sent / min(rates(links)))  # whoever goes on alone is quicker, and no help to the others
    round_s += _merge_s(run)
    return PlaybackResult(
        by=by,
        round_s=(round_s,) * some.num,
        stall_s=tuple(max(_merge_s(run), round_s - one) for one in alone_s),
        tokens=tuple(share * run.tokens_per_step * one for one in steps),
        down_bytes=sent,
        up_bytes=sent,
        partners=share * (others + 1) - 1,
        fresh_share=share,
        sizes=PublicationBytes(weights=0, gradient=_on_roster_bytes(run)),
    )


def _on_roster_bytes(run: RunFile) -> int:
    return encoded_size_bytes(run.merge.roster_format, [stage_parameters(run)])


def _on_rosters(
    run: RunFile, some: PlaybackMachines, links: LinksSection, others: int, seed: int
) -> tuple[float, float]:
    """Play some volunteers among `others` more. Return (seconds of a round, share of all volunteers on a roster)."""
    merge, steps, parameters = run.merge, _steps(run, some.step_s, others + 1), stage_parameters(run)
    in_shares = others + 1 > merge.share_above
    settings = Settings(
        inner_steps=merge.inner_steps,
        tokens_per_step=run.tokens_per_step,
        round_limit_s=merge.round_limit_s,
        silence_s=merge.silence_s,
        target=_target(run, some, others) if merge.kind.common_step else None,
        max_wait_s=merge.max_wait_s if merge.kind.common_step else math.inf,
        share_above=merge.share_above if in_shares else some.num,
        presence_ttl_s=run.network.presence_ttl_s,
        call_limit_s=run.network.call_limit_s,
        stall_limit_s=run.network.stall_limit_s,
        publication_bytes=_on_roster_bytes(run),
        state_bytes=merge.kind.state_bytes(parameters),
        transfers_share_links=True,
        by_bandwidth=False,  # the links are alike, and so are the shares
    )
    link = link_of(links, settings.publication_bytes, random.Random(seed))
    if not in_shares and some.num > 1:  # each sends its publication to all others, of whom some are played
        slower = (some.num - 1) / others
        link = replace(link, bytes_per_s=slower * link.bytes_per_s, down_bytes_per_s=slower * link.down_per_s)
    world = SynchronousWorld(settings, link=link, seed=seed)
    paced = [1.0 if merge.kind.common_step else merge.inner_steps / one for one in steps]
    speeds = [times / step_s for times, step_s in zip(paced, some.step_s, strict=True)]
    world.join_together({f"v{number}": speed for number, speed in enumerate(speeds)})
    longest_s = max(one * step_s for one, step_s in zip(steps, some.step_s, strict=True))
    end_s = 4 * _ROUNDS * (longest_s + settings.publication_bytes * 2 / link.bytes_per_s + merge.silence_s)
    _befall(world, some, 0.0, end_s, seed)
    world.run_rounds(_WARM_ROUNDS + _ROUNDS, end_s, most_ahead=4 * _ROUNDS)
    return _applied(world, end_s)


def _target(run: RunFile, some: PlaybackMachines, others: int) -> BatchTarget:
    """Return the part of a large batch of mean size that the volunteers played have among `others` more."""
    tokens = run.batch_target.mean_tokens * some.num / (others + 1)
    return BatchTarget(max(run.tokens_per_step, round(tokens)), run.run.total_tokens)


def _applied(world: SynchronousWorld, end_s: float) -> tuple[float, float]:
    """Return (seconds of a round, share of all volunteers on a roster), leaving out the first rounds."""
    ends_s: dict[int, list[float]] = defaultdict(list)
    entries: dict[int, int] = {}
    for event in world.events("applied"):
        if event.round >= _WARM_ROUNDS - 1 and event.roster is not None:
            ends_s[event.round].append(event.time_s)
            entries[event.round] = max(len(event.roster.entries), entries.get(event.round, 0))
    if len(ends_s) < 2:  # nobody gets through them
        return end_s, 1 / len(world.peers)
    first, last = min(ends_s), max(ends_s)
    round_s = (statistics.median(ends_s[last]) - statistics.median(ends_s[first])) / (last - first)
    return round_s, statistics.mean(entries.values()) / len(world.running())


def by_server(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int) -> PlaybackResult:
    """Compute the rounds of a server's workers."""
    steps, merge_s = _steps(run, machines.step_s), _merge_s(run)
    sizes = publication_sizes(run, stage_parameters(run), machines.num - 1)
    return PlaybackResult(
        by="arithmetic: nobody waits for anybody, and the server's link carries what it must",
        round_s=tuple(merge_s + one * step_s for one, step_s in zip(steps, machines.step_s, strict=True)),
        stall_s=(merge_s,) * machines.num,
        tokens=tuple(float(run.tokens_per_step * one) for one in steps),
        down_bytes=sizes.weights,
        up_bytes=sizes.gradient,
        partners=0.0,
        fresh_share=1.0,
        sizes=sizes,
    )


def _stages(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int) -> PlaybackResult:
    """Play the stages, then the gossip of one stage's peers, each of which trains on its part of the microbatches."""
    stages = run.pipeline.stages
    if machines.num < stages:
        raise UserError(
            f"--peers: {counted(machines.num, 'volunteer')} cannot hold {stages} stages (pipeline.stages), since here "
            f"each holds one; allowed: {stages} or more",
            code="too-few-peers",
        )
    some = machines.at_most(max(_MOST_IN_STAGES, stages))
    world = _through_stages(run, some, links, seed)
    a_peer_per_s = max(world.tokens_per_s, 1e-9) * stages / some.num
    holders = machines.num // stages
    each = PlaybackMachines(step_s=(run.tokens_per_step / a_peer_per_s,) * holders)
    merging = lives_of(run)(run, each, links, seed)
    a_token = activation_wire_bytes(run) / (run.microbatch_sequences * run.model.context_tokens)
    activations = 2 * (stages - 1) / stages * a_token * statistics.mean(merging.tokens)
    return replace(
        merging,
        by=f"{_some(some, machines)} that pass microbatches through {stages} stages, and {merging.by}",
        down_bytes=merging.down_bytes + activations,
        up_bytes=merging.up_bytes + activations,
        activation_bytes=activations,
    )


def _through_stages(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int) -> PipelineWorld:
    """Pass some thousand microbatches, and for at least as long as some take one after the other.

    All peers know each other by the time that is measured, and nobody comes or goes.
    """
    stages, tokens = run.pipeline.stages, run.microbatch_sequences * run.model.context_tokens
    settings, (_, down) = settings_of(run, links), rates(links)
    long_s = _MICROBATCHES * tokens / sum(run.tokens_per_step / step_s for step_s in machines.step_s)
    long_s = max(long_s, _ONE_AFTER_THE_OTHER * 2 * stages * (settings.latency_s + settings.tensors_s))
    looks_s = min(PipelineSettings.look_every_s, long_s / 16)
    settings = replace(settings, look_every_s=looks_s, record_delay_s=(0.0, 0.0))
    world = PipelineWorld(settings, seed=seed)
    for number, step_s in enumerate(machines.step_s):
        speed, fetch_s = run.tokens_per_step / step_s, stage_bytes(run) / down
        machine = PipelineMachine(name=f"v{number}", tokens_per_s=speed, fetch_s=fetch_s)
        world.join(machine, place(world, machine))
    world.run_until(long_s / 4)
    world.measure_from_here()
    world.run_until(long_s)
    return world
