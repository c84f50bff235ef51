"""Single faults, each with the wait that it may cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from swarms import assert_one_model, assert_tokens_count_once

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.simulate.systems.volunteer import SimulatedVolunteer
from swarmtrain.simulate.systems.world import Settings, SimulatedLink, SynchronousWorld

pytestmark = pytest.mark.slow

# What a dead, silent or cut-off peer may cost the others once, in seconds: the time a refused call or a stalled
# transfer takes to be noticed, and then the silence before the next in turn acts.
SETTINGS = Settings()
ROUND_S = SETTINGS.inner_steps / 10.0
KILL_COSTS_S = 3.0 + SETTINGS.silence_s
SILENCE_COSTS_S = SETTINGS.call_limit_s + SETTINGS.hold_s + SETTINGS.stall_limit_s + SETTINGS.silence_s


def longest_wait_s(world: SynchronousWorld) -> float:
    return max(wait_s for _, _, wait_s in world.waits_s)


def swarm(num_peers: int) -> SynchronousWorld:
    world = SynchronousWorld()
    world.join_many(num_peers)
    return world


def test_one_peer_alone_is_a_swarm() -> None:
    world = swarm(1)
    assert world.run_rounds(5, 5 * ROUND_S + 1)
    assert longest_wait_s(world) == 0
    assert_one_model(world)


@pytest.mark.parametrize("num_peers", [2, 3, 5, 6, 8, 50])
def test_without_faults_nobody_waits_longer_than_the_transfers(num_peers: int) -> None:
    world = swarm(num_peers)
    assert world.run_rounds(5, 60)
    assert longest_wait_s(world) < 1.5
    assert len(world.events("signed")) == 5
    assert not world.events("adopted")
    assert {event.peer for event in world.events("signed")} == {"p000"}
    assert all(len(event.roster.entries) == num_peers for event in world.events("signed") if event.roster)
    assert_one_model(world)


def test_the_same_world_twice_is_the_same() -> None:
    def once() -> list[object]:
        world = SynchronousWorld(link=SimulatedLink(drop=0.02), seed=7)
        world.join_many(6)
        world.at(7.0, world.kill, "p002")
        world.run_until(40)
        return list(world.log)

    assert once() == once()


@pytest.mark.parametrize("num_idle", [1, 2])
@pytest.mark.parametrize("num_peers", [4, 9])
def test_a_signer_that_never_signs_costs_ever_fewer_rounds(num_peers: int, num_idle: int) -> None:
    """It publishes and answers; each of its turns costs the time limit and a silence."""
    limit_s = 8.0
    world = SynchronousWorld(Settings(round_limit_s=limit_s))
    world.join_many(num_peers)
    for i in range(num_idle):
        world.at(5.0 + i, world.idle, f"p{i:03d}")
    world.run_until(400.0)
    slow = [round for name, round, wait_s in world.waits_s if name == f"p{num_peers - 1:03d}" and wait_s > 2]
    assert slow == [1, 2, 5, 10, 19, 36, 69]
    assert longest_wait_s(world) < limit_s + num_idle * SETTINGS.silence_s
    rosters = [event.roster for event in world.events("signed") if event.time_s > 20 and event.roster]
    assert all(len(roster.peers) == num_peers for roster in rosters), "it is still a member, as are all others"
    for i in range(num_idle):
        world.sign_again(f"p{i:03d}")
    world.run_until(700.0)
    assert {event.peer for event in world.events("signed") if event.time_s > 650} == {"p000"}, "its turn again"
    assert_one_model(world)


def test_those_who_pass_over_different_signers_stay_one_swarm() -> None:
    """Half of them have not seen it: two sign, and the same hashes hold."""
    world = swarm(4)
    world.run_until(5.0)
    for name in ("p002", "p003"):
        for _ in range(2):
            world.peers[name].engine.signers.round_over(0, ["p000", "p001"], [])
    assert world.run_rounds(8, 60)
    assert longest_wait_s(world) < 1.5
    assert_one_model(world)


def test_slower_peers_are_waited_for() -> None:
    world = SynchronousWorld()
    for name, steps_per_s in (("a", 10.0), ("b", 5.0), ("c", 10.0)):
        world.join(name, steps_per_s=steps_per_s)
    assert world.run_rounds(4, 60)
    assert all(len(event.roster.entries) == 3 for event in world.events("signed") if event.roster)
    assert longest_wait_s(world) < ROUND_S + 1


def test_the_time_limit_closes_a_round_for_a_peer_that_takes_too_long() -> None:
    world = SynchronousWorld(Settings(round_limit_s=6.0))
    for name, steps_per_s in (("a", 10.0), ("b", 10.0), ("c", 0.5)):
        world.join(name, steps_per_s=steps_per_s)
    world.run_until(60)
    assert all(peer.round >= 6 for peer in world.running())
    assert longest_wait_s(world) < 8


@pytest.mark.parametrize("num_peers", [3, 4, 8])
@pytest.mark.parametrize("late_s", [0.1, 0.5, 1.0, 3.0])
def test_who_stood_still_hears_what_was_signed_meanwhile_before_it_signs(late_s: float, num_peers: int) -> None:
    """It wakes with everybody's publications in its ear, after they have passed it over."""
    world = swarm(num_peers)

    def stop(name: str) -> None:
        asked_s = world.clock.now + 0.01
        world.at(asked_s, world.freeze, name)
        world.at(asked_s + SETTINGS.hold_s + SETTINGS.silence_s + late_s, world.thaw, name)

    world.fail_at("p000", 2, "ended", stop)
    assert world.run_rounds(6, 60)
    applied = [event for event in world.events("applied") if event.peer == "p000" and event.roster]
    assert [event.roster.digest for event in applied] == [
        roster.digest for roster in world.peers["p000"].history if roster.round in {event.round for event in applied}
    ], "what it merged holds"
    assert "p000" not in {event.peer for event in world.events("signed") if event.round == 2}
    assert {event.peer for event in world.events("signed") if event.round == 5} == {"p000"}
    assert_one_model(world)


@pytest.mark.parametrize("moment", ["started", "ended", "signed", "told_one", "serving"])
@pytest.mark.parametrize("victim", ["p000", "p001", "p002"])
@pytest.mark.parametrize("num_peers", [3, 8])
def test_a_killed_peer_costs_a_bounded_wait(moment: str, victim: str, num_peers: int) -> None:
    world = swarm(num_peers)
    world.fail_at(victim, 2, moment)  # type: ignore[arg-type]
    world.run_until(40)
    assert len(world.running()) == num_peers - (moment not in ("signed", "told_one") or victim == "p000")
    assert longest_wait_s(world) < KILL_COSTS_S
    assert_one_model(world)


def test_the_roster_that_only_one_was_told_holds() -> None:
    """The signer dies after its bytes are everywhere and one peer has its roster: that is enough."""
    world = SynchronousWorld()
    for name, steps_per_s in (("p000", 10.0), ("p001", 10.0), ("p002", 10.0), ("p003", 8.0)):
        world.join(name, steps_per_s=steps_per_s)
    world.fail_at("p000", 2, "told_one")
    assert world.run_rounds(4, 60)
    applied = {event.roster.signer for event in world.events("applied") if event.round == 2 and event.roster}
    final = {peer.history[2].digest for peer in world.running()}
    assert len(final) == 1
    assert "p000" in applied


def test_everyone_but_one_is_killed() -> None:
    world = swarm(6)
    world.run_until(10)
    for i in (0, 1, 2, 4, 5):
        world.kill(f"p{i:03d}")
    world.run_until(40)
    assert [peer.name for peer in world.running()] == ["p003"]
    assert longest_wait_s(world) < KILL_COSTS_S
    assert world.peers["p003"].round > 6


def test_the_whole_swarm_changes_over_time() -> None:
    world = swarm(3)
    for i in range(8):
        world.at(10.0 + 10 * i, world.join, f"n{i}")
    for i in range(3):
        world.at(35.0 + 10 * i, world.kill, f"p{i:03d}")
    for i in range(5):
        world.at(60.0 + 10 * i, world.leave, f"n{i}")
    world.run_until(130)
    assert [peer.name for peer in world.running()] == ["n5", "n6", "n7"]
    assert len(world.running()[0].history) > 20
    assert_one_model(world)


@pytest.mark.parametrize("frozen_s", [1.0, 4.0, 9.0, 30.0, 90.0])
@pytest.mark.parametrize("begins_s", [6.9, 9.0, 9.7, 10.1])
def test_a_frozen_signer_is_passed_over_and_comes_back(frozen_s: float, begins_s: float) -> None:
    world = swarm(3)
    world.at(begins_s, world.freeze, "p000")
    world.at(begins_s + frozen_s, world.thaw, "p000")
    world.run_until(begins_s + frozen_s + 20)
    assert longest_wait_s(world) < SILENCE_COSTS_S
    assert_one_model(world)


@pytest.mark.parametrize("num_peers", [3, 8])
@pytest.mark.parametrize("victim", ["p000", "p002"])
def test_a_frozen_peer_costs_two_rounds_however_long_its_presence_lasts(num_peers: int, victim: str) -> None:
    world = SynchronousWorld(Settings(presence_ttl_s=120.0))
    world.join_many(num_peers)
    world.at(9.0, world.freeze, victim)
    world.at(80.0, world.thaw, victim)
    world.run_until(75.0)
    slow = [wait_s for name, _, wait_s in world.waits_s if name == "p001" and wait_s > 2]
    assert len(slow) <= 2 and max(slow) < SILENCE_COSTS_S
    world.run_until(130.0)
    assert_one_model(world)


def test_a_thawed_signer_listens_before_it_signs() -> None:
    """It slept through the others' silence; by its own clock they have all been silent for long."""
    world = swarm(3)
    world.fail_at("p000", 2, "ended", world.freeze)
    world.at(25.0, world.thaw, "p000")
    world.run_until(60)
    assert [e for e in world.events("signed") if e.peer == "p000" and e.round == 2] == []
    assert_one_model(world)


def test_of_two_rosters_of_one_round_the_lower_signers_holds() -> None:
    """The signer is cut off as its round ends: both sides sign round 1. It is back before round 2 ends."""
    world = swarm(3)
    world.at(5.0, world.partition, ["p000"])
    world.at(17.8, world.heal)
    world.run_until(60)
    signers = {event.peer for event in world.events("signed") if event.round == 1}
    assert signers == {"p000", "p001"}
    assert world.events("adopted")
    assert_one_model(world)


@pytest.mark.parametrize("apart_s", [2.0, 6.0, 15.0, 60.0])
@pytest.mark.parametrize("sides", [(["p000", "p001"], ["p002", "p003"]), (["p000", "p003"], ["p001", "p002"])])
def test_a_partition_heals(apart_s: float, sides: tuple[list[str], list[str]]) -> None:
    world = swarm(4)
    world.at(9.0, world.partition, *sides)
    world.at(9.0 + apart_s, world.heal)
    world.run_until(9.0 + apart_s + SETTINGS.presence_ttl_s)
    assert longest_wait_s(world) < SILENCE_COSTS_S
    assert_one_model(world)


def test_one_that_was_cut_off_does_not_take_back_the_work_of_many() -> None:
    """The lowest PeerID of six goes on alone, faster than the others; theirs holds, for more tokens are in it."""
    world = SynchronousWorld()
    world.join("a", steps_per_s=20.0)
    for name in "bcdef":
        world.join(name)
    world.run_until(9.0)
    world.partition(["a"])
    world.run_until(100.0)
    many, alone = world.peers["b"], world.peers["a"]
    assert alone.round > many.round
    before = many.history
    world.heal()
    world.run_until(140.0)
    assert many.history[: len(before)] == before
    assert not [event for event in world.events("adopted") if event.peer != "a" and event.time_s > 100]
    assert_one_model(world)


@pytest.mark.parametrize("num_peers", [8, 50])
@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_share_owner_fails(num_peers: int, fault: str) -> None:
    world = swarm(num_peers)
    world.fail_at("p004", 2, "serving", getattr(world, fault))
    world.run_until(45)
    world.thaw("p004")
    world.run_until(60)
    assert longest_wait_s(world) < (KILL_COSTS_S if fault == "kill" else SILENCE_COSTS_S)
    assert_one_model(world)


def test_a_peer_that_only_the_dht_can_reach_does_not_slow_the_rest_for_long() -> None:
    world = swarm(4)
    world.at(9.0, world.cut_off, "p000")
    world.run_until(200)
    slow = [wait_s for name, _, wait_s in world.waits_s if name == "p001" and wait_s > 2]
    assert len(slow) <= 12
    assert world.peers["p001"].round > 30


def test_the_first_candidates_of_a_large_swarm_die_at_once() -> None:
    """Most peers ask only two candidates; the rest have not been silent, only unasked."""
    world = swarm(30)
    for i in range(6):
        world.fail_at(f"p{i:03d}", 2, "ended")
    world.run_until(40)
    assert len([event for event in world.events("signed") if event.round == 2]) <= 2
    assert longest_wait_s(world) < 2 * KILL_COSTS_S
    assert_one_model(world)


@pytest.mark.parametrize("joins_s", [8.0, 8.9, 9.5, 10.1, 10.5, 11.0])
@pytest.mark.parametrize("name", ["a-low", "z-high"])
@pytest.mark.parametrize("num_peers", [3, 8])
def test_a_late_joiner_delays_nobody(joins_s: float, name: str, num_peers: int) -> None:
    world = swarm(num_peers)
    world.at(joins_s, world.join, name)
    world.run_until(40)
    assert longest_wait_s(world) < 2.0
    joined = world.events("adopted")[0]
    first = world.peers["p001"].history[joined.round]
    second = world.peers["p001"].history[joined.round + 1]
    assert name in first.peers + second.peers
    assert_one_model(world)


def test_a_leaver_costs_nothing() -> None:
    world = swarm(4)
    world.at(9.0, world.leave, "p000")
    world.run_until(30)
    assert longest_wait_s(world) < 1.5
    assert_one_model(world)


def test_lost_messages_cost_time_and_nothing_else() -> None:
    world = SynchronousWorld(seed=3)
    world.join_many(5)
    world.run_until(8)
    world.lose_messages(0.1)
    world.run_until(60)
    world.lose_messages(0.0)
    world.run_until(75)
    assert_one_model(world)


@pytest.mark.parametrize("num_peers", [100, pytest.param(300, marks=pytest.mark.evidence)])
def test_a_large_swarm_whose_signer_dies(num_peers: int) -> None:
    world = swarm(num_peers)
    world.fail_at("p000", 1, "signed")
    assert world.run_rounds(2, 60)
    assert len(set(world.digests(2).values())) == 1
    assert longest_wait_s(world) < KILL_COSTS_S
    assert_tokens_count_once(world)


class _ClaimsDone(SimulatedVolunteer):
    """Claims in its presence that it has done all of the round that the others are about to begin."""

    def info(self) -> PeerInfo:
        return replace(super().info(), round=self.round + 1, inner_steps_done=self.settings.inner_steps)


def test_one_that_claims_to_be_done_shortens_nobody_elses_round() -> None:
    world = SynchronousWorld(Settings(inner_steps=100))
    world.join_many(19)
    liar = world.peers["liar"] = _ClaimsDone(world, "liar", 10.0, SimulatedLink())
    world.record("joined", liar)
    liar.deliver(liar.begin)
    assert world.run_rounds(4, 60)
    history = world.peers["p000"].history
    steps = [entry.inner_steps for roster in history for entry in roster.entries if entry.peer != "liar"]
    assert steps == [100] * 19 * len(history)
