"""What peers tell of their links, and how far it is believed when shares of a mean are divided.

A peer measures its own link and tells it; nobody else can measure it. One that tells less than it has gets a smaller
share, and nobody loses anything but its help. One that tells more gets a share that it does not deliver in time: then
whoever waited averages that share itself, and when it signs a roster it takes what that peer tells for a quarter, for a
sixteenth after the second such share, and so on. Each share that comes in time takes half of a quarter back, and so do
eight rounds, since a peer without a share can show nothing.

One that tells less can also bring nothing, and be waited for as if its link were slow. Whose publication could not be
had counts for some rounds as a peer that tells nothing, so that this happens once and not in every round.

Whoever signs a roster writes the shares. Its readers take only shares that an honest signer may have written
(`bounded`): otherwise it could let an accomplice average the whole mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from swarmtrain.protocol.membership.membership import Membership
from swarmtrain.protocol.rounds.roles import (
    LinkRates,
    averaging_s,
    carrying_s,
    divide,
    equal_shares,
    known_rates,
    largest_share,
)
from swarmtrain.protocol.rounds.rosters import Roster

_LATE_DOUBTS, _MAX_DOUBTS = 2, 10
"""Halvings of a claim for each share that is late, and at most: a thousandth of what it says."""
_FORGIVE_ROUNDS = 8
"""Rounds after which one halving of each claim is taken back."""
_LEAST_BYTES_PER_S = 32 * 1024.0
"""Rate below which a pull is given up anyway: whoever tells less does not make the others wait longer."""


@dataclass(frozen=True, slots=True)
class AveragingTimes:
    """Seconds that averaging a roster should take by what the peers tell of their links, at most a round's limit."""

    everyone_s: float
    """Until all have carried what is theirs: even a fast owner waits for the bytes of the slowest."""
    pairs_s: tuple[float, ...]
    """Until each peer of the roster, in its order, and this peer have."""


@dataclass
class LinkClaims:
    """Links of the peers, as this peer believes them."""

    membership: Membership
    own: LinkRates = field(default_factory=LinkRates)
    """This peer's own link."""
    _doubts: dict[str, int] = field(default_factory=dict)
    """Number of halvings of each peer's claim."""
    _undelivered: dict[str, int] = field(default_factory=dict)
    """Peers whose publication could not be had, each with the rounds for which nobody waits for what it tells."""

    def judged(self, owner: str, *, in_time: bool) -> None:
        """Believe a peer's claim less after a share that did not come in time, and more after one that did."""
        doubts = min(max(0, self._doubts.pop(owner, 0) + (-1 if in_time else _LATE_DOUBTS)), _MAX_DOUBTS)
        if doubts:
            self._doubts[owner] = doubts

    def not_delivered(self, authors: Iterable[str]) -> None:
        """Do not wait for what these peers tell of their links, for some rounds.

        Meanwhile they do not fail anew: one whose link is honestly slow is waited for again after that.
        """
        self._undelivered = dict.fromkeys(authors, _FORGIVE_ROUNDS) | self._undelivered

    def round_over(self, round: int) -> None:
        """Believe all claims a little more, now and then."""
        self._undelivered = {peer: left - 1 for peer, left in self._undelivered.items() if left > 1}
        if round % _FORGIVE_ROUNDS == 0:
            self._doubts = {peer: doubts - 1 for peer, doubts in self._doubts.items() if doubts > 1}

    def shares(self, peers: Sequence[str], num_chunks: int, body_bytes: int) -> tuple[int, ...]:
        """Return the chunks that each of these peers is to average; empty for equal shares.

        Shares are equal if a peer tells no link, because its version would not know of others, whether it is one of
        these or a volunteer that only merges their mean; and if no link is measured and everyone can be dialled, or all
        links are alike.
        """
        told = [self.own if peer == self.membership.me else self._claim(peer) for peer in peers]
        links = [self._believed(peer, link) for peer, link in zip(peers, told, strict=True) if link is not None]
        if num_chunks <= 0 or len(links) < len(peers):
            return ()
        if any(info.link is None for info in self.membership.volunteers()):
            return ()
        shares = divide(links, num_chunks, body_bytes).shares
        return shares if shares != equal_shares(num_chunks, [True] * len(peers)) else ()

    def bounded(self, roster: Roster) -> tuple[Roster, str]:
        """Return the roster, and what is wrong with its shares, "" if nothing: no peer may average more than
        `largest_share`.

        Wrong shares are left away. Every reader then takes equal ones, since the limit is the same for all, unless
        fewer than a third of the peers can be dialled; and the mean does not depend on who averages what.
        """
        if not roster.shares:
            return roster, ""
        links = (self.own if peer == self.membership.me else self._claim(peer) for peer in roster.peers)
        num_dialled = sum(link is None or link.can_be_dialled for link in links) or len(roster.peers)
        num_chunks, largest = sum(roster.shares), max(roster.shares)
        most = largest_share(num_chunks, len(roster.peers), num_dialled)
        if largest <= most:
            return roster, ""
        owner = roster.peers[roster.shares.index(largest)]
        flaw = f"a roster by which {owner} averages {largest} of {num_chunks} chunks of the mean, more than {most}"
        return dataclasses.replace(roster, shares=()), flaw

    def averaging_times(
        self, peers: Sequence[str], shares: Sequence[int], body_bytes: int, limit_s: float
    ) -> AveragingTimes | None:
        """Return how long averaging with these shares takes, at most `limit_s`; None if no link is known."""
        links = self._waited_for(peers)
        if not shares or not any(link.is_known for link in links):
            return None
        me, each_s = self.membership.me, carrying_s(links, shares, body_bytes)
        own_s = each_s[peers.index(me)] if me in peers else self._receiving_s(body_bytes)
        pairs_s = tuple(min(max(own_s, its_s), limit_s) for its_s in each_s)
        return AveragingTimes(max(pairs_s), pairs_s)

    def merging_s(self, peers: Sequence[str], shares: Sequence[int] | None, body_bytes: int) -> float:
        """Return how long merging should take: with these shares, with equal ones if they are empty, and if they are
        None each peer pulls everything. Infinity if it is not known how fast one of them sends: it may be slow."""
        links = self._waited_for(peers)
        if not any(link.is_known for link in links) or not all(map(self._is_measured, peers)):
            return math.inf
        own_s = 0.0 if self.membership.me in peers else self._receiving_s(body_bytes)
        if shares is None:
            return max(len(peers) * own_s, max(1, len(peers) - 1) * body_bytes / min(known_rates(links)))
        return max(own_s, averaging_s(links, shares or [1] * len(peers), body_bytes))

    def _waited_for(self, peers: Sequence[str]) -> list[LinkRates]:
        """Return the links that others wait for."""
        told = (
            self.own if peer == self.membership.me else None if peer in self._undelivered else self._claim(peer)
            for peer in peers
        )
        return [LinkRates() if link is None else _at_least(link, _LEAST_BYTES_PER_S) for link in told]

    def _is_measured(self, peer: str) -> bool:
        """Return whether it is known how fast a peer sends, or this peer receives; or is not waited for."""
        if peer == self.membership.me:
            return self.own.down_bytes_per_s > 0
        link = self._claim(peer)
        return peer in self._undelivered or (link is not None and link.up_bytes_per_s > 0)

    def _receiving_s(self, body_bytes: int) -> float:
        """Return how long this peer takes to receive the mean, 0 if its link is not known."""
        return body_bytes / known_rates([_at_least(self.own, _LEAST_BYTES_PER_S)])[0] if self.own.is_known else 0.0

    def _claim(self, peer: str) -> LinkRates | None:
        info = self.membership.info(peer)
        return None if info is None else info.link

    def _believed(self, peer: str, link: LinkRates) -> LinkRates:
        part = 0.5 ** self._doubts.get(peer, 0)
        return dataclasses.replace(
            link, up_bytes_per_s=part * link.up_bytes_per_s, down_bytes_per_s=part * link.down_bytes_per_s
        )


def _at_least(link: LinkRates, least: float) -> LinkRates:
    up, down = (max(rate, least) if rate > 0 else 0.0 for rate in (link.up_bytes_per_s, link.down_bytes_per_s))
    return dataclasses.replace(link, up_bytes_per_s=up, down_bytes_per_s=down)
