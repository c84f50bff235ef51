"""Settings of a simulated gossip swarm, and what its volunteers advertise, publish and record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from swarmtrain.network.tensor_groups import groups_of, rules_of
from swarmtrain.protocol.gossip.partners import Place, PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName, PublicationBytes, WantedPartners
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.shards import CoverageRow
from swarmtrain.run import RunFile

GROUPS = rules_of(groups_of((), "fp32", ("fp32",)))
"""Tensor groups of a publication and the rule by which each is merged: a number each, in place of tensors."""
WEIGHTS, GRADIENT = GROUPS


@dataclass(frozen=True, kw_only=True)
class SimulatedGossipSettings:
    """Settings of a simulated gossip swarm, which a run file fixes for real peers. Durations are in seconds."""

    inner_steps: int = 64
    tokens_per_step: int = 100
    num_parts: int = 4
    num_fragments: int = 1
    adapter_groups: int = 0
    """Number of fragments, as groups of an adapter, that a volunteer trains in a round; 0: all."""
    wanted: WantedPartners = field(default_factory=lambda: WantedPartners(gradients=3, weights=3))
    variant: str = "uniform"
    pacing: bool = True
    round_limit_s: float = 1e9
    max_staleness_rounds: int = 8
    max_readers: int = 4
    sizes: PublicationBytes = field(default_factory=lambda: PublicationBytes(weights=1_000_000, gradient=1_000_000))
    """Bytes of the publications of all fragments together."""
    state_bytes: int = 2_000_000
    """Bytes of weights and momentum that a joiner downloads."""
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.8
    inner_rate: float = 0.0
    num_shards: int = 0
    presence_ttl_s: float = 30.0
    stall_limit_s: float = 10.0
    sample: int = 16
    """Number of presences that a peer reads in a round: in a large swarm it knows a sample."""
    forget_after_s: float = 600.0
    keeps_past: bool = True
    """True if peers keep checkpoints to restart from, and `entered`. Off for ten thousand peers, to save memory."""

    @classmethod
    def of(cls, run: RunFile, sizes: PublicationBytes, state_bytes: int) -> SimulatedGossipSettings:
        """Return the settings of a run file."""
        merge, network = run.merge, run.network
        return cls(
            inner_steps=merge.inner_steps,
            tokens_per_step=run.tokens_per_step,
            num_parts=merge.publications_per_round,
            num_fragments=merge.num_fragments,
            wanted=WantedPartners(merge.num_partners, merge.num_weights),
            variant=merge.partners,
            pacing=merge.pacing,
            round_limit_s=merge.round_limit_s,
            max_staleness_rounds=merge.max_staleness_rounds,
            max_readers=network.max_readers,
            sizes=sizes,
            state_bytes=state_bytes,
            outer_learning_rate=merge.outer_learning_rate,
            outer_momentum=merge.outer_momentum,
            presence_ttl_s=network.presence_ttl_s,
            stall_limit_s=network.stall_limit_s,
        )

    @cached_property
    def fragment_sizes(self) -> PublicationBytes:
        """Bytes of one fragment."""
        num = self.num_fragments
        return PublicationBytes(self.sizes.weights // num, self.sizes.gradient // num, 1 / num)

    def group_bytes(self, group: GroupName) -> int:
        """Return the bytes of one fragment's tensor group."""
        return self.fragment_sizes.weights if group == WEIGHTS else self.fragment_sizes.gradient


@dataclass(frozen=True)
class SimulatedPublication:
    """Publication of one fragment: its weight at the start of the fragment's round, and the pseudo-gradient since.

    Part 0 has the weight alone.
    """

    group: GroupName
    """Tensor group that is pulled."""
    peer: str
    version: PublicationVersion
    theta: float
    gradient: float
    rows: tuple[CoverageRow, ...] = ()
    fragment: int = 0
    is_forged: bool = False
    """True if a host changed what `peer` has signed."""

    @property
    def is_finite(self) -> bool:
        """True if the numbers are finite. The product's codec refuses others."""
        return math.isfinite(self.theta) and math.isfinite(self.gradient)


class PublicationQuery(NamedTuple):
    """Query for a peer's newest publication of a tensor group."""

    group: GroupName
    fragment: int


class OfGuest(NamedTuple):
    """Request to a host for something of one of its guests."""

    author: str
    what: PublicationQuery | SimulatedPublication


class Entered(NamedTuple):
    """Inner steps of the author `whose` that entered weights of peer `who`, counted in tokens of the fragment's
    round."""

    who: str
    whose: str
    fragment: int
    round: int
    since: int
    until: int


@dataclass(frozen=True)
class ConsensusSnapshot:
    """State that a joiner takes: weights, and for each fragment the place up to which they contain each peer's
    publications.

    `entered` is for the tests.
    """

    thetas: list[float]
    momenta: list[float]
    round: int
    places: list[dict[str, Place]]
    entered: list[Entered]


@dataclass(frozen=True)
class SimulatedCheckpoint:
    """Weights with the ledger of what was merged into them: they belong together. `entered` is for the tests."""

    thetas: list[float]
    momenta: list[float]
    round: int
    ledger: list[list[list[str | int]]]
    entered: list[Entered]
    came: list[Entered]


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One peer's round, for tests and reports."""

    peer: str
    round: int
    started_s: float
    ended_s: float
    steps: int
    partners: float
    """Number of publications that entered with parts that were not merged before; the mean over the fragments."""
    staleness_rounds: int
    """Rounds by which the oldest publication that entered was behind the median."""
    bytes_down: int
    waited: bool = False
    """True if the peer was too far behind at the round's end, and fetched another's weights before the next round."""


@dataclass(frozen=True, slots=True)
class AdvertisedRecord:
    """A peer's record in the DHT, shared by all who read it, and the time at which its round ends."""

    info: PeerInfo
    expires_s: float
    round_ends_s: float | None
