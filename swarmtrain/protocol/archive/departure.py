"""Leaving before the end: a bootstrap archives first what nobody who goes on has.

Pure: `now` is an argument, in seconds of the swarm's time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from enum import Enum

from swarmtrain.protocol.membership.membership import Membership, PeerState

__all__ = ["LAST_HOLDER_S", "DepartureQueue", "FellowDepartures", "Leave", "before_leaving"]

LAST_HOLDER_S = 60.0
"""So long whoever has work that nobody else has waits for a bootstrap that does not answer."""

_MAX_LET_GO = 1024
_ASKED_S = 5.0
"""Who wants to leave asks again and again: one that has not for so long is gone, or trains on."""
_TAKEN_EVERY_S = 5.0
_TAKEN_AT_ONCE = 3
"""Whoever asks for the sake of asking has an archive made so often at most; a few who leave one soon after the other do
not wait for each other."""


class Leave(Enum):
    """What one that would leave does now."""

    GO = "others train on, or what it has is in an archive"
    HAND_OVER = "a bootstrap archives what it has"
    WAIT = "nobody else has what it has, and no bootstrap answers: one may come back"
    GO_UNARCHIVED = "what it has is in its folder only"


def before_leaving(
    membership: Membership, answers: Sequence[bool | None], round: int, waited_s: float, leaving: Container[str] = ()
) -> Leave:
    """What one does that would leave, and has waited so long.

    `answers`: of each bootstrap asked whether it is to stay, None where it did not answer; where none did, the others
    were asked how far they are, so that it is known who is there, and `leaving` are those that leave too. `round`: so
    many it has merged; what a bootstrap told last of its archive counts.
    """
    if any(answers):
        return Leave.HAND_OVER
    bootstraps = [info for info in membership.known() if info.is_bootstrap]
    has_told = any(answer is False for answer in answers) or any(info.round >= round for info in bootstraps)
    trains_on = any(info.peer not in leaving for info in membership.answering())
    if has_told or trains_on or not round:
        return Leave.GO
    if all(membership.state(info.peer) is PeerState.LEFT for info in bootstraps):
        return Leave.GO_UNARCHIVED  # none is on its way
    return Leave.WAIT if waited_s < LAST_HOLDER_S else Leave.GO_UNARCHIVED


class FellowDepartures:
    """Volunteers that leave in the same moment, while no bootstrap answers, agree who stays: the lowest PeerID.

    Each asks the others. Without an agreement each would take the other for one that trains on, and nobody would wait
    for the bootstrap.
    """

    def __init__(self, me: str) -> None:
        self._me = me
        self._let_go: set[str] = set()
        self.told: set[str] = set()
        """Those that said that they go."""
        self.is_going = False

    def ask(self, peer: str, now: float) -> bool:
        """`peer` would leave: whether it should stay, because this peer does not."""
        if self.is_going or peer < self._me:
            return True
        if len(self._let_go) < _MAX_LET_GO:
            self._let_go.add(peer)
        return False

    @property
    def leaving(self) -> frozenset[str]:
        """Those that leave too: they said it, or were told that this peer stays."""
        return frozenset(self.told | self._let_go)


class DepartureQueue:
    """Who asked a bootstrap whether it may leave."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._asked_s: dict[str, float] = {}
        self._began_s: dict[str, float] = {}
        self._taken_s: dict[str, float] = {}
        self._next_s = -math.inf
        self._has_news = self._is_over = False

    def release(self) -> None:
        """The last archive is made: they may go."""
        self._is_over = True

    def take_news(self) -> bool:
        """Whether somebody has begun to ask since this was called last."""
        had, self._has_news = self._has_news, False
        return had

    def ask(self, peer: str, now: float) -> bool:
        """`peer` would leave: whether it should stay, because nobody who trains on has what it has.

        Somebody trains on who was heard of since it asked first: one that was killed a moment ago is believed alive
        still. It need not stay once the archive has what it has, which is said once: it may come back.
        """
        info = self._membership.info(peer)
        if self._is_over or info is None or not info.training or self._membership.state(peer) is not PeerState.LIVE:
            return False
        if now < self._taken_s.pop(peer, -math.inf) + _ASKED_S:
            return False
        is_new = not self._asks(peer, now)
        if is_new:
            self._began_s[peer] = now
        self._asked_s[peer] = now
        began_s = self._began_s.setdefault(peer, now)  # `waiting` may have been called meanwhile, in another thread
        if is_new:
            self._has_news = True
        others = [other.peer for other in self._membership.volunteers() if not self._asks(other.peer, now)]
        return not any(self._membership.heard_s(other) > began_s for other in others)

    def is_asked(self, now: float) -> bool:
        """Whether somebody would leave: whether others train on is worth asking them."""
        return any(self._asks(peer, now) for peer in tuple(self._asked_s))

    def waiting(self, now: float) -> tuple[str, ...]:
        """Those who stay until an archive has what they have; nobody, where somebody trains on."""
        asked = {peer: asked_s for peer, asked_s in tuple(self._asked_s.items()) if now < asked_s + _ASKED_S}
        self._asked_s, self._began_s = asked, {peer: self._began_s.get(peer, asked[peer]) for peer in asked}
        return tuple(self._asked_s) if self._asked_s and now >= self._next_s and self._all_leave(now) else ()

    def taken(self, peers: tuple[str, ...], now: float) -> None:
        """An archive has been made since these were `waiting`, or has had what they have: they may leave."""
        self._taken_s = dict.fromkeys(peers, now)
        for peer in peers:
            self._asked_s.pop(peer, None)
        self._next_s = max(self._next_s, now - (_TAKEN_AT_ONCE - 1) * _TAKEN_EVERY_S) + _TAKEN_EVERY_S

    def _asks(self, peer: str, now: float) -> bool:
        return now < self._asked_s.get(peer, -math.inf) + _ASKED_S

    def _all_leave(self, now: float) -> bool:
        """Whether everyone who trains and answers asked lately. Who paused has said goodbye, and counts as gone."""
        return all(self._asks(info.peer, now) for info in self._membership.answering())
