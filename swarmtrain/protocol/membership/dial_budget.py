"""Addresses that a peer dials because somebody asked it to, and how often.

A stranger must not make the swarm knock at other machines' doors, nor learn what is behind a peer's router. So a peer
dials only the address that the question itself came from, at a few ports, a few times a minute (decision 10).
"""

from __future__ import annotations

import ipaddress
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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
