"""Whatever is retried, lost, repeated or reordered: a microbatch's gradient enters one step of a stage, once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from fault_search import microbatch_swarm
from fault_search.microbatch_swarm import FAULTS, Faults, MicrobatchSwarm, run_schedule
from virtual_loop import virtually

from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.protocol.pipeline.ledger import Settlement, StageLedger

SCHEDULES_OF_A_PART = 60
"""Schedules of all faults at once: about three seconds of a core."""
PARTS = [0, 1, *(pytest.param(part, marks=pytest.mark.evidence) for part in range(2, 40))]
"""120 schedules in continuous integration, 2,400 with `make evidence`."""


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", range(4))
def test_each_microbatch_counts_once(name: str, seed: int) -> None:
    swarm = run_schedule(FAULTS[name], seed)
    if name == "nothing":
        assert not swarm.told.num_retried
    if name in ("nothing", "lost", "answers lost", "repeated", "slow"):
        assert not swarm.told.lost_


@pytest.mark.parametrize("name", ["nothing", "everything but death", "everything"])
@pytest.mark.parametrize("seed", range(4))
def test_a_driver_that_dies_leaves_nothing_half_counted(name: str, seed: int) -> None:
    swarm = run_schedule(FAULTS[name], 1000 + seed, killed=1)
    assert len(swarm.finished) < swarm.num_drivers * swarm.num_microbatches, "it died too late to show anything"


class SlowCopies:
    """Transfer from a device: an answer is in main memory a while after it was computed, and not in order."""

    def __init__(self) -> None:
        self.rng, self.num_arrived = random.Random(0), 0

    async def pinned(self, payload: Any) -> Any:
        return payload

    async def arrived(self, answer: Any) -> Any:
        await asyncio.sleep(self.rng.uniform(0.0, 1.0))
        self.num_arrived += 1
        return answer


@pytest.mark.parametrize("name", ["lost", "everything but death", "everything"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_that_a_device_still_copies_count_once_too(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: Any = SlowCopies()

    def queue(ledger: StageLedger, now: Callable[[], float]) -> StageRequestQueue:
        return StageRequestQueue(ledger, now, copies)

    monkeypatch.setattr(microbatch_swarm, "StageRequestQueue", queue)
    swarm = run_schedule(FAULTS[name], 2000 + seed, killed=seed % 2)
    assert copies.num_arrived > 4 * swarm.num_microbatches


def test_a_driver_may_say_that_it_is_there_and_nothing_else() -> None:
    async def body(now: Callable[[], float]) -> list[set[str]]:
        swarm = MicrobatchSwarm(now, 0, Faults())
        for driver in swarm.drivers:
            assert await driver.calls.settle("s1p0", 1, Settlement(0, (), (), 0)) == set()
        return [set(peer.queue.ledger._drivers) for peer in swarm.peers.values() if peer.name in ("s1p0", "s1p1")]

    assert virtually(body) == [{"d0", "d1"}, set()]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_schedules_of_everything_at_once(part: int) -> None:
    for seed in range(SCHEDULES_OF_A_PART * part, SCHEDULES_OF_A_PART * (part + 1)):
        run_schedule(FAULTS["everything but death" if seed % 3 else "everything"], seed, killed=seed % 2)
