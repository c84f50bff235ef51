"""Budgets: what other peers may make this one do. Calls, readers, accusations, and addresses that it dials.

A stranger must not make the swarm knock at other machines' doors, nor learn what is behind a peer's router. So a peer
dials only the address that the question itself came from, at a few ports, a few times a minute (decision 10).
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

MAX_PORTS = 4
"""Ports that are dialled at each address."""
_MAX_HOSTS = 2
"""Addresses that are dialled for one question."""
_WINDOW_S = 60.0
"""Seconds over which dials are counted."""
_IPV4_BEHIND = tuple(
    (ipaddress.IPv6Network(network), shift)
    for network, shift in (
        ("::/96", 0),  # IPv4-compatible, of long ago
        ("::ffff:0:0/96", 0),  # IPv4-mapped
        ("::ffff:0:0:0/96", 0),  # IPv4-translated
        ("64:ff9b::/96", 0),  # NAT64
        ("64:ff9b:1::/48", 0),  # NAT64 of a network's own
        ("2002::/16", 80),  # 6to4
        ("2001::/32", 64),  # Teredo: its server; the other end of the tunnel is beside it
    )
)
"""IPv6 networks whose packets go to an IPv4 address within the address, and that address's distance from the right in
bits."""
_TEREDO = ipaddress.IPv6Network("2001::/32")
_ISATAP = (0x00005EFE, 0x02005EFE)
"""Bits 32 to 63 of an ISATAP address, which ends with an IPv4 address."""
_METADATA = frozenset(
    ipaddress.ip_address(host) for host in ("100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")
)
"""Metadata services of cloud machines that are not link-local, as 169.254.169.254 is; no peer has such an address."""


def dial_targets(seen: Iterable[str], ports: Sequence[int]) -> tuple[str, ...]:
    """Return the multiaddresses to dial for a peer whose connections come from `seen`; empty if there are none."""
    hosts: dict[str, None] = {}
    for address in seen:
        match = re.fullmatch(r"/(ip[46])/([0-9A-Fa-f:.]+)/tcp/[0-9]{1,5}", address)
        if match is not None and may_be_dialled(match[2]):
            hosts[f"/{match[1]}/{match[2]}"] = None
    good = [port for port in dict.fromkeys(ports) if 0 < port < 65536][:MAX_PORTS]
    return tuple(f"{host}/tcp/{port}" for host in list(hosts)[:_MAX_HOSTS] for port in good)


def may_be_dialled(host: str) -> bool:
    """Return whether `host` is the IP address of a single host: no multicast, unspecified, broadcast, link-local or
    metadata address, in whatever form.

    An IPv4 address within an IPv6 one is checked too.
    """
    if "%" in host:  # a zone names an interface of this machine, which no stranger may choose
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return all(map(_is_a_hosts, (address, *_within(address))))


def _is_a_hosts(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address in _METADATA or address == ipaddress.IPv4Address(2**32 - 1):
        return False
    return not (address.is_multicast or address.is_unspecified or address.is_link_local)


def _within(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """Yield the IPv4 addresses to which packets for this address may finally go."""
    if address.version == 4 or address.is_loopback:  # ::1 is in ::/96
        return
    number = int(address)
    for network, shift in _IPV4_BEHIND:
        if address in network:
            yield ipaddress.IPv4Address(number >> shift & 0xFFFFFFFF)
    if address in _TEREDO:
        yield ipaddress.IPv4Address(~number & 0xFFFFFFFF)
    if number >> 32 & 0xFFFFFFFF in _ISATAP:
        yield ipaddress.IPv4Address(number & 0xFFFFFFFF)


def may_dial(address: str) -> bool:
    """Return whether a multiaddress from a stranger is TCP at an IP address that may be dialled.

    Names are refused: looking one up tells its owner who asks, and the address behind it may change after any check.
    """
    match = re.fullmatch(r"/ip([46])/([^/]+)/tcp/([1-9][0-9]{0,4})", address)
    if match is None or int(match[3]) > 65535 or not may_be_dialled(match[2]):
        return False
    return ipaddress.ip_address(match[2]).version == int(match[1])


def is_public(address: str) -> bool:
    """Return whether a multiaddress is on the internet, not in a local network or a provider's own."""
    match = re.match(r"/ip[46]/([^/]+)", address)
    try:
        return match is not None and ipaddress.ip_address(match[1]).is_global
    except ValueError:
        return False


@dataclass
class DialBudget:
    """Limit of dials a minute, for each network that asks and in total."""

    per_host: int = 6
    in_all: int = 30
    _granted: deque[tuple[float, str]] = field(default_factory=deque)

    def admit(self, targets: Sequence[str], now: float) -> bool:
        """Return whether these targets may be dialled now; if so, count them."""
        while self._granted and self._granted[0][0] <= now - _WINDOW_S:
            self._granted.popleft()
        hosts = {_network_of(target) for target in targets}
        counts = [sum(granted == host for _, granted in self._granted) for host in hosts]
        if len(self._granted) + len(hosts) > self.in_all or any(count >= self.per_host for count in counts):
            return False
        self._granted.extend((now, host) for host in sorted(hosts))
        return True


def _network_of(target: str) -> str:
    """Return what counts as one asker: an IPv4 address, or a /64 of IPv6, the smallest network that one owner has."""
    host = ipaddress.ip_address(target.split("/")[2])
    return str(host if host.version == 4 else ipaddress.ip_network((host, 64), strict=False))


_MAX_CALLERS = 4096
_FORGET_AFTER_S = 600.0
"""Seconds after which a caller is forgotten. Its whole burst has long been refilled by then."""


@dataclass
class CallBudget:
    """Rate limit of each caller: `per_s` calls a second, and `burst` at once after a pause."""

    per_s: float = 64.0
    burst: float = 256.0
    max_callers: int = _MAX_CALLERS
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Calls left to each caller and the time of that count, the caller with the oldest call first."""

    @property
    def in_words(self) -> str:
        """Sentence about the fault of a caller that exceeds the budget, for the report."""
        return f"more than {self.per_s:g} calls a second"

    def allows(self, caller: str, now: float) -> bool:
        """Return whether `caller` may call now; if so, count the call."""
        left, since_s = self._left.pop(caller, (self.burst, now))
        left = min(self.burst, left + (now - since_s) * self.per_s)
        allowed = left >= 1
        self._left[caller] = (left - allowed, now)
        oldest, (_, heard_s) = next(iter(self._left.items()))
        while len(self._left) > self.max_callers or now > heard_s + _FORGET_AFTER_S:
            del self._left[oldest]
            oldest, (_, heard_s) = next(iter(self._left.items()))
        return allowed


_NAME_AGAIN_S = 6 * 3600.0
"""Seconds after which a peer may be named again for the same rule."""
_AT_ONCE = 16
"""Names that are reported at once for one rule after a silence."""
_ANOTHER_S = 60.0
"""Seconds between reports of further names for the same rule, after `_AT_ONCE` were reported."""

_MAX_NAMES, _MAX_RULES = 1024, 64


@dataclass
class _Rate:
    """Rate limit of one rule: names that may pass, and the time of that count."""

    left: float = float(_AT_ONCE)
    at_s: float = 0.0

    def passes(self, now: float) -> bool:
        self.left = min(float(_AT_ONCE), self.left + max(0.0, now - self.at_s) / _ANOTHER_S)
        self.at_s = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass
class NamedOnce:
    """Decides when a peer may be named: once in `again_s` seconds (six hours) for each peer and rule.

    Of one rule 16 names pass at once, then one a minute.
    """

    again_s: float = _NAME_AGAIN_S
    _named_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """Time when each peer was named for each rule, oldest first."""
    _rates: dict[str, _Rate] = field(default_factory=dict)

    def is_due(self, peer: str, now: float, rule: str = "") -> bool:
        """Return whether to name `peer` for `rule` now; if so, count it as named. Rules are few and never chosen by
        peers."""
        named_s = self._named_s.get((peer, rule))
        # The clock may have been set back.
        if named_s is not None and abs(now - named_s) < self.again_s:
            return False
        rate = self._rates.pop(rule, None) or _Rate()
        self._rates[rule] = rate
        while len(self._rates) > _MAX_RULES:
            del self._rates[next(iter(self._rates))]
        if not rate.passes(now):
            return False
        self._named_s.pop((peer, rule), None)
        self._named_s[peer, rule] = now
        while len(self._named_s) > _MAX_NAMES:
            del self._named_s[next(iter(self._named_s))]
        return True


GIVES_WAY_S = 30.0
"""Seconds after which a reader may have to give way. At the slowest speed that is tolerated, four chunks take this
long."""

_COMES_BACK_S = 2.0
"""Seconds for which a place is kept for a peer that was told to come again."""
_MAX_WAITING = 256
"""Peers that may wait in order, of those that go first and of the others."""


@dataclass(eq=False)
class Reader:
    """Reader that has a place. `took_s` is the time at which it was given its last piece, infinite while it waits for
    this peer."""

    peer: str
    took_s: float
    took_bytes: int = 0
    earlier_s: float = 0.0

    def own_s(self, now: float) -> float:
        """Return for how long the reader has had its place, without the time that it waited for this peer."""
        return self.earlier_s + (max(0.0, now - self.took_s) if math.isfinite(self.took_s) else 0.0)

    def bytes_per_s(self, now: float) -> float:
        """Return the reader's speed in that time."""
        return self.took_bytes / max(self.own_s(now), 1e-9)


@dataclass
class Readers:
    """Readers that have places. The number of places, `most`, is an argument of each call, because it may change."""

    stall_s: float
    gives_way_s: float = GIVES_WAY_S
    in_order: bool = False
    """Whether peers that got no place get one in the order in which they asked first: a place that becomes free is kept
    for a moment for whoever asked earlier. Otherwise it is the next asker's, which may be the one that just left it."""
    goes_first: Callable[[str], bool] = lambda peer: True
    """Returns whether a peer goes before those for which this is false."""
    _inside: dict[Reader, None] = field(default_factory=dict)
    _waiting: dict[str, float] = field(default_factory=dict)
    """Peers that got no place, the earliest first, with the time at which they asked last."""

    def __len__(self) -> int:
        return len(self._inside)

    def __contains__(self, reader: Reader) -> bool:
        return reader in self._inside

    def has_room_for(self, peer: str, most: int, now: float) -> bool:
        """Return whether `peer` ("": unknown) would get a place. One peer has at most half of the places."""
        if peer and self._num_moving(peer, now) >= -(-most // 2):
            return False
        return len(self._inside) + self._num_before(peer, now) < most or self._to_give_way(peer, now) is not None

    def admit(self, peer: str, most: int, now: float) -> tuple[Reader | None, Reader | None]:
        """Return (the new reader or None, the reader that loses its place for it or None)."""
        if not self.has_room_for(peer, most, now):
            has_its_part = peer and self._num_moving(peer, now) >= -(-most // 2)
            alike = sum(self.goes_first(other) == self.goes_first(peer) for other in self._waiting if other != peer)
            if self.in_order and peer and not has_its_part and alike < _MAX_WAITING:
                self._waiting[peer] = now
            return None, None
        self._waiting.pop(peer, None)
        gone = self._to_give_way(peer, now) if len(self._inside) >= most else None
        if gone is not None:
            del self._inside[gone]
        reader = Reader(peer, now)
        self._inside[reader] = None
        return reader, gone

    def is_stalled(self, reader: Reader, now: float) -> bool:
        """Return whether the reader has taken nothing for so long that it keeps its place only while nobody else wants
        it."""
        return reader.took_s <= now - self.stall_s

    def waits(self, reader: Reader, now: float) -> None:
        """Record that the reader has come for its next piece: from now on it waits for this peer."""
        reader.earlier_s = reader.own_s(now)
        reader.took_s = math.inf

    def takes(self, reader: Reader, size_bytes: int, now: float) -> None:
        """Record that the reader's next piece is sent."""
        reader.earlier_s = reader.own_s(now)
        reader.took_s, reader.took_bytes = now, reader.took_bytes + size_bytes

    def leaves(self, reader: Reader) -> None:
        """Free the reader's place, if it still has one."""
        self._inside.pop(reader, None)

    def _num_before(self, peer: str, now: float) -> int:
        """Return the number of peers that wait for a place and go before this one."""
        for gone in [other for other, asked_s in self._waiting.items() if asked_s < now - _COMES_BACK_S]:
            del self._waiting[gone]
        mine, line = self.goes_first(peer), [(other, self.goes_first(other)) for other in self._waiting]
        place = next((place for place, (other, _) in enumerate(line) if other == peer), len(line))
        return sum(theirs > mine or (theirs == mine and at < place) for at, (_, theirs) in enumerate(line))

    def _num_moving(self, peer: str, now: float) -> int:
        return sum(reader.peer == peer and not self.is_stalled(reader, now) for reader in self._inside)

    def _to_give_way(self, peer: str, now: float) -> Reader | None:
        """Return the reader that loses its place to `peer`; None if none must."""
        stalled = [reader for reader in self._inside if self.is_stalled(reader, now)]
        if stalled:
            return min(stalled, key=lambda reader: reader.took_s)
        if self.goes_first(peer):
            strangers = [reader for reader in self._inside if not self.goes_first(reader.peer)]
            if strangers:
                return min(strangers, key=lambda reader: reader.bytes_per_s(now))
        own = self._num_moving(peer, now) if peer else 0
        # Two readers at 54 KB/s once kept an honest one out in 31 of 31 attempts (decision 53).
        due = [
            reader
            for reader in self._inside
            if reader.own_s(now) >= self.gives_way_s and (not reader.peer or self._num_moving(reader.peer, now) > own)
        ]
        return min(due, key=lambda reader: reader.bytes_per_s(now), default=None)
