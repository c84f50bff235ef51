"""Whom to name for what, where strangers decide how much there is to tell: identities cost nothing.

A peer is named once in a while for each rule that it breaks. New names come through at a bounded rate, rule by rule:
who invents a thousand peers that break one rule does not mute the others, and is told of at that rate only.

Pure: `now` is an argument, in seconds of one clock that may jump.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["NamedOnce"]

_NAME_AGAIN_S = 6 * 3600.0
_AT_ONCE = 16
_ANOTHER_S = 60.0
"""Of one rule so many names pass at once after a silence, and then one in so long."""

_MAX_NAMES, _MAX_RULES = 1024, 64


@dataclass
class _Rate:
    """Names that may pass now, and when that was so."""

    left: float = float(_AT_ONCE)
    at_s: float = 0.0

    def passes(self, now: float) -> bool:
        self.left = min(float(_AT_ONCE), self.left + max(0.0, now - self.at_s) / _ANOTHER_S)
        self.at_s = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass
class NamedOnce:
    """Says of each peer and rule once in `again_s` seconds that it may be named, six hours unless something else is
    said; and of one rule 16 peers at once, then one a minute."""

    again_s: float = _NAME_AGAIN_S
    _named_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """When each was named; the one named longest ago first."""
    _rates: dict[str, _Rate] = field(default_factory=dict)

    def is_due(self, peer: str, now: float, rule: str = "") -> bool:
        """Whether to name `peer` for `rule` now; it counts as named then. Rules are words of ours, few of them."""
        named_s = self._named_s.get((peer, rule))
        if named_s is not None and abs(now - named_s) < self.again_s:
            return False
        rate = self._rates.pop(rule, None) or _Rate()
        self._rates[rule] = rate
        while len(self._rates) > _MAX_RULES:
            del self._rates[next(iter(self._rates))]
        if not rate.passes(now):
            return False
        self._named_s.pop((peer, rule), None)
        self._named_s[peer, rule] = now
        while len(self._named_s) > _MAX_NAMES:
            del self._named_s[next(iter(self._named_s))]
        return True
