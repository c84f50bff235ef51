"""Which of two chains of rosters holds, by what their peers signed; no claim of a roster's signer counts.

A peer that publishes signs a manifest, and the manifest names the roster whose weights it starts from. A manifest whose
base lies on one branch of a fork, and not before it, shows that its author went on from there. Of two branches the one
holds that more peers of the last common roster (the *electors*) went on with; then the one where more peers stand now;
then the one with more tokens, summed from those manifests; then the one whose first roster is signed by the lower
PeerID. `Roster.base_tokens` is never looked at.

Where a peer stands is what it told in an answer of its own; one that lives and has yet to answer counts as staying. An
entry of the first roster after the fork counts for neither branch: its manifest names the common roster, so anybody may
put it on a roster of its own. A single elector decides nothing, and the start of the run has none: whoever was alone
once could else call everybody back to there.

Pure, as `rosters.py`. The same evidence gives everybody the same answer.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, better_roster

__all__ = [
    "MAX_LINKS",
    "Chain",
    "ChainLink",
    "ChainView",
    "Chains",
    "ShownChain",
    "Stands",
    "chain_holds",
    "chain_view",
    "flaw",
]

MAX_LINKS = 512
"""Rosters that a chain keeps, the newest."""

_MAX_HEADS = 64
"""So many chains are judged, those on which most peers stand: heads cost nothing, and each is held against all that was
told."""
_MAX_SHOWN = 16
"""So many chains of others are kept, the last: heads cost nothing."""

Link = TypeVar("Link")
"""A link of a chain as it travels."""


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """A roster on a chain, and the tokens of those of its entries whose signed manifests were seen, by peer."""

    roster: Roster
    shown: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Rosters of which each names the one before it as its base, the oldest first."""

    links: tuple[ChainLink, ...] = ()

    @property
    def head(self) -> Roster | None:
        """The last roster: it names the weights."""
        return self.links[-1].roster if self.links else None

    @property
    def digest(self) -> str:
        """The head's digest; "" before the first roster."""
        return self.links[-1].roster.digest if self.links else ""

    @cached_property
    def _places(self) -> dict[str, int]:
        """How many links there are up to each digest; the base of the oldest link is known by its digest alone."""
        places = {link.roster.digest: number for number, link in enumerate(self.links, start=1)}
        return places | {self.links[0].roster.base if self.links else "": 0}

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def roster(self, digest: str) -> Roster | None:
        """The roster of this digest, if it is kept."""
        place = self._places.get(digest, 0)
        return self.links[place - 1].roster if place else None

    def tokens_at(self, digest: str) -> int | None:
        """What the run had counted once the roster of this digest was applied; None if this chain does not say."""
        if digest == "":
            return 0
        roster = self.roster(digest)
        if roster is not None:
            return roster.total_tokens
        return self.links[0].roster.base_tokens if digest in self else None

    def after(self, digest: str | None) -> tuple[ChainLink, ...]:
        """The links after that roster; all of them if it is None."""
        return self.links[0 if digest is None else self._places[digest] :]

    def __repr__(self) -> str:
        return f"Chain({len(self.links)} links to {self.digest[:8]})"

    def extended(self, link: ChainLink) -> Chain:
        """With one link more, if it names this chain's head as its base; else that link alone."""
        if not self.links or link.roster.base != self.digest:
            return Chain((link,))
        return Chain((*self.links, link)[-MAX_LINKS:])

    def up_to(self, roster: Roster) -> Chain:
        """What led to this roster, which is kept here."""
        return Chain(self.links[: self._places[roster.digest]])

    def joined_to(self, other: Chain) -> Chain:
        """With what `other` keeps of the time before this chain's oldest link."""
        if not self.links or (base := self.links[0].roster.base) not in other:
            return self
        before = other.links[: len(other.links) - len(other.after(base))]
        return Chain((*before, *self.links)[-MAX_LINKS:])


def flaw(chain: Chain, ours: Chain) -> str:
    """What is wrong with a chain that somebody shows, in words; "" if nothing. Each roster has to count what those
    before it counted, as far as they are shown, or known of our own chain."""
    tokens = ours.tokens_at(chain.links[0].roster.base) if chain.links else 0
    before: Roster | None = None
    for link in chain.links:
        roster = link.roster
        if before is not None and (roster.base, roster.round) != (before.digest, before.round + 1):
            return "a chain of rosters that do not follow each other"
        if tokens is not None and roster.base_tokens != tokens:
            return f"a roster that counts {roster.base_tokens} tokens behind it where its chain has {tokens}"
        entries = {entry.peer: entry.tokens for entry in roster.entries}
        if any(entries.get(peer) != shown for peer, shown in link.shown.items()):
            return "a chain with manifests of other entries than its rosters have"
        before, tokens = roster, roster.total_tokens
    return ""


def _last_common(ours: Chain, theirs: Chain) -> str | None:
    """The digest of the last roster that both chains know, "" for the start of the run; None if they know none."""
    for link in reversed(theirs.links):
        if link.roster.digest in ours:
            return link.roster.digest
    base = theirs.links[0].roster.base
    return base if base in ours else None


def _electors(ours: Chain, theirs: Chain, common: str | None) -> frozenset[str]:
    """Whose manifests count. Without a roster that both know: the peers of our own last one."""
    if common == "":
        return frozenset()
    roster = None if common is None else ours.roster(common) or theirs.roster(common)
    roster = roster or ours.head
    peers = frozenset() if roster is None else frozenset(roster.peers)
    return peers if len(peers) > 1 else frozenset()


def _digests(branch: Sequence[ChainLink]) -> frozenset[str]:
    return frozenset(link.roster.digest for link in branch)


def _authors(branch: Sequence[ChainLink]) -> frozenset[str]:
    return frozenset(peer for link in branch for peer in link.shown)


def _tokens(branch: Sequence[ChainLink], electors: frozenset[str]) -> int:
    return sum(tokens for link in branch for peer, tokens in link.shown.items() if not electors or peer in electors)


@dataclass(frozen=True, kw_only=True)
class Stands:
    """Where everybody stands: `told` says which roster each of the others told that it applied last, `unheard` who
    lives and has yet to tell, `known` what chains end with those rosters; `me` stands on the head of our own."""

    told: Mapping[str, str] = field(default_factory=dict)
    me: str = ""
    is_away: bool = False
    unheard: frozenset[str] = frozenset()
    known: Mapping[str, Chain] = field(default_factory=dict)


def chain_holds(theirs: Chain, ours: Chain, stands: Stands) -> bool:
    """Whether `theirs` holds against `ours`.

    `theirs` may extend `ours`: then those who stand on our head, or went on from there otherwise, speak against it. One
    that `is_away`, since it slept or was not there, does not count itself among those. Of one roster more those speak
    for it whom it counts: that is a round's end which this peer has missed.
    """
    if not theirs.links or theirs.digest in ours:
        return False
    if not ours.links:
        return True
    common = _last_common(ours, theirs)
    our_branch, their_branch = ours.after(common), theirs.after(common)
    is_next = not our_branch and len(their_branch) == 1
    our_signed, their_signed = our_branch[1:], their_branch if is_next else their_branch[1:]
    if common is None:  # of how the chains parted nothing is known: those count who stand here, or signed over there
        our_signed = ()
    own_digests, their_digests = _digests(our_branch) or {ours.digest}, _digests(their_branch)

    def is_beyond(digest: str, head: str) -> bool:
        chain = stands.known.get(digest)
        return chain is not None and head in chain

    gone_on = {
        peer for peer, digest in stands.told.items() if digest in their_digests or is_beyond(digest, theirs.digest)
    } - {stands.me}
    staying = {peer for peer, digest in stands.told.items() if digest in own_digests or is_beyond(digest, ours.digest)}
    staying = (staying - gone_on) | (stands.unheard - _authors(their_signed))
    if stands.me:
        is_nowhere = stands.is_away and (not our_branch or common is None)
        staying = staying - {stands.me} if is_nowhere else staying | {stands.me}
    electors = _electors(ours, theirs, common)
    own = (
        len(electors & (_authors(our_signed) | staying)),
        len(staying),
        _tokens(our_signed, electors),
    )
    their = (
        len(electors & (_authors(their_signed) | gone_on)),
        len(gone_on),
        _tokens(their_signed, electors),
    )
    if is_next and own[0] == their[0]:
        return True
    if own != their:
        return their > own
    return not our_branch or better_roster([our_branch[0].roster, their_branch[0].roster]) is their_branch[0].roster


@dataclass(frozen=True, kw_only=True)
class ChainView:
    """What a peer knows of its own chain and the others'."""

    ours: Chain
    shown: Mapping[str, Chain] = field(default_factory=dict)
    """What others showed of their chains, by the digest of the head. Of one that can show nothing: its head alone."""
    heads: Mapping[str, Roster] = field(default_factory=dict)
    """The rosters that others told they applied last, by digest."""
    stands: Mapping[str, str] = field(default_factory=dict)
    unheard: frozenset[str] = frozenset()
    me: str = ""
    is_away: bool = False

    def chain_of(self, heard: Roster) -> Chain | None:
        """The chain that ends with this roster; None if that has yet to be asked for.

        What the next roster after ours says of its entries is believed for now: whoever applies it has their manifests,
        and before a state is taken its chain is asked for.
        """
        if heard.digest in self.shown:
            return self.shown[heard.digest]
        if heard.base == self.ours.digest:
            claimed = {entry.peer: entry.tokens for entry in heard.entries}
            return self.ours.extended(ChainLink(roster=heard, shown=claimed))
        before = self.shown.get(heard.base)
        return None if before is None else before.extended(ChainLink(roster=heard))

    def lacks(self, heard: Roster | None) -> bool:
        """Whether nothing can be said of this roster before somebody has shown its chain."""
        return heard is not None and heard.digest not in self.ours and self.chain_of(heard) is None

    def holds(self, heard: Roster | None) -> bool:
        """Whether the weights after `heard` hold against ours, and against those of all others; False while its chain
        is not known. Of a chain that holds so do all rosters after ours."""
        if heard is None or heard.digest in self.ours:
            return False
        best = self.best if heard.digest in self.heads else self.best_of([heard, *self.heads.values()])
        return best is not None and heard.digest in best

    @cached_property
    def best(self) -> Chain | None:
        """The chain that holds of all that were told; None if that is ours."""
        return self.best_of(self.heads.values())

    def best_of(self, heads: Iterable[Roster]) -> Chain | None:
        """Of the chains with these heads the one that holds against the others and ours; None if that is ours.

        Those on which most peers stand are looked at first, so that all who hear of the same end with the same one.
        """
        by_digest, standing = {head.digest: head for head in heads}, Counter(self.stands.values())
        found = {digest: chain for digest, head in by_digest.items() if (chain := self.chain_of(head)) is not None}
        order = lambda digest: (-standing[digest], len(found[digest].links), digest)  # noqa: E731 - of a few words
        chains = {digest: found[digest] for digest in heapq.nsmallest(_MAX_HEADS, found, key=order)}
        best = self.ours
        for digest in chains:
            is_ours = best is self.ours  # else this peer would go with it; of the unheard nothing is known then
            stands = Stands(
                told=self.stands,
                me=self.me,
                is_away=self.is_away,
                unheard=self.unheard if is_ours else frozenset(),
                known=chains,
            )
            if chain_holds(chains[digest], best, stands):
                best = chains[digest]
        return None if best is self.ours else best


def chain_view(
    ours: Chain,
    shown: Mapping[str, Chain],
    told: Mapping[str, tuple[float, AdvertisedRound] | None],
    *,
    since_s: float,
    me: str,
    is_away: bool,
) -> ChainView:
    """What those who live have `told` since `since_s`; None of one that has told nothing. What was told before says
    nothing any more of a peer that was on our chain then: it may have gone on."""
    heads, stands, unheard = dict[str, Roster](), dict[str, str](), set[str]()
    for peer, one in told.items():
        last = None if one is None else one[1].last
        digest = "" if last is None else last.digest
        if one is None or (one[0] < since_s and digest in ours):
            unheard.add(peer)
            continue
        stands[peer] = digest
        if last is not None and digest not in ours:
            heads[digest] = last
    return ChainView(
        ours=ours, shown=shown, heads=heads, stands=stands, unheard=frozenset(unheard), me=me, is_away=is_away
    )


@dataclass(frozen=True)
class ShownChain(Generic[Link]):
    """A chain, and the signed form of those of its links that came with it, by their rosters' digests."""

    chain: Chain
    signed: Mapping[str, Link] = field(default_factory=dict)


@dataclass
class Chains(Generic[Link]):
    """A peer's own chain, and what others have shown of theirs."""

    chain: Chain = field(default_factory=Chain)
    _signed: dict[str, Link] = field(default_factory=dict)
    _shown: dict[str, ShownChain[Link]] = field(default_factory=dict)

    def move(self, link: ChainLink, signed: Link | None = None) -> None:
        """The weights are those after this roster now: merged here, or taken from another peer."""
        roster = link.roster
        if roster.digest == self.chain.digest:
            return
        # Whoever gave its state may have gone on before it showed its chain.
        there = (one for one in self._shown.values() if one.chain.roster(roster.digest) is not None)
        shown = self._shown.get(roster.digest) or next(there, None) or self._shown.get(roster.base)
        if roster.base == self.chain.digest and roster.digest not in self._shown:
            shown = ShownChain(self.chain, self._signed)
        kept: dict[str, Link] = {}
        if shown is None:
            self.chain = Chain((link,))
        else:
            is_there = shown.chain.roster(roster.digest) is not None
            chain = shown.chain.up_to(roster).joined_to(self.chain) if is_there else shown.chain.extended(link)
            self.chain, kept = chain, {**self._signed, **shown.signed}
        if signed is not None:
            kept.setdefault(roster.digest, signed)
        self._signed = self._bounded(kept)
        self._shown = {digest: one for digest, one in self._shown.items() if digest not in self.chain}

    def _bounded(self, signed: dict[str, Link]) -> dict[str, Link]:
        """Those of our chain's signed links that are kept."""
        return signed

    @property
    def shown(self) -> dict[str, Chain]:
        """What others have shown, by the digest of the head."""
        return {digest: one.chain for digest, one in self._shown.items()}

    def lacks(self, roster: Roster | None) -> bool:
        """Whether somebody has to show how it came to this roster: it is not ours, nor the next one."""
        if roster is None or roster.digest in self.chain or roster.base == self.chain.digest:
            return False
        return roster.digest not in self._shown and roster.base not in self._shown

    def keep(self, shown: ShownChain[Link]) -> None:
        """Remember what somebody showed."""
        self._shown.pop(shown.chain.digest, None)
        self._shown[shown.chain.digest] = shown
        while len(self._shown) > _MAX_SHOWN:
            del self._shown[next(iter(self._shown))]

    def keep_head(self, roster: Roster) -> None:
        """Remember that whoever stands at this roster can show nothing: it runs a version of before."""
        if self.lacks(roster):
            self.keep(ShownChain(Chain((ChainLink(roster=roster),))))

    def tokens_behind(self, base: str) -> int | None:
        """What the run had counted after the roster `base`, as far as this peer has seen; None if it has not.

        Of others' chains those count that begin with the run, or with a roster of ours: what is before the oldest one
        that is shown is only claimed.
        """
        oldest = ((one.chain, one.chain.links[0].roster) for one in self._shown.values())
        whole = (chain for chain, first in oldest if first.base == "" or first.digest in self.chain)
        chains = (self.chain, *whole)
        return next((tokens for one in chains if (tokens := one.tokens_at(base)) is not None), None)

    def wrong_with(self, roster: Roster) -> str:
        """What is wrong with a roster that claims another round or other tokens behind it than those before it had, in
        words; "" if nothing."""
        tokens = self.tokens_behind(roster.base)
        if tokens is not None and roster.base_tokens != tokens:
            return f"a roster that counts {roster.base_tokens} tokens behind it where its chain has {tokens}"
        before = self.chain.roster(roster.base)
        if before is not None and roster.round != before.round + 1:
            return "a roster of another round than the one after its base"
        return ""
