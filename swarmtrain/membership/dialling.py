"""Whom a peer dials because somebody asked it to, and how often.

A stranger must not make the swarm knock at others' doors, nor learn what is behind a peer's. So: only at the address
that the question itself came from, at a few ports, a few times a minute.
"""

from __future__ import annotations

import ipaddress
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["MAX_PORTS", "DialBudget", "dial_targets", "is_public", "may_be_dialled", "may_dial"]

MAX_PORTS = 4
_MAX_HOSTS = 2
_WINDOW_S = 60.0


def dial_targets(seen: Iterable[str], ports: Sequence[int]) -> tuple[str, ...]:
    """The multiaddresses to dial for one whose connections come from `seen`; empty if there is nothing to dial."""
    hosts: dict[str, None] = {}
    for address in seen:
        match = re.fullmatch(r"/(ip[46])/([0-9A-Fa-f:.]+)/tcp/[0-9]{1,5}", address)
        if match is not None and may_be_dialled(match[2]):
            hosts[f"/{match[1]}/{match[2]}"] = None
    good = [port for port in dict.fromkeys(ports) if 0 < port < 65536][:MAX_PORTS]
    return tuple(f"{host}/tcp/{port}" for host in list(hosts)[:_MAX_HOSTS] for port in good)


def may_be_dialled(host: str) -> bool:
    """Whether `host` is an IP address, and no group, any or link-local one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified or address.is_link_local)


def may_dial(address: str) -> bool:
    """Whether a multiaddress that a stranger gave is one of TCP, by name or by an IP address that may be dialled."""
    match = re.fullmatch(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([1-9][0-9]{0,4})", address)
    if match is None or int(match[3]) > 65535:
        return False
    return match[1].startswith("dns") or may_be_dialled(match[2])


def is_public(address: str) -> bool:
    """Whether a multiaddress is one of the internet's, not of a local network or of a provider's own."""
    match = re.match(r"/ip[46]/([^/]+)", address)
    try:
        return match is not None and ipaddress.ip_address(match[1]).is_global
    except ValueError:
        return False


@dataclass
class DialBudget:
    """At most so many dials a minute, for each who asks and in all."""

    per_host: int = 6
    in_all: int = 30
    _granted: deque[tuple[float, str]] = field(default_factory=deque)

    def admit(self, targets: Sequence[str], now: float) -> bool:
        """Whether these targets may be dialled now; counted if so."""
        while self._granted and self._granted[0][0] <= now - _WINDOW_S:
            self._granted.popleft()
        hosts = {_network_of(target) for target in targets}
        counts = [sum(granted == host for _, granted in self._granted) for host in hosts]
        if len(self._granted) + len(hosts) > self.in_all or any(count >= self.per_host for count in counts):
            return False
        self._granted.extend((now, host) for host in sorted(hosts))
        return True


def _network_of(target: str) -> str:
    """Who counts as one: an IPv4 address, or the /64 that a single owner of IPv6 has at least."""
    host = ipaddress.ip_address(target.split("/")[2])
    return str(host if host.version == 4 else ipaddress.ip_network((host, 64), strict=False))
