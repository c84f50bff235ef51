"""Asynchronous gossip under the virtual clock: nobody waits, rounds merge fresh parts, traffic does not grow."""

from __future__ import annotations

import cmath
import math
import random
import statistics
from collections import defaultdict
from itertools import pairwise

import pytest

from swarmtrain.protocol.gossip.partners import VARIANTS
from swarmtrain.protocol.gossip.pulls import PublicationBytes, WantedPartners
from swarmtrain.simulate.systems.gossip import GossipSwarm
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.publications import RoundRecord, SimulatedGossipSettings

pytestmark = pytest.mark.slow


def unequal_swarm(num_peers: int, settings: SimulatedGossipSettings | None = None, *, seed: int = 0) -> GossipSwarm:
    """Founders at speeds of 2 to 20 steps a second, with weights between -1 and 1."""
    swarm, rng = GossipSwarm(settings, seed=seed), random.Random(seed)
    for i in range(num_peers):
        swarm.found(f"p{i:04d}", steps_per_s=2.0 * 10.0 ** rng.random(), theta=rng.uniform(-1, 1))
    return swarm


def by_peer(swarm: GossipSwarm) -> dict[str, list[RoundRecord]]:
    rounds = defaultdict(list)
    for record in swarm.rounds:
        rounds[record.peer].append(record)
    return rounds


def assert_nobody_waits(swarm: GossipSwarm) -> None:
    """Check that a round takes only its inner steps, and that the next begins at the same moment.

    Except for a peer that has fallen behind and takes another's weights.
    """
    for name, rounds in by_peer(swarm).items():
        for one in rounds:
            assert one.ended_s - one.started_s == pytest.approx(one.steps / swarm.peers[name].steps_per_s)
        assert all(one.ended_s == following.started_s for one, following in pairwise(rounds) if not one.waited)


def assert_steps_enter_at_most_once(swarm: GossipSwarm) -> None:
    entered = defaultdict(list)
    for who, whose, fragment, round, since, until in swarm.entered:
        assert since < until and who != whose
        entered[who, whose, fragment, round].append((since, until))
    for spans in entered.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))


def fresh_share(records: list[RoundRecord]) -> float:
    """Return the share of fresh rounds, without each peer's first, in which others have published nothing yet."""
    merging = [record.partners > 0 for record in records if record.round > 0]
    return sum(merging) / len(merging)


def test_a_thousand_peers_some_of_which_die_and_come() -> None:
    settings = SimulatedGossipSettings(inner_steps=128, max_staleness_rounds=4, sample=12)
    swarm = unequal_swarm(1000, settings)
    at_first = swarm.spread()
    for i in range(100):
        swarm.at(20.0, swarm.kill, f"p{i:04d}")
        if i < 50:
            swarm.at(25.0 + i / 10, swarm.join, f"q{i:04d}")
    swarm.run_until(52.0)
    assert_nobody_waits(swarm)
    assert_steps_enter_at_most_once(swarm)
    assert len(swarm.running()) == 950 and len(swarm.rounds) > 4000
    assert fresh_share(swarm.rounds) >= 0.95
    assert max(record.staleness_rounds for record in swarm.rounds) <= settings.max_staleness_rounds
    assert min(peer.round for peer in swarm.running()) >= statistics.median(p.round for p in swarm.running()) - 5
    assert swarm.spread() < 0.25 * at_first
    assert not swarm.incidents


def test_half_of_the_peers_killed_at_once_delay_nobody() -> None:
    swarm = unequal_swarm(8)
    swarm.run_until(30.0)
    for i in range(4):
        swarm.kill(f"p{i:04d}")
    swarm.run_until(120.0)
    assert_nobody_waits(swarm)
    assert_steps_enter_at_most_once(swarm)
    assert fresh_share([record for record in swarm.rounds if record.ended_s > 30.0]) >= 0.95


def test_one_frozen_and_one_cut_off_cost_the_others_nothing() -> None:
    swarm = unequal_swarm(6)
    swarm.at(20.0, swarm.freeze, "p0000")
    swarm.at(20.0, swarm.cut_off, "p0001")
    swarm.at(80.0, swarm.thaw, "p0000")
    swarm.at(80.0, swarm.heal)
    swarm.run_until(200.0)
    others = [record for record in swarm.rounds if record.peer not in ("p0000", "p0001")]
    assert fresh_share(others) >= 0.95
    assert_steps_enter_at_most_once(swarm)
    back = [record for record in swarm.rounds if record.peer in ("p0000", "p0001") and record.started_s > 100.0]
    assert fresh_share(back) >= 0.95 and swarm.spread() < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_a_newcomer_trains_and_merges_while_two_of_three_hang(seed: int) -> None:
    """Those who hang are present to it, and do not answer: it takes the state of the one that trains."""
    settings = SimulatedGossipSettings(presence_ttl_s=60.0, stall_limit_s=3.0)
    swarm, came_s = GossipSwarm(settings, seed=seed), 15.0
    for i, theta in enumerate((-1.0, 0.5, 1.0)):
        swarm.found(f"p{i}", theta=theta)
    swarm.at(10.0, swarm.freeze, "p1")
    swarm.at(10.0, swarm.freeze, "p2")
    swarm.at(came_s, swarm.join, "new")
    swarm.run_until(50.0)
    assert {peer.name for peer in swarm.running()} == {"new", "p0"}, "the others still hang"
    assert {"p1", "p2"} <= swarm.board.keys(), "and are still present"
    rounds = by_peer(swarm)["new"]
    most_s = 4 * settings.stall_limit_s + 1.0
    assert rounds[0].started_s - came_s <= most_s, "each that does not answer costs it two calls at most"
    assert rounds[0].round > 0 and len(rounds) >= 3 and fresh_share(rounds) == 1.0, "it merges in each round"
    assert {("new", "p0"), ("p0", "new")} <= {(one.who, one.whose) for one in swarm.entered}, "and is merged"
    assert_nobody_waits(swarm)

    swarm.thaw("p1")
    swarm.thaw("p2")
    swarm.run_until(110.0)
    later = {(one.who, one.whose) for one in swarm.entered}
    assert {("new", "p1"), ("new", "p2"), ("p1", "new"), ("p2", "new")} <= later, "and so with those who woke"
    assert_steps_enter_at_most_once(swarm)


@pytest.mark.parametrize("pacing", [True, False])
def test_restarts_from_old_checkpoints_merge_nothing_twice(pacing: bool) -> None:
    swarm = unequal_swarm(
        6, SimulatedGossipSettings(pacing=pacing, wanted=WantedPartners(2, 2), max_staleness_rounds=30), seed=2
    )
    for i in range(20):
        swarm.at(60.0 + 7.0 * i, swarm.restart, f"p{i % 6:04d}")
    swarm.run_until(260.0)
    assert_steps_enter_at_most_once(swarm)
    assert len(swarm.entered) > 300 and fresh_share(swarm.rounds) >= 0.95
    assert {words.split(" ")[1] for _, _, words in swarm.incidents} <= {"counter"}


def test_lost_messages_and_slow_links() -> None:
    swarm = GossipSwarm(
        SimulatedGossipSettings(inner_steps=200), link=SimulatedLink(latency_s=0.05, bytes_per_s=1e6, drop=0.05), seed=1
    )
    for i in range(8):
        swarm.found(f"p{i}", steps_per_s=10.0 + i, theta=float(i % 2))
    swarm.run_until(300.0)
    assert_nobody_waits(swarm)
    assert_steps_enter_at_most_once(swarm)
    assert fresh_share(swarm.rounds) >= 0.95


def test_traffic_of_a_peer_is_the_same_with_four_and_with_sixteen() -> None:
    bytes_per_round, bytes_up = {}, {}
    for num_peers in (4, 16):
        swarm = unequal_swarm(num_peers)
        swarm.run_until(300.0)
        rounds = [record for record in swarm.rounds if record.round > 1]
        bytes_per_round[num_peers] = statistics.mean(record.bytes_down for record in rounds)
        bytes_up[num_peers] = sum(peer.bytes_up for peer in swarm.running()) / len(rounds)
        assert max(record.bytes_down for record in rounds) <= 3 * swarm.settings.sizes.both
    assert bytes_per_round[16] == pytest.approx(bytes_per_round[4], rel=0.05)
    assert bytes_up[16] == pytest.approx(bytes_up[4], rel=0.05)


def test_a_slower_link_carries_fewer_partners_and_nobody_waits_for_it() -> None:
    sizes = PublicationBytes(weights=2_000_000, gradient=2_000_000)
    swarm = GossipSwarm(SimulatedGossipSettings(sizes=sizes), link=SimulatedLink(bytes_per_s=1e6))
    for i in range(5):
        swarm.found(f"p{i}", theta=float(i))
    swarm.run_until(120.0)
    assert_nobody_waits(swarm)
    later = [record for record in swarm.rounds if record.round > 2]
    partners = [record.partners for record in later]
    assert 0.7 < statistics.mean(partners) < 1.1, "two thirds of a round of 6.4 s carry 4.2 MB"
    assert fresh_share(later) > 0.65, "two may pull from one, whose uplink then carries half to each"
    assert statistics.mean(record.bytes_down for record in later) <= 1.1 * sizes.both


def test_without_pacing_the_slowest_takes_the_present_weights_when_it_is_too_far_behind() -> None:
    settings = SimulatedGossipSettings(pacing=False, max_staleness_rounds=3)
    swarm = GossipSwarm(settings)
    for i, speed in enumerate((20.0, 18.0, 16.0, 2.0)):
        swarm.found(f"p{i}", steps_per_s=speed, theta=float(i))
    swarm.run_until(600.0)
    assert_nobody_waits(swarm)
    assert_steps_enter_at_most_once(swarm)
    slow = by_peer(swarm)["p3"]
    assert len(slow) < 25 and slow[-1].round > 100, "its rounds are few, and numbered as the others' are"
    assert max(record.staleness_rounds for record in swarm.rounds) <= 3
    assert swarm.spread() < 0.01


def test_fragments_are_merged_one_after_the_other_and_each_step_of_each_enters_once() -> None:
    whole, pieces = (unequal_swarm(8, SimulatedGossipSettings(num_parts=16, num_fragments=number)) for number in (1, 4))
    at_first = pieces.spread()
    for swarm in whole, pieces:
        swarm.run_until(200.0)
        assert_nobody_waits(swarm)
        assert_steps_enter_at_most_once(swarm)
        assert fresh_share(swarm.rounds) > 0.95 and swarm.spread() < 0.02 * at_first
    assert {one.fragment for one in pieces.entered} == {0, 1, 2, 3}
    assert len({one.theta for one in pieces.running()[0].model.fragments}) > 1, "each is merged by itself"
    a_round = [statistics.mean(one.bytes_down for one in swarm.rounds if one.round > 1) for swarm in (whole, pieces)]
    assert a_round[1] == pytest.approx(a_round[0], rel=0.05)


@pytest.mark.parametrize("num_fragments", [1, 4])
def test_a_state_brings_what_has_entered_its_fragments(num_fragments: int) -> None:
    swarm = unequal_swarm(6, SimulatedGossipSettings(num_parts=16, num_fragments=num_fragments, pacing=False), seed=4)
    for number in range(12):
        swarm.at(20.0 + 3.7 * number, swarm.join, f"q{number:04d}")
    swarm.run_until(120.0)
    entered = defaultdict(list)
    for peer in swarm.running():
        for one in [*peer.model.came, *peer.model.entered]:
            entered[peer.name, one.whose, one.fragment, one.round].append((one.since, one.until))
    assert sum(len(peer.model.came) > 0 for peer in swarm.running()) == 18
    for spans in entered.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))


@pytest.mark.parametrize("inner_steps", [64, 15])
def test_rounds_keep_in_step_unless_they_are_very_short(inner_steps: int) -> None:
    swarm = GossipSwarm(SimulatedGossipSettings(inner_steps=inner_steps), seed=1)
    for i in range(16):  # each begins when it does
        swarm.run_until(0.3 * i)
        swarm.found(f"p{i:04d}", steps_per_s=(8.0, 7.0, 5.0, 4.0)[i % 4])
    swarm.run_until(300.0)
    assert_nobody_waits(swarm)
    round_s = inner_steps / 8.0
    late = [one.ended_s for one in swarm.rounds if one.ended_s > 100.0]
    together = abs(sum(cmath.rect(1.0, math.tau * at_s / round_s) for at_s in late)) / len(late)
    starts = abs(sum(cmath.rect(1.0, math.tau * 0.3 * i / round_s) for i in range(16))) / 16
    assert starts < 0.7
    assert together > 0.95 if inner_steps == 64 else together < 0.6


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_brings_the_weights_together(variant: str) -> None:
    swarm = unequal_swarm(12, SimulatedGossipSettings(variant=variant, wanted=WantedPartners(1, 1)), seed=3)
    at_first = swarm.spread()
    swarm.run_until(150.0)
    assert_steps_enter_at_most_once(swarm)
    assert fresh_share(swarm.rounds) >= 0.95 and swarm.spread() < 0.02 * at_first


def test_peers_with_targets_of_their_own_stay_together_near_the_mean() -> None:
    swarm = unequal_swarm(8, SimulatedGossipSettings(inner_rate=0.002), seed=5)
    targets = [peer.model.target for peer in swarm.running()]
    at_first = swarm.spread()
    swarm.run_until(400.0)
    assert swarm.spread() < 0.25 * at_first
    weights = [peer.theta for peer in swarm.running()]
    assert min(targets) < statistics.mean(weights) < max(targets)


def test_data_coverage_without_a_server_one_of_four_gone_for_good() -> None:
    swarm = unequal_swarm(4, SimulatedGossipSettings(num_shards=64))
    swarm.at(15.0, swarm.kill, "p0003")
    swarm.run_until(200.0)
    for peer in swarm.running():
        assert peer.coverage is not None and min(peer.coverage.seen) > 0


def test_the_same_swarm_twice_is_the_same() -> None:
    def once() -> tuple[object, ...]:
        swarm = unequal_swarm(20, seed=9)
        swarm.lose_messages(0.02)
        swarm.at(12.0, swarm.kill, "p0002")
        swarm.run_until(60.0)
        return swarm.rounds, swarm.entered, [peer.theta for peer in swarm.running()]

    assert once() == once()


def test_links_are_shared_by_one_rule_however_many_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.simulate.systems.network.EXACT_UP_TO", 3)
    few, many = unequal_swarm(3), unequal_swarm(4)
    for swarm in few, many:
        swarm.run_until(30.0)
    few.join("late")
    many.kill("p0000")
    many.forget("p0000")
    for swarm in few, many:
        swarm.run_until(120.0)
    assert (few.links.exact, len(few.peers)) == (True, 4)
    assert (many.links.exact, len(many.peers)) == (False, 3)


def test_one_peer_alone_trains_and_merges_nobody() -> None:
    swarm = unequal_swarm(1)
    swarm.run_until(300.0)
    assert_nobody_waits(swarm)
    assert len(swarm.rounds) > 5 and not swarm.entered and {record.partners for record in swarm.rounds} == {0}
