"""Who may read from a peer now, of those who want to: so many at once, and nobody for ever while others wait.

A reader takes as long as it likes, so places are lent. Whoever takes nothing for a while loses its place to the next
that comes. Whoever has taken `gives_way_s` of its own time gives way too, the slowest first, to one that has fewer
places; its own is what it did not spend waiting for us, whose link may be the slow one. It may come back at once, and
goes on where it was. While there are places for all nobody gives way, however slow it is.

Pure: `now` is an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["GIVES_WAY_S", "Reader", "Readers"]

GIVES_WAY_S = 30.0
"""At the least speed that is not given up four chunks take so long."""


@dataclass(eq=False)
class Reader:
    """One that has a place. `took_s` is when it was given its last piece, infinite while it waits for us."""

    peer: str
    took_s: float
    took_bytes: int = 0
    earlier_s: float = 0.0

    def own_s(self, now: float) -> float:
        """For how long it has had its place without waiting for us."""
        return self.earlier_s + (max(0.0, now - self.took_s) if math.isfinite(self.took_s) else 0.0)

    def bytes_per_s(self, now: float) -> float:
        """What it took in that time."""
        return self.took_bytes / max(self.own_s(now), 1e-9)


@dataclass
class Readers:
    """Those that have places. How many there are, `most`, is asked each time."""

    stall_s: float
    gives_way_s: float = GIVES_WAY_S
    _inside: dict[Reader, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._inside)

    def __contains__(self, reader: Reader) -> bool:
        return reader in self._inside

    def has_room_for(self, peer: str, most: int, now: float) -> bool:
        """Whether `peer` (empty: one not known) would get a place. It has half of them at most, so that none can keep
        all others away."""
        if peer and self._num_moving(peer, now) >= -(-most // 2):
            return False
        return len(self._inside) < most or self._to_give_way(peer, now) is not None

    def admit(self, peer: str, most: int, now: float) -> tuple[Reader | None, Reader | None]:
        """(its place, if it gets one; who loses its own for that, if somebody does)."""
        if not self.has_room_for(peer, most, now):
            return None, None
        gone = self._to_give_way(peer, now) if len(self._inside) >= most else None
        if gone is not None:
            del self._inside[gone]
        reader = Reader(peer, now)
        self._inside[reader] = None
        return reader, gone

    def is_stalled(self, reader: Reader, now: float) -> bool:
        """Whether it has taken nothing for so long that it keeps its place only while nobody else wants it."""
        return reader.took_s <= now - self.stall_s

    def waits(self, reader: Reader, now: float) -> None:
        """It has come for its next piece: it is we who let it wait from now on."""
        reader.earlier_s = reader.own_s(now)
        reader.took_s = math.inf

    def takes(self, reader: Reader, size_bytes: int, now: float) -> None:
        """Its next piece goes out."""
        reader.earlier_s = reader.own_s(now)
        reader.took_s, reader.took_bytes = now, reader.took_bytes + size_bytes

    def leaves(self, reader: Reader) -> None:
        """Its place is free, if it still has one."""
        self._inside.pop(reader, None)

    def _num_moving(self, peer: str, now: float) -> int:
        return sum(reader.peer == peer and not self.is_stalled(reader, now) for reader in self._inside)

    def _to_give_way(self, peer: str, now: float) -> Reader | None:
        stalled = [reader for reader in self._inside if self.is_stalled(reader, now)]
        if stalled:
            return min(stalled, key=lambda reader: reader.took_s)
        own = self._num_moving(peer, now) if peer else 0
        due = [
            reader
            for reader in self._inside
            if reader.own_s(now) >= self.gives_way_s and (not reader.peer or self._num_moving(reader.peer, now) > own)
        ]
        return min(due, key=lambda reader: reader.bytes_per_s(now), default=None)
