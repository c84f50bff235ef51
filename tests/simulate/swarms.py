"""What the simulated swarm's tests share: the check that a swarm is whole, and schedules of faults."""

from __future__ import annotations

from fault_search.rounds import counted_twice, not_one_model

from swarmtrain.simulate.systems.messages import Phase
from swarmtrain.simulate.systems.world import SynchronousWorld


def assert_tokens_count_once(world: SynchronousWorld) -> None:
    """See `counted_twice`."""
    assert not (found := counted_twice(world)), found


def assert_one_model(world: SynchronousWorld, settle_rounds: int = 2, limit_s: float = 120.0) -> None:
    """See `not_one_model`; and no token counts twice."""
    assert not (found := not_one_model(world, settle_rounds, limit_s)), found
    assert_tokens_count_once(world)


def longest_open_wait_s(world: SynchronousWorld) -> float:
    """Of those that wait now, in seconds."""
    return max((world.clock.now - p.ended_s for p in world.running() if p.phase is Phase.MERGING), default=0.0)
