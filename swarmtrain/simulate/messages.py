"""What simulated peers say to each other and remember of a round."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from swarmtrain.protocol.chains import Chain
from swarmtrain.protocol.rosters import Publication, Roster, Told

__all__ = [
    "Link",
    "Moment",
    "Phase",
    "RoundReply",
    "RoundRequest",
    "RoundState",
    "Settings",
    "State",
    "hash_of",
    "rotated",
]

Moment = Literal["started", "ended", "signed", "told_one", "serving"]
"""When a declared fault strikes: its round's training started or ended, it signed a roster and told nobody, it told
one peer, somebody began to pull from it."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A peer's connection: one-way latency in seconds, bytes per second up and (0: the same) down, and the share of
    messages lost."""

    latency_s: float = 0.01
    bytes_per_s: float = 10e6
    down_bytes_per_s: float = 0.0
    drop: float = 0.0

    @property
    def down_per_s(self) -> float:
        """Bytes per second down."""
        return self.down_bytes_per_s or self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the run file and the network driver fix. Durations in seconds."""

    inner_steps: int = 32
    tokens_per_step: int = 1000
    round_limit_s: float = 600.0
    silence_s: float = 5.0
    share_above: int = 5
    presence_ttl_s: float = 30.0
    read_presence_s: float = 3.0
    call_limit_s: float = 5.0
    hold_s: float = 2.0
    retry_s: float = 0.5
    stall_limit_s: float = 10.0
    publication_bytes: int = 2_000_000
    state_bytes: int = 4_000_000
    kept_rounds: int = 3
    """Rosters are kept for this many rounds, publications for two."""


class Phase(Enum):
    """What a volunteer is at."""

    JOINING = "joining"
    TRAINING = "training"
    MERGING = "merging"
    CATCHING_UP = "catching up"


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """What do you have of `round`? `known` is the version of the answer the asker has; held up to `hold_s`."""

    src: str
    round: int
    known: int
    hold_s: float


@dataclass(frozen=True, kw_only=True)
class RoundReply:
    """A peer's answer about `asked`, the round it was asked about."""

    asked: int
    version: int
    told: Told
    inner_steps_done: int
    publication: Publication | None
    roster: Roster | None
    chain: Chain = field(default_factory=Chain)
    """What it shows of how it came to the roster that it tells of."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a joiner is given: everything that a round starts from."""

    round: int
    last: Roster | None
    digest: str
    history: tuple[Roster, ...]
    chain: Chain = field(default_factory=Chain)


@dataclass
class RoundState:
    """What is known of the round that this peer has ended; forgotten when the next one begins."""

    started_s: float
    ended_s: float = math.inf
    frozen_s: float = 0.0
    """How long this process stood still since `ended_s`."""
    announced: dict[str, Publication] = field(default_factory=dict)
    rosters: dict[tuple[str, int, str], Roster] = field(default_factory=dict)
    asked_at_s: dict[str, float] = field(default_factory=dict)
    answered_at_s: dict[str, float] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    pulling: set[str] = field(default_factory=set)
    unobtainable: set[str] = field(default_factory=set)
    undeliverable: set[str] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    applying: str = ""
    roster_at_s: float = 0.0
    own_share_at_s: float = math.inf
    shares_pulling: set[int] = field(default_factory=set)
    averaging: set[int] = field(default_factory=set)


def hash_of(text: str) -> str:
    """SHA-256 of a text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def rotated(peers: Iterable[str], name: str) -> list[str]:
    """The same peers, begun elsewhere by everyone, so that not all ask the first one."""
    ordered = sorted(peers)
    start = int(hash_of(name)[:8], 16) % len(ordered) if ordered else 0
    return ordered[start:] + ordered[:start]
