"""Predict a run with given volunteers and links, before anybody is invited.

`plan` is all that others call. It plays rounds of a part of the swarm in virtual time
(`simulate/planning/playback.py`), adds other traffic (`simulate/planning/traffic.py`) and the estimate of `swarmtrain
check`. `simulate/planning/bottlenecks.py` says what limits the run first.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.peer.estimate import disk_bytes, estimate
from swarmtrain.protocol.gossip.pulls import PublicationBytes
from swarmtrain.rehearsal import LinksSection
from swarmtrain.run import RunFile
from swarmtrain.simulate.pipeline.world import stage_parameters
from swarmtrain.simulate.planning.playback import PlaybackMachines, PlaybackResult, lived
from swarmtrain.simulate.planning.traffic import TrafficEstimate, archived_every_s, traffic_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of planning.

    Values are means over the volunteers unless they say otherwise; times are in seconds.
    """

    by: str
    """Way in which the plan was found, in words for a person."""
    num_peers: int
    step_s: float
    step_least_s: float
    step_most_s: float
    """Seconds of an inner step: of the median volunteer, the shortest, the longest."""
    full_steps: float
    """Inner steps in the round of a volunteer that is not paced; where all wait for the slowest such volunteer, in its
    round.

    Fewer than `merge.inner_steps` if `merge.round_limit_s` ends rounds before.
    """
    round_s: float
    round_least_s: float
    round_most_s: float
    """Seconds of a round: of the median volunteer, the shortest, the longest."""
    num_rounds: float
    """Rounds of the median volunteer in the whole run."""
    run_s: float
    tokens_per_s: float
    """Tokens per second of all volunteers together."""
    stall_share: float
    partners_per_round: float
    fresh_share: float
    """Share of the rounds that merge another volunteer's pseudo-gradient."""
    sizes: PublicationBytes
    """Bytes of a round that one partner pulls."""
    state_bytes: int
    """Bytes of weights and momentum, which a late joiner or the archive pulls from the first peer it asks."""
    payload_up_bytes: float
    payload_down_bytes: float
    """Payload bytes that a volunteer receives in a round, and in `payload_up_bytes` those that it sends."""
    archive_every_s: float
    """Seconds between two archives of the bootstrap."""
    traffic: TrafficEstimate
    """All traffic of a link."""
    link_up_bytes_per_s: float
    link_down_bytes_per_s: float
    """Rates of a link, up and down; 0 for no limit."""
    memory_bytes: int
    disk_bytes: int

    @property
    def publication_bytes(self) -> int:
        """Bytes of a round that one partner pulls, in all."""
        return self.sizes.both

    @property
    def rounds_per_hour(self) -> float:
        """Rounds per hour of the median volunteer."""
        return 3600 / self.round_s

    @property
    def up_bytes_per_day(self) -> float:
        """Bytes that a volunteer sends in a day."""
        return 86_400 * self.traffic.up

    @property
    def down_bytes_per_day(self) -> float:
        """Bytes that a volunteer receives in a day."""
        return 86_400 * self.traffic.down

    @property
    def up_bytes(self) -> float:
        """Bytes that a volunteer sends in the whole run."""
        return self.run_s * self.traffic.up + self.traffic.once_up

    @property
    def down_bytes(self) -> float:
        """Bytes that a volunteer receives in the whole run."""
        return self.run_s * self.traffic.down + self.traffic.once_down

    @property
    def up_share(self) -> float | None:
        """Share of the uplink that is used; None without a limit."""
        return self.traffic.up / self.link_up_bytes_per_s if self.link_up_bytes_per_s else None

    @property
    def down_share(self) -> float | None:
        """Share of the downlink that is used; None without a limit."""
        return self.traffic.down / self.link_down_bytes_per_s if self.link_down_bytes_per_s else None


def plan(run: RunFile, machines: PlaybackMachines, links: LinksSection, seed: int = 0) -> Plan:
    """Plan this run on these machines, all behind links like `links`. Takes seconds.

    Raises UserError for what cannot be planned.
    """
    found = _carried(run, lived(run, machines, links, seed), machines, links)
    scale = machines.num / len(found.round_s) / run.pipeline.stages * (1 - machines.away_share)
    tokens_per_s = scale * sum(tokens / one for tokens, one in zip(found.tokens, found.round_s, strict=True))
    round_s, apart = statistics.median(found.round_s), run.merge.kind.asynchronous
    # Each sees the end at the end of a round of its own, by what the others told at the end of theirs.
    run_s = run.run.total_tokens / tokens_per_s + round_s * apart
    cost, parameters = estimate(run, num_trained_parameters(run), machines.num), stage_parameters(run)
    return Plan(
        by=found.by,
        num_peers=machines.num,
        step_s=statistics.median(machines.step_s),
        step_least_s=min(machines.step_s),
        step_most_s=max(machines.step_s),
        full_steps=_full_steps(run, found),
        round_s=round_s,
        round_least_s=min(found.round_s),
        round_most_s=max(found.round_s),
        num_rounds=run_s / round_s + (apart and run.merge.pacing),  # the first is short: speeds are not known yet
        run_s=run_s,
        tokens_per_s=tokens_per_s,
        stall_share=sum(found.stall_s) / sum(found.round_s),
        partners_per_round=found.partners,
        fresh_share=found.fresh_share,
        sizes=found.sizes,
        state_bytes=run.merge.kind.state_bytes(parameters),
        payload_up_bytes=found.up_bytes,
        payload_down_bytes=found.down_bytes,
        traffic=traffic_of(run, found, machines, links.up_mbit * BYTES_PER_S_OF_MBIT),
        archive_every_s=archived_every_s(run, links.up_mbit * BYTES_PER_S_OF_MBIT),
        link_up_bytes_per_s=links.up_mbit * BYTES_PER_S_OF_MBIT,
        link_down_bytes_per_s=links.down_mbit * BYTES_PER_S_OF_MBIT,
        memory_bytes=cost.memory_bytes,
        disk_bytes=disk_bytes(parameters),
    )


def _carried(run: RunFile, found: PlaybackResult, machines: PlaybackMachines, links: LinksSection) -> PlaybackResult:
    """Make rounds that wait for the wire so long that links carry their bytes beside all other traffic.

    The playback knows of a link only what passes in rounds. Where other traffic alone fills a link, no length helps.
    """
    if run.merge.kind.asynchronous:
        return found
    traffic, times = traffic_of(run, found, machines, links.up_mbit * BYTES_PER_S_OF_MBIT), 1.0
    for mbit, whole, merging in (
        (links.up_mbit, traffic.up, traffic.merging_up),
        (links.down_mbit, traffic.down, traffic.merging_down),
    ):
        left = mbit * BYTES_PER_S_OF_MBIT - (whole - merging)
        times = max(times, merging / left if mbit and left > 0 else 1.0)
    longer_s = [(times - 1) * one for one in found.round_s]
    return replace(
        found,
        round_s=tuple(one + more for one, more in zip(found.round_s, longer_s, strict=True)),
        stall_s=tuple(one + more for one, more in zip(found.stall_s, longer_s, strict=True)),
    )


def _full_steps(run: RunFile, found: PlaybackResult) -> float:
    synchronous = not run.merge.kind.asynchronous
    counted = found.fresh_share if synchronous else 1.0  # of a round that is on no roster nothing counts
    steps = [tokens / (run.tokens_per_step * counted) for tokens in found.tokens]
    if run.merge.pacing:
        return min(max(steps), run.merge.inner_steps)  # some rounds are longer, to end when others' do
    return min(steps) if synchronous else statistics.median(steps)
