"""Who came lately: what an honest peer says then may be old, and is not worth a name yet.

One that comes back from its folder publishes a round of long ago, tells of data that others do not know of yet, and
knows too little of theirs itself. All of that is refused, as from anybody; a person is told of it half a minute later
at the soonest, if it is so still.

Pure: `now` is an argument, in seconds of one clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LATELY_S", "Arrivals"]

LATELY_S = 30.0
_OLD = (("round", "rounds behind"), ("shards", ""))
"""What may be old, by rule and what is said of it; whoever breaks another rule is named at once."""
_MAX_PEERS = 1024


@dataclass
class Arrivals:
    """When others came, and this peer itself."""

    _came_s: dict[str, float] = field(default_factory=dict)
    _own_s: float = float("inf")

    def came(self, peer: str, now: float) -> None:
        """`peer` is here, for the first time or again."""
        self._came_s.pop(peer, None)
        self._came_s[peer] = now
        while len(self._came_s) > _MAX_PEERS:
            del self._came_s[next(iter(self._came_s))]

    def came_myself(self, now: float) -> None:
        """This peer is."""
        self._own_s = now

    def spares(self, peer: str, rule: str, detail: str, now: float) -> bool:
        """Whether nobody is named yet for what broke `rule`: this peer came lately, `peer` did, or one that `detail`
        is about."""
        if not any(rule == old and words in detail for old, words in _OLD):
            return False
        lately = [other for other, came_s in self._came_s.items() if now < came_s + LATELY_S]
        return now < self._own_s + LATELY_S or any(other == peer or other in detail for other in lately)
