"""Bootstraps that a volunteer of synchronous rounds asks, beside its rounds, how far their archives are (decision 60).

Otherwise a volunteer that continued from an old folder while no bootstrap was there, or was suspended while all others
left, would train in vain: a later newcomer would take the archive's side.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from swarmtrain.protocol.membership.membership import Membership


class ArchivesSeen:
    """Bootstraps that have reported their progress to this peer, and have been present since."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._seen: frozenset[str] = frozenset()
        self._listening_since_s = -math.inf
        """Value of this process's `listening_since_s` when the bootstraps were asked."""

    def to_ask(self, listening_since_s: float) -> list[str]:
        """Return the bootstraps to ask for their progress: those that have come or come back; all if this process was
        suspended or is alone."""
        if not self._membership.volunteers() or listening_since_s != self._listening_since_s:
            self._seen, self._listening_since_s = frozenset(), listening_since_s
        here = self._here()
        came, self._seen = here - self._seen, here & self._seen
        return sorted(came)

    def told(self, told: Collection[str]) -> bool:
        """Record that these peers have reported their progress. Return whether a bootstrap that is present is among
        them."""
        came = self._here().intersection(told)
        self._seen |= came
        return bool(came)

    def forget(self) -> None:
        """Ask all bootstraps anew, because this peer was away."""
        self._seen = frozenset()

    def _here(self) -> frozenset[str]:
        return frozenset(info.peer for info in self._membership.live() if info.is_bootstrap)
