"""What a peer knows of a round that it has ended itself; `rounds.py` decides by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic

from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Link
from swarmtrain.protocol.rounds.messages import Envelope, SignedRoster
from swarmtrain.protocol.rounds.rosters import RoundPublication, better_roster, worst_roster
from swarmtrain.protocol.rounds.state_search import CatchingUp, Hearsay

__all__ = ["KnownRound"]

_MAX_ATTEMPTS = 8
_MAX_ROSTERS = 64
"""So many rosters of others are kept of a round, those that hold against the rest: signers cost nothing."""
_CHAIN_SILENCES = 3
"""For so many times as long as one may be silent nothing is signed before chains are shown."""


@dataclass(slots=True)
class KnownRound(Generic[Envelope, Link]):
    """What is known of one round that this peer has ended itself."""

    round: int
    started_s: float
    ended_s: float
    own: RoundPublication
    announced: dict[str, RoundPublication] = field(default_factory=dict)
    rosters: dict[str, SignedRoster[Envelope]] = field(default_factory=dict)
    """By name."""
    best: SignedRoster[Envelope] | None = None
    """Of these the one that holds."""
    shared: str = ""
    asking: dict[str, int] = field(default_factory=dict)
    """The number of the question to each peer that is under way."""
    ask_again_s: dict[str, float] = field(default_factory=dict)
    told_of: dict[str, str] = field(default_factory=dict)
    """The name of the roster that each peer told of last."""
    asked_at_s: dict[str, float] = field(default_factory=dict)
    answered_at_s: dict[str, float] = field(default_factory=dict)
    """When what each peer answered last was asked."""
    brought: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    """The publications that were asked for, and those whose bytes are here, by their hashes."""
    unobtainable: set[str] = field(default_factory=set)
    tried_again: set[tuple[str, str]] = field(default_factory=set)
    undeliverable: set[str] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    """Peers that sent something malformed about this round: asked again, but not waited for."""
    impossible: set[str] = field(default_factory=set)
    """Digests of rosters that name a publication of ours that we never made."""
    lacking_s: dict[str, float] = field(default_factory=dict)
    """Since when each peer has told of a roster whose chain nobody has shown yet."""
    merging: str = ""
    is_merged: bool = False
    catching_up: CatchingUp[Envelope, Link] | None = None

    def keep(self, one: SignedRoster[Envelope]) -> bool:
        """Remember a roster of this round that starts from our weights, of one signer the latest few and of all signers
        those that hold against the rest; whether it is new."""
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
        best = better_roster([kept.roster for kept in self.rosters.values()])
        self.best = next(kept for kept in self.rosters.values() if kept.roster is best)
        self.unobtainable.difference_update(roster.peers)
        return True

    def was_brought(self, event: ev.PublicationFetched | ev.PublicationNotFetched) -> None:
        """A publication's bytes are here, or nobody delivers them."""
        if isinstance(event, ev.PublicationFetched):
            self.held.add(event.snapshot)
        else:
            self.unobtainable.update(p for p, offer in self.announced.items() if offer.snapshot == event.snapshot)

    def merge_went_on(self, event: ev.PublicationFound | ev.RosterMerged | ev.RosterNotMerged) -> None:
        """What came of the merge that is under way; of one before nothing is taken."""
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

    def try_again(self, hearsay: Hearsay[Envelope, Link]) -> None:
        """Who could not be pulled from, and has merged this round by now, may just have stood still: what is on its
        roster holds, so that it gets another chance, once."""
        for peer in list(self.unobtainable):
            last = hearsay.last_of(peer)
            if last is None or (last.round, last.base) != (self.round, self.own.base):
                continue
            if (peer, last.digest) not in self.tried_again:
                self.tried_again.add((peer, last.digest))
                self.unobtainable.discard(peer)

    def chains_due_s(self, lacking: Iterable[str], silence_s: float, now: float) -> float:
        """Until when somebody has yet to show its chain, for which it has as long as it may be silent, and all together
        a few times as long: who comes after the other with one that nobody knows must not hold a round up for ever."""
        until_s = [self.lacking_s.setdefault(peer, now) + silence_s for peer in lacking]
        most_s = min(self.lacking_s.values(), default=now) + _CHAIN_SILENCES * silence_s
        return min(max(until_s, default=now), most_s)
