"""Rate limit of one caller. A peer that calls more often gets the shortest possible answer, and is named.

An honest peer calls a few times a round. Identities cost nothing, so this limits what one connection can ask for, not
what a crowd can. Everything here is pure: `now` is an argument, in seconds of a clock that does not jump.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_MAX_CALLERS = 4096
_FORGET_AFTER_S = 600.0
"""Seconds after which a caller is forgotten. Its whole burst has long been refilled by then."""


@dataclass
class CallBudget:
    """Rate limit of each caller: `per_s` calls a second, and `burst` at once after a pause."""

    per_s: float = 64.0
    burst: float = 256.0
    max_callers: int = _MAX_CALLERS
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Calls left to each caller and the time of that count, the caller with the oldest call first."""

    @property
    def in_words(self) -> str:
        """Sentence about the fault of a caller that exceeds the budget, for the report."""
        return f"more than {self.per_s:g} calls a second"

    def allows(self, caller: str, now: float) -> bool:
        """Return whether `caller` may call now; if so, count the call."""
        left, since_s = self._left.pop(caller, (self.burst, now))
        left = min(self.burst, left + (now - since_s) * self.per_s)
        allowed = left >= 1
        self._left[caller] = (left - allowed, now)
        oldest, (_, heard_s) = next(iter(self._left.items()))
        while len(self._left) > self.max_callers or now > heard_s + _FORGET_AFTER_S:
            del self._left[oldest]
            oldest, (_, heard_s) = next(iter(self._left.items()))
        return allowed
