"""What bad networks do to the links of a rehearsal: pieces that come late, and times in which nothing passes.

A stream is modelled, not packets, so what happens to packets shows as what TCP makes of it: a piece that lost one of
them is late by a timeout, or by a round trip if that is longer; what was held up by an outage comes some time after it,
since TCP tries again ever more seldom. Random numbers are given: the same seed, the same troubles.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["PACKET_BYTES", "Lateness", "Outage", "Outages", "piece_bytes"]

PACKET_BYTES = 1448
"""What an Ethernet frame carries of a stream."""

_PIECE_S, _MOST_PIECE_BYTES = 0.01, 64 * 1024
_RETRANSMIT_S = 0.2
_MOST_AGAIN_S = 60.0


def piece_bytes(bytes_per_s: float) -> int:
    """What passes a link of this rate at once: a hundredth of a second's, so that a small call waits little for
    those of others; from a packet to 64 kB."""
    return int(min(max(bytes_per_s * _PIECE_S, PACKET_BYTES), _MOST_PIECE_BYTES))


@dataclass
class Lateness:
    """By how much the pieces of one direction of a connection are late, beyond the link's delay."""

    jitter_s: float = 0.0
    loss: float = 0.0
    """Share of its packets that are lost, from 0 to 1."""
    rtt_s: float = 0.0
    rng: random.Random = field(default_factory=random.Random)

    def of(self, size_bytes: int) -> float:
        """Seconds, for the next piece: up to `jitter_s`, and a retransmission if one of its packets was lost."""
        late_s = self.rng.uniform(0.0, self.jitter_s) if self.jitter_s > 0 else 0.0
        if self.loss > 0:
            packets = -(-size_bytes // PACKET_BYTES)
            if self.rng.random() >= (1.0 - self.loss) ** packets:
                late_s += max(_RETRANSMIT_S, self.rtt_s)
        return late_s

    def of_transfer(self, size_bytes: int, bytes_per_s: float) -> float:
        """Seconds by which a transfer's end is late: its pieces are, one by one, and those behind wait, as in TCP."""
        if not self.jitter_s and not self.loss:
            return 0.0
        size = piece_bytes(bytes_per_s)
        number, piece_s = -(-size_bytes // size), size / bytes_per_s
        return max((self.of(size) - behind * piece_s for behind in range(number)), default=0.0)


@dataclass(frozen=True, eq=False)
class Outage:
    """Nothing passes between its sides; who is in none of them is on one more side."""

    sides: tuple[frozenset[str], ...]

    def parts(self, one: str, other: str) -> bool:
        """Whether these two are on different sides."""
        return self._side(one) != self._side(other)

    def _side(self, name: str) -> int:
        return next((number for number, side in enumerate(self.sides, 1) if name in side), 0)


@dataclass
class Outages:
    """Those that there are now. All calls are made in one event loop."""

    rng: random.Random = field(default_factory=random.Random)
    _now: list[Outage] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, sides: Iterable[Iterable[str]]) -> Outage:
        """From now on."""
        outage = Outage(tuple(frozenset(side) for side in sides))
        self._now.append(outage)
        return outage

    def end(self, outage: Outage) -> None:
        """What was held up goes on, by and by."""
        self._now.remove(outage)
        self._changed.set()
        self._changed = asyncio.Event()

    def parts(self, one: str, other: str) -> bool:
        """Whether nothing passes between these two now."""
        return any(outage.parts(one, other) for outage in self._now)

    async def passable(self, one: str, other: str) -> bool:
        """Returns when what is said between these two arrives: at once if nothing is in its way; whether it was."""
        clock, was_held_up = asyncio.get_running_loop().time, False
        while self.parts(one, other):
            since_s, was_held_up = clock(), True
            while self.parts(one, other):
                await self._changed.wait()
            await asyncio.sleep(self.rng.uniform(0.0, min(clock() - since_s, _MOST_AGAIN_S)))
        return was_held_up
