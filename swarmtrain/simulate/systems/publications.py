"""What simulated volunteers who gossip are told, publish and leave behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from swarmtrain.network.sections import rules_of, sections_of
from swarmtrain.protocol.gossip.partners import Place, PublicationVersion
from swarmtrain.protocol.gossip.pulls import Section, SectionBytes, WantedPartners
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.shards import CoverageRow
from swarmtrain.run import RunFile

__all__ = [
    "GRADIENT",
    "SECTIONS",
    "WEIGHTS",
    "AdvertisedRecord",
    "ConsensusSnapshot",
    "Entered",
    "OfGuest",
    "PublicationQuery",
    "RoundRecord",
    "SimulatedCheckpoint",
    "SimulatedGossipSettings",
    "SimulatedPublication",
]

SECTIONS = rules_of(sections_of((), "fp32", ("fp32",)))
"""What is published, and what a merge makes of it: a number each, in place of tensors."""
WEIGHTS, GRADIENT = SECTIONS


@dataclass(frozen=True, kw_only=True)
class SimulatedGossipSettings:
    """What the run file fixes. Durations in seconds."""

    inner_steps: int = 64
    tokens_per_step: int = 100
    num_parts: int = 4
    num_fragments: int = 1
    wanted: WantedPartners = field(default_factory=lambda: WantedPartners(gradients=3, weights=3))
    variant: str = "uniform"
    pacing: bool = True
    round_limit_s: float = 1e9
    max_staleness_rounds: int = 8
    max_readers: int = 4
    sizes: SectionBytes = field(default_factory=lambda: SectionBytes(weights=1_000_000, gradient=1_000_000))
    """Of all fragments."""
    state_bytes: int = 2_000_000
    """Weights and momentum, as a joiner takes them."""
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.8
    inner_rate: float = 0.0
    num_shards: int = 0
    presence_ttl_s: float = 30.0
    stall_limit_s: float = 10.0
    sample: int = 16
    """Presences that a peer reads a round: of a large swarm it knows a sample."""
    forget_after_s: float = 600.0
    keeps_past: bool = True
    """Whether peers keep checkpoints to go on from, and `entered`: ten thousand of them had better not."""

    @classmethod
    def of(cls, run: RunFile, sizes: SectionBytes, state_bytes: int) -> SimulatedGossipSettings:
        """What a run file says."""
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
    def fragment_sizes(self) -> SectionBytes:
        """Of one of the fragments."""
        num = self.num_fragments
        return SectionBytes(self.sizes.weights // num, self.sizes.gradient // num, 1 / num)

    def section_bytes(self, section: Section) -> int:
        """Of one fragment's."""
        return self.fragment_sizes.weights if section == WEIGHTS else self.fragment_sizes.gradient


@dataclass(frozen=True)
class SimulatedPublication:
    """What a peer published of a fragment: its weight at the start of the fragment's round and the pseudo-gradient
    since, or (part 0) the former."""

    section: Section
    """What is pulled of it."""
    peer: str
    mark: PublicationVersion
    theta: float
    gradient: float
    rows: tuple[CoverageRow, ...] = ()
    fragment: int = 0
    is_forged: bool = False
    """Whether it is not what `peer` has signed: whoever serves it changed it."""

    @property
    def is_finite(self) -> bool:
        """As the codec checks it: else it is not taken."""
        return math.isfinite(self.theta) and math.isfinite(self.gradient)


class PublicationQuery(NamedTuple):
    """The question for a peer's newest publication of a section."""

    section: Section
    fragment: int


class OfGuest(NamedTuple):
    """What a host is asked for that belongs to a guest of its."""

    author: str
    what: PublicationQuery | SimulatedPublication


class Entered(NamedTuple):
    """Inner steps of `whose` that entered weights of `who`, counted in tokens of the fragment's round."""

    who: str
    whose: str
    fragment: int
    round: int
    since: int
    until: int


@dataclass(frozen=True)
class ConsensusSnapshot:
    """What a joiner takes: weights, and up to where each peer is in them, by fragments. `entered` is for the tests."""

    thetas: list[float]
    momenta: list[float]
    round: int
    places: list[dict[str, Place]]
    entered: list[Entered]


@dataclass(frozen=True)
class SimulatedCheckpoint:
    """Weights, and what was merged into them: they belong together. `entered` is for the tests."""

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
    """Publications that entered: parts that were not merged before. The mean over the fragments."""
    staleness_rounds: int
    """The oldest of them, behind the median."""
    bytes_down: int
    waited: bool = False
    """Whether it was too far behind by then, and asked for another's weights before the next one began."""


@dataclass(frozen=True, slots=True)
class AdvertisedRecord:
    """What the DHT was given of a peer: its record, which all who read it share, and when its round ends."""

    info: PeerInfo
    expires_s: float
    round_ends_s: float | None
