"""Places for readers: which peers may read from this one now.

Their number is limited, and nobody keeps a place for ever while others wait. A reader may take as long as it likes, so
places are lent (decision 53). A reader that takes nothing for a while loses its place to the next peer that comes. A
reader that has used `gives_way_s` of its own time gives way to a peer with fewer places, the slowest first; time that
it spent waiting for this peer, whose link may be the slow one, does not count. It may come back at once and continue
where it was. While there are places for all, nobody gives way, however slow.

What a synchronous round averages is for its volunteers: they go before strangers, of whom anyone can make any number.

Everything here is pure: `now` is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

GIVES_WAY_S = 30.0
"""Seconds after which a reader may have to give way. At the slowest speed that is tolerated, four chunks take this
long."""

_COMES_BACK_S = 2.0
"""Seconds for which a place is kept for a peer that was told to come again."""
_MAX_WAITING = 256
"""Peers that may wait in order, of those that go first and of the others."""


@dataclass(eq=False)
class Reader:
    """Reader that has a place. `took_s` is the time at which it was given its last piece, infinite while it waits for
    this peer."""

    peer: str
    took_s: float
    took_bytes: int = 0
    earlier_s: float = 0.0

    def own_s(self, now: float) -> float:
        """Return for how long the reader has had its place, without the time that it waited for this peer."""
        return self.earlier_s + (max(0.0, now - self.took_s) if math.isfinite(self.took_s) else 0.0)

    def bytes_per_s(self, now: float) -> float:
        """Return the reader's speed in that time."""
        return self.took_bytes / max(self.own_s(now), 1e-9)


@dataclass
class Readers:
    """Readers that have places. The number of places, `most`, is an argument of each call, because it may change."""

    stall_s: float
    gives_way_s: float = GIVES_WAY_S
    in_order: bool = False
    """Whether peers that got no place get one in the order in which they asked first: a place that becomes free is kept
    for a moment for whoever asked earlier. Otherwise it is the next asker's, which may be the one that just left it."""
    goes_first: Callable[[str], bool] = lambda peer: True
    """Returns whether a peer goes before those for which this is false."""
    _inside: dict[Reader, None] = field(default_factory=dict)
    _waiting: dict[str, float] = field(default_factory=dict)
    """Peers that got no place, the earliest first, with the time at which they asked last."""

    def __len__(self) -> int:
        return len(self._inside)

    def __contains__(self, reader: Reader) -> bool:
        return reader in self._inside

    def has_room_for(self, peer: str, most: int, now: float) -> bool:
        """Return whether `peer` ("": unknown) would get a place. One peer has at most half of the places."""
        if peer and self._num_moving(peer, now) >= -(-most // 2):
            return False
        return len(self._inside) + self._num_before(peer, now) < most or self._to_give_way(peer, now) is not None

    def admit(self, peer: str, most: int, now: float) -> tuple[Reader | None, Reader | None]:
        """Return (the new reader or None, the reader that loses its place for it or None)."""
        if not self.has_room_for(peer, most, now):
            has_its_part = peer and self._num_moving(peer, now) >= -(-most // 2)
            alike = sum(self.goes_first(other) == self.goes_first(peer) for other in self._waiting if other != peer)
            if self.in_order and peer and not has_its_part and alike < _MAX_WAITING:
                self._waiting[peer] = now
            return None, None
        self._waiting.pop(peer, None)
        gone = self._to_give_way(peer, now) if len(self._inside) >= most else None
        if gone is not None:
            del self._inside[gone]
        reader = Reader(peer, now)
        self._inside[reader] = None
        return reader, gone

    def is_stalled(self, reader: Reader, now: float) -> bool:
        """Return whether the reader has taken nothing for so long that it keeps its place only while nobody else wants
        it."""
        return reader.took_s <= now - self.stall_s

    def waits(self, reader: Reader, now: float) -> None:
        """Record that the reader has come for its next piece: from now on it waits for this peer."""
        reader.earlier_s = reader.own_s(now)
        reader.took_s = math.inf

    def takes(self, reader: Reader, size_bytes: int, now: float) -> None:
        """Record that the reader's next piece is sent."""
        reader.earlier_s = reader.own_s(now)
        reader.took_s, reader.took_bytes = now, reader.took_bytes + size_bytes

    def leaves(self, reader: Reader) -> None:
        """Free the reader's place, if it still has one."""
        self._inside.pop(reader, None)

    def _num_before(self, peer: str, now: float) -> int:
        """Return the number of peers that wait for a place and go before this one."""
        for gone in [other for other, asked_s in self._waiting.items() if asked_s < now - _COMES_BACK_S]:
            del self._waiting[gone]
        mine, line = self.goes_first(peer), [(other, self.goes_first(other)) for other in self._waiting]
        place = next((place for place, (other, _) in enumerate(line) if other == peer), len(line))
        return sum(theirs > mine or (theirs == mine and at < place) for at, (_, theirs) in enumerate(line))

    def _num_moving(self, peer: str, now: float) -> int:
        return sum(reader.peer == peer and not self.is_stalled(reader, now) for reader in self._inside)

    def _to_give_way(self, peer: str, now: float) -> Reader | None:
        """Return the reader that loses its place to `peer`; None if none must."""
        stalled = [reader for reader in self._inside if self.is_stalled(reader, now)]
        if stalled:
            return min(stalled, key=lambda reader: reader.took_s)
        if self.goes_first(peer):
            strangers = [reader for reader in self._inside if not self.goes_first(reader.peer)]
            if strangers:
                return min(strangers, key=lambda reader: reader.bytes_per_s(now))
        own = self._num_moving(peer, now) if peer else 0
        # Two readers at 54 KB/s once kept an honest one out in 31 of 31 attempts (decision 53).
        due = [
            reader
            for reader in self._inside
            if reader.own_s(now) >= self.gives_way_s and (not reader.peer or self._num_moving(reader.peer, now) > own)
        ]
        return min(due, key=lambda reader: reader.bytes_per_s(now), default=None)
