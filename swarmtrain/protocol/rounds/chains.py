"""Choice between chains of rosters, by what peers have signed, never by what a roster's signer claims.

A peer that publishes signs a manifest, which names the roster whose weights it starts from. A manifest whose base lies
on one branch of a fork, after the fork, shows that its author continued on that branch. Of two branches the one holds
- that more peers of the last common roster (the *electors*) continued on;
- else on which more peers stand now;
- else that has more tokens, summed over those manifests;
- else whose first roster is signed by the lower PeerID.

`Roster.base_tokens` is never believed: any signer could write any number there (decision 50).

Where a peer stands is what it says in its own answers; a live peer that has not answered yet counts as staying. An
entry of the first roster after the fork counts for neither branch: its manifest names the common roster, so anybody may
list it on a roster of their own. A single elector decides nothing, and the start of the run has none; otherwise a peer
that was alone once could call everybody back to that point.

Everything here is pure, and the same evidence gives everybody the same answer.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, better_roster

MAX_LINKS = 512
"""Rosters that a chain keeps, the newest."""

_MAX_HEADS = 64
"""Chains that are compared, those on which most peers stand. Heads cost nothing, and each comparison looks at all
answers."""
_MAX_SHOWN = 16
"""Chains of other peers that are kept, the most recent ones."""

Link = TypeVar("Link")
"""Signed form of a link as it travels; opaque here."""


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """Roster on a chain, and the tokens of those of its entries whose signed manifests were seen, by peer."""

    roster: Roster
    shown: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Rosters of which each names the one before it as its base, oldest first."""

    links: tuple[ChainLink, ...] = ()

    @property
    def head(self) -> Roster | None:
        """Last roster, which identifies the weights."""
        return self.links[-1].roster if self.links else None

    @property
    def digest(self) -> str:
        """Digest of the last roster; "" before the first roster."""
        return self.links[-1].roster.digest if self.links else ""

    @cached_property
    def _places(self) -> dict[str, int]:
        """Number of links up to each digest. The base of the oldest link is known only by its digest."""
        places = {link.roster.digest: number for number, link in enumerate(self.links, start=1)}
        return places | {self.links[0].roster.base if self.links else "": 0}

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def roster(self, digest: str) -> Roster | None:
        """Return the roster with this digest if it is kept."""
        place = self._places.get(digest, 0)
        return self.links[place - 1].roster if place else None

    def tokens_at(self, digest: str) -> int | None:
        """Return the run's tokens after the roster with this digest; None if this chain does not know."""
        if digest == "":
            return 0
        roster = self.roster(digest)
        if roster is not None:
            return roster.total_tokens
        return self.links[0].roster.base_tokens if digest in self else None

    def after(self, digest: str | None) -> tuple[ChainLink, ...]:
        """Return the links after the roster with this digest; all links if it is None."""
        return self.links[0 if digest is None else self._places[digest] :]

    def __repr__(self) -> str:
        return f"Chain({len(self.links)} links to {self.digest[:8]})"

    def extended(self, link: ChainLink) -> Chain:
        """Return this chain with one more link; only that link if its base is not this chain's head."""
        if not self.links or link.roster.base != self.digest:
            return Chain((link,))
        return Chain((*self.links, link)[-MAX_LINKS:])

    def up_to(self, roster: Roster) -> Chain:
        """Return the chain up to this roster, which it contains."""
        return Chain(self.links[: self._places[roster.digest]])

    def joined_to(self, other: Chain) -> Chain:
        """Return this chain with the older links that `other` still has."""
        if not self.links or (base := self.links[0].roster.base) not in other:
            return self
        before = other.links[: len(other.links) - len(other.after(base))]
        return Chain((*before, *self.links)[-MAX_LINKS:])


class Flaw(NamedTuple):
    """What is wrong with something that a peer has sent."""

    detail: str
    code: str
    """The error's code, such as `bad-tokens`."""


def flaw(chain: Chain, ours: Chain) -> Flaw | None:
    """Return what is wrong with a chain that a peer has sent; None if nothing is.

    Each roster's `base_tokens` must agree with the tokens of the rosters before it, as far as these are in the message
    or on this peer's own chain.
    """
    tokens = ours.tokens_at(chain.links[0].roster.base) if chain.links else 0
    before: Roster | None = None
    for link in chain.links:
        roster = link.roster
        if before is not None and (roster.base, roster.round) != (before.digest, before.round + 1):
            return Flaw("a chain of rosters that do not follow each other", "bad-chain")
        if tokens is not None and roster.base_tokens != tokens:
            return _other_tokens(roster, tokens)
        entries = {entry.peer: entry.tokens for entry in roster.entries}
        if any(entries.get(peer) != shown for peer, shown in link.shown.items()):
            return Flaw("a chain with manifests of other entries than its rosters have", "bad-chain")
        before, tokens = roster, roster.total_tokens
    return None


def _other_tokens(roster: Roster, tokens: int) -> Flaw:
    detail = f"a roster that counts {roster.base_tokens} tokens behind it where its chain has {tokens}"
    return Flaw(detail, "bad-tokens")


def _last_common(ours: Chain, theirs: Chain) -> str | None:
    """Return the digest of the last roster on both chains, "" for the start of the run; None if they share none."""
    for link in reversed(theirs.links):
        if link.roster.digest in ours:
            return link.roster.digest
    base = theirs.links[0].roster.base
    return base if base in ours else None


def _electors(ours: Chain, theirs: Chain, common: str | None) -> frozenset[str]:
    """Return the peers whose manifests count. Without a common roster these are the peers of this peer's last one."""
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
    """Roster that each peer has applied last (where it "stands"). This peer (`me`) stands on the head of its own
    chain."""

    advertised: Mapping[str, str] = field(default_factory=dict)
    """Digest of the roster that each other peer says it applied last."""
    me: str = ""
    is_away: bool = False
    """True if this peer was suspended or absent, so that it does not count itself."""
    unheard: frozenset[str] = frozenset()
    """Live peers that have not answered yet."""
    known: Mapping[str, Chain] = field(default_factory=dict)
    """Chains that end with the rosters in `advertised`, by digest."""


def chain_holds(theirs: Chain, ours: Chain, stands: Stands) -> bool:
    """Return whether `theirs` holds against `ours`.

    `theirs` may extend `ours`. Then peers that stand on our head, or have continued from there in another way, speak
    against it. A peer that `is_away`, because it was suspended or absent, does not count itself among them. If `theirs`
    is only one roster longer, the peers listed on that roster speak for it: it is a round's end that this peer has
    missed.
    """
    if not theirs.links or theirs.digest in ours:
        return False
    if not ours.links:
        return True
    common = _last_common(ours, theirs)
    our_branch, their_branch = ours.after(common), theirs.after(common)
    is_next = not our_branch and len(their_branch) == 1
    # The first roster after the fork does not count: its manifests name the common roster, so a liar could list
    # everybody's.
    our_signed, their_signed = our_branch[1:], their_branch if is_next else their_branch[1:]
    if common is None:  # where the chains forked is unknown: what counts is who stands here, or has signed over there
        our_signed = ()
    own_digests, their_digests = _digests(our_branch) or {ours.digest}, _digests(their_branch)

    def is_beyond(digest: str, head: str) -> bool:
        chain = stands.known.get(digest)
        return chain is not None and head in chain

    gone_on = {
        peer
        for peer, digest in stands.advertised.items()
        if digest in their_digests or is_beyond(digest, theirs.digest)
    } - {stands.me}
    staying = {
        peer for peer, digest in stands.advertised.items() if digest in own_digests or is_beyond(digest, ours.digest)
    }
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
    """This peer's own chain, and the others' as far as it knows them."""

    ours: Chain
    shown: Mapping[str, Chain] = field(default_factory=dict)
    """Chains that other peers have sent, keyed by the digest of the last roster."""
    heads: Mapping[str, Roster] = field(default_factory=dict)
    """Rosters that other peers say they applied last, by digest."""
    stands: Mapping[str, str] = field(default_factory=dict)
    """Digest of the roster that each other peer says it applied last."""
    unheard: frozenset[str] = frozenset()
    """Live peers that have not answered yet."""
    me: str = ""
    is_away: bool = False
    """True if this peer was suspended or absent, so that it does not count itself."""

    def chain_of(self, heard: Roster) -> Chain | None:
        """Return the chain that ends with the roster `heard`; None if the chain must be asked for first.

        The entries of a roster that follows this peer's own are believed for now: a peer that applies the roster has
        their manifests, and its chain is asked for before a state is taken.
        """
        if heard.digest in self.shown:
            return self.shown[heard.digest]
        if heard.base == self.ours.digest:
            claimed = {entry.peer: entry.tokens for entry in heard.entries}
            return self.ours.extended(ChainLink(roster=heard, shown=claimed))
        before = self.shown.get(heard.base)
        return None if before is None else before.extended(ChainLink(roster=heard))

    def lacks(self, heard: Roster | None) -> bool:
        """Return whether the roster `heard` cannot be judged until some peer has sent its chain."""
        return heard is not None and heard.digest not in self.ours and self.chain_of(heard) is None

    def holds(self, heard: Roster | None) -> bool:
        """Return whether the weights after the roster `heard` hold against this peer's and all others'; False if its
        chain is unknown.

        If a chain holds, so do all of its rosters after the last one that it shares with this peer's.
        """
        if heard is None or heard.digest in self.ours:
            return False
        best = self.best if heard.digest in self.heads else self.best_of([heard, *self.heads.values()])
        return best is not None and heard.digest in best

    @cached_property
    def best(self) -> Chain | None:
        """Chain that holds among all chains that peers stand on; None if it is this peer's own."""
        return self.best_of(self.heads.values())

    def best_of(self, heads: Iterable[Roster]) -> Chain | None:
        """Return the chain that holds among those with these heads and ours; None if it is this peer's own.

        Chains on which most peers stand are compared first, so that all peers with the same evidence choose the same
        one.
        """
        by_digest, standing = {head.digest: head for head in heads}, Counter(self.stands.values())
        found = {digest: chain for digest, head in by_digest.items() if (chain := self.chain_of(head)) is not None}
        order = lambda digest: (-standing[digest], len(found[digest].links), digest)  # noqa: E731 - of a few words
        chains = {digest: found[digest] for digest in heapq.nsmallest(_MAX_HEADS, found, key=order)}
        best = self.ours
        for digest in chains:
            is_ours = best is self.ours  # otherwise this peer has left its own, and what the unheard do is unknown
            stands = Stands(
                advertised=self.stands,
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
    advertised: Mapping[str, tuple[float, AdvertisedRound] | None],
    *,
    since_s: float,
    me: str,
    is_away: bool,
) -> ChainView:
    """Build a view from what the live peers have said since `since_s`; None for a peer that has said nothing.

    An older answer of a peer that was on our chain does not count: the peer may have advanced since.
    """
    heads, stands, unheard = dict[str, Roster](), dict[str, str](), set[str]()
    for peer, one in advertised.items():
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
    """Chain, with its links in their signed form as far as the sender provided it, by the digest of their rosters."""

    chain: Chain
    signed: Mapping[str, Link] = field(default_factory=dict)


@dataclass
class Chains(Generic[Link]):
    """This peer's own chain, and those that other peers have sent."""

    chain: Chain = field(default_factory=Chain)
    _signed: dict[str, Link] = field(default_factory=dict)
    _shown: dict[str, ShownChain[Link]] = field(default_factory=dict)

    def move(self, link: ChainLink, signed: Link | None = None) -> None:
        """Record that the weights are now those after this roster, which was merged here or came with another peer's
        state."""
        roster = link.roster
        if roster.digest == self.chain.digest:
            return
        # The peer that gave its state may have advanced before it showed its chain.
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
        """Return the signed links of this peer's chain that are kept; subclasses may keep fewer."""
        return signed

    @property
    def shown(self) -> dict[str, Chain]:
        """Chains that other peers have sent, keyed by the digest of the chain's last roster."""
        return {digest: one.chain for digest, one in self._shown.items()}

    def lacks(self, roster: Roster | None) -> bool:
        """Return whether some peer must send the chain of this roster: it is neither on this peer's chain nor the next
        one after it."""
        if roster is None or roster.digest in self.chain or roster.base == self.chain.digest:
            return False
        return roster.digest not in self._shown and roster.base not in self._shown

    def keep(self, shown: ShownChain[Link]) -> None:
        """Remember a chain that a peer has sent."""
        self._shown.pop(shown.chain.digest, None)
        self._shown[shown.chain.digest] = shown
        while len(self._shown) > _MAX_SHOWN:
            del self._shown[next(iter(self._shown))]

    def tokens_behind(self, base: str) -> int | None:
        """Return the run's tokens after the roster `base`, as far as this peer has evidence; None without any.

        Of other peers' chains only those count that begin with the run or with a roster of this peer's chain. Tokens
        before the oldest known roster of a chain are only a claim.
        """
        oldest = ((one.chain, one.chain.links[0].roster) for one in self._shown.values())
        whole = (chain for chain, first in oldest if first.base == "" or first.digest in self.chain)
        chains = (self.chain, *whole)
        return next((tokens for one in chains if (tokens := one.tokens_at(base)) is not None), None)

    def wrong_with(self, roster: Roster) -> Flaw | None:
        """Return what is wrong with a roster's round or `base_tokens` compared with the rosters before it; None if
        nothing is."""
        tokens = self.tokens_behind(roster.base)
        if tokens is not None and roster.base_tokens != tokens:
            return _other_tokens(roster, tokens)
        before = self.chain.roster(roster.base)
        if before is not None and roster.round != before.round + 1:
            return Flaw("a roster of another round than the one after its base", "bad-round")
        return None
