"""Whatever goes wrong, in whatever order: nobody waits for ever, and afterwards there is one model again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarms import assert_one_model, longest_open_wait_s

from swarmtrain.simulate.systems.world import Settings, SynchronousWorld

pytestmark = pytest.mark.slow

NUM_SCHEDULES = 40
"""Drawn anew by nobody: always the same. `make search` draws others, for as long as it is let."""
FAULTS_END_S = 60.0
BASE_WAIT_S = 5.0
"""Without a fault: the slowest peer's round less the fastest one's, and the transfers."""
FAULT_WAIT_S = 22.0
"""Longest wait by one fault: a call's time limit and hold (7 s), a stalled transfer (10 s), a silence (5 s)."""


@dataclass(frozen=True)
class Fault:
    kind: str
    peer: int
    at_s: float
    lasts_s: float
    round: int
    moment: str


faults = st.builds(
    Fault,
    kind=st.sampled_from(["kill", "leave", "freeze", "partition", "cut", "loss", "join", "fail_at"]),
    peer=st.integers(0, 7),
    at_s=st.floats(3.0, FAULTS_END_S - 20),
    lasts_s=st.floats(0.5, 20.0),
    round=st.integers(0, 8),
    moment=st.sampled_from(["started", "ended", "signed", "told_one", "serving"]),
)


def declare(world: SynchronousWorld, fault: Fault, names: list[str], index: int) -> None:
    name, end_s = names[fault.peer % len(names)], fault.at_s + fault.lasts_s
    if fault.kind == "kill":
        world.at(fault.at_s, world.kill, name)
    elif fault.kind == "leave":
        world.at(fault.at_s, world.leave, name)
    elif fault.kind == "freeze":
        world.at(fault.at_s, world.freeze, name)
        world.at(end_s, world.thaw, name)
    elif fault.kind == "partition":
        world.at(fault.at_s, world.partition, names[: 1 + fault.peer % len(names)])
        world.at(end_s, world.heal)
    elif fault.kind == "cut":
        world.at(fault.at_s, world.cut_off, name)
        world.at(end_s, world.heal)
    elif fault.kind == "loss":
        world.at(fault.at_s, world.lose_messages, 0.2)
        world.at(end_s, world.lose_messages, 0.0)
    elif fault.kind == "join":
        world.at(fault.at_s, world.join, f"{'az'[fault.peer % 2]}{index}")
    elif fault.kind == "idle":
        world.at(fault.at_s, world.idle, name)
        world.at(end_s, world.sign_again, name)
    else:
        world.fail_at(name, fault.round, fault.moment)  # type: ignore[arg-type]


@settings(max_examples=NUM_SCHEDULES, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    speeds=st.lists(st.sampled_from([8.0, 10.0, 16.0]), min_size=1, max_size=8),
    share_above=st.sampled_from([2, 5]),
    declared=st.lists(faults, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_any_schedule_of_faults(speeds: list[float], share_above: int, declared: list[Fault], seed: int) -> None:
    world = SynchronousWorld(Settings(share_above=share_above), seed=seed)
    names = [f"p{i}" for i in range(len(speeds))]
    for name, steps_per_s in zip(names, speeds, strict=True):
        world.join(name, steps_per_s=steps_per_s)
    for index, fault in enumerate(declared):
        declare(world, fault, names, index)
    world.run_until(FAULTS_END_S)
    world.heal()
    world.lose_messages(0.0)
    for name in list(world.peers):
        world.thaw(name)
    world.declare_no_more()
    bound_s = BASE_WAIT_S + FAULT_WAIT_S * len(declared)
    assert longest_open_wait_s(world) <= bound_s
    assert max((wait_s for _, _, wait_s in world.waits_s), default=0.0) <= bound_s
    if world.running():
        world.run_until(FAULTS_END_S + world.settings.presence_ttl_s / 3 + 20)
        assert_one_model(world)
        late = [wait_s for _, _, wait_s in world.waits_s[-len(world.running()) :]]
        assert max(late) <= BASE_WAIT_S, "the faults are over and forgotten"


idle = st.builds(
    Fault, st.just("idle"), st.integers(0, 3), st.floats(3, 20), st.floats(10, 40), st.just(0), st.just("")
)
others = faults.filter(lambda fault: fault.kind in ("kill", "leave", "join", "partition", "loss", "freeze"))


@settings(max_examples=NUM_SCHEDULES // 2, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    speeds=st.lists(st.sampled_from([8.0, 10.0, 16.0]), min_size=3, max_size=8),
    share_above=st.sampled_from([2, 5]),
    idlers=st.lists(idle, min_size=1, max_size=3),
    declared=st.lists(others, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_signers_that_do_not_sign_part_nobody(
    speeds: list[float], share_above: int, idlers: list[Fault], declared: list[Fault], seed: int
) -> None:
    """Everyone judges them by its own clock, and so the peers disagree about who is to sign."""
    limit_s = 10.0
    world = SynchronousWorld(Settings(share_above=share_above, round_limit_s=limit_s), seed=seed)
    names = [f"p{i}" for i in range(len(speeds))]
    for name, steps_per_s in zip(names, speeds, strict=True):
        world.join(name, steps_per_s=steps_per_s)
    for index, fault in enumerate([*idlers, *declared]):
        declare(world, fault, names, index)
    world.run_until(FAULTS_END_S)
    world.heal()
    world.lose_messages(0.0)
    for name in list(world.peers):
        world.thaw(name)
    bound_s = limit_s + world.settings.silence_s * (1 + len(idlers)) + FAULT_WAIT_S * len(declared)
    assert max((wait_s for _, _, wait_s in world.waits_s), default=0.0) <= bound_s
    if world.running():
        world.run_until(FAULTS_END_S + world.settings.presence_ttl_s / 3 + 20)
        assert_one_model(world)
