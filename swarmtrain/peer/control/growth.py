"""How quickly a count grows, by when it changed: what a status calls a speed, of a peer and of the run.

Counts of tokens grow by a round or a part of one at a time, so a speed is measured from change to change. Pure: `now`
is an argument, in seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Growth"]

_WINDOW_S = 60.0
_STOPPED_AFTER = 2.0
"""Times its usual interval; a count that has not changed for so long grows more slowly than it did."""


@dataclass
class Growth:
    """The last changes of a count: those of a minute, or the last two if these are further apart."""

    _count: int = -1
    _changes: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, count: int, now: float) -> None:
        """What it is now. The first value seen is no change: when it was reached is not known."""
        if count > self._count >= 0:
            self._changes.append((now, count))
            while len(self._changes) > 2 and self._changes[1][0] <= now - _WINDOW_S:
                self._changes.popleft()
        self._count = max(count, self._count)

    def per_s(self, now: float) -> float | None:
        """How much it grows a second; None before it has changed twice."""
        if len(self._changes) < 2:
            return None
        (first_s, first), (last_s, last) = self._changes[0], self._changes[-1]
        interval_s = (last_s - first_s) / (len(self._changes) - 1)
        if now - last_s > max(_WINDOW_S / 2, _STOPPED_AFTER * interval_s):
            last_s = now
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    @property
    def changed_s(self) -> float:
        """When it changed last."""
        return self._changes[-1][0] if self._changes else float("-inf")
