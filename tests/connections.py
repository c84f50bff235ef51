"""TCP connections on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_ESTABLISHED = "01"


def connected_ports() -> list[tuple[int, int]]:
    """List (own port, remote port) for each end of an IPv4 connection."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [(_port(row[1]), _port(row[2])) for row in rows if row[3] == _ESTABLISHED]


def _port(address: str) -> int:
    return int(address.split(":")[1], 16)


def between(ports: Iterable[int]) -> list[tuple[int, int]]:
    """List connections with both ends among `ports`."""
    ports = set(ports)
    return [pair for pair in connected_ports() if ports.issuperset(pair)]
