"""Growth of a count, measured from change to change: the speed of a peer and of the run in a status.

Counts of tokens grow by a round, or a part of one, at a time, so a fixed window would show jumps. Pure: `now` is an
argument, in seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_WINDOW_S = 60.0
_STOPPED_AFTER = 2.0
"""Multiple of the usual interval after which a count that has not changed is taken to grow more slowly."""


@dataclass
class Growth:
    """Last changes of a count: those of the last minute, or the last two if they are further apart."""

    _count: int = -1
    _changes: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, count: int, now: float) -> None:
        """Record the count at `now`. The first value is no change, since it is unknown when it was reached."""
        if count > self._count >= 0:
            self._changes.append((now, count))
            while len(self._changes) > 2 and self._changes[1][0] <= now - _WINDOW_S:
                self._changes.popleft()
        self._count = max(count, self._count)

    def per_s(self, now: float) -> float | None:
        """Return the growth per second; None before the count has changed twice."""
        if len(self._changes) < 2:
            return None
        (first_s, first), (last_s, last) = self._changes[0], self._changes[-1]
        interval_s = (last_s - first_s) / (len(self._changes) - 1)
        if now - last_s > max(_WINDOW_S / 2, _STOPPED_AFTER * interval_s):
            last_s = now
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    @property
    def changed_s(self) -> float:
        """Time of the last change."""
        return self._changes[-1][0] if self._changes else float("-inf")
