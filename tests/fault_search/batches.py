"""Schedules of faults in a swarm that makes one large batch after the other, and the invariants that must hold.

All that must hold in synchronous rounds (`tests/fault_search/rounds.py`), and:

- A batch goes on for `round_limit_s` at most, and one step.
- A gradient counts with the tokens that its author computed for it, and once.
- Where peers only die, leave and come, a batch takes as long as those who are left need for it, and then waits for
  `max_wait_s` at most.
- One that lies about how far it is holds nobody up for longer than that, and ends batches early within bounds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fault_search.faults import declare_span
from fault_search.rounds import KINDS, RoundLiar, SearchedRounds, draw_rounds, judged, settings_of
from fault_search.schedule import FaultSchedule, Played, ScheduledFault, Violation
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.run_batch import BatchTarget
from swarmtrain.simulate.systems.batch_volunteer import BatchVolunteer
from swarmtrain.simulate.systems.messages import SimulatedLink, WorldMoment
from swarmtrain.simulate.systems.transfers import Owner
from swarmtrain.simulate.systems.volunteer import SimulatedVolunteer

_SPEEDS = (0.7, 2.0, 5.0, 10.0)
"""Inner steps per second."""
_BATCH_S = (3.0, 6.0)
"""Seconds in which all who are there at first compute a batch."""
_MAX_WAIT_S = (3.0, 8.0)
"""Below and above the time after which a signer is passed over."""
_ROUND_LIMIT_S = 30.0
_MANY_GO = 0.15
"""Share of the schedules in which a third of the peers goes at once."""
_LAST_S = 20.0
"""Time until which they go, and seconds for which the others' links are halved."""
_LIES = (
    "lie: boasts", "lie: understates", "lie: ends at once", "lie: never ends", "lie: whole batch", "lie: speed",
    "lie: tokens",
)  # fmt: skip
"""Lies about how far it is, how fast, and how many tokens it has."""
_KINDS = (
    {kind: weight for kind, weight in KINDS.items() if kind != "lie: done"} | dict.fromkeys(_LIES, 2) | {"narrow": 2}
)
_MOST_TIMES_FASTEST = 16.0
"""Speed up to which a liar is believed, as a multiple of the fastest peer's: a rate counts up to eight times the
median, and what is told up to twice what follows from it."""
_TRANSFER_S = 2.0
"""Seconds in which publications and shares are asked for and pulled, links being as they are."""
_UNNOTICED_S = 4.0
"""Seconds until a peer that has died or come is noticed: presence is read every three."""
_EXACT_S = 1e-6
_GONE = ("kill", "kill at", "leave", "join", "narrow")


def draw_batches(rng: random.Random) -> FaultSchedule:
    """Draw a swarm of up to seven peers of unlike speed, and its faults."""
    schedule = draw_rounds(rng, _KINDS)
    more = ("batch_s", rng.choice(_BATCH_S)), ("max_wait_s", rng.choice(_MAX_WAIT_S))
    speeds = tuple(rng.choice(_SPEEDS) for _ in schedule.speeds)
    faults = _a_third_goes(rng, len(speeds)) if rng.random() < _MANY_GO and len(speeds) >= 3 else schedule.faults
    return replace(schedule, world="batches", speeds=speeds, faults=faults, options=(*schedule.options, *more))


def _a_third_goes(rng: random.Random, num_peers: int) -> tuple[ScheduledFault, ...]:
    """Draw a third of the peers that vanish at one moment, the signer among them, and halve the others' links."""
    at_s = round(rng.uniform(0.0, _LAST_S), 1)
    gone = {0, *rng.sample(range(1, num_peers), round(num_peers / 3) - 1)}
    kinds = ((peer, "kill" if peer in gone else "narrow") for peer in range(num_peers))
    return tuple(ScheduledFault(kind=kind, peer=peer, at_s=at_s, lasts_s=_LAST_S) for peer, kind in kinds)


class BatchLiar(RoundLiar, BatchVolunteer):
    """Simulated peer that works as the others do, but lies about how far it is."""

    @property
    def _whole(self) -> int:
        """Inner steps of the whole batch."""
        return -(-self.settings.target_tokens // self.settings.tokens_per_step)

    @property
    def inner_steps_done(self) -> int:
        """Inner steps of this round that the liar claims."""
        if self.lies & {"boasts", "whole batch"}:
            return self._whole
        return 0 if "understates" in self.lies else super().inner_steps_done

    def info(self) -> PeerInfo:
        """Return this peer's presence record."""
        info = super().info()
        return replace(info, steps_per_s=1000 * info.steps_per_s) if "speed" in self.lies else info

    def _steps_done(self) -> None:
        if self.lies & {"ends at once", "whole batch"}:
            self.steps = self._whole if "whole batch" in self.lies else self.steps + 1
            self._publish()
        elif "never ends" in self.lies:
            self.steps += 1
            self._trains_until(self.world.clock.now + 1 / self.steps_per_s)
        else:
            super()._steps_done()


@dataclass(frozen=True)
class _EndedBatch:
    """Batch of one peer that it has ended."""

    peer: str
    round: int
    base: str
    began_s: float
    ended_s: float
    steps_per_s: float
    """Inner steps per second of the honest peers that were there all the time, together."""

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


class SearchedBatches(SearchedRounds):
    """Simulated world that records how long each batch took."""

    def __init__(self, schedule: FaultSchedule) -> None:
        settings = replace(
            settings_of(schedule),
            target=BatchTarget(int(1000 * schedule.option("batch_s", _BATCH_S[0]) * sum(schedule.speeds)), 10**12),
            max_wait_s=schedule.option("max_wait_s", _MAX_WAIT_S[0]),
            round_limit_s=_ROUND_LIMIT_S,
            tokens_per_step=1000,
        )
        super().__init__(schedule, settings)
        self._newcomers_per_s = schedule.speeds[0]
        self._began: dict[str, tuple[float, frozenset[str]]] = {}
        """When each peer began its batch, and which honest peers were there then."""
        self._computed: set[tuple[str, int, int]] = set()
        """(peer, round, tokens) of each gradient that an honest peer has published."""
        self.batches: list[_EndedBatch] = []
        """Batches of honest peers."""

    def _make(self, name: str, steps_per_s: float, link: SimulatedLink) -> SimulatedVolunteer:
        return (BatchLiar if name in self.liars else BatchVolunteer)(self, name, steps_per_s, link)

    def declare(self, fault: ScheduledFault, name: str, index: int) -> None:
        """Schedule a fault of this peer; `index` tells newcomers apart."""
        if fault.kind == "narrow":
            declare_span(self, fault, lambda: self._set_rate(name, 0.5), lambda: self._set_rate(name, 1.0))
        else:
            super().declare(fault, name, index)

    def _set_rate(self, name: str, share: float) -> None:
        peer = self.peers[name]
        peer.link = replace(peer.link, bytes_per_s=share * self._link.bytes_per_s)

    def come(self, name: str, checkpoint: int) -> object:
        """Start a newcomer, or a peer that has died."""
        if name in self.peers:
            return self.come_back(name, checkpoint)
        return self.join(name, steps_per_s=self._newcomers_per_s)

    def reached(self, peer: Owner, moment: WorldMoment) -> None:
        """Record when the peer began and ended a batch."""
        if moment == "started":
            self._began[peer.name] = self.clock.now, self._honest()
        elif moment == "ended" and peer.name not in self.liars:
            began_s, were_there = self._began[peer.name]
            self._computed.add((peer.name, peer.round, peer.steps * self.settings.tokens_per_step))
            steps_per_s = sum(self.peers[name].steps_per_s for name in sorted(were_there & self._honest()))
            self.batches.append(
                _EndedBatch(peer.name, peer.round, peer.engine.base, began_s, self.clock.now, steps_per_s)
            )
        super().reached(peer, moment)

    def _honest(self) -> frozenset[str]:
        return frozenset(peer.name for peer in self.running() if peer.name not in self.liars)

    def record(self, kind: Any, peer: SimulatedVolunteer, roster: Roster | None = None) -> None:
        """Add an event to the log, and judge it."""
        super().record(kind, peer, roster)
        if kind != "applied" or roster is None or peer.name in self.liars:
            return
        for entry in roster.entries:
            if entry.peer not in self.liars and (entry.peer, roster.round, entry.tokens) not in self._computed:
                detail = (
                    f"{entry.tokens} tokens of {entry.peer} count in round {roster.round}, which it has not computed"
                )
                self.broken.append(Violation("a gradient counts as it was computed", detail))


# ---------------------------------------------------------------- play


def play_batches(schedule: FaultSchedule) -> Played:
    """Play the schedule, and return the violations."""
    world = SearchedBatches(schedule)
    played = judged(world, schedule, limit_s=5 * _ROUND_LIMIT_S)
    found = list(_endless(world))
    if all(fault.kind in (*_GONE, *_LIES) for fault in schedule.faults):
        found += [*_late(world), *_left_out(world)]
    if all(fault.kind in _LIES for fault in schedule.faults):
        found += _early(world, schedule)
    return Played([*played.violations, *found], played.fingerprint)


def _endless(world: SearchedBatches) -> Iterable[Violation]:
    """Check that no batch went on for longer than a round may last, and a step."""
    for batch in world.batches:
        name, seconds = batch.peer, batch.seconds
        for begin_s, end_s in _frozen(world, name):
            seconds -= max(0.0, min(end_s, batch.ended_s) - max(begin_s, batch.began_s))
        if seconds > world.settings.round_limit_s + 1 / world.peers[name].steps_per_s + _EXACT_S:
            yield Violation("batches end", f"{name} added up gradients for {seconds:.1f} s, to {batch.ended_s:.1f} s")


def _frozen(world: SearchedBatches, name: str) -> list[tuple[float, float]]:
    """Return from when until when a peer's process was frozen."""
    begins = [event.time_s for event in world.events("frozen") if event.peer == name]
    ends = [event.time_s for event in world.events("thawed") if event.peer == name]
    return [(begin_s, min((end_s for end_s in ends if end_s >= begin_s), default=begin_s)) for begin_s in begins]


def _late(world: SearchedBatches) -> Iterable[Violation]:
    """Check that batches take as long as the peers that were there all the time need for them, and that nobody waits
    for longer than for one `max_wait_s`."""
    s = world.settings
    for batch in world.batches:
        need_s = s.target_tokens / s.tokens_per_step / batch.steps_per_s
        needs_s = need_s + 1 / world.peers[batch.peer].steps_per_s + _UNNOTICED_S
        if batch.seconds > needs_s:
            detail = (
                f"{batch.peer} added up gradients for {batch.seconds:.1f} s, to {batch.ended_s:.1f} s; those who are"
            )
            yield Violation("nobody makes batches long", f"{detail} there need {need_s:.1f} s")
    for over_s, name, wait_s in world.waits:
        if wait_s > s.max_wait_s + _TRANSFER_S:
            detail = f"{name} waited for {wait_s:.1f} s to {over_s:.1f} s, and max_wait_s is {s.max_wait_s:g} s"
            yield Violation("nobody waits longer than max_wait_s", detail)


def _left_out(world: SearchedBatches) -> Iterable[Violation]:
    """Check that rosters list everybody that had ended its batch in time."""
    ended = {(batch.round, batch.base, batch.peer): batch.ended_s for batch in world.batches}
    for event in world.events("signed"):
        roster = event.roster
        if roster is None or roster.signer in world.liars:
            continue
        for (round, base, name), ended_s in ended.items():
            is_there = (round, base) == (roster.round, roster.base) and world.peers[name].alive
            if is_there and ended_s < event.time_s - _TRANSFER_S and name not in roster.peers:
                detail = f"{name} had ended round {round} {event.time_s - ended_s:.1f} s before {roster.signer} signed"
                yield Violation("who delivers in time counts", f"{detail} at {event.time_s:.1f} s, without it")


def _early(world: SearchedBatches, schedule: FaultSchedule) -> Iterable[Violation]:
    """Check that the others have as much of each batch as they would beside a peer of the speed that is believed."""
    speeds = dict(zip(schedule.names, schedule.speeds, strict=True))
    honest = sum(speed for name, speed in speeds.items() if name not in world.liars)
    least_share = honest / (honest + _MOST_TIMES_FASTEST * max(speeds.values()))
    if any(event.roster and event.roster.signer in world.liars for event in world.events("applied")):
        return  # a roster that a liar signs binds as any other does
    for event in world.events("signed"):
        if event.roster is None or event.roster.signer in world.liars or not honest:
            continue
        tokens = sum(entry.tokens for entry in event.roster.entries if entry.peer not in world.liars)
        if tokens < least_share * world.settings.target_tokens - len(speeds) * world.settings.tokens_per_step:
            detail = f"round {event.round} has {tokens} honest tokens of {world.settings.target_tokens}"
            yield Violation("no liar ends batches", f"{detail}, less than {least_share:.0%}")
