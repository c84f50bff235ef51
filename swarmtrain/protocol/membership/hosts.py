"""Peers that nobody can dial: who is one, through which hosts its publications are had, and whom a host serves.

A peer behind a router that lets nothing in *can* be called over a connection that it opened itself. So it keeps
connections to two hosts, peers that can be dialled; they pull its publications and serve them on. It asks others to
dial it to find out, and chooses its hosts by itself among those with the fewest guests, spread by a hash.

Pure: `now` and the random numbers are arguments, every answer carries its reason.
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

__all__ = [
    "KEPT_OF_A_GUEST",
    "MAX_GUESTS",
    "MAX_HOSTS",
    "NUM_ASKED",
    "Guests",
    "HostCandidate",
    "HostChoice",
    "HostOrder",
    "Reach",
    "Reachability",
    "callable_first",
    "from_outside",
    "host_candidates",
    "most_guests",
]

MAX_HOSTS = 4
"""A presence names at most so many."""

MAX_GUESTS = 8
"""A host serves the publications of at most so many."""

NUM_ASKED = 3
"""So many others are asked to dial, each time."""

_NUM_HOSTS = 2
_HOST_MEMORY_BYTES = 2 * 1024**3
KEPT_OF_A_GUEST = 2


class Reach(Enum):
    """What a peer believes of itself."""

    UNKNOWN = "not known yet"
    DIALABLE = "others can dial it"
    HIDDEN = "nobody can dial it"


@dataclass
class Reachability:
    """Whether this peer is hidden, from what those say whom it asked to dial it; and when to ask again.

    One who reached it is enough to be dialable. It takes two who tried in vain to be hidden, at one time or one after
    the other; twice that for one that others could dial, so that a single lost packet moves nobody. On a busy machine
    two may fail by chance: who has just become hidden asks again soon, then after twice as long, and so on.
    """

    again_s: float = 5.0
    """After an answer that needs another, or none."""
    hidden_first_s: float = 15.0
    hidden_every_s: float = 180.0
    dialable_every_s: float = 600.0
    state: Reach = Reach.UNKNOWN
    _misses: int = 0
    _hidden_times: int = 0
    _due_s: float = 0.0

    def is_due(self, now: float) -> bool:
        """Whether to ask now."""
        return now >= self._due_s

    def told(self, answers: Sequence[bool | None], now: float, rng: random.Random) -> str:
        """What those who were asked said: reached, not reached, or nothing (None). Returns what follows, in words."""
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
    """What those said whose second item says that they are on the internet; what all said if none of those could say.

    A neighbour behind the same router reaches a peer that nobody else can dial."""
    outside = [answer for answer, is_outside in answers if is_outside and answer is not None]
    return list(outside) or [answer for answer, _ in answers]


# ---------------------------------------------------------------- the hidden peer


@dataclass(frozen=True, kw_only=True)
class HostCandidate:
    """A live peer that can be dialled, and how many name it as their host."""

    peer: str
    num_guests: int = 0


def host_candidates(live: Iterable[PeerInfo]) -> list[HostCandidate]:
    """Those among the live peers that can be hosts, with their guests as announced."""
    infos = list(live)
    guests = Counter(host for info in infos if info.hidden for host in info.hosts)
    return [
        HostCandidate(peer=info.peer, num_guests=guests[info.peer])
        for info in infos
        if info.addresses and not info.hidden
    ]


def callable_first(infos: Iterable[PeerInfo]) -> list[PeerInfo]:
    """Those that anybody can call; everyone if there are none."""
    everyone = list(infos)
    return [info for info in everyone if not info.hidden] or everyone


@dataclass
class _Host:
    since_s: float
    answered_s: float
    hosting: bool = False


@dataclass
class HostChoice:
    """The hosts of a hidden peer. One that has been silent for `replace_after_s` is replaced; one that has no place or
    was silent is left alone for a while, the longer the more often, unless there is nobody else: a peer whose other
    host dies has no time to lose."""

    me: str
    number: int = _NUM_HOSTS
    replace_after_s: float = 10.0
    back_off: BackOff = field(default_factory=lambda: BackOff(busy_s=10.0, first_s=15.0, most_s=120.0))
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Whom to keep a connection to."""
        return tuple(self._hosts)

    @property
    def serving(self) -> tuple[str, ...]:
        """Those of them that have said that they serve this peer's publications on."""
        return tuple(peer for peer, host in self._hosts.items() if host.hosting)

    def answered(self, peer: str, hosting: bool, now: float) -> str:
        """A host answered, and serves this peer or does not. Returns what follows, in words."""
        host = self._hosts.get(peer)
        if host is None:
            return "it is no host of this peer any more"
        if not hosting:
            return self._drop(peer, "it has no place for one more", now)
        host.answered_s, host.hosting = now, True
        self.back_off.answered(peer)
        return "it serves this peer's publications on"

    def choose(self, candidates: Iterable[HostCandidate], now: float) -> list[str]:
        """Look at the hosts again; `candidates` are the live peers that can be dialled. Returns what changed, each with
        its reason."""
        among = {one.peer: one for one in candidates if one.peer != self.me}
        changes = []
        for peer, host in list(self._hosts.items()):
            silent_s = now - host.answered_s
            if silent_s >= self.replace_after_s:
                changes.append(f"{peer} is replaced: {self._drop(peer, f'silent for {silent_s:.0f} s', now)}")
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
        """This peer can be dialled now: it needs no hosts."""
        self._hosts.clear()

    def _drop(self, peer: str, reason: str, now: float) -> str:
        del self._hosts[peer]
        return self.back_off.failed(peer, now, reason)

    def _hash(self, peer: str) -> bytes:
        return hashlib.sha256(f"{self.me} {peer}".encode()).digest()


# ---------------------------------------------------------------- the host


def most_guests(publication_bytes: int) -> int:
    """How many a host can have at most, given what a publication takes of its memory: the last two of each are kept."""
    return max(1, min(MAX_GUESTS, _HOST_MEMORY_BYTES // max(1, KEPT_OF_A_GUEST * publication_bytes)))


@dataclass
class Guests:
    """Whom a host serves: first come, first served, and whoever is silent for `silent_s` has gone."""

    most: int = MAX_GUESTS
    silent_s: float = 30.0
    _heard_s: dict[str, float] = field(default_factory=dict)

    def ask(self, peer: str, now: float) -> tuple[bool, str]:
        """Whether `peer`, which asks now, is a guest from here on; with the reason."""
        here = self.current(now)
        if peer not in here and len(here) >= self.most:
            return False, f"{len(here)} hidden peers are served already"
        for gone in self._heard_s.keys() - set(here):
            del self._heard_s[gone]
        self._heard_s[peer] = now
        return True, "it was hosted before" if peer in here else f"{self.most - len(here)} places were free"

    def left(self, peer: str) -> None:
        """It said goodbye."""
        self._heard_s.pop(peer, None)

    def current(self, now: float) -> tuple[str, ...]:
        """The guests."""
        here = {peer: heard_s for peer, heard_s in dict(self._heard_s).items() if now < heard_s + self.silent_s}
        return tuple(here)


@dataclass
class HostOrder:
    """The reader's part: whom of a hidden peer's hosts to ask first. One that fails is left alone for a while."""

    me: str
    rng: random.Random = field(default_factory=random.Random)
    back_off: BackOff = field(default_factory=lambda: BackOff(first_s=5.0, most_s=60.0))

    def of(self, hosts: Sequence[str], now: float) -> list[str]:
        """The others of them, by lot, those that have just failed last."""
        others = [host for host in hosts if host != self.me]
        ready, _ = self.back_off.ready(others, now)
        return sorted(self.rng.sample(others, len(others)), key=lambda host: host not in ready)
