"""Leaving before the end: a bootstrap archives first what nobody who goes on has.

Pure: `now` is an argument, in seconds of the swarm's time.
"""

from __future__ import annotations

import math

from swarmtrain.membership.lifecycle import Membership, PeerState

__all__ = ["Leavers"]

_ASKED_S = 5.0
"""Who wants to leave asks again and again: one that has not for so long is gone, or trains on."""
_TAKEN_EVERY_S = 5.0
"""Whoever asks for the sake of asking has an archive made so often at most."""


class Leavers:
    """Who asked a bootstrap whether it may leave."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._asked_s: dict[str, float] = {}
        self._taken_s: dict[str, float] = {}
        self._next_s = 0.0

    def ask(self, peer: str, now: float) -> bool:
        """`peer` would leave: whether it should stay, because nobody who trains on has what it has.

        It need not once the archive has that, which is said once: it may come back.
        """
        info = self._membership.info(peer)
        if info is None or not info.training or self._membership.state(peer) is not PeerState.LIVE:
            return False
        if now < self._taken_s.pop(peer, -math.inf) + _ASKED_S:
            return False
        self._asked_s[peer] = now
        return self._all_leave(now)

    def waiting(self, now: float) -> tuple[str, ...]:
        """Those who stay until an archive has what they have; nobody, where somebody trains on."""
        self._asked_s = {peer: asked_s for peer, asked_s in self._asked_s.items() if now < asked_s + _ASKED_S}
        return tuple(self._asked_s) if self._asked_s and now >= self._next_s and self._all_leave(now) else ()

    def taken(self, peers: tuple[str, ...], now: float) -> None:
        """An archive has been made since these were `waiting`, or has had what they have: they may leave."""
        self._taken_s = dict.fromkeys(peers, now)
        for peer in peers:
            self._asked_s.pop(peer, None)
        self._next_s = now + _TAKEN_EVERY_S

    def _all_leave(self, now: float) -> bool:
        """Whether everyone who trains asked lately. Who paused has said goodbye, and counts as gone."""
        trains = [info.peer for info in self._membership.volunteers()]
        return all(now < self._asked_s.get(peer, -math.inf) + _ASKED_S for peer in trains)
