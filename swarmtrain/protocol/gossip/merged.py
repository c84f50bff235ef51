"""What a peer that gossips has merged of the others into one fragment, and what of a publication is new to it.

The driver's handles of pseudo-gradients are kept as long as a later part of their round may be the difference to them.
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
from swarmtrain.protocol.gossip.pulls import Section, SectionRule
from swarmtrain.protocol.membership.membership import PeerInfo

__all__ = ["MergedPublications"]

_RESTART_ROUNDS = 3
"""A peer that was killed and went on from its checkpoint is behind what it had published by so many rounds."""


class MergedPublications(Generic[Held]):
    """The ledger of a fragment's merges, and what goes with it."""

    def __init__(self, ledger: Ledger, rules: Mapping[Section, SectionRule]) -> None:
        """`rules`: what a merge makes of each section."""
        self.ledger, self._rules = ledger, rules
        self._held: dict[str, Held] = {}
        """Pseudo-gradients that a later part of their round is the difference to."""
        self._turned_back: dict[Which, int] = {}
        """Whose counter turned back, and in which round of this peer that was seen."""

    # ------------------------------------------------------------- what of a publication is new

    def news(
        self, section: Section, peer: str, mark: PublicationVersion, reference: int
    ) -> tuple[News, Held | None] | None:
        """What of a publication can be merged, and what it is the difference to; None if nothing can."""
        news = self._news(section, peer, mark, reference)
        if isinstance(news, Stale | WeightsOnly):
            return None
        if not isinstance(news, Delta):
            return news, None
        earlier = self._held.get(peer)
        return None if earlier is None else (news, earlier)

    def _news(self, section: Section, peer: str, mark: PublicationVersion, reference: int) -> News:
        if self._rules[section] == "mean":
            return self.ledger.news_of_values(section, peer, (mark.round, mark.part), reference)
        return self.ledger.news(peer, mark, reference)

    def wrong_counter(self, section: Section, peer: str, mark: PublicationVersion, reference: int, round: int) -> str:
        """In what way `peer` publishes what is too old, or its counter turned back for good; "" if it did not. `round`:
        this peer's own.

        One that was killed turned back by a few rounds, and is past them soon."""
        news = self._news(section, peer, mark, reference)
        if not isinstance(news, Stale):
            return ""
        known = self.ledger.mark(peer)
        if news.turned_back and known is not None:
            most = max(_RESTART_ROUNDS, self.ledger.max_staleness_rounds)
            since = self._turned_back.setdefault((section, peer), round)
            if mark.round >= known.round - most and round <= since + most:
                return ""
        if news.turned_back or news.too_old:
            return f"a publication of an old round: {news.reason}"
        return ""

    def right_counter(self, section: Section, peer: str) -> None:
        """It goes forward."""
        self._turned_back.pop((section, peer), None)

    def forget_all_but(self, live: Iterable[PeerInfo]) -> None:
        """Nobody else's counter is remembered."""
        if self._turned_back:
            peers = {info.peer for info in live}
            self._turned_back = {which: since for which, since in self._turned_back.items() if which[1] in peers}

    def last(self, section: Section, peer: str) -> PublicationVersion | None:
        """Up to where that section of the peer's was merged."""
        if self._rules[section] != "mean":
            return self.ledger.mark(peer)
        place = self.ledger.values_at(section, peer)
        return None if place is None else PublicationVersion(*place, 0)

    # ------------------------------------------------------------- merging

    def of_use(
        self, pulled: Iterable[ReceivedPublication[Held, Payload]], reference: int
    ) -> list[ReceivedPublication[Held, Payload]]:
        """Of what was pulled: what may be merged still. What it is the difference to was there when it came."""
        rules, has_new, new_tokens = self._rules, self.ledger.has_new_values, self.ledger.new_tokens
        found = []
        for each in pulled:
            section, peer, mark = each.section, each.peer, each.mark
            if rules[section] == "mean":
                is_new = has_new(section, peer, (mark.round, mark.part), reference)
            else:
                is_new = new_tokens(peer, mark, reference) is not None
            if is_new:
                found.append(each)
        return found

    def merged(self, pulled: Iterable[ReceivedPublication[Held, Payload]], reference: int) -> None:
        """These enter the weights."""
        ledger, rules = self.ledger, self._rules
        for each in pulled:
            section, peer, mark = each.section, each.peer, each.mark
            if rules[section] == "mean":
                ledger.values_merged(section, peer, (mark.round, mark.part))
            else:
                ledger.merged(peer, mark, reference)
                self._held[peer] = each.held
        stays = self.ledger.held
        self._held = {peer: held for peer, held in self._held.items() if peer in stays}

    def took_states(self, told: Iterable[Mapping[str, Place]], heard: Mapping[str, int], round: int) -> None:
        """Others' weights take the place of these; see `agreed_places`."""
        self.ledger.bring(agreed_places(told, heard, round, self.ledger.max_staleness_rounds))

    # ------------------------------------------------------------- for others, and for a checkpoint

    def places(self, me: str, round: int) -> dict[str, Place]:
        """Up to where each peer is in these weights; `me` has ended `round` (below 0: none)."""
        places = self.ledger.places()
        if round >= 0:
            places[me] = max(places.get(me, (-1, 0)), (round, self.ledger.num_parts))
        return places

    def rows(self) -> list[list[str | int]]:
        """What was merged of whom."""
        return self.ledger.rows()

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Go on from what `rows` gave. ValueError if they are anything else."""
        self.ledger.load(rows)
