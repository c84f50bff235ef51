"""What a service of the system is to be: which peer it starts, with what, and within which limits.

The folder of the peer is the one place that remembers its options. So a service holds no option that the folder
remembers, but for what the system itself can bound: memory, and the shares of processors and disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.errors import UserError
from swarmtrain.protocol.limits import parse_size

__all__ = [
    "FAILED_RESTART_S",
    "PREFIX",
    "STOP_S",
    "ServiceDefinition",
    "ServiceLimits",
    "free_name",
    "is_service_name",
    "service_limits",
]

PREFIX = "swarmtrain-"
STOP_S = 110
"""Seconds that a peer gets to end cleanly: the last volunteer of a run waits up to 100 s for the archive, and systemd
gives all services of a user 120 s at shutdown."""
FAILED_RESTART_S = 30
"""Seconds before a peer that failed or was killed is started again."""

_MEMORY_FACTOR = 1.5
_MEMORY_SPARE_BYTES = 512 * 10**6
_NICER = 1.25
"""Linux gives a program that is nicer by one 1/1.25 of the processor time."""
_MOST_NICE = 19
_MOST_NAME = 64


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """Limits of a volunteer that the system keeps too."""

    memory_bytes: int = 0  # 0: no limit
    nice: int = 0
    only_when_idle: bool = False

    @property
    def fence_bytes(self) -> int:
        """Memory at which the system ends the peer; 0: none.

        The peer itself pauses at its limit, after half a minute, and its daemon and files that it reads count here too.
        So this is far enough above not to be reached but by a mistake.
        """
        return max(int(_MEMORY_FACTOR * self.memory_bytes), self.memory_bytes + _MEMORY_SPARE_BYTES) * bool(
            self.memory_bytes
        )

    @property
    def processor_weight(self) -> int:
        """Weight among the user's other services and windows, of which each has 100. Niceness alone does not count
        between control groups."""
        return max(1, round(100 / _NICER**self.nice))

    @property
    def yields_disk(self) -> bool:
        """True if the peer reads and writes only when nobody else does."""
        return self.only_when_idle or self.nice >= _MOST_NICE


def service_limits(options: Mapping[str, tuple[str, ...]]) -> ServiceLimits:
    """Return the limits among a folder's remembered options; what cannot be read counts as not given: the peer itself
    says so when it starts."""
    try:
        return ServiceLimits(
            memory_bytes=parse_size(options.get("--memory", ("none",))[0]),
            nice=min(max(int(options.get("--nice", ("0",))[0]), 0), _MOST_NICE),
            only_when_idle="--only-when-idle" in options,
        )
    except (ValueError, IndexError):
        return ServiceLimits()


@dataclass(frozen=True, kw_only=True)
class ServiceDefinition:
    """Service that starts one peer of this machine."""

    name: str
    """Name for the system, such as `swarmtrain-anna`."""
    title: str
    """What it is, in a few words of a person."""
    folder: Path
    command: tuple[str, ...]
    """Command line; the program's absolute path first."""
    environment: Mapping[str, str] = field(default_factory=dict)
    writable: tuple[Path, ...] = ()
    """Folders, besides its own, in which it writes."""
    gives_way: bool = True
    """True for a volunteer: it is the first to end when the machine runs out of memory."""
    limits: ServiceLimits = field(default_factory=ServiceLimits)

    def __post_init__(self) -> None:
        words = (*self.command, *self.environment.values(), str(self.folder), *map(str, self.writable))
        for word in words:
            if not word.isprintable():
                raise UserError(
                    f"{word!r} has a character that no service can hold; give a folder without it, with --dir",
                    code="not-for-a-service",
                )


def is_service_name(name: str) -> bool:
    """Return whether `name` can be that of a service of swarmtrain."""
    return re.fullmatch(rf"{PREFIX}[A-Za-z0-9][A-Za-z0-9._-]{{0,{_MOST_NAME}}}", name) is not None


def free_name(wanted: str, taken: Collection[str]) -> str:
    """Return a service's name for what a person calls the peer: `swarmtrain-anna`, else `swarmtrain-anna-2`, ..."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-._")[: _MOST_NAME - 8] or "peer"
    names = (f"{PREFIX}{plain}{f'-{number}' if number > 1 else ''}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
