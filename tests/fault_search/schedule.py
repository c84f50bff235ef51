"""A schedule of faults: a small swarm, its faults and their times. Everything in it follows from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

WorldKind: TypeAlias = Literal["rounds", "gossip", "stages", "microbatches", "lives", "batches"]


@dataclass(frozen=True, kw_only=True)
class ScheduledFault:
    """Fault of `peer` at `at_s` for `lasts_s` seconds. The meaning of `detail` depends on the kind."""

    kind: str
    peer: int = 0
    at_s: float = 0.0
    lasts_s: float = 0.0
    detail: int = 0

    @property
    def end_s(self) -> float:
        """Time at which the fault is over."""
        return self.at_s + self.lasts_s


@dataclass(frozen=True, kw_only=True)
class FaultSchedule:
    """Small swarm with faults at given times, as `play` runs it. `speeds` has one number per peer; `options` has the
    settings that differ from their defaults."""

    world: WorldKind
    speeds: tuple[float, ...]
    faults: tuple[ScheduledFault, ...] = ()
    options: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    """Seed of chance within the world: which messages are lost, whom a peer asks."""

    def option(self, name: str, usual: float) -> float:
        """Return the option `name`, or `usual` if the schedule does not set it."""
        return dict(self.options).get(name, usual)

    @property
    def names(self) -> list[str]:
        """Names of the peers that are present at first, in PeerID order."""
        return [f"p{i}" for i in range(len(self.speeds))]

    def name(self, fault: ScheduledFault) -> str:
        """Return the name of the peer that a fault strikes."""
        return f"p{fault.peer}"

    @property
    def liars(self) -> frozenset[str]:
        """Names of the peers that lie. What becomes of them is not judged."""
        return frozenset(self.name(fault) for fault in self.faults if fault.kind.startswith("lie: "))

    def has(self, *kinds: str) -> bool:
        """Return whether the schedule has a fault of one of these kinds."""
        return any(fault.kind in kinds for fault in self.faults)

    def faults_end_s(self, least_s: float) -> float:
        """Return the time at which all faults are over, but at least `least_s`."""
        return max([least_s, *(fault.end_s for fault in self.faults)])


@dataclass(frozen=True)
class Violation:
    """Invariant that did not hold, and how."""

    invariant: str
    detail: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.detail}"


@dataclass(frozen=True)
class Played:
    """Result of playing a schedule."""

    violations: list[Violation]
    fingerprint: str = ""
    """Hash of all that happened: the same wherever the schedule is played."""


@dataclass(frozen=True)
class FaultSpan:
    """Times between which faults of a world strike, and their longest duration, in seconds."""

    first_s: float
    last_s: float
    longest_s: float


def draw_faults(
    rng: random.Random, kinds: Mapping[str, int], num_peers: int, span: FaultSpan, detail: Callable[[str], int]
) -> tuple[ScheduledFault, ...]:
    """Draw up to six faults of these kinds (with their weights), in the order of their times. At most one peer lies."""
    faults, liar = [], rng.randrange(num_peers)
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5, 6))):
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        lies = kind.startswith("lie: ") or kind == "idle"
        peer = liar if lies else rng.randrange(num_peers)
        longest_s = span.longest_s * (3 if lies else rng.choice((0.1, 0.1, 1, 1)))
        at_s, lasts_s = rng.uniform(span.first_s, span.last_s), rng.uniform(0, longest_s)
        faults.append(
            ScheduledFault(kind=kind, peer=peer, at_s=round(at_s, 1), lasts_s=round(lasts_s, 1), detail=detail(kind))
        )
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
