"""Schedules of faults in a pipeline's calls, and the invariants that must hold.

Each microbatch counts once in each stage, or is reported as lost where its peer died; no driver waits without bound.
`detail` is a share of the calls in per cent for faults that lose, repeat or slow them; for the others it says whom they
strike.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

from virtual_loop import virtually

from fault_search.microbatch_swarm import Faults, MicrobatchSwarm
from fault_search.schedule import FaultSchedule, FaultSpan, Played, ScheduledFault, Violation, draw_faults

_LIMIT_S = 900.0
_SPAN = FaultSpan(0.1, 3.0, 40.0)
_SHARES = {"lost": "lost", "answers lost": "reply_lost", "repeated": "twice", "slow": "slow"}
_KINDS = {"lost": 3, "answers lost": 3, "repeated": 3, "slow": 1, "parted": 2, "hang": 4, "death": 3, "driver dies": 2}


def draw_microbatches(rng: random.Random) -> FaultSchedule:
    """Draw up to three drivers and two peers for each of one or two more stages, and their faults."""
    speeds = (1.0,) * rng.choice((1, 2, 2, 3))
    return FaultSchedule(
        world="microbatches",
        speeds=speeds,
        faults=draw_faults(rng, _KINDS, len(speeds), _SPAN, lambda kind: rng.randrange(1, 13)),
        options=(("stages", float(rng.choice((2, 3)))),),
        seed=rng.randrange(2**16),
    )


def play_microbatches(schedule: FaultSchedule) -> Played:
    """Play the schedule, and return the violations."""
    rates = Faults()
    for fault in schedule.faults:
        if (share := _SHARES.get(fault.kind)) is not None:
            rates = replace(rates, **{share: fault.detail / 100 * (4 if share == "twice" else 1)})
    died = schedule.has("death", "driver dies")

    async def body(now: Callable[[], float]) -> Played:
        swarm = MicrobatchSwarm(
            now,
            schedule.seed,
            rates,
            num_stages=int(schedule.option("stages", 2)),
            num_drivers=len(schedule.speeds),
            num_microbatches=8,
        )
        others = [peer for peer in swarm.peers.values() if peer.stage]
        later = asyncio.get_running_loop().call_later

        def lose(share: float) -> None:
            for network in swarm.networks:
                network.faults = replace(network.faults, lost=share)

        for fault in schedule.faults:
            peer = others[fault.detail % len(others)]
            if fault.kind == "death":
                later(fault.at_s, peer.born)
            elif fault.kind == "hang":
                later(fault.at_s, peer.hang, fault.lasts_s)
            elif fault.kind == "parted" and fault.lasts_s:  # drivers from all others
                later(fault.at_s, lose, 1.0)
                later(fault.end_s, lose, rates.lost)
        try:
            await swarm.run(_deaths(schedule.faults), _LIMIT_S)
        except TimeoutError:
            return Played([Violation("nobody waits", f"a driver is not done after {_LIMIT_S:g} s")])
        found = [Violation("exactly once", detail) for detail in swarm.miscounted(nobody_died=not died)]
        return Played(found, f"{now()} s, {swarm.told.num_retried} retried, {swarm.rng.random()}")

    return virtually(body)


def _deaths(faults: tuple[ScheduledFault, ...]) -> dict[int, float]:
    """Map each driver that dies to the time of its first death."""
    return {fault.peer: fault.at_s for fault in reversed(faults) if fault.kind == "driver dies"}
