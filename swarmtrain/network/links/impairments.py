"""Model what bad networks do to a rehearsal's links: late pieces, and times in which nothing passes.

The model is a stream, not packets, so faults of packets appear as what TCP makes of them (decision 32). A piece that
lost a packet is late by a timeout, or by a round trip if that is longer. What an outage held up arrives some time after
it, since TCP doubles its waits between retries. Random generators are arguments: the same seed gives the same faults.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

PACKET_BYTES = 1448
"""Bytes of a stream in one Ethernet frame."""

_PIECE_S, _MOST_PIECE_BYTES = 0.01, 64 * 1024
_RETRANSMIT_S = 0.2  # TCP's least retransmission timeout
_MOST_AGAIN_S = 60.0  # TCP's longest wait between two retries, as modelled


def piece_bytes(bytes_per_s: float) -> int:
    """Return the bytes that pass a link of this rate at once: a hundredth of a second's, from one packet to 64 KiB.

    Larger pieces would make small calls wait for those of other connections.
    """
    return int(min(max(bytes_per_s * _PIECE_S, PACKET_BYTES), _MOST_PIECE_BYTES))


@dataclass
class Lateness:
    """Delays of the pieces of one direction of a connection, beyond the link's own delay."""

    jitter_s: float = 0.0
    loss: float = 0.0
    """Share of packets that are lost, from 0 to 1."""
    rtt_s: float = 0.0
    rng: random.Random = field(default_factory=random.Random)

    def of(self, size_bytes: int) -> float:
        """Return the next piece's delay in seconds: up to `jitter_s`, and a retransmission if one of its packets was
        lost."""
        late_s = self.rng.uniform(0.0, self.jitter_s) if self.jitter_s > 0 else 0.0
        if self.loss > 0:
            packets = -(-size_bytes // PACKET_BYTES)
            if self.rng.random() >= (1.0 - self.loss) ** packets:
                late_s += max(_RETRANSMIT_S, self.rtt_s)
        return late_s

    def of_transfer(self, size_bytes: int, bytes_per_s: float) -> float:
        """Return the seconds by which a transfer's end is late: each piece may be, and those behind it wait, as with
        TCP."""
        if not self.jitter_s and not self.loss:
            return 0.0
        size = piece_bytes(bytes_per_s)
        number, piece_s = -(-size_bytes // size), size / bytes_per_s
        return max((self.of(size) - behind * piece_s for behind in range(number)), default=0.0)


@dataclass(frozen=True, eq=False)
class Narrowing:
    """Time in which the links of some peers carry only a share of their bandwidth."""

    names: frozenset[str]
    share: float
    """Share of the bandwidth that is left, from 0 to 1."""


@dataclass(frozen=True, eq=False)
class Outage:
    """Time in which nothing passes between the given sides. Peers named in none of them form one more side."""

    sides: tuple[frozenset[str], ...]

    def parts(self, one: str, other: str) -> bool:
        """Return whether peers `one` and `other` are on different sides."""
        return self._side(one) != self._side(other)

    def _side(self, name: str) -> int:
        return next((number for number, side in enumerate(self.sides, 1) if name in side), 0)


@dataclass
class Outages:
    """Present outages. All calls have to be made in one event loop."""

    rng: random.Random = field(default_factory=random.Random)
    _now: list[Outage] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, sides: Iterable[Iterable[str]]) -> Outage:
        """Begin an outage between these sides."""
        outage = Outage(tuple(frozenset(side) for side in sides))
        self._now.append(outage)
        return outage

    def end(self, outage: Outage) -> None:
        """End an outage; what it held up arrives little by little."""
        self._now.remove(outage)
        self._changed.set()
        self._changed = asyncio.Event()

    def parts(self, one: str, other: str) -> bool:
        """Return whether an outage separates peers `one` and `other` now."""
        return any(outage.parts(one, other) for outage in self._now)

    async def passable(self, one: str, other: str) -> bool:
        """Wait until something sent between these peers arrives; return whether an outage had delayed it."""
        clock, was_held_up = asyncio.get_running_loop().time, False
        while self.parts(one, other):
            since_s, was_held_up = clock(), True
            while self.parts(one, other):
                await self._changed.wait()
            # TCP doubles its waits between retries, so the next one comes within as long again as the outage lasted.
            await asyncio.sleep(self.rng.uniform(0.0, min(clock() - since_s, _MOST_AGAIN_S)))
        return was_held_up
