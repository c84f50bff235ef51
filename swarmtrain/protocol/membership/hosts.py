"""Hidden peers, which nobody can dial: how a peer finds out that it is one, and how hosts serve its publications.

A peer behind a router that lets nothing in *can* be called over a connection that it opened itself. So it keeps
connections to two hosts, which are peers that can be dialled; they pull its publications and serve them to others. A
peer asks others to dial it to find out whether it is hidden. It chooses its hosts by itself among those with the fewest
guests, spread by a hash (decision 19).

Everything here is pure: `now` and the random generator are arguments, and every answer carries its reason.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from swarmtrain.protocol.gossip.partners import BackOff
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.words import counted

MAX_HOSTS = 4
"""Limit of hosts in a presence record."""

MAX_GUESTS = 8
"""Limit of hidden peers that a host serves."""

NUM_ASKED = 3
"""Peers that are asked to dial this one, each time."""

_NUM_HOSTS = 2
"""Hosts that a hidden peer keeps."""
_HOST_MEMORY_BYTES = 2 * 1024**3
"""Memory in bytes that a host uses for its guests' publications."""
KEPT_OF_A_GUEST = 2
"""Publications that a host keeps of each guest."""


class Reach(Enum):
    """Result of asking others to dial this peer."""

    UNKNOWN = "not known yet"
    DIALABLE = "others can dial it"
    HIDDEN = "nobody can dial it"


@dataclass
class Reachability:
    """Decides whether this peer is hidden, from the results of the peers that it asked to dial it, and when to ask
    again.

    One peer that reached it is enough to be dialable. Two that tried in vain, at once or one after the other, make it
    hidden; four are needed if others could dial it before, so that one lost packet changes nothing. On a busy machine
    two attempts may fail by chance: a peer that has just become hidden asks again soon, then after twice as long, and
    so on.
    """

    again_s: float = 5.0
    """Seconds until it asks again if the answers decided nothing."""
    hidden_first_s: float = 15.0
    hidden_every_s: float = 180.0
    dialable_every_s: float = 600.0
    state: Reach = Reach.UNKNOWN
    _misses: int = 0
    _hidden_times: int = 0
    _due_s: float = 0.0

    def is_due(self, now: float) -> bool:
        """Return whether it is time to ask peers to dial this one."""
        return now >= self._due_s

    def told(self, answers: Sequence[bool | None], now: float, rng: random.Random) -> str:
        """Record the answers: reached (True), not reached (False), or unknown (None). Return the consequence in words,
        for the log."""
        tried, reached = [answer for answer in answers if answer is not None], any(answers)
        wait_s = self.again_s
        if reached:
            self.state, self._misses, self._hidden_times = Reach.DIALABLE, 0, 0
            wait_s = self.dialable_every_s
            reason = f"{sum(map(bool, tried))} of {len(tried)} could dial this peer"
        elif not tried:
            reason = "nobody could say whether this peer can be dialled"
        else:
            self._misses += len(tried)
            reason = f"{self._misses} tried and failed to dial this peer"
            if self._misses >= {Reach.UNKNOWN: 2, Reach.DIALABLE: 4, Reach.HIDDEN: 0}[self.state]:
                self.state, self._misses = Reach.HIDDEN, 0
                wait_s = min(self.hidden_first_s * 2.0**self._hidden_times, self.hidden_every_s)
                self._hidden_times = min(self._hidden_times + 1, 32)
        self._due_s = now + wait_s * (0.8 + 0.4 * rng.random())
        return f"{self.state.value}: {reason}"


def from_outside(answers: Sequence[tuple[bool | None, bool]]) -> list[bool | None]:
    """Return the answers of the peers on the internet (second item True); all answers if none of those could say.

    A neighbour behind the same router reaches a peer that nobody else can dial.
    """
    outside = [answer for answer, is_outside in answers if is_outside and answer is not None]
    return list(outside) or [answer for answer, _ in answers]


# ---------------------------------------------------------------- the hidden peer


@dataclass(frozen=True, kw_only=True)
class HostCandidate:
    """Live peer that can be dialled, and the number of peers that name it as their host."""

    peer: str
    num_guests: int = 0


def host_candidates(live: Iterable[PeerInfo]) -> list[HostCandidate]:
    """Return the live peers that can be hosts, with their guests as advertised."""
    infos = list(live)
    guests = Counter(host for info in infos if info.hidden for host in info.hosts)
    return [
        HostCandidate(peer=info.peer, num_guests=guests[info.peer])
        for info in infos
        if info.addresses and not info.hidden
    ]


def callable_first(infos: Iterable[PeerInfo]) -> list[PeerInfo]:
    """Return the peers that anybody can call; all if there are none."""
    everyone = list(infos)
    return [info for info in everyone if not info.hidden] or everyone


@dataclass
class _Host:
    """Host of this peer, and the time of its last answer."""

    since_s: float
    answered_s: float
    hosting: bool = False


@dataclass
class HostChoice:
    """Hosts of a hidden peer.

    A host that is silent for `replace_after_s` is replaced. One that has no place or was silent is left alone for a
    while, longer each time, unless there is nobody else: a peer whose other host dies must not wait.
    """

    me: str
    number: int = _NUM_HOSTS
    replace_after_s: float = 10.0
    back_off: BackOff = field(default_factory=lambda: BackOff(busy_s=10.0, first_s=15.0, most_s=120.0))
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Peers to keep a connection to."""
        return tuple(self._hosts)

    @property
    def serving(self) -> tuple[str, ...]:
        """Hosts that have confirmed that they serve this peer's publications."""
        return tuple(peer for peer, host in self._hosts.items() if host.hosting)

    def answered(self, peer: str, hosting: bool, now: float) -> str:
        """Record whether a host serves this peer. Return the consequence in words, for the log."""
        host = self._hosts.get(peer)
        if host is None:
            return "it is no host of this peer any more"
        if not hosting:
            return self._drop(peer, "it has no place for one more", now)
        host.answered_s, host.hosting = now, True
        self.back_off.answered(peer)
        return "it serves this peer's publications on"

    def choose(self, candidates: Iterable[HostCandidate], now: float) -> list[str]:
        """Drop and add hosts. `candidates` are the live peers that can be dialled. Return the changes with their
        reasons."""
        among = {one.peer: one for one in candidates if one.peer != self.me}
        changes = []
        for peer, host in list(self._hosts.items()):
            silent_s = now - host.answered_s
            if silent_s >= self.replace_after_s:
                changes.append(f"{peer} is replaced: {self._drop(peer, f'silent for {silent_s:.0f} s', now)}")
            # A host that serves this peer stays, whatever the records say: its answers show that it is there.
            elif peer not in among and not host.hosting:
                changes.append(f"{peer} is replaced: {self._drop(peer, 'it is gone, or cannot be dialled', now)}")
        places = [one for one in among.values() if one.peer not in self._hosts and one.num_guests < MAX_GUESTS]
        ready, _ = self.back_off.ready([one.peer for one in places], now)
        free = [one for one in places if one.peer in ready]
        free.sort(key=lambda one: (one.num_guests, self._hash(one.peer)))
        for one in free[: max(0, self.number - len(self._hosts))]:
            self._hosts[one.peer] = _Host(now, now)
            changes.append(f"{one.peer} is asked to be a host: it serves {counted(one.num_guests, 'hidden peer')}")
        return changes

    def clear(self) -> None:
        """Drop all hosts: this peer can be dialled now."""
        self._hosts.clear()

    def _drop(self, peer: str, reason: str, now: float) -> str:
        del self._hosts[peer]
        return self.back_off.failed(peer, now, reason)

    def _hash(self, peer: str) -> bytes:
        return hashlib.sha256(f"{self.me} {peer}".encode()).digest()


# ---------------------------------------------------------------- the host


def most_guests(publication_bytes: int) -> int:
    """Return how many guests a host can have by its memory: it keeps the last two publications of each."""
    return max(1, min(MAX_GUESTS, _HOST_MEMORY_BYTES // max(1, KEPT_OF_A_GUEST * publication_bytes)))


@dataclass
class Guests:
    """Hidden peers that a host serves: first come, first served. A guest that is silent for `silent_s` has gone."""

    most: int = MAX_GUESTS
    silent_s: float = 30.0
    _heard_s: dict[str, float] = field(default_factory=dict)

    def ask(self, peer: str, now: float) -> tuple[bool, str]:
        """Decide whether `peer`, which asks now, is a guest from now on. Return (True if so, reason)."""
        here = self.current(now)
        if peer not in here and len(here) >= self.most:
            return False, f"{len(here)} hidden peers are served already"
        for gone in self._heard_s.keys() - set(here):
            del self._heard_s[gone]
        self._heard_s[peer] = now
        return True, "it was hosted before" if peer in here else f"{self.most - len(here)} places were free"

    def left(self, peer: str) -> None:
        """Remove a guest that said goodbye."""
        self._heard_s.pop(peer, None)

    def current(self, now: float) -> tuple[str, ...]:
        """Return the PeerIDs of the present guests."""
        here = {peer: heard_s for peer, heard_s in dict(self._heard_s).items() if now < heard_s + self.silent_s}
        return tuple(here)


@dataclass
class HostOrder:
    """Order in which a reader asks a hidden peer's hosts. A host that fails is left alone for a while."""

    me: str
    rng: random.Random = field(default_factory=random.Random)
    back_off: BackOff = field(default_factory=lambda: BackOff(first_s=5.0, most_s=60.0))

    def of(self, hosts: Sequence[str], now: float) -> list[str]:
        """Return the hosts without this peer itself, in random order, those that failed recently last."""
        others = [host for host in hosts if host != self.me]
        ready, _ = self.back_off.ready(others, now)
        return sorted(self.rng.sample(others, len(others)), key=lambda host: host not in ready)
