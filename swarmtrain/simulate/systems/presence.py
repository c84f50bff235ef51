"""How a simulated volunteer of synchronous rounds learns which peers are here, and announces itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.systems.messages import Settings
from swarmtrain.simulate.systems.network import End, NetworkPlace, SimulatedMachine


class Directory(Protocol):
    """Carrier of presence: the DHT, which loses nothing within a partition, and messages."""

    clock: Clock
    presences: list[tuple[PeerInfo, float, int]]
    """Records stored in the DHT: (record, time of expiry, side of the partition)."""

    @property
    def peers(self) -> Mapping[str, Known]:
        """All peers by name, this one included."""

    def side(self, peer: NetworkPlace) -> int:
        """Return which side of the partition a peer is on; 0 without a partition."""

    def tell(self, src: End, dst: SimulatedMachine, call: Callable[..., object], *args: Any) -> None:
        """Send a message that has no answer."""


class Known(SimulatedMachine, Protocol):
    """Simulated peer, as its presence and other peers see it."""

    settings: Settings
    membership: Membership
    presence: SimulatedPresence

    def info(self) -> PeerInfo:
        """Return the peer's presence record."""

    def later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run a call in this process after `delay_s` seconds."""

    def tell(self, event: ev.Event[None, None]) -> None:
        """Pass an event to the engine."""


class SimulatedPresence:
    """Presence of one peer: what it announces, and what it reads of others."""

    def __init__(self, owner: Known, world: Directory) -> None:
        self._owner, self._world, self._settings = owner, world, owner.settings
        self._membership = owner.membership
        self._num_read = 0

    def read(self) -> None:
        """Read the DHT's new records."""
        now, side = self._world.clock.now, self._world.side(self._owner)
        news = self._world.presences[self._num_read :]
        self._num_read = len(self._world.presences)
        for info, expires_s, their_side in news:
            if (side == their_side or 0 in (side, their_side)) and expires_s >= now:
                self._membership.saw_presence(info, expires_s, now)
        self._membership.expire(now)

    def announce(self) -> None:
        """Announce this peer in the DHT and to everyone it knows; keep renewing the record and reading."""
        self._renew()
        self._owner.later(self._settings.read_presence_s, self._read_on)
        for info in self._membership.live():
            other = self._world.peers[info.peer]
            self._world.tell(self._owner, other, other.presence.heard_hello, self._owner.info())

    def say_goodbye(self) -> None:
        """Say goodbye to every peer that it knows."""
        for info in self._membership.live():
            other = self._world.peers[info.peer]
            self._world.tell(self._owner, other, other.presence.heard_goodbye, self._owner.info())

    def heard_hello(self, info: PeerInfo) -> None:
        """Record the presence of a peer that has just joined."""
        now = self._world.clock.now
        self._membership.saw_presence(info, now + self._settings.presence_ttl_s, now)
        self._owner.tell(ev.MembersChanged())

    def heard_goodbye(self, info: PeerInfo) -> None:
        """Record the goodbye of a peer."""
        self._membership.left(info.peer, self._world.clock.now)
        self._owner.tell(ev.MembersChanged())

    def _renew(self) -> None:
        expires_s = self._world.clock.now + self._settings.presence_ttl_s
        self._world.presences.append((self._owner.info(), expires_s, self._world.side(self._owner)))
        self._owner.later(self._settings.presence_ttl_s / 3, self._renew)

    def _read_on(self) -> None:
        self.read()
        self._owner.later(self._settings.read_presence_s, self._read_on)
        self._owner.tell(ev.MembersChanged())
