"""The bytes of a simulated peer: publications, shares, and where to get what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from swarmtrain.protocol.lifecycle import Membership, PeerState
from swarmtrain.protocol.rosters import Publication, Roster, share_due_s
from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.messages import Link, Moment, Phase, RoundState, Settings, State
from swarmtrain.simulate.network import End, Place

__all__ = ["Carrier", "Transfers"]


class Carrier(Protocol):
    """What carries a peer's bytes: the clock, the others, and the links to them."""

    clock: Clock

    @property
    def peers(self) -> Mapping[str, Transfers]:
        """By name, itself among them."""

    def connected(self, a: Place, b: Place) -> bool:
        """Whether packets pass between the two machines."""

    def passes(self, src: Place, dst: Place) -> bool:
        """Whether this one message arrives."""

    def latency_s(self, a: Place, b: Place) -> float:
        """One way, in seconds."""

    def pull(self, dst: End, src_name: str, what: str, num_bytes: float, done: Callable[[Any], None]) -> None:
        """Transfer `what` from a peer; `done(payload)`, None if it did not come."""

    def reached(self, peer: Transfers, moment: Moment) -> None:
        """A peer is there: where a fault may have been declared."""


class Transfers:
    """The part of a volunteer that obtains what a roster names; the rest of it is in `volunteer.py`."""

    world: Carrier
    name: str
    link: Link
    alive: bool
    settings: Settings
    membership: Membership
    phase: Phase
    round: int
    _now: RoundState
    _wake: Timer | None

    def __init__(self) -> None:
        self._store: dict[str, int] = {}
        self._shares: dict[str, set[int]] = {}

    @property
    def running(self) -> bool:
        """Neither gone nor frozen."""
        raise NotImplementedError

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Run something in this process."""
        raise NotImplementedError

    def _later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        raise NotImplementedError

    def _evaluate(self) -> None:
        raise NotImplementedError

    def _advance(self, roster: Roster) -> None:
        raise NotImplementedError

    def _state(self) -> State:
        raise NotImplementedError

    def provide(self, what: str) -> Any:
        """The bytes named `what`, for a pull; None if they are not here."""
        if what == "state":
            if self.phase is Phase.JOINING:
                return None
            return self._state()
        return what if self._holds(what.split(" ")[0], what) else None

    def _holds(self, snapshot: str, part: str) -> bool:
        return snapshot in self._store or part in self._store

    def _pull_from(self, sources: Iterable[str], what: str, num_bytes: float, done: Callable[[Any], None]) -> None:
        """Try one source after the other; `done(None)` when none has it."""
        left = [source for source in dict.fromkeys(sources) if source != self.name]

        def next_source(payload: Any) -> None:
            while left and self.membership.state(left[0]) is not PeerState.LIVE:
                left.pop(0)
            if payload is not None or not left:
                done(payload)
            else:
                self.world.pull(self, left.pop(0), what, num_bytes, next_source)

        next_source(None)

    def _sources(self, first: Iterable[str]) -> list[str]:
        """Who may have a publication's bytes: those of whom it is likely, then whoever lives."""
        return [*first, *(info.peer for info in self.membership.volunteers())][: 2 + self.settings.share_above]

    def _pull_whole(self, offer: Publication, signer: str | None = None) -> None:
        r = self._now
        if offer.snapshot in r.pulling or offer.snapshot in self._store:
            return
        r.pulling.add(offer.snapshot)

        def done(payload: Any) -> None:
            if payload is not None:
                self._store[offer.snapshot] = self.round
            if r is self._now:
                r.pulling.discard(offer.snapshot)
                if payload is None:
                    r.unobtainable.add(offer.peer)
                self._evaluate()

        sources = self._sources([offer.peer, *([] if signer is None else [signer])])
        self._pull_from(sources, offer.snapshot, self.settings.publication_bytes, done)

    def _apply(self, roster: Roster) -> None:
        r, now = self._now, self.world.clock.now
        if r.applying != roster.digest:
            r.applying, r.roster_at_s, r.own_share_at_s = roster.digest, now, math.inf
            r.shares_pulling.clear()
            r.averaging.clear()
        if len(roster.entries) > self.settings.share_above:
            self._apply_shares(roster)
            return
        lacking = [offer for offer in roster.entries if offer.snapshot not in self._store]
        for offer in lacking:
            self._pull_whole(offer, roster.signer)
        if not lacking:
            self._advance(roster)

    def _apply_shares(self, roster: Roster) -> None:
        """The own share from every entry, the others' from their owners, or from the entries when overdue."""
        r, now, owners = self._now, self.world.clock.now, roster.peers
        own = owners.index(self.name) if self.name in owners else None
        have = self._shares.setdefault(roster.digest, set())
        if own is None or own in have:
            r.own_share_at_s = min(r.own_share_at_s, now)
        elif own not in have:
            self._average_share(roster, own)
        lacking = set(range(len(owners))) - have
        if not lacking:
            self._advance(roster)
            return
        overdue = now >= share_due_s(r.roster_at_s, r.own_share_at_s, self.settings.silence_s)
        ready: list[int] = []
        for i in sorted(lacking - r.shares_pulling - {own}):
            owner = self.world.peers[owners[i]]
            if i in owner._shares.get(roster.digest, ()) and owner.running and self.world.connected(self, owner):
                ready.append(i)
            elif overdue or not owner.alive or self.membership.state(owners[i]) is not PeerState.LIVE:
                self._average_share(roster, i)
        if ready:
            self._pull_shares(roster, ready)
        if self._wake is None or not self._wake.pending:
            self._wake = self._later(self.settings.retry_s, self._evaluate)

    def _pull_shares(self, roster: Roster, ready: list[int]) -> None:
        """Pull many shares side by side; one event for all of them."""
        r, num_bytes = self._now, self.settings.publication_bytes / len(roster.entries)
        r.shares_pulling.update(ready)
        latency_s = max(self.world.latency_s(self, self.world.peers[roster.peers[i]]) for i in ready)

        def done() -> None:
            for i in ready:
                owner = self.world.peers[roster.peers[i]]
                if owner.running and self.world.passes(owner, self):
                    self._shares[roster.digest].add(i)
            if r is self._now:
                r.shares_pulling.difference_update(ready)
                self._evaluate()

        self._later(2 * latency_s + len(ready) * num_bytes / self.link.bytes_per_s, done)

    def _average_share(self, roster: Roster, index: int) -> None:
        """Get one share's part of every entry, and average them."""
        r, num_parts = self._now, len(roster.entries)
        if index in r.averaging:
            return
        r.averaging.add(index)
        num_bytes = self.settings.publication_bytes / num_parts
        open_parts = {offer.peer for offer in roster.entries}

        def got(offer: Publication, payload: Any) -> None:
            if payload is None and r is self._now:
                r.unobtainable.add(offer.peer)
            elif payload is not None:
                self._store[parts[offer.peer]] = self.round
                open_parts.discard(offer.peer)
            waiting.discard(offer.peer)
            if not waiting:
                finish()

        def finish() -> None:
            if r is not self._now:
                return
            r.averaging.discard(index)
            if not open_parts:
                self._shares[roster.digest].add(index)
                if self.name in roster.peers and index == roster.peers.index(self.name):
                    r.own_share_at_s = self.world.clock.now
            self._evaluate()

        # The parts that are there for the asking come in one event; the others are looked for one by one.
        parts = {offer.peer: f"{offer.snapshot} {index}/{num_parts}" for offer in roster.entries}
        waiting = {offer.peer for offer in roster.entries if not self._holds(offer.snapshot, parts[offer.peer])}
        open_parts &= waiting
        easy = [offer for offer in roster.entries if offer.peer in waiting and self._reaches(offer, parts[offer.peer])]

        def easy_done() -> None:
            for offer in easy:
                ok = self._reaches(offer, parts[offer.peer])
                got(offer, offer.snapshot) if ok else look(offer)

        def look(offer: Publication) -> None:
            sources = self._sources([offer.peer, roster.peers[index], roster.signer])
            self._pull_from(sources, parts[offer.peer], num_bytes, lambda payload: got(offer, payload))

        if not waiting:
            self.world.clock.call_later(0.0, self.deliver, finish)
        if easy:
            self._later(4 * self.link.latency_s + len(easy) * num_bytes / self.link.bytes_per_s, easy_done)
        for offer in easy:
            self.world.reached(self.world.peers[offer.peer], "serving")
        come_easily = {offer.peer for offer in easy}
        for offer in [o for o in roster.entries if o.peer in waiting and o.peer not in come_easily]:
            look(offer)

    def _reaches(self, offer: Publication, part: str) -> bool:
        author = self.world.peers[offer.peer]
        return author.running and self.world.passes(author, self) and author._holds(offer.snapshot, part)
