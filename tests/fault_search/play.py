"""One schedule: drawn from a seed, played, shrunk while the same invariant breaks, and written down as a test."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from fault_search.batches import draw_batches, play_batches
from fault_search.gossip import draw_gossip, play_gossip
from fault_search.lives import draw_lives, play_lives
from fault_search.microbatches import draw_microbatches, play_microbatches
from fault_search.rounds import draw_rounds, play_rounds
from fault_search.schedule import FaultSchedule, Played, ScheduledFault, Violation, WorldKind
from fault_search.stages import draw_stages, play_stages
from swarmtrain.errors import SwarmtrainError

_DRAW: dict[WorldKind, Callable[[random.Random], FaultSchedule]] = {
    "rounds": draw_rounds,
    "gossip": draw_gossip,
    "stages": draw_stages,
    "microbatches": draw_microbatches,
    "lives": draw_lives,
    "batches": draw_batches,
}
_PLAY: dict[WorldKind, Callable[[FaultSchedule], Played]] = {
    "rounds": play_rounds,
    "gossip": play_gossip,
    "stages": play_stages,
    "microbatches": play_microbatches,
    "lives": play_lives,
    "batches": play_batches,
}
_TURNS: tuple[WorldKind, ...] = (
    "rounds", "gossip", "stages", "microbatches", "lives", "batches", "gossip", "stages", "microbatches", "lives",
)  # fmt: skip
"""World of each seed, in turn: half of the synchronous swarms make large batches."""
_WRONG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SwarmtrainError,
    TypeError,
    ValueError,
)


def draw(seed: int, world: WorldKind | None = None) -> FaultSchedule:
    """Draw the schedule of a seed, in `world` or in the world whose turn it is.

    Consecutive seeds try all worlds.
    """
    return _DRAW[world or _TURNS[seed % len(_TURNS)]](random.Random(seed))


def play(schedule: FaultSchedule) -> list[Violation]:
    """Play a schedule in virtual time, and return the violations. An error in a decision is one of them."""
    return replay(schedule).violations


def replay(schedule: FaultSchedule) -> Played:
    """Play a schedule, and return the violations with a fingerprint of what happened."""
    try:
        return _PLAY[schedule.world](schedule)
    except _WRONG as error:
        return Played([Violation(f"no {type(error).__name__}", str(error))])


# ---------------------------------------------------------------- shrinking


def shrink(schedule: FaultSchedule, invariant: str, most_plays: int = 400) -> FaultSchedule:
    """Return the shortest schedule found, within `most_plays` plays, in which this invariant still breaks."""
    tries = most_plays
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(schedule):
            if (tries := tries - 1) < 0:
                return schedule
            if any(violation.invariant == invariant for violation in play(smaller)):
                schedule, progress = smaller, True
                break
    return schedule


def _smaller(schedule: FaultSchedule) -> Iterator[FaultSchedule]:
    """Yield simpler schedules, the greatest steps first. Each is simpler by a measure of its own, so that this ends."""
    faults, number = schedule.faults, len(schedule.faults)
    size = number
    while size:
        for first in range(0, number, size):
            yield replace(schedule, faults=faults[:first] + faults[first + size :])
        size //= 2
    for peer in reversed(range(len(schedule.speeds))) if len(schedule.speeds) > 1 else ():
        yield _without(schedule, peer)
    for i in range(len(schedule.options)):
        yield replace(schedule, options=schedule.options[:i] + schedule.options[i + 1 :])
    usual = max(schedule.speeds)
    if set(schedule.speeds) != {usual}:
        yield replace(schedule, speeds=(usual,) * len(schedule.speeds))
    if schedule.seed:
        yield replace(schedule, seed=0)
    for i, fault in enumerate(faults):
        for simpler in _simpler(fault):
            yield replace(schedule, faults=(*faults[:i], simpler, *faults[i + 1 :]))


def _without(schedule: FaultSchedule, peer: int) -> FaultSchedule:
    """Return the schedule without a peer, and without what happened to it."""
    kept = [fault for fault in schedule.faults if fault.peer != peer]
    faults = tuple(replace(fault, peer=fault.peer - (fault.peer > peer)) for fault in kept)
    return replace(schedule, speeds=schedule.speeds[:peer] + schedule.speeds[peer + 1 :], faults=faults)


def _simpler(fault: ScheduledFault) -> Iterator[ScheduledFault]:
    """Yield the fault with shorter or rounder times, or a smaller detail."""
    for lasts_s in (0.0, float(int(fault.lasts_s / 2)), float(int(fault.lasts_s))):
        if lasts_s < fault.lasts_s:
            yield replace(fault, lasts_s=lasts_s)
    for at_s in (float(int(fault.at_s / 10) * 10), float(int(fault.at_s))):
        if at_s < fault.at_s:
            yield replace(fault, at_s=at_s)
    for detail in (0, fault.detail // 2, fault.detail - 1):
        if 0 <= detail < fault.detail:
            yield replace(fault, detail=detail)


# ---------------------------------------------------------------- in words


def as_test(schedule: FaultSchedule, invariant: str = "of a searched schedule") -> str:
    """Return the source of a test that fails as this schedule does, named after the invariant."""
    found = play(schedule)
    said = "".join(f"    # {violation}\n" for violation in found) or "    # nothing is wrong with it\n"
    return (
        f"from fault_search import {FaultSchedule.__name__}, {ScheduledFault.__name__}, play\n\n\n"
        f"def test_{schedule.world}_{re.sub('[^a-z]+', '_', invariant.lower())}() -> None:\n"
        f"{said}    schedule = {_written(schedule)}\n    assert not play(schedule)\n"
    )


def _written(schedule: FaultSchedule) -> str:
    """Return the schedule as Python source, leaving out default values."""
    lines = [f"        {name}={value}," for name, value in _fields(schedule) if name != "faults"]
    faults = [f"            {_call(fault)}," for fault in schedule.faults]
    if faults:
        lines += ["        faults=(", *faults, "        ),"]
    return "\n".join([f"{FaultSchedule.__name__}(", *lines, "    )"])


def _call(fault: ScheduledFault) -> str:
    return f"{ScheduledFault.__name__}({', '.join(f'{name}={value}' for name, value in _fields(fault))})"


def _fields(one: ScheduledFault | FaultSchedule) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if value != field.default:
            yield field.name, repr(value).replace("'", '"')
