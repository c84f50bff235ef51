"""How often one peer may call: whoever calls more often gets the shortest answer there is, and is named.

An honest peer calls a few times a round; identities cost nothing, so this bounds what one connection can ask for, not
what a crowd can. Pure: `now` is an argument, in seconds of a clock that does not jump.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CallBudget"]

_MAX_CALLERS = 4096
_FORGET_AFTER_S = 600.0
"""It has all of its burst again long before."""


@dataclass
class CallBudget:
    """`per_s` calls a second of each caller, and `burst` at once after a pause."""

    per_s: float = 64.0
    burst: float = 256.0
    max_callers: int = _MAX_CALLERS
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By caller: calls it may make, and when that was so; the one heard of longest ago first."""

    @property
    def in_words(self) -> str:
        """What is allowed."""
        return f"more than {self.per_s:g} calls a second"

    def allows(self, caller: str, now: float) -> bool:
        """Whether `caller` may call now; it counts as called if so."""
        left, since_s = self._left.pop(caller, (self.burst, now))
        left = min(self.burst, left + (now - since_s) * self.per_s)
        allowed = left >= 1
        self._left[caller] = (left - allowed, now)
        oldest, (_, heard_s) = next(iter(self._left.items()))
        while len(self._left) > self.max_callers or now > heard_s + _FORGET_AFTER_S:
            del self._left[oldest]
            oldest, (_, heard_s) = next(iter(self._left.items()))
        return allowed
