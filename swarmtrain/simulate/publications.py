"""What simulated volunteers who gossip are told, publish and leave behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from swarmtrain.protocol.lifecycle import PeerInfo
from swarmtrain.protocol.partners import Candidate, Mark
from swarmtrain.protocol.pulls import Section, SectionBytes, Wanted
from swarmtrain.protocol.shards import Row
from swarmtrain.run import RunFile

__all__ = ["GossipSettings", "Presence", "Publication", "RoundRecord"]


@dataclass(frozen=True, kw_only=True)
class GossipSettings:
    """What the run file fixes. Durations in seconds."""

    inner_steps: int = 64
    tokens_per_step: int = 100
    num_parts: int = 4
    wanted: Wanted = field(default_factory=lambda: Wanted(gradients=3, weights=3))
    variant: str = "uniform"
    pacing: bool = True
    round_limit_s: float = 1e9
    max_staleness_rounds: int = 8
    max_readers: int = 4
    sizes: SectionBytes = field(default_factory=lambda: SectionBytes(weights=1_000_000, gradient=1_000_000))
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
    def of(cls, run: RunFile, sizes: SectionBytes, state_bytes: int) -> GossipSettings:
        """What a run file says."""
        merge, network = run.merge, run.network
        return cls(
            inner_steps=merge.inner_steps,
            tokens_per_step=run.tokens_per_step,
            num_parts=merge.publications_per_round,
            wanted=Wanted(merge.num_partners, merge.num_weights),
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

    def section_bytes(self, section: Section) -> int:
        """One of them."""
        return self.sizes.weights if section == "weights" else self.sizes.gradient


@dataclass(frozen=True)
class Publication:
    """What a peer published: its weight at the round's start and the pseudo-gradient since, or (part 0) the former."""

    peer: str
    mark: Mark
    theta: float
    gradient: float
    rows: tuple[Row, ...] = ()
    is_forged: bool = False
    """Whether it is not what `peer` has signed: whoever serves it changed it."""

    @cached_property
    def section(self) -> Section:
        """What is pulled of it."""
        return "gradient" if self.mark.part else "weights"

    @property
    def is_finite(self) -> bool:
        """As the codec checks it: else it is not taken."""
        return math.isfinite(self.theta) and math.isfinite(self.gradient)

    @cached_property
    def body(self) -> str:
        """What to ask for to have it."""
        return f"{self.section} {self.mark.round} {self.mark.part}"


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One peer's round, for tests and reports."""

    peer: str
    round: int
    started_s: float
    ended_s: float
    steps: int
    partners: int
    """Publications that entered: parts that were not merged before."""
    staleness_rounds: int
    """The oldest of them, behind the median."""
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Presence:
    """What the DHT was given of a peer: its record, the same as others choose partners by, and when its round ends."""

    info: PeerInfo
    expires_s: float
    candidate: Candidate
    round_ends_s: float | None
