"""What others told of themselves and of their chains, and the search for the state that holds among theirs.

A joiner, one that comes back, and an archive search alike: they ask some peers how far they are, have those show their
chains whose rosters they do not know, and take the state of the chain that holds, from whoever delivers it. Who missed
a round takes a state with the same steps. Pure; driven by `rounds.py`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic

from swarmtrain.protocol.chains import Chain, Chains, ChainView, Link, chain_view, flaw
from swarmtrain.protocol.lifecycle import Change, Membership
from swarmtrain.protocol.rosters import Roster, Told
from swarmtrain.protocol.round_events import Envelope, Reply

__all__ = ["CatchUpSources", "Hearsay", "Search", "Source"]

_CHAIN_TRIES = 2
_CHAIN_AGAIN_S = 1.0
"""A peer is asked for its chain so often at most: checking it takes a while."""
_MOST_STEPS = 2**31


@dataclass
class Hearsay(Generic[Envelope, Link]):
    """What others told of themselves, and of how they came there."""

    me: str
    membership: Membership
    chains: Chains[Link]
    told: dict[str, tuple[float, Told]] = field(default_factory=dict)
    _chain_asked_s: dict[str, float] = field(default_factory=dict)

    def last_of(self, peer: str) -> Roster | None:
        """The roster that it told it applied last."""
        one = self.told.get(peer)
        return None if one is None else one[1].last

    def forget(self, peer: str) -> None:
        """It has long been gone."""
        self.told.pop(peer, None)
        self._chain_asked_s.pop(peer, None)

    def flaw_in(self, reply: Reply[Envelope, Link], asked_for_chain: bool) -> str:
        """What is wrong with what a peer tells of itself, in words; "" if nothing."""
        told, last = reply.told, reply.told.last
        if told.round != (0 if last is None else last.round + 1):
            return "a peer in another round than its last roster leads to"
        if reply.last is not None and (found := self.chains.wrong_with(reply.last.roster)):
            return found
        shown = reply.shown
        if not asked_for_chain or shown is None or last is None or last.digest in self.chains.chain:
            return ""
        if shown.chain.digest != last.digest:
            return "a chain of rosters that does not lead to its last one"
        return flaw(shown.chain, self.chains.chain)

    def hear(self, peer: str, reply: Reply[Envelope, Link], asked_for_chain: bool, now: float) -> Change | None:
        """Take in what a peer tells of itself, and shows of its chain. One that does not know the question shows
        nothing. Returns the change, if it says that it is away."""
        told = reply.told
        done = min(reply.inner_steps_done, _MOST_STEPS)
        self.membership.heard(peer, now, round=told.round, inner_steps_done=done)
        self.told[peer] = (now, told)
        if asked_for_chain and told.last is not None and told.last.digest not in self.chains.chain:
            if reply.shown is None:
                self.chains.keep_head(told.last)
            else:
                self.chains.keep(reply.shown)
        return self.membership.left(peer, now) if reply.away else None

    def wants_chain(self, peer: str, now: float) -> bool:
        """Whether to ask with this question for the chain of one that told of a roster that is not on ours, nor the
        next; it counts as asked then."""
        asked_s = self._chain_asked_s.get(peer, -math.inf)
        if not self.chains.lacks(self.last_of(peer)) or now < asked_s + _CHAIN_AGAIN_S:
            return False
        self._chain_asked_s[peer] = now
        return True

    def view(self, told: Mapping[str, Told], me: str) -> ChainView:
        """Which chain holds, for a peer that comes, or comes back, and for an archive."""
        now = {peer: (0.0, one) for peer, one in told.items()}
        return chain_view(self.chains.chain, self.chains.shown, now, since_s=0.0, me=me, is_away=True)


@dataclass
class Source:
    """Whose state is asked for, and with which number."""

    number: int
    peer: str
    roster: Roster | None = None
    """It is offered, after this one; and its chain is asked for."""


@dataclass
class CatchUpSources(Generic[Envelope, Link]):
    """The peers that are ahead, one of which is to give its state."""

    hearsay: Hearsay[Envelope, Link]
    round: int
    reason: str
    left: deque[str]
    unobtainable: Collection[str] = ()
    source: Source | None = None

    def next(self) -> tuple[str, int] | None:
        """Whom to ask now, and for a state of which round or later."""
        if not self.left:
            return None
        peer = self.left.popleft()
        last = self.hearsay.last_of(peer)
        return peer, 0 if last is None else last.round + 1

    def needs_chain(self, roster: Roster) -> bool:
        """Whether its source has to show how it came to this roster before it can be judged."""
        return roster.digest not in self.hearsay.chains.shown

    def may_take(self, source: str, roster: Roster, view: ChainView) -> bool:
        """Whether the weights after `roster` hold. Who has a publication of its own on this round's, and does not
        deliver that, is believed nothing; who is further than that need not have it any more."""
        withholds = roster.round == self.round and source in self.unobtainable and source in roster.peers
        return not withholds and view.holds(roster)


@dataclass
class Search(Generic[Envelope, Link]):
    """One search for the state that holds."""

    hearsay: Hearsay[Envelope, Link]
    search: int
    me: str
    """"" for an archive, whose weights count for no chain."""
    told: Mapping[str, Told]
    above_tokens: int
    fetches: bool
    rng: random.Random
    best: Chain | None = None
    source: Source | None = None
    _lacking: deque[tuple[str, list[str]]] = field(init=False)
    _sources: deque[tuple[str, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        standing: dict[str, list[str]] = {}
        for peer, one in self.told.items():
            if one.last is not None:
                standing.setdefault(one.last.digest, []).append(peer)
        for peers in standing.values():
            self.rng.shuffle(peers)
        self._lacking = deque((digest, peers[:_CHAIN_TRIES]) for digest, peers in standing.items())

    def whose_chain(self) -> str | None:
        """Who is asked next for its chain: each is, before any is judged."""
        chains = self.hearsay.chains
        while self._lacking:
            digest, peers = self._lacking[0]
            if peers and digest not in chains.chain and digest not in chains.shown:
                return peers.pop()
            self._lacking.popleft()
        return None

    def choose(self) -> bool:
        """All have shown their chains, or will not: which holds? False if that is ours, or counts too little."""
        now = self.hearsay.told  # who was asked may have gone on since
        self.told = {peer: now[peer][1] if peer in now else before for peer, before in self.told.items()}
        self.best = best = self.hearsay.view(self.told, self.me).best
        if best is None or best.head is None or best.head.total_tokens <= self.above_tokens:
            return False
        lasts = {peer: one.last.digest for peer, one in self.told.items() if one.last is not None}
        holders = [peer for peer, digest in lasts.items() if digest == best.digest]
        ours = self.hearsay.chains.chain
        rest = [peer for peer, digest in lasts.items() if digest in best and digest not in ours and peer not in holders]
        self.rng.shuffle(holders)
        self._sources.extend((peer, best.head.round + 1) for peer in holders)
        self._sources.extend((peer, 1) for peer in rest)
        return True

    def next(self) -> tuple[str, int] | None:
        """Whom to ask now, and for a state of which round or later."""
        return self._sources.popleft() if self._sources else None

    def needs_chain(self, roster: Roster) -> bool:
        """Whether its source has to show how it came to this roster before it can be judged."""
        return self._is_newer(roster) and self.best is not None and roster.digest not in self.best

    def may_take(self, source: str, roster: Roster, view: ChainView | None = None) -> bool:
        """Whether the state after `roster` is of the chain that holds: it may be further than it was, or forgotten."""
        if not self._is_newer(roster):
            return False
        assert self.best is not None
        if roster.digest not in self.best:
            last = self.hearsay.last_of(source)
            chain = None if last is None else self.hearsay.view(self.told, self.me).chain_of(last)
            if chain is None or self.best.digest not in chain or roster.digest not in chain:
                return False
        return roster.total_tokens > self.above_tokens

    def _is_newer(self, roster: Roster) -> bool:
        return roster.digest not in self.hearsay.chains.chain
