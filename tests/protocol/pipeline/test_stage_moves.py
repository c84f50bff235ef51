"""Moves between stages: unequal stages become equal, and no move empties one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from swarmtrain.protocol.pipeline.balance import (
    Joiner,
    Rule,
    StageChange,
    StagePeer,
    anchor,
    changes,
    my_change,
    stage_rates,
    stages_for_joiner,
)
from swarmtrain.protocol.pipeline.moves import LeaseRequest, StageLeases


def _peers(*counts: int, rate: float = 100.0, most_stages: int = 1) -> dict[str, StagePeer]:
    """Return so many equal peers at each stage."""
    stages = [stage for stage, count in enumerate(counts) for _ in range(count)]
    return {
        f"p{number:02}": StagePeer(peer=f"p{number:02}", stages=(stage,), tokens_per_s=rate, most_stages=most_stages)
        for number, stage in enumerate(stages)
    }


def _rule(num_stages: int) -> Rule:
    return Rule(costs=(1 / num_stages,) * num_stages)


def _settle(peers: dict[str, StagePeer], rule: Rule) -> list[StageChange]:
    """Moves one after the other until nobody wants to."""
    made: list[StageChange] = []
    while len(made) < 50:
        found, _ = changes(peers.values(), 0.0, rule)
        if not found:
            return made
        for change in found:
            peers[change.peer] = replace(peers[change.peer], stages=change.after)
            made.append(change)
    raise AssertionError("they move for ever")


@pytest.mark.parametrize(
    ("counts", "ends"),
    [((4, 1, 1), [2, 2, 2]), ((8, 2, 2), [4, 4, 4]), ((3, 3, 1, 1), [2, 2, 2, 2]), ((6, 0, 0), [2, 2, 2])],
    ids=str,
)
def test_unequal_stages_become_equal(counts: tuple[int, ...], ends: list[int]) -> None:
    peers, rule = _peers(*counts), _rule(len(counts))
    made = _settle(peers, rule)
    assert stage_rates(peers.values(), rule) == pytest.approx([100.0 * count for count in ends])
    assert len(made) == sum(max(0, count - end) for count, end in zip(counts, ends, strict=True))
    assert all(change.reason for change in made)


def test_equal_stages_stay_as_they_are_and_say_why() -> None:
    found, reason = changes(_peers(2, 2, 2).values(), 0.0, _rule(3))
    assert not found and "5%" in reason


def test_everyone_names_the_same_peer_and_only_it_moves() -> None:
    peers, rule = _peers(4, 1, 1), _rule(3)
    named = [my_change(me, peers.values(), 0.0, rule)[0] for me in peers]
    assert sum(change is not None for change in named) == 1


def test_unequal_peers_are_placed_by_what_they_do() -> None:
    rng = random.Random(1)
    for _ in range(50):
        num_stages = rng.randint(2, 4)
        rule = _rule(num_stages)
        peers = {
            f"p{n:02}": StagePeer(
                peer=f"p{n:02}", stages=(rng.randrange(num_stages),), tokens_per_s=rng.uniform(50, 500)
            )
            for n in range(16)
        }
        total = sum(peer.tokens_per_s for peer in peers.values())
        _settle(peers, rule)
        assert min(stage_rates(peers.values(), rule)) > 0.75 * total / num_stages


def test_a_joiner_goes_where_it_is_needed_most() -> None:
    peers, rule = _peers(2, 1, 2), _rule(3)
    assert stages_for_joiner(Joiner(peer="new", tokens_per_s=33.0), peers.values(), 0.0, rule)[0] == (1,)
    alone, _ = stages_for_joiner(Joiner(peer="new", tokens_per_s=33.0, most_stages=3), (), 0.0, rule)
    assert alone == (0, 1, 2), "fewer peers than stages: it serves several"


def test_who_was_not_seen_lately_does_not_count() -> None:
    peers, rule = _peers(2, 2, 1), _rule(3)
    found, _ = changes(peers.values(), 59.0, rule)
    gone, reason = changes(peers.values(), 61.0, rule)
    assert not gone and reason == "nobody is there"
    assert not found or found[0].after == (2,)


def test_no_schedule_of_joint_moves_empties_a_stage() -> None:
    """Two who hold a stage both want to leave, whatever they see; calls and moves in any order."""
    for seed in range(500):
        rng = random.Random(seed)
        stays = {name: StageLeases(name) for name in ("a", "b", "c")}
        there, now = {"a", "b", "c"}, 0.0
        waiting: list[tuple[str, str, float]] = []
        for _ in range(60):
            now += rng.uniform(0.0, 20.0)
            me = rng.choice(sorted(stays))
            action = rng.random()
            if me not in there:
                continue
            if action < 0.4 and stays[me].wants_to_leave(0, now)[0] and len(there) > 1:
                waiting.append((me, rng.choice(sorted(there - {me})), now))
            elif action < 0.7 and waiting:
                mover, asked, asked_s = waiting.pop(rng.randrange(len(waiting)))
                request = LeaseRequest(stage=0, mover=mover, anchor=asked, asked_s=asked_s)
                lease, reason = stays[asked].asked(request, (0,) if asked in there else (), now)
                assert reason
                if lease is not None:
                    stays[mover].granted(lease)
            elif stays[me].may_leave(0, now)[0]:
                there.discard(me)
                stays[me].over(0)
            elif action > 0.95:
                stays[me].over(0)
            assert there, f"seed {seed}: nobody is left"


def test_the_anchor_is_one_that_stays() -> None:
    peers, rule = _peers(3, 1), _rule(2)
    assert anchor("p00", peers.values(), 0, 0.0, rule) == "p01"
    peers["p01"] = replace(peers["p01"], moving_to=(1,))
    assert anchor("p00", peers.values(), 0, 0.0, rule) == "p02"
    assert anchor("p03", peers.values(), 1, 0.0, rule) is None
