"""A simulated gossip swarm with hidden peers, which nobody can dial: their publications go through hosts.

The peers run the product's own decisions: which peers are hidden, which hosts a peer chooses and replaces, which guests
a host takes. A hidden peer opens connections to its hosts alone. Whoever else wants its publication asks one of these
hosts, which pulls it first if it does not have it. A hidden peer learns from presences which hosts there are and whom
it may ask to dial it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from swarmtrain.protocol.gossip.messages import FindRoute, RouteFound
from swarmtrain.protocol.membership.hosts import (
    KEPT_OF_A_GUEST,
    NUM_ASKED,
    Guests,
    HostChoice,
    Reach,
    Reachability,
    host_candidates,
)
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.simulate.systems.gossip import AWAY, NOTHING, GossipPeer, GossipSwarm
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.publications import (
    OfGuest,
    PublicationQuery,
    SimulatedGossipSettings,
    SimulatedPublication,
)

_POLL_INTERVAL_S = 5.0


class HostedPeer(GossipPeer):
    """Volunteer that may be hidden; if it is not, it can be a host."""

    def __init__(self, swarm: HostedSwarm, name: str, speed: float, theta: float, link: SimulatedLink) -> None:
        self.hosted = swarm
        self.reachability, self.choice, self.guests = Reachability(), HostChoice(me=name), Guests()
        self.most_guests = 0
        self._kept: dict[tuple[str, PublicationQuery], list[SimulatedPublication]] = {}
        self._chance = random.Random(f"hosts {swarm.seed} {name}")
        super().__init__(swarm, name, speed, theta, link)
        swarm.clock.call_later(1.0 + self._chance.random(), self.deliver, self._look)

    # ------------------------------------------------------------------ the hidden peer

    def _look(self) -> None:
        """Ask to be dialled if that is due, and call the hosts, as real peers do every few seconds."""
        now, swarm = self.swarm.clock.now, self.hosted
        hidden = self.reachability.state is Reach.HIDDEN
        due = self.reachability.is_due(now)
        candidates = host_candidates(self.membership.live()) if hidden or due else []
        if due:
            asked = self._chance.sample(candidates, min(NUM_ASKED, len(candidates)))
            dialable = not swarm.is_hidden(self.name)  # those asked dial as strangers: a host's connection says nothing
            answers = [dialable if swarm.peers[one.peer].running else None for one in asked]
            self.reachability.told(answers, now, self._chance)
        if self.reachability.state is Reach.HIDDEN:
            self.choice.choose(candidates, now)
            for host in self.choice.chosen:
                if swarm.peers[host].running:
                    self.choice.answered(host, swarm.peers[host].take_guest(self.name), now)
            if self.name in swarm.board:
                self._announce(now)
        else:
            self.choice.clear()
        swarm.clock.call_later(_POLL_INTERVAL_S, self.deliver, self._look)

    def _describe(self, info: PeerInfo) -> PeerInfo:
        hidden = self.reachability.state is Reach.HIDDEN
        addresses = () if hidden else (self.name,)
        return dataclasses.replace(info, hidden=hidden, hosts=self.choice.serving, addresses=addresses)

    # ------------------------------------------------------------------ the host

    def take_guest(self, peer: str) -> bool:
        """Decide whether to serve `peer` as a guest from now on; return True if so."""
        now = self.swarm.clock.now
        is_guest, _ = self.guests.ask(peer, now)
        self.most_guests = max(self.most_guests, len(self.guests.current(now)))
        return is_guest

    def provide(self, what: Any) -> Any:
        """Return one of this peer's own publications, or a guest's."""
        if not isinstance(what, OfGuest):
            return super().provide(what)
        author, asked = what
        if author not in self.guests.current(self.swarm.clock.now):
            return AWAY
        if isinstance(asked, SimulatedPublication):
            kept = self._kept.get((author, PublicationQuery(asked.group, asked.fragment)), ())
            return asked if asked in kept else None
        kept = self._kept.setdefault((author, asked), [])
        if self.is_missing(author, asked):
            kept.append(self.hosted.peers[author].provide(asked))
            del kept[:-KEPT_OF_A_GUEST]
        return kept[-1] if kept else NOTHING

    def is_missing(self, author: str, asked: PublicationQuery) -> bool:
        """Return whether the guest `author` may have a publication that this host does not have yet."""
        guest, kept = self.hosted.peers[author], self._kept.get((author, asked))
        newest = guest.provide(asked) if guest.running else None
        return isinstance(newest, SimulatedPublication) and not (kept and kept[-1].version == newest.version)

    # ------------------------------------------------------------------ the reader

    def _route(self, route: FindRoute) -> None:
        self._tell(RouteFound(route.pull, self.name in self.hosted.peers[route.peer].choice.chosen))

    def _fetch(
        self, source: str, author: str, what: PublicationQuery | SimulatedPublication, done: Callable[[Any], None]
    ) -> None:
        through = self.hosted.peers[source]
        if source == author:
            if not self.hosted.can_call(self.name, through):  # one that has not found out yet
                self.swarm.clock.call_later(self.settings.stall_limit_s, self.deliver, done, None)
                return
        elif isinstance(what, PublicationQuery) and through.running and through.is_missing(author, what):
            size_bytes = self.settings.group_bytes(what.group)
            self.hosted.peers[author].bytes_up += size_bytes
            self._pull(source, author, what, size_bytes, done)  # the host pulls it first
            return
        super()._fetch(source, author, what, done)


class HostedSwarm(GossipSwarm):
    """Gossip swarm with some machines that nobody can dial."""

    def __init__(
        self,
        hidden: Callable[[str], bool],
        settings: SimulatedGossipSettings | None = None,
        *,
        link: SimulatedLink | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(settings, link=link, seed=seed)
        self.is_hidden = hidden
        self.peers: dict[str, HostedPeer] = {}  # type: ignore[assignment]

    def _make(self, name: str, steps_per_s: float, theta: float, link: SimulatedLink) -> HostedPeer:
        return HostedPeer(self, name, steps_per_s, theta, link)

    def can_call(self, caller: str, peer: HostedPeer) -> bool:
        """Return whether `caller` reaches `peer`: it can be dialled, or has opened a connection to the caller."""
        return not self.is_hidden(peer.name) or caller in peer.choice.chosen
