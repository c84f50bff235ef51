"""Settings of a simulated synchronous swarm, and what its peers say to each other and remember of a round."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from swarmtrain.protocol.rounds.chains import Chain
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.run_batch import BatchTarget

WorldMoment = Literal["started", "ended", "signed", "told_one", "serving"]
"""Moment at which a declared fault strikes.

- "started", "ended": training of the peer's round;
- "signed": it has signed a roster and told nobody;
- "told_one": it has told one peer of that roster;
- "serving": somebody began to pull from it.
"""


@dataclass(frozen=True, kw_only=True)
class SimulatedLink:
    """Link of a peer: one-way latency in seconds, bytes per second up and down (down 0: as up), the share of messages
    lost, and whether others can dial the peer."""

    latency_s: float = 0.01
    bytes_per_s: float = 10e6
    down_bytes_per_s: float = 0.0
    drop: float = 0.0
    can_be_dialled: bool = True
    told_bytes_per_s: float = 0.0
    """Rate that the peer tells of its link; 0: the true one."""

    @property
    def down_per_s(self) -> float:
        """Bytes per second that the peer can receive."""
        return self.down_bytes_per_s or self.bytes_per_s

    @property
    def rates(self) -> LinkRates:
        """Link as the peer tells it."""
        up, down = self.told_bytes_per_s or self.bytes_per_s, self.told_bytes_per_s or self.down_per_s
        return LinkRates(up, down, self.can_be_dialled)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a simulated synchronous swarm, which a run file and the network fix for real peers. Durations are in
    seconds."""

    inner_steps: int = 32
    tokens_per_step: int = 1000
    round_limit_s: float = 600.0
    silence_s: float = 5.0
    target: BatchTarget | None = None
    """Size of the large batches that all volunteers make together; None: rounds of `inner_steps`."""
    max_wait_s: float = math.inf
    share_above: int = 5
    presence_ttl_s: float = 30.0
    read_presence_s: float = 3.0
    call_limit_s: float = 5.0
    hold_s: float = 2.0
    retry_s: float = 0.25
    look_s: float = 3.0
    share_again_s: float = 0.5
    stall_limit_s: float = 10.0
    publication_bytes: int = 2_000_000
    state_bytes: int = 4_000_000
    transfers_share_links: bool = False
    """True if all transfers share the links of their ends, piece by piece; otherwise each has them for itself, and the
    shares of a round go by formulas, which many peers need."""
    by_bandwidth: bool = True
    """With `transfers_share_links`: True if who averages how much follows from the links, else all shares are equal."""

    @property
    def target_tokens(self) -> int:
        """Tokens of the first large batch; 0 without any."""
        return 0 if self.target is None else self.target.first_tokens

    @property
    def num_chunks(self) -> int:
        """Chunks of a publication, of which shares are made."""
        return math.ceil(self.publication_bytes / CHUNK_BYTES)


class Phase(Enum):
    """Phases of a volunteer's round."""

    JOINING = "joining"
    TRAINING = "training"
    MERGING = "merging"
    MERGED = "merged"
    CATCHING_UP = "catching up"


@dataclass(frozen=True, kw_only=True)
class JoinState:
    """State that a joiner receives: everything that a round starts from."""

    round: int
    last: Roster | None
    digest: str
    history: tuple[Roster, ...]
    chain: Chain = field(default_factory=Chain)


def hash_of(text: str) -> str:
    """Return the SHA-256 of a text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()
