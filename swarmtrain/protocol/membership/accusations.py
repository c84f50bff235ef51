"""Rate limit of accusations. Identities cost nothing, so strangers must not decide how much there is to report.

A peer is named at most once in a while for each rule that it breaks. New names pass at a bounded rate for each rule: a
thousand invented peers that break one rule are reported at that rate only, and do not mute the other rules.

Everything here is pure: `now` is an argument, in seconds of one clock that may jump.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_NAME_AGAIN_S = 6 * 3600.0
"""Seconds after which a peer may be named again for the same rule."""
_AT_ONCE = 16
"""Names that are reported at once for one rule after a silence."""
_ANOTHER_S = 60.0
"""Seconds between reports of further names for the same rule, after `_AT_ONCE` were reported."""

_MAX_NAMES, _MAX_RULES = 1024, 64


@dataclass
class _Rate:
    """Rate limit of one rule: names that may pass, and the time of that count."""

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
    """Decides when a peer may be named: once in `again_s` seconds (six hours) for each peer and rule.

    Of one rule 16 names pass at once, then one a minute.
    """

    again_s: float = _NAME_AGAIN_S
    _named_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """Time when each peer was named for each rule, oldest first."""
    _rates: dict[str, _Rate] = field(default_factory=dict)

    def is_due(self, peer: str, now: float, rule: str = "") -> bool:
        """Return whether to name `peer` for `rule` now; if so, count it as named. Rules are few and never chosen by
        peers."""
        named_s = self._named_s.get((peer, rule))
        # The clock may have been set back.
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
