"""Pipelines in virtual time: what passes through, who moves, and what a hung or dying peer costs."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from swarmtrain.protocol.pipeline import moves
from swarmtrain.protocol.pipeline.balance import Rule, StageChange
from swarmtrain.protocol.pipeline.router import VARIANTS, Router
from swarmtrain.simulate.pipeline.settings import PipelineMachine, PipelineSettings
from swarmtrain.simulate.pipeline.world import PipelineWorld, best_bottleneck

pytestmark = pytest.mark.slow

THREE = Rule(costs=(1 / 3,) * 3, live_s=30.0)
STILL = PipelineSettings(rule=THREE, balance="none")


def best_assignment(speeds: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slowest stage of the best assignment, by trying all; for a few peers."""
    best = 0.0
    for held in itertools.product(range(len(costs)), repeat=len(speeds)):
        rates = [0.0] * len(costs)
        for speed, stage in zip(speeds, held, strict=True):
            rates[stage] += speed / costs[stage]
        best = max(best, min(rates))
    return best


def world(settings: PipelineSettings, *counts: int, speed: float = 500.0, fetch_s: float = 30.0) -> PipelineWorld:
    """Equal machines, so many a stage."""
    made = PipelineWorld(settings, seed=1)
    for stage, count in enumerate(counts):
        for _ in range(count):
            name = f"p{len(made.peers):02d}"
            made.join(PipelineMachine(name=name, tokens_per_s=speed, fetch_s=fetch_s, most_stages=2), (stage,))
    return made


def settings_for(num_stages: int, **more: object) -> PipelineSettings:
    return PipelineSettings(rule=replace(THREE, costs=(1 / num_stages,) * num_stages), **more)  # type: ignore[arg-type]


def rate(world: PipelineWorld, passed_s: float) -> float:
    """Return the throughput of the next seconds, in tokens per second."""
    world.measure_from_here()
    world.run_until(world.clock.now + passed_s)
    return world.tokens_per_s


# ---------------------------------------------------------------- routing


def test_equal_peers_reach_nearly_what_they_could() -> None:
    even = world(STILL, 3, 3, 3)
    even.run_until(120)
    assert rate(even, 600) >= 0.9 * 3 * 500 * 3
    assert even.share == pytest.approx(even.share_of_assignment, rel=0.1) and even.num_late == 0
    assert even.share_of_assignment == pytest.approx(1.0)


class Plain(Router):
    """Round robin that learns nothing from a timeout: no long sample, no ban."""

    def timed_out(self, peer: str, now: float, took_s: float, tokens: float) -> str:
        self._ended(peer, tokens)
        return ""


def with_hung(router: type[Router], variant: str = VARIANTS[0]) -> float:
    """Hang one of four peers in each of two stages; returns the throughput relative to before.

    A driver has six microbatches in flight, and waits for two minutes.
    """

    def patient(rng: random.Random) -> Router:
        return router(rng, variant, least_limit_s=120.0, most_limit_s=120.0)

    four = world(replace(STILL, router=patient, in_flight=6, microbatch_tokens=4096), 4, 4, 4)
    four.run_until(60)
    before = rate(four, 240)
    for name in ("p04", "p08"):
        four.hang(name)
    four.run_until(four.clock.now + 240)
    return rate(four, 600) / before


def test_one_hung_peer_of_four_costs_its_part_where_timeouts_are_charged() -> None:
    assert with_hung(Plain) <= 0.4
    for variant in VARIANTS:
        assert with_hung(Router, variant) >= 0.72, variant


def test_work_of_a_peer_that_dies_goes_on_from_that_boundary_at_another() -> None:
    even = world(STILL, 3, 3, 3)
    even.run_until(120)
    even.kill("p03")
    even.kill("p06", silent=True)
    even.run_until(180)
    assert rate(even, 300) >= 0.85 * 2 * 500 * 3
    driver = even.peers["p00"].driver
    assert driver is not None
    assert 0 < driver.engine.num_under_way <= driver.engine.most, "none of its microbatches is lost"


# ---------------------------------------------------------------- rebalancing


@pytest.mark.parametrize("counts", [(4, 1, 1), (8, 2, 2), (3, 3, 1, 1), (6, 0, 0)])
def test_piles_resolve(counts: tuple[int, ...]) -> None:
    piled = world(settings_for(len(counts)), *counts)
    piled.run_until(180)
    assert piled.holders() == [sum(counts) // len(counts)] * len(counts)
    assert not piled.emptied
    assert piled.log[-1].kind == "serves"


def test_who_has_just_moved_stays_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    piled = world(settings_for(3), 4, 1, 1)
    while not (moved := [moment for moment in piled.log if moment.kind == "moves"]):
        piled.run_until(piled.clock.now + 1)
    mover = piled.peers[moved[0].peer].mover
    while mover.engine.change is not None:
        piled.run_until(piled.clock.now + 1)
    moved_s = piled.clock.now
    assert mover.peer.stages != (0,)
    back = StageChange(peer=mover.peer.name, before=mover.peer.stages, after=(0,), reason="by hand")
    monkeypatch.setattr(moves, "my_change", lambda me, *others: (back if me == back.peer else None, "by hand"))
    piled.run_until(moved_s + 50.0)
    assert mover.engine.change is None
    piled.run_until(moved_s + 75.0)
    assert mover.engine.change == back


def test_four_one_one_has_half_of_two_two_two_without_and_recovers_from_crashes_with_it() -> None:
    none = rate(world(STILL, 4, 1, 1), 600)
    even = rate(world(STILL, 2, 2, 2), 600)
    assert none <= 0.6 * even
    piled = world(settings_for(3), 4, 1, 1)
    piled.run_until(60)
    assert rate(piled, 600) >= 0.8 * even
    first = next(name for name, peer in piled.peers.items() if peer.stages == (1,))
    second = next(name for name, peer in piled.peers.items() if peer.stages == (1,) and name != first)
    piled.kill(first)
    piled.kill(second)
    piled.run_until(piled.clock.now + 150)
    assert rate(piled, 600) >= 0.75 * best_assignment([500.0] * 4, (1 / 3,) * 3)
    reasons = [moment.reason for moment in piled.log if moment.kind == "moves"]
    assert any("stage 1 is empty" in reason and "moves to it from stage" in reason for reason in reasons), reasons


def test_a_peer_that_becomes_ten_times_slower_is_made_up_for() -> None:
    wide = world(settings_for(3, balance="none"), 4, 2, 2)
    moved = world(settings_for(3), 4, 2, 2)
    shares = []
    for one in (wide, moved):
        one.run_until(120)
        slow = next(name for name in sorted(one.peers) if one.peers[name].stages == (1,))
        one.slow(slow, 10.0)
        one.run_until(420)
        shares.append(rate(one, 600))
    assert shares[1] >= 1.4 * shares[0], shares


def test_without_memory_for_two_a_mover_leaves_first_and_drains() -> None:
    tight = PipelineWorld(settings_for(2), seed=3)
    for i in range(5):
        tight.join(PipelineMachine(name=f"p{i}", tokens_per_s=500.0, fetch_s=20.0), (int(i == 0),))
    tight.run_until(200)
    assert sorted(tight.holders()) == [2, 3] and not tight.emptied
    assert rate(tight, 300) >= 0.8 * 2 * 500 * 2


def test_fewer_machines_than_stages_serve_several_until_others_come() -> None:
    few = PipelineWorld(settings_for(3), seed=2)
    few.join(PipelineMachine(name="a", tokens_per_s=300.0, fetch_s=10.0, most_stages=3))
    few.run_until(120)
    assert few.holders() == [1, 1, 1] and rate(few, 300) >= 0.8 * 300
    for name in "bc":
        few.join(PipelineMachine(name=name, tokens_per_s=300.0, fetch_s=10.0, most_stages=3))
        few.run_until(few.clock.now + 150)
    assert min(few.holders()) == 1 and max(len(peer.stages) for peer in few.peers.values()) <= 2
    assert rate(few, 300) >= 0.8 * 900


def test_the_ideal_is_above_the_best_assignment_and_close_to_it() -> None:
    rng, ratios = random.Random(3), []
    for _ in range(25):
        speeds = [rng.uniform(1, 10) for _ in range(7)]
        costs = [rng.uniform(0.2, 0.5) for _ in range(3)]
        best, ideal = best_assignment(speeds, costs), best_bottleneck(speeds, costs)
        assert best <= ideal * (1 + 1e-9)
        ratios.append(best / ideal)
    assert statistics.mean(ratios) >= 0.9
    assert best_bottleneck([5.0, 1.0, 1.0], (0.5, 0.5)) == best_assignment([5.0, 1.0, 1.0], (0.5, 0.5)) == 4.0
    assert best_bottleneck([5.0], (0.5, 0.5)) == 0.0
