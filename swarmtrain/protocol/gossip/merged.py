"""Record of what a peer has merged of the others into one fragment, and the decision what of a publication is new to
it.

Besides the ledger this keeps the caller's handles of pseudo-gradients, as long as a later part of their round may have
to be compared with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic

from swarmtrain.protocol.gossip.messages import Held, Payload, ReceivedPublication
from swarmtrain.protocol.gossip.open_pulls import Which
from swarmtrain.protocol.gossip.partners import (
    Delta,
    Ledger,
    News,
    Place,
    PublicationVersion,
    Stale,
    WeightsOnly,
    agreed_places,
)
from swarmtrain.protocol.gossip.pulls import GroupName, GroupRule
from swarmtrain.protocol.membership.membership import PeerInfo

_RESTART_ROUNDS = 3
"""Rounds by which a peer may honestly be behind its own publications: it was killed and continued from a checkpoint."""


class MergedPublications(Generic[Held]):
    """Ledger of one fragment's merges, with the handles of the pseudo-gradients and the counters that went
    backwards."""

    def __init__(self, ledger: Ledger, rules: Mapping[GroupName, GroupRule]) -> None:
        """`rules`: how a merge uses each tensor group."""
        self.ledger, self._rules = ledger, rules
        self._held: dict[str, Held] = {}
        """Handle of each peer's pseudo-gradient that a later part of the round will be compared with."""
        self._turned_back: dict[Which, int] = {}
        """(tensor group, peer) whose counter went backwards, with this peer's round when that was first seen."""

    # ------------------------------------------------------------- what of a publication is new

    def news(
        self, group: GroupName, peer: str, version: PublicationVersion, reference: int
    ) -> tuple[News, Held | None] | None:
        """Return (the part of a publication that is new to this peer, the earlier publication to subtract from it or
        None); None if nothing can be merged."""
        news = self._news(group, peer, version, reference)
        if isinstance(news, Stale | WeightsOnly):
            return None
        if not isinstance(news, Delta):
            return news, None
        earlier = self._held.get(peer)
        return None if earlier is None else (news, earlier)

    def _news(self, group: GroupName, peer: str, version: PublicationVersion, reference: int) -> News:
        if self._rules[group] == "mean":
            return self.ledger.news_of_values(group, peer, (version.round, version.part), reference)
        return self.ledger.news(peer, version, reference)

    def wrong_counter(
        self, group: GroupName, peer: str, version: PublicationVersion, reference: int, round: int
    ) -> str:
        """Say what is wrong with the counters of `peer`'s publication: it is too old, or the counter went backwards for
        good.

        "" if nothing is wrong. `round` is this peer's own. A peer that was killed and restarted is a few rounds behind
        its old publications and is past them soon, so it gets that many rounds before it is accused.
        """
        news = self._news(group, peer, version, reference)
        if not isinstance(news, Stale):
            return ""
        known = self.ledger.version(peer)
        if news.turned_back and known is not None:
            most = max(_RESTART_ROUNDS, self.ledger.max_staleness_rounds)
            since = self._turned_back.setdefault((group, peer), round)
            if version.round >= known.round - most and round <= since + most:
                return ""
        if news.turned_back or news.too_old:
            return f"a publication of an old round: {news.reason}"
        return ""

    def right_counter(self, group: GroupName, peer: str) -> None:
        """Record that the counter of `peer`'s tensor group moves forward again."""
        self._turned_back.pop((group, peer), None)

    def forget_all_but(self, live: Iterable[PeerInfo]) -> None:
        """Forget the counters of peers that are not live any more."""
        if self._turned_back:
            peers = {info.peer for info in live}
            self._turned_back = {which: since for which, since in self._turned_back.items() if which[1] in peers}

    def last(self, group: GroupName, peer: str) -> PublicationVersion | None:
        """Return the version of the last publication of a tensor group of `peer` that was merged; None if none was."""
        if self._rules[group] != "mean":
            return self.ledger.version(peer)
        place = self.ledger.values_at(group, peer)
        return None if place is None else PublicationVersion(*place, 0)

    # ------------------------------------------------------------- merging

    def of_use(
        self, pulled: Iterable[ReceivedPublication[Held, Payload]], reference: int
    ) -> list[ReceivedPublication[Held, Payload]]:
        """Return those of the `pulled` publications that may still be merged. `reference` is the round from which
        staleness is measured.

        A difference needs no check: its earlier publication was there when it was decoded.
        """
        rules, has_new, new_tokens = self._rules, self.ledger.has_new_values, self.ledger.new_tokens
        found = []
        for each in pulled:
            group, peer, version = each.group, each.peer, each.version
            if rules[group] == "mean":
                is_new = has_new(group, peer, (version.round, version.part), reference)
            else:
                is_new = new_tokens(peer, version, reference) is not None
            if is_new:
                found.append(each)
        return found

    def merged(self, pulled: Iterable[ReceivedPublication[Held, Payload]], reference: int) -> None:
        """Record that the `pulled` publications enter the weights. `reference` is the round from which staleness is
        measured."""
        ledger, rules = self.ledger, self._rules
        for each in pulled:
            group, peer, version = each.group, each.peer, each.version
            if rules[group] == "mean":
                ledger.values_merged(group, peer, (version.round, version.part))
            else:
                ledger.merged(peer, version, reference)
                self._held[peer] = each.held
        stays = self.ledger.held
        self._held = {peer: held for peer, held in self._held.items() if peer in stays}

    def took_states(self, told: Iterable[Mapping[str, Place]], heard: Mapping[str, int], round: int) -> None:
        """Record that this peer continues from other peers' weights; for the arguments see `agreed_places`."""
        self.ledger.adopt(agreed_places(told, heard, round, self.ledger.max_staleness_rounds))

    # ------------------------------------------------------------- for others, and for a checkpoint

    def places(self, me: str, round: int) -> dict[str, Place]:
        """Map each peer to the place up to which these weights contain its publications. `me` has ended `round`; below
        0: none."""
        places = self.ledger.places()
        if round >= 0:
            places[me] = max(places.get(me, (-1, 0)), (round, self.ledger.num_parts))
        return places

    def rows(self) -> list[list[str | int]]:
        """Return the ledger's rows for a checkpoint."""
        return self.ledger.rows()

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Restore the ledger from `rows`. Raise ValueError if they are malformed."""
        self.ledger.load(rows)
