"""Rests between inner steps, so that a device is busy for a share of the time only (`--gpu-share`).

Pure: times are arguments, in seconds. What is too little to rest for is added to the next rests, and what was rested
too long is taken off them, so that the share holds over many steps whatever each of them takes.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

LEAST_REST_S = 0.005
"""Shorter rests are added up: to fall asleep and wake takes a share of them."""
RECENT_STEPS = 21
"""Number of last steps whose median is the usual time of one."""
MOST_STEPS_AT_ONCE = 10
"""A step counts as at most so many usual ones: a process that was stopped for an hour need not rest for another."""


@dataclass
class DutyCycle:
    """Schedule of the rests after inner steps."""

    owed_s: float = 0.0
    """Seconds of rest still to take; negative if the last rest was longer than planned."""
    _steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def rest_s(self, busy_s: float, share: float) -> float:
        """Return how long to rest after a step that kept the device busy for `busy_s` seconds, so that it is busy for
        `share` of the time, above 0 and at most 1."""
        self._steps_s.append(busy_s)
        counted_s = min(busy_s, MOST_STEPS_AT_ONCE * statistics.median(self._steps_s))
        self.owed_s += counted_s * (1 / share - 1)
        return self.owed_s if self.owed_s >= LEAST_REST_S else 0.0

    def rested(self, rested_s: float) -> None:
        """Note that the rest lasted so long. One that was longer than all that was owed shortens later ones by as much
        again at most."""
        self.owed_s = max(self.owed_s - rested_s, -self.owed_s)

    def forget(self) -> None:
        """Owe nothing more: the peer has paused, or may use the device all the time."""
        self.owed_s = 0.0
