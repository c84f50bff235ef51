"""Bytes of a simulated peer in synchronous rounds: publications, shares, and where to get what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from swarmtrain.protocol.membership.membership import Membership, PeerState
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.engine import RoundEngine
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication, sources_of
from swarmtrain.protocol.rounds.share_waits import share_due_s
from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.systems.messages import Settings, WorldMoment
from swarmtrain.simulate.systems.network import End, NetworkPlace
from swarmtrain.simulate.systems.shares import ShareMerge


class Carrier(Protocol):
    """Simulated world, as a peer's transfers see it: the clock, the other peers, and the links to them."""

    clock: Clock

    @property
    def peers(self) -> Mapping[str, Owner]:
        """All peers by name, this one included."""

    shared: bool

    def connected(self, a: NetworkPlace, b: NetworkPlace) -> bool:
        """Return whether packets pass between two machines."""

    def passes(self, src: NetworkPlace, dst: NetworkPlace) -> bool:
        """Draw whether this one message arrives."""

    def latency_s(self, a: NetworkPlace, b: NetworkPlace) -> float:
        """Return the one-way latency in seconds."""

    def pull(
        self,
        dst: End,
        src_name: str,
        what: str,
        num_bytes: float,
        done: Callable[[Any], None],
        *,
        goes_on: bool = False,
    ) -> None:
        """Transfer `what` from a peer; `done(payload)` gets None if it did not come. `goes_on`: in an open stream."""

    def reached(self, peer: Owner, moment: WorldMoment) -> None:
        """Hook, called when a peer reaches a moment for which a fault may be declared."""


@dataclass
class _Merging:
    """Roster that is being merged, and the progress of that."""

    roster: Roster
    roster_at_s: float
    own_share_at_s: float = math.inf
    looked_for: set[str] = field(default_factory=set)
    shares_pulling: set[int] = field(default_factory=set)
    averaging: set[int] = field(default_factory=set)
    again: Timer | None = None
    shares: ShareMerge | None = None
    """Its shares, if transfers share links."""


class Owner(End, Protocol):
    """Simulated peer, as its transfers see it: a process in a swarm."""

    alive: bool
    settings: Settings
    membership: Membership
    transfers: Transfers
    engine: RoundEngine[None, None]

    steps: int

    @property
    def round(self) -> int:
        """Round that the peer is in."""

    @property
    def running(self) -> bool:
        """True if the process is neither gone nor frozen."""

    def later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run a call in this process after `delay_s` seconds."""

    def tell(self, event: ev.Event[None, None]) -> None:
        """Pass an event to the engine."""


class Transfers:
    """Bytes of one peer, by name: publications, their parts, and averaged shares.

    It obtains what a roster names, and reports the result to the engine.
    """

    def __init__(self, owner: Owner, world: Carrier) -> None:
        self._owner, self._world, self._settings = owner, world, owner.settings
        self._store: dict[str, int] = {}
        """Round in which each thing arrived, by name."""
        self._shares: dict[str, set[int]] = {}
        self._pulling: set[str] = set()
        self._wanted: dict[str, list[Callable[[], None]]] = {}
        self._merging: _Merging | None = None

    def published(self, snapshot: str) -> None:
        """Record that the owner's own publication is available."""
        self._store[snapshot] = self._owner.round

    def provide(self, what: str) -> str | None:
        """Return the bytes named `what`, for a pull; None if they are not here."""
        return what if self._holds(what.split(" ")[0], what) else None

    def give_up_merge(self) -> None:
        """Drop the merge: its mean is no longer wanted."""
        self._end_merge()

    def keep(self, what: str) -> None:
        """Keep something that was averaged or pulled, for others to pull."""
        self._store[what] = self._owner.round
        for told in self._wanted.pop(what, ()):
            told()

    def tell_when_kept(self, what: str, told: Callable[[], None]) -> None:
        """Call `told` once this is here, as the answer to a question about a round that is held until then."""
        self._wanted.setdefault(what, []).append(told)

    def forget_old(self) -> None:
        """Begin the next round: drop what is two rounds old, which nobody asks for any more."""
        round = self._owner.round
        self._store = {what: r for what, r in self._store.items() if abs(round - r) <= 1}
        self._wanted.clear()

    def _holds(self, snapshot: str, part: str) -> bool:
        return snapshot in self._store or part in self._store

    def pull_from(
        self, sources: Iterable[str], what: str, num_bytes: float, done: Callable[[Any], None], *, goes_on: bool = False
    ) -> None:
        """Try one source after the other; `done(None)` when none has it. `goes_on`: the first sends already."""
        is_open = goes_on
        left = [source for source in dict.fromkeys(sources) if source != self._owner.name]

        def next_source(payload: Any) -> None:
            nonlocal is_open
            while left and self._owner.membership.state(left[0]) is not PeerState.LIVE:
                left.pop(0)
            if payload is not None or not left:
                done(payload)
            else:
                is_open, goes_on = False, is_open
                self._world.pull(self._owner, left.pop(0), what, num_bytes, next_source, goes_on=goes_on)

        next_source(None)

    def fetch(self, offer: RoundPublication, sources: Iterable[str]) -> None:
        """Fetch a publication's bytes, then continue the merge that lacked them."""
        if offer.snapshot in self._pulling or offer.snapshot in self._store:
            return
        self._pulling.add(offer.snapshot)

        def done(payload: Any) -> None:
            self._pulling.discard(offer.snapshot)
            if payload is not None:
                self._store[offer.snapshot] = self._owner.round
            self._owner.tell(
                ev.PublicationNotFetched(offer.snapshot) if payload is None else ev.PublicationFetched(offer.snapshot)
            )
            self._go_on_merging()

        self.pull_from(sources, offer.snapshot, self._settings.publication_bytes, done)

    # ------------------------------------------------------------------ a merge

    def merge(self, roster: Roster) -> None:
        """Obtain the publications or shares that this roster needs."""
        self._end_merge()
        self._merging = _Merging(roster, self._world.clock.now)
        self._go_on_merging()

    def _go_on_merging(self) -> None:
        if (m := self._merging) is None:
            return
        if len(m.roster.entries) > self._settings.share_above:
            if self._world.shared:
                self._begin_shares(m)
            else:
                self._go_on_with_shares(m)
            return
        lacking = [offer for offer in m.roster.entries if offer.snapshot not in self._store]
        for offer in lacking:
            if offer.snapshot in self._pulling:
                continue
            if offer.snapshot in m.looked_for:
                self._merging = None
                self._owner.tell(ev.RosterNotMerged(m.roster.digest, frozenset([offer.peer])))
                return
            m.looked_for.add(offer.snapshot)
            self.fetch(offer, sources_of(m.roster, offer.peer))
        if not lacking:
            self._has_merged(m)

    def _has_merged(self, m: _Merging) -> None:
        self._merging = None
        self._owner.tell(ev.RosterMerged(m.roster.digest))

    def _begin_shares(self, m: _Merging) -> None:
        if m.shares is not None:
            return

        def done(lacking: frozenset[str]) -> None:
            if m is not self._merging:
                return
            if lacking:
                self._merging = None
                self._owner.tell(ev.RosterNotMerged(m.roster.digest, lacking))
            else:
                self._has_merged(m)

        m.shares = ShareMerge(self, self._owner, self._world, m.roster, done)
        m.shares.begin()

    def _end_merge(self) -> None:
        if self._merging is not None and self._merging.shares is not None:
            self._merging.shares.stop()
        self._merging = None

    def _go_on_with_shares(self, m: _Merging) -> None:
        """Average this peer's own share, and pull the others from their owners.

        A share that is overdue is averaged here from the entries.
        """
        now, owners = self._world.clock.now, m.roster.peers
        own = owners.index(self._owner.name) if self._owner.name in owners else None
        have = self._shares.setdefault(m.roster.digest, set())
        if own is None or own in have:
            m.own_share_at_s = min(m.own_share_at_s, now)
        else:
            self._average_share(m, own)
        lacking = set(range(len(owners))) - have
        if not lacking:
            self._has_merged(m)
            return
        overdue = now >= share_due_s(m.roster_at_s, m.own_share_at_s, self._settings.silence_s)
        ready: list[int] = []
        for i in sorted(lacking - m.shares_pulling - {own}):
            owner = self._world.peers[owners[i]]
            if (
                i in owner.transfers._shares.get(m.roster.digest, ())
                and owner.running
                and self._world.connected(self._owner, owner)
            ):
                ready.append(i)
            elif overdue or not owner.alive or self._owner.membership.state(owners[i]) is not PeerState.LIVE:
                self._average_share(m, i)
        if ready:
            self._pull_shares(m, ready)
        if m.again is None or not m.again.pending:
            m.again = self._owner.later(self._settings.share_again_s, self._go_on_with, m)

    def _go_on_with(self, m: _Merging) -> None:
        if m is self._merging:
            self._go_on_merging()

    def _pull_shares(self, m: _Merging, ready: list[int]) -> None:
        """Pull many shares side by side, as one event."""
        # An event a share would be N * N events a round, of N volunteers.
        num_bytes = self._settings.publication_bytes / len(m.roster.entries)
        m.shares_pulling.update(ready)
        owners = [self._world.peers[m.roster.peers[i]] for i in ready]
        latency_s = max(self._world.latency_s(self._owner, owner) for owner in owners)

        def done() -> None:
            for i, owner in zip(ready, owners, strict=True):
                if owner.running and self._world.passes(owner, self._owner):
                    self._shares[m.roster.digest].add(i)
            m.shares_pulling.difference_update(ready)
            self._go_on_with(m)

        self._owner.later(2 * latency_s + len(ready) * num_bytes / self._owner.link.bytes_per_s, done)

    def _average_share(self, m: _Merging, index: int) -> None:
        """Get one share's part of every entry, and average them."""
        if index in m.averaging:
            return
        m.averaging.add(index)
        roster, num_parts, link = m.roster, len(m.roster.entries), self._owner.link
        num_bytes = self._settings.publication_bytes / num_parts
        lacking = {offer.peer for offer in roster.entries}

        def got(offer: RoundPublication, payload: Any) -> None:
            if payload is not None:
                self._store[parts[offer.peer]] = self._owner.round
                lacking.discard(offer.peer)
            waiting.discard(offer.peer)
            if not waiting:
                finish()

        def finish() -> None:
            if m is not self._merging:
                return
            m.averaging.discard(index)
            if lacking:
                self._merging = None
                self._owner.tell(ev.RosterNotMerged(roster.digest, frozenset(lacking)))
                return
            self._shares[roster.digest].add(index)
            if self._owner.name in roster.peers and index == roster.peers.index(self._owner.name):
                m.own_share_at_s = self._world.clock.now
            self._go_on_merging()

        # The parts that are there for the asking come in one event; the others are looked for one by one.
        parts = {offer.peer: f"{offer.snapshot} {index}/{num_parts}" for offer in roster.entries}
        waiting = {offer.peer for offer in roster.entries if not self._holds(offer.snapshot, parts[offer.peer])}
        lacking &= waiting
        easy = [offer for offer in roster.entries if offer.peer in waiting and self._reaches(offer, parts[offer.peer])]

        def easy_done() -> None:
            for offer in easy:
                ok = self._reaches(offer, parts[offer.peer])
                got(offer, offer.snapshot) if ok else look(offer)

        def look(offer: RoundPublication) -> None:
            sources = [offer.peer, roster.peers[index], *sources_of(roster, offer.peer)]
            self.pull_from(sources, parts[offer.peer], num_bytes, lambda payload: got(offer, payload))

        if not waiting:
            self._owner.later(0.0, finish)
        if easy:
            self._owner.later(4 * link.latency_s + len(easy) * num_bytes / link.bytes_per_s, easy_done)
        for offer in easy:
            self._world.reached(self._world.peers[offer.peer], "serving")
        come_easily = {offer.peer for offer in easy}
        for offer in [o for o in roster.entries if o.peer in waiting and o.peer not in come_easily]:
            look(offer)

    def _reaches(self, offer: RoundPublication, part: str) -> bool:
        author = self._world.peers[offer.peer]
        return (
            author.running and self._world.passes(author, self._owner) and author.transfers._holds(offer.snapshot, part)
        )
