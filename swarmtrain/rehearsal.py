"""Rehearsal files: emulated links, churn and timed faults of a swarm that `swarmtrain local` runs on one machine.

A person writes the file, like a run file. `fault_events` turns it and the volunteers' names into a schedule of faults,
the same one each time. `network.links` carries out faults of links, `peer.local.swarm` those of processes.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from swarmtrain.errors import UserError
from swarmtrain.problems import Section, problems_in_words, read_small_file
from swarmtrain.words import one_line

Deed = Literal["kill", "leave", "hang", "stall", "partition", "reset", "half-open", "narrow"]
_OF_LINKS = ("stall", "partition", "reset", "half-open", "narrow")
_EXAMPLE = "examples/rehearsals/bad-internet.toml"


class SeedSection(Section):
    """Section `[rehearsal]`."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of random victims and times.")


class LinksSection(Section):
    """Section `[links]`: the link of each volunteer. Delays and losses are those from one volunteer to another."""

    rtt_ms: float = Field(0.0, ge=0, le=2000, description="Round-trip time between two volunteers, in milliseconds.")
    up_mbit: float = Field(
        0.0, ge=0, le=100_000, description="Upload bandwidth of a volunteer, in Mbit/s; 0: no limit."
    )
    down_mbit: float = Field(
        0.0, ge=0, le=100_000, description="Download bandwidth of a volunteer, in Mbit/s; 0: no limit."
    )
    jitter_ms: float = Field(0.0, ge=0, le=2000, description="Largest random delay, each way, in milliseconds.")
    loss_percent: float = Field(
        0.0, ge=0, le=50, description="Percentage of packets lost each way; a stream sees them as delays."
    )


class RehearsedVolunteer(Section):
    """One entry of `[[volunteers]]`: what one volunteer's link has in place of `[links]`."""

    name: str = Field(description="Name of the volunteer, such as `volunteer-2`.")
    up_mbit: float | None = Field(None, ge=0, le=100_000, description="Its upload bandwidth, in Mbit/s; 0: no limit.")
    down_mbit: float | None = Field(None, ge=0, le=100_000, description="Its download bandwidth, in Mbit/s.")
    hidden: bool = Field(False, description="True if nobody can dial it, as behind most home routers.")


class RehearsalChurn(Section):
    """Section `[churn]`: volunteers that are killed or leave, and come back."""

    every_s: float = Field(0.0, ge=0, description="Mean seconds between departures; 0: never.")
    away_s: float = Field(10.0, ge=0, description="Seconds until a volunteer comes back.")


class FaultSection(Section):
    """One entry of `[[faults]]`."""

    at_s: float = Field(ge=0, description="Time of the fault, in seconds since the last volunteer was started.")
    do: Deed = Field(description="Kind of fault.")
    who: tuple[str, ...] = Field((), strict=False, description="Victims by name; empty: `number` random ones.")
    number: int = Field(1, ge=1, description="Number of random victims.")
    for_s: float = Field(20.0, ge=0, description="Duration, in seconds.")
    bandwidth_percent: float = Field(
        50.0, gt=0, lt=100, description='With "narrow": percentage of its bandwidth that a link keeps.'
    )

    @field_validator("who")
    @classmethod
    def _once(cls, who: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(who)) < len(who):
            raise ValueError("a name is there twice")
        return who


class _Sections(Section):
    rehearsal: SeedSection = Field(default_factory=lambda: SeedSection())
    links: LinksSection = Field(default_factory=lambda: LinksSection())
    churn: RehearsalChurn = Field(default_factory=lambda: RehearsalChurn())


class RehearsalFile(_Sections):
    """Whole rehearsal file."""

    faults: tuple[FaultSection, ...] = ()
    volunteers: tuple[RehearsedVolunteer, ...] = ()

    @property
    def needs_links(self) -> bool:
        """True if peers must run behind emulated links."""
        has_links = bool(self.volunteers) or any(self.links.model_dump().values())
        return has_links or any(fault.do in _OF_LINKS for fault in self.faults)

    def links_of(self, name: str) -> LinksSection:
        """Return the link of one volunteer."""
        own = self._of(name)
        told = {} if own is None else own.model_dump(include={"up_mbit", "down_mbit"}, exclude_none=True)
        return self.links.model_copy(update=told)

    def is_hidden(self, name: str) -> bool:
        """Return whether nobody can dial this volunteer."""
        own = self._of(name)
        return own is not None and own.hidden

    def _of(self, name: str) -> RehearsedVolunteer | None:
        return next((each for each in self.volunteers if each.name == name), None)

    @property
    def strikes(self) -> bool:
        """True if faults or churn strike the volunteers."""
        return bool(self.faults) or self.churn.every_s > 0


class _Fault(Section):
    """Wrapper that gives a fault's problems the form of any other section's."""

    faults: FaultSection


class _Volunteer(Section):
    """The same for a volunteer."""

    volunteers: RehearsedVolunteer


def load_rehearsal(path: Path) -> RehearsalFile:
    """Read a rehearsal file. Raises `UserError`, one line that names the file and the key."""
    origin = one_line(str(path))
    table = read_small_file(path, "a rehearsal file", _EXAMPLE)
    faults = [_row(_Fault, "faults", row, f"{origin}: fault {n}") for n, row in _rows(table, "faults", origin)]
    told = [
        _row(_Volunteer, "volunteers", row, f"{origin}: volunteer {number}")
        for number, row in _rows(table, "volunteers", origin)
    ]
    try:
        rest = _Sections.model_validate(table)
    except ValidationError as error:
        raise UserError(*(each.found_in(origin) for each in problems_in_words(error, _Sections))) from None
    return RehearsalFile(**dict(rest), faults=tuple(faults), volunteers=tuple(told))


def _rows(table: dict[str, Any], key: str, origin: str) -> list[tuple[int, Any]]:
    """Take a list of tables out of a file; return its rows with their numbers."""
    rows = table.pop(key, [])
    if not isinstance(rows, list):
        raise UserError(f"{origin}: {key}: is a list; write [[{key}]] for each", code="wrong-type")
    return list(enumerate(rows, 1))


def _row(wrapper: type[Section], key: str, row: Any, origin: str) -> Any:
    try:
        return getattr(wrapper.model_validate({key: row}), key)
    except ValidationError as error:
        raise UserError(*(each.found_in(origin) for each in problems_in_words(error, wrapper))) from None


# ---------------------------------------------------------------- what happens when


@dataclass(frozen=True, order=True)
class FaultEvent:
    """Fault that strikes some volunteers at once and ends after `for_s`."""

    at_s: float
    do: Deed
    who: tuple[str, ...]
    for_s: float
    bandwidth_percent: float = 50.0


def fault_events(rehearsal: RehearsalFile, names: Sequence[str]) -> Iterator[FaultEvent]:
    """Yield all faults by time, without end if volunteers come and go. Raises `UserError` for an unknown name, and for
    a link without a bandwidth that is narrowed."""
    if unknown := sorted({volunteer.name for volunteer in rehearsal.volunteers} - set(names)):
        raise UserError(
            f"volunteers.name: no volunteer is called {unknown[0]}; there are {', '.join(names)}",
            code="no-such-volunteer",
        )
    for fault in rehearsal.faults:
        if unknown := sorted(set(fault.who) - set(names)):
            raise UserError(
                f"faults.who: no volunteer is called {unknown[0]}; there are {', '.join(names)}",
                code="no-such-volunteer",
            )
        if not fault.who and fault.number > len(names):
            raise UserError(
                f"faults.number: {fault.number}, but there are {len(names)} volunteers; lower it, or give more --peers",
                code="no-such-volunteer",
            )
        if fault.do == "narrow":
            for name in fault.who or names:
                _check_bandwidth(rehearsal.links_of(name), name)
    rng = random.Random(f"faults of {rehearsal.rehearsal.seed}")
    told = [
        FaultEvent(
            fault.at_s,
            fault.do,
            fault.who or tuple(sorted(rng.sample(names, fault.number))),
            fault.for_s,
            fault.bandwidth_percent,
        )
        for fault in rehearsal.faults
    ]
    return heapq.merge(sorted(told), _churn(rehearsal, names))


def _check_bandwidth(links: LinksSection, name: str) -> None:
    """Raise `UserError` if a link has no bandwidth that a fault could narrow."""
    if not links.up_mbit and not links.down_mbit:
        raise UserError(
            f'links.up_mbit: missing; allowed: more than 0, since a fault "narrow" needs a bandwidth of {name}',
            code="missing-key",
        )


def _churn(rehearsal: RehearsalFile, names: Sequence[str]) -> Iterator[FaultEvent]:
    """Yield departures one after the other, never of a volunteer that is still away."""
    churn, rng = rehearsal.churn, random.Random(f"churn of {rehearsal.rehearsal.seed}")
    back_s, now_s = dict.fromkeys(names, 0.0), 0.0
    while churn.every_s > 0:
        now_s += churn.every_s * rng.uniform(0.5, 1.5)
        now_s = max(now_s, min(back_s.values()))  # if everybody is away, wait for the first to come back
        name = rng.choice([name for name in names if back_s[name] <= now_s])
        deed: Deed = rng.choice(["kill", "leave"])
        back_s[name] = now_s + churn.away_s
        yield FaultEvent(now_s, deed, (name,), churn.away_s)
