"""State of one round whose inner steps this peer has done: publications, rosters and open questions.

`engine.py` decides by it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic

from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Link
from swarmtrain.protocol.rounds.messages import Envelope, SignedRoster
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication, better_roster, worst_roster
from swarmtrain.protocol.rounds.state_search import CatchingUp, Hearsay

_MAX_ATTEMPTS = 8
"""Rosters that are kept of each signer, the latest attempts."""
_MAX_ROSTERS = 64
"""Rosters of others that are kept for a round, those that hold against the rest. Signers cost nothing, so a flood of
them must not fill the memory."""
_CHAIN_SILENCES = 3
"""Limit, in multiples of `silence_s`, of the wait for other peers to send their chains before this peer signs."""


@dataclass(slots=True)
class KnownRound(Generic[Envelope, Link]):
    """State of one round whose inner steps this peer has done."""

    round: int
    started_s: float
    ended_s: float
    own: RoundPublication
    """Publication of this peer."""
    announced: dict[str, RoundPublication] = field(default_factory=dict)
    """Publications whose manifests are known, by peer, this peer's included."""
    rosters: dict[str, SignedRoster[Envelope]] = field(default_factory=dict)
    """Rosters of this round that fit this peer's weights, by name."""
    shared: str = ""
    """Digest of the roster whose share this peer has averaged, whole or `pieces` pieces of it."""
    pieces: int = 0
    asking: dict[str, int] = field(default_factory=dict)
    """Number of the open question to each peer."""
    ask_again_s: dict[str, float] = field(default_factory=dict)
    """Time before which each peer is not asked again."""
    told_of: dict[str, str] = field(default_factory=dict)
    """Name of the roster that each peer sent last, for the next question to it."""
    asked_at_s: dict[str, float] = field(default_factory=dict)
    """Time when each peer was first asked about this round."""
    answered_at_s: dict[str, float] = field(default_factory=dict)
    """Time at which each peer's last answered question was asked."""
    fetched: set[str] = field(default_factory=set)
    """Hashes of the publications whose download was ordered."""
    held: set[str] = field(default_factory=set)
    """Hashes of the publications whose bytes are here."""
    unobtainable: set[str] = field(default_factory=set)
    """Peers whose publication nobody delivers."""
    in_vain: frozenset[str] = frozenset()
    """Peers whose second chance came to nothing in an earlier round; they get no more of those that cost a wait."""
    tried_again: set[tuple[str, str]] = field(default_factory=set)
    """(peer, digest of a roster) for which an unobtainable publication got its second chance; "" for the chance of one
    that had hung."""
    missed_s: dict[str, float] = field(default_factory=dict)
    """Time when each peer's publication was first found unobtainable."""
    undeliverable: set[str] = field(default_factory=set)
    """Peers whose state could not be fetched."""
    distrusted: set[str] = field(default_factory=set)
    """Peers that sent something malformed about this round: they are asked again, but not waited for."""
    impossible: set[str] = field(default_factory=set)
    """Digests of rosters that name a publication of this peer that it never made."""
    lacking_s: dict[str, float] = field(default_factory=dict)
    """Time since which each peer has named a roster whose chain no peer has sent."""
    idled: set[str] = field(default_factory=set)
    """Peers that have let their turn to sign pass. By the round's end they may have applied another's roster."""
    merging: str = ""
    """Digest of the roster that is being averaged; "" if none is."""
    is_merged: bool = False
    state_fetch: CatchingUp[Envelope, Link] | None = None

    @property
    def best(self) -> SignedRoster[Envelope] | None:
        """Roster that holds among those whose publications can be had, or among all if there is none; others are told
        of it."""
        kept_ones = [kept for kept in self.rosters.values() if self.can_be_had(kept.roster)]
        kept_ones = kept_ones or list(self.rosters.values())
        best = better_roster([kept.roster for kept in kept_ones])
        return next((kept for kept in kept_ones if kept.roster is best), None)

    def can_be_had(self, roster: Roster) -> bool:
        """Return whether nothing on this roster is known to be out of reach."""
        return self.unobtainable.isdisjoint(roster.peers) and roster.digest not in self.impossible

    def keep(self, one: SignedRoster[Envelope]) -> bool:
        """Remember a roster of this round that starts from this peer's weights. Return whether it is new.

        Of one signer the latest attempts are kept, of all signers the rosters that hold against the rest.
        """
        roster = one.roster
        if one.name in self.rosters or (roster.round, roster.base) != (self.round, self.own.base):
            return False
        same_signer = [name for name, kept in self.rosters.items() if kept.roster.signer == roster.signer]
        if len(same_signer) >= _MAX_ATTEMPTS:
            oldest = min(same_signer, key=lambda name: self.rosters[name].roster.attempt)
            if roster.attempt <= self.rosters[oldest].roster.attempt:
                return False
            del self.rosters[oldest]
        self.rosters[one.name] = one
        others = [kept.roster for kept in self.rosters.values() if kept.roster.signer != self.own.peer]
        if len(others) > _MAX_ROSTERS:
            worst = worst_roster(others)
            self.rosters = {name: kept for name, kept in self.rosters.items() if kept.roster is not worst}
            if worst is roster:
                return False
        # Another chance for what is on it: in a small group a signer lists only what it holds (decision 4).
        self.unobtainable.difference_update(roster.peers)
        return True

    def has_piece_for(self, question: ev.RoundQuestion) -> bool:
        """Return whether this peer has averaged the piece of its share that the asker lacks."""
        return self.shared != "" and not question.has_share and question.share_piece < self.pieces

    def was_fetched(self, event: ev.PublicationFetched | ev.PublicationNotFetched) -> None:
        """Record that a publication's bytes are here, or that nobody delivers them."""
        if isinstance(event, ev.PublicationFetched):
            self.held.add(event.snapshot)
        else:
            self.unobtainable.update(p for p, offer in self.announced.items() if offer.snapshot == event.snapshot)

    def merge_went_on(self, event: ev.PublicationFound | ev.RosterMerged | ev.RosterNotMerged) -> None:
        """Record the progress of the merge under way; events of an earlier merge are ignored."""
        match event:
            case ev.PublicationFound(publication=offer):
                self.announced[offer.peer] = self.own if offer.peer == self.own.peer else offer
            case ev.RosterMerged(roster=digest):
                self.is_merged = self.is_merged or self.merging == digest
            case ev.RosterNotMerged(roster=digest) if self.merging == digest:
                self.merging = ""
                if self.own.peer in event.lacking:
                    self.impossible.add(digest)
                self.unobtainable.update(event.lacking - {self.own.peer})

    def try_again(self, hearsay: Hearsay[Envelope, Link], heard_at_s: Mapping[str, float], now: float) -> None:
        """Give unobtainable publications a second chance if their author has merged this round, or is there again.

        The author may have been suspended when it was asked. What is on the roster that it applied holds, so it can be
        had from somebody. Each roster gives one such chance. Another is for a roster whose authors hung while their
        bytes were pulled, once something is heard of all of them: else this peer would sign without them.
        """
        for peer in self.unobtainable:
            self.missed_s.setdefault(peer, now)
        for peer in list(self.unobtainable):
            last = hearsay.last_of(peer)
            if last is None or (last.round, last.base) != (self.round, self.own.base):
                continue
            if (peer, last.digest) not in self.tried_again:
                self.tried_again.add((peer, last.digest))
                self.unobtainable.discard(peer)
        for lacking in self._lacking():
            if all(heard_at_s.get(peer, -math.inf) > self.missed_s[peer] for peer in lacking):
                self.tried_again |= {(peer, "") for peer in lacking}
                self.unobtainable -= lacking

    def _lacking(self) -> list[set[str]]:
        """Return, of each roster that lacks something, the authors of that, if none has had a second chance."""
        lacking = [self.unobtainable.intersection(one.roster.peers) for one in self.rosters.values()]
        tried = self.in_vain.union(peer for peer, _ in self.tried_again)
        return [some for some in lacking if some and not some & tried]

    def authors_due_s(self, live: Collection[str], silence_s: float, now: float) -> float:
        """Return the time until which to wait for a word of the authors whose publications could not be got, before
        this peer signs without them."""
        due_s = (max(self.missed_s.get(peer, now) for peer in some) for some in self._lacking() if some <= set(live))
        return max((one + silence_s for one in due_s), default=now)

    def chains_due_s(self, lacking: Iterable[str], silence_s: float, now: float) -> float:
        """Return the time until which to wait for the `lacking` peers to send their chains.

        Each has `silence_s`; all together have `_CHAIN_SILENCES` times as long, so that ever new peers with unknown
        chains cannot hold up a round for ever.
        """
        until_s = [self.lacking_s.setdefault(peer, now) + silence_s for peer in lacking]
        most_s = min(self.lacking_s.values(), default=now) + _CHAIN_SILENCES * silence_s
        return min(max(until_s, default=now), most_s)
