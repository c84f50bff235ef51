"""Rules for leaving before the end of a run: a bootstrap first archives work that none of the remaining volunteers has.

Everything here is pure: `now` is an argument, in seconds of the swarm's time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from enum import Enum

from swarmtrain.protocol.membership.membership import Membership, PeerState

LAST_HOLDER_S = 60.0
"""Seconds for which the last holder of work waits for a bootstrap that does not answer."""

_MAX_LET_GO = 1024
"""Limit of peers that are remembered as leaving."""
_ASKED_S = 5.0
"""Seconds after which a request to leave has lapsed. A peer that wants to leave repeats its request; one that does not
has gone, or trains on."""
_TAKEN_EVERY_S = 5.0
"""Seconds between two archives for leavers on average, so that a peer that asks only to annoy costs no more."""
_TAKEN_AT_ONCE = 3
"""Archives that may follow each other at once, so that a few peers that leave in a row need not wait for each other."""


class Leave(Enum):
    """Next step of a peer that wants to leave."""

    GO = "others train on, or what it has is in an archive"
    HAND_OVER = "a bootstrap archives what it has"
    WAIT = "nobody else has what it has, and no bootstrap answers: one may come back"
    GO_UNARCHIVED = "what it has is in its folder only"


def before_leaving(
    membership: Membership, answers: Sequence[bool | None], round: int, waited_s: float, leaving: Container[str] = ()
) -> Leave:
    """Decide the next step of a peer that wants to leave and has waited `waited_s` seconds.

    `answers` has for each bootstrap True if this peer must stay, False if it may go, None without an answer. If none
    answered, the other peers were asked how far they are, so that it is known who is there; `leaving` are those that
    leave too. `round`: rounds that this peer has merged, compared with what bootstraps last advertised of their
    archive.
    """
    if any(answers):
        return Leave.HAND_OVER
    bootstraps = [info for info in membership.known() if info.is_bootstrap]
    has_told = any(answer is False for answer in answers) or any(info.round >= round for info in bootstraps)
    trains_on = any(info.peer not in leaving for info in membership.answering())
    if has_told or trains_on or not round:
        return Leave.GO
    if all(membership.state(info.peer) is PeerState.LEFT for info in bootstraps):
        return Leave.GO_UNARCHIVED  # no bootstrap is expected back
    return Leave.WAIT if waited_s < LAST_HOLDER_S else Leave.GO_UNARCHIVED


class FellowDepartures:
    """Agreement among volunteers that leave at the same moment, while no bootstrap answers: the lowest PeerID stays.

    Each asks the others. Without an agreement each would assume that the others continue to train, and none would wait
    for the bootstrap.
    """

    def __init__(self, me: str) -> None:
        self._me = me
        self._let_go: set[str] = set()
        self.told: set[str] = set()
        """Peers that said that they leave."""
        self.is_going = False

    def ask(self, peer: str, now: float) -> bool:
        """Return whether `peer`, which wants to leave, should stay, because this peer does not."""
        if self.is_going or peer < self._me:
            return True
        if len(self._let_go) < _MAX_LET_GO:
            self._let_go.add(peer)
        return False

    @property
    def leaving(self) -> frozenset[str]:
        """Peers that leave too: they said so, or this peer has told them that it stays."""
        return frozenset(self.told | self._let_go)


class DepartureQueue:
    """Requests to leave that a bootstrap has received, and which of these peers must wait for an archive."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._asked_s: dict[str, float] = {}
        self._began_s: dict[str, float] = {}
        self._taken_s: dict[str, float] = {}
        self._next_s = -math.inf
        self._has_news = self._is_over = False

    def release(self) -> None:
        """Let every peer leave: the last archive is made."""
        self._is_over = True

    def take_news(self) -> bool:
        """Return whether a peer has asked to leave for the first time since the last call."""
        had, self._has_news = self._has_news, False
        return had

    def ask(self, peer: str, now: float) -> bool:
        """Return whether `peer`, which wants to leave, must stay because no volunteer that remains has its work.

        A volunteer counts as remaining if anything was received from it since the peer first asked: one that was just
        killed is still believed alive. Once the archive has the peer's work, the next answer is False, once, since the
        peer may come back later.
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
        began_s = self._began_s.setdefault(peer, now)  # another thread may have called `waiting` in between
        if is_new:
            self._has_news = True
        others = (other.peer for other in self._membership.volunteers())
        return not any(self._membership.heard_s(other) > began_s and not self._asks(other, now) for other in others)

    def is_asked(self, now: float) -> bool:
        """Return whether any peer wants to leave now. If so, the bootstrap asks the others whether they stay."""
        return any(self._asks(peer, now) for peer in tuple(self._asked_s))

    def waiting(self, now: float) -> tuple[str, ...]:
        """Return the peers whose work must be archived before they leave; none if a volunteer remains that continues to
        train."""
        asked = {peer: asked_s for peer, asked_s in tuple(self._asked_s.items()) if now < asked_s + _ASKED_S}
        self._asked_s, self._began_s = asked, {peer: self._began_s.get(peer, asked[peer]) for peer in asked}
        return tuple(self._asked_s) if self._asked_s and now >= self._next_s and self._all_leave(now) else ()

    def taken(self, peers: tuple[str, ...], now: float) -> None:
        """Record that an archive with the work of these peers was made: they may leave."""
        self._taken_s = dict.fromkeys(peers, now)
        for peer in peers:
            self._asked_s.pop(peer, None)
        self._next_s = max(self._next_s, now - (_TAKEN_AT_ONCE - 1) * _TAKEN_EVERY_S) + _TAKEN_EVERY_S

    def _asks(self, peer: str, now: float) -> bool:
        return now < self._asked_s.get(peer, -math.inf) + _ASKED_S

    def _all_leave(self, now: float) -> bool:
        """Return whether every volunteer that answers has asked recently. A paused one has said goodbye and counts as
        gone."""
        return all(self._asks(info.peer, now) for info in self._membership.answering())
