"""Recent arrivals, whose outdated claims are no reason to name anybody yet (decision 58).

A peer that comes back from its folder publishes an old round, advertises data that others have not heard of, and does
not know theirs. All of that is refused as from anybody. The user is told at the earliest half a minute later, if it
still goes on.

Everything here is pure: `now` is an argument, in seconds of one clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LATELY_S = 30.0
"""Seconds for which an arrival counts as recent."""
_OLD = (("round", "rounds behind"), ("shards", ""))
"""Rules that an honest newcomer may break, each with words of the refusal's message; a peer that breaks any other rule
is named at once."""
_MAX_PEERS = 1024


@dataclass
class Arrivals:
    """Times at which other peers, and this one, arrived."""

    _came_s: dict[str, float] = field(default_factory=dict)
    _own_s: float = float("inf")

    def came(self, peer: str, now: float) -> None:
        """Record that `peer` has arrived, for the first time or again."""
        self._came_s.pop(peer, None)
        self._came_s[peer] = now
        while len(self._came_s) > _MAX_PEERS:
            del self._came_s[next(iter(self._came_s))]

    def came_myself(self, now: float) -> None:
        """Record that this peer has arrived."""
        self._own_s = now

    def spares(self, peer: str, rule: str, detail: str, now: float) -> bool:
        """Return whether breaking `rule` is not reported yet.

        That is so if this peer, `peer`, or a peer that `detail` mentions has arrived recently.
        """
        if not any(rule == old and words in detail for old, words in _OLD):
            return False
        lately = [other for other, came_s in self._came_s.items() if now < came_s + LATELY_S]
        return now < self._own_s + LATELY_S or any(other == peer or other in detail for other in lately)
