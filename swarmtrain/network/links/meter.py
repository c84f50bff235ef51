"""Measure one direction of this peer's link on the traffic that it has anyway.

Nobody can tell what a link carries while it is idle, so a rate counts only what certainly passed in a short time: of
each other peer the pieces within some seconds, without the first, which may have been under way for longer. The best of
several lengths of time is the rate. It is a lower bound: a link that never has much to carry is not known better, and
need not be. What was sent to a reader counts once the reader asks for more, or has taken more than the transport can
have buffered.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain.network.links.throttle import Throttle

_WINDOWS_S = (1.0, 2.0, 4.0, 8.0)
_LOOK_S = 0.5
"""Seconds between two looks at the recent pieces."""
_LEAST_PIECES = 4
"""Pieces that a window must have besides each peer's first: few may have come together by chance."""
_BUFFERED_BYTES = 2 * 1024 * 1024
"""Bytes that the transport takes from a sender at once, before the reader has read any; measured: 1.3 MB."""
_NEWEST = 0.3
"""Weight of a slower newest measurement."""
_MAX_READERS = 1024


@dataclass
class LinkMeter:
    """Rate of one direction of this peer's link, of which `limit` is the limit."""

    limit: Throttle = field(default_factory=Throttle)
    clock: Callable[[], float] = time.monotonic
    _pieces: deque[tuple[float, str, int]] = field(default_factory=deque)
    _under_way: dict[str, int] = field(default_factory=dict)
    """Bytes sent to each reader that may not have arrived."""
    _looked_s: float = 0.0
    _rate: float = 0.0
    _newest: float = 0.0
    """Best rate since the last `round_over`."""
    _was_disturbed: bool = False

    @property
    def bytes_per_s(self) -> float:
        """Measured rate, at most the limit; 0 before the first measurement, or the limit if there is one."""
        rate = max(self._rate, self._newest)
        return min(rate, self.limit.bytes_per_s) if rate and self.limit.bytes_per_s else rate or self.limit.bytes_per_s

    def sent(self, reader: str, size_bytes: int) -> None:
        """Count bytes that were given to the transport for `reader`."""
        under_way = self._under_way.pop(reader, 0) + size_bytes
        if under_way > _BUFFERED_BYTES:
            self.passed(reader, under_way - _BUFFERED_BYTES)
            under_way = _BUFFERED_BYTES
        self._under_way[reader] = under_way
        while len(self._under_way) > _MAX_READERS:
            del self._under_way[next(iter(self._under_way))]

    def asks(self, reader: str) -> None:
        """Count what was sent to a reader that asks for more: it has arrived."""
        self.passed(reader, self._under_way.pop(reader, 0))

    def passed(self, other: str, size_bytes: int) -> None:
        """Count bytes that have passed the link, from or to `other`."""
        if size_bytes <= 0:
            return
        now = self.clock()
        self._pieces.append((now, other, size_bytes))
        if now >= self._looked_s + _LOOK_S:
            self._looked_s = now
            self._look(now)

    def disturbed(self) -> None:
        """Record that a transfer failed: until the next `round_over` the link had less to carry than it should have."""
        self._was_disturbed = True

    def round_over(self) -> None:
        """Take what was measured since the last call for the rate: at once if it is faster; if it is slower little by
        little, because then there may have been less to carry, and not at all if transfers failed."""
        newest, self._newest = self._newest, 0.0
        was_disturbed, self._was_disturbed = self._was_disturbed, False
        self._pieces.clear()
        if newest and (newest >= self._rate or not was_disturbed):
            self._rate = newest if newest >= self._rate else self._rate + _NEWEST * (newest - self._rate)

    def _look(self, now: float) -> None:
        while self._pieces and self._pieces[0][0] < now - _WINDOWS_S[-1]:
            self._pieces.popleft()
        for window_s in _WINDOWS_S:
            known, counted, num = set[str](), 0, 0
            recent = itertools.takewhile(lambda piece: piece[0] >= now - window_s, reversed(self._pieces))  # noqa: B023
            for _, other, size_bytes in reversed(list(recent)):
                if other in known:
                    counted, num = counted + size_bytes, num + 1
                known.add(other)
            if num >= _LEAST_PIECES:
                self._newest = max(self._newest, counted / window_s)
