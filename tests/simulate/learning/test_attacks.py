"""Hostile volunteers of a scenario: each does what it says, a rule bounds it, and what they train does not count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from learnt import setting, tiny

from swarmtrain.algorithm.pacing import fewest_inner_steps
from swarmtrain.simulate.learning.gossip import LearningPeer
from swarmtrain.simulate.learning.hostile import HostileWorld, gossip
from swarmtrain.simulate.learning.setting import RunOutcome, Setting

pytestmark = pytest.mark.slow

ALIKE = {"number": 4, "slowdowns": [1.0]}


def hostile(tmp_path: Path, attack: str, percent: float = 25, **changes: Any) -> Setting:
    changes = {"merge__method": "gossip", "merge__pacing": True} | changes
    return setting(tiny(tmp_path, peers=ALIKE, hostile={"attack": attack, "percent": percent}), **changes)


def published(tmp_path: Path, attack: str) -> tuple[HostileWorld, Any]:
    """Return a world in which the hostile peer has just published, in its third round; and that peer."""
    world = HostileWorld(hostile(tmp_path, attack, merge__fragments=1))
    one: Any = world.peers[-1]
    train_to, stopped = one.train_to, []

    def noted(moment: int) -> None:
        train_to(moment)
        stopped.append(one.round >= 2)

    one.train_to = noted
    for peer in world.peers:
        world.clock.call_at(0.01 * peer.number, peer.begin)
    while not any(stopped):
        world.clock.step()
    return world, one


def test_what_is_published_in_place_of_what_was_learnt(tmp_path: Path) -> None:
    for attack, factor in (("sign-flip", -1.0), ("sign-flip x3", -3.0), ("scaled x1000", 1000.0)):
        _, one = published(tmp_path, attack)
        assert torch.equal(one.fragments[0].newest.vector, factor * one.gradients[0])
    for attack, number in (("huge", 1e30), ("nan", math.nan)):
        _, one = published(tmp_path, attack)
        assert torch.equal(
            one.fragments[0].newest.vector.nan_to_num(7), torch.full_like(one.gradients[0], number).nan_to_num(7)
        )
    world, one = published(tmp_path, "noise x3")
    for place in world.layout.slices:
        assert float(one.fragments[0].newest.vector[place].norm()) == pytest.approx(
            3 * float(one.gradients[0][place].norm()), rel=1e-4
        )
    assert (
        abs(float(torch.nn.functional.cosine_similarity(one.fragments[0].newest.vector, one.gradients[0], dim=0))) < 0.2
    )


def test_weights_are_dragged_back_by_what_was_learnt(tmp_path: Path) -> None:
    _, one = published(tmp_path, "drag x3")
    assert torch.equal(one.fragments[0].newest.vector, one.gradients[0]), "which is honest"
    before, theta = one.gradients[0], one.trainer.state.theta
    assert torch.equal(one.spoilt_weights(0, theta), theta + 3 * before)


def test_a_little_is_the_honest_mean_less_so_many_deviations(tmp_path: Path) -> None:
    world, one = published(tmp_path, "little-is-enough x1.5")
    tokens = one.fragments[0].newest.version.tokens
    each = torch.stack(
        [new.vector * (tokens / new.version.tokens) for peer in world.honest if (new := peer.fragments[0].newest)]
    )
    assert len(each) == 3
    expected = each.mean(0) - 1.5 * each.std(0)
    assert torch.equal(one.fragments[0].newest.vector, expected) and not torch.equal(expected, one.gradients[0])


def test_a_copycat_publishes_what_an_honest_one_has(tmp_path: Path) -> None:
    world, one = published(tmp_path, "copycat")
    theirs = one.copied.fragments[0].newest
    assert one.copied in world.honest and theirs is not None
    assert torch.equal(
        one.fragments[0].newest.vector, theirs.vector * (one.fragments[0].newest.version.tokens / theirs.version.tokens)
    )


def test_liars_say_more_than_they_do(tmp_path: Path) -> None:
    world, one = published(tmp_path, "tokens")
    steps, full = one.start.inner_steps, world.setting.run.merge.inner_steps
    assert steps == fewest_inner_steps(full) == 1 and world.setting.step_s == (0.01, 0.01, 0.01, 0.08)
    assert (
        one.fragments[0].newest.version.tokens
        == world.setting.run.max_round_tokens
        == 1.5 * full * world.setting.run.tokens_per_step
    )
    lied, calm = hostile(tmp_path, "speed"), hostile(tmp_path, "sign-flip")
    assert [lied.said_speed(number, 100.0) for number in (0, 3)] == [100.0, 1e9] and calm.said_speed(3, 100.0) == 100.0
    assert lied.steps_of_round(0) == calm.steps_of_round(0) == full, "the second highest counts"
    assert calm.steps_of_everybody(0) == 3.0 and lied.steps_of_everybody(0) == 4.0


def test_a_rule_bounds_what_an_attack_costs(tmp_path: Path) -> None:
    losses = {
        (attack, rule): gossip(hostile(tmp_path, attack, merge__robust=rule))
        for attack, rule in (("absent", "none"), ("scaled x1000", "none"), ("scaled x1000", "clip"))
    }
    alone, struck, clipped = losses.values()
    assert not struck.held_out_loss < 2 * alone.held_out_loss, "or not a number"
    assert clipped.held_out_loss < 1.05 * alone.held_out_loss
    assert clipped.named_hostile and clipped.named_honest is not None and clipped.named_hostile > clipped.named_honest
    assert alone.named_hostile == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """What honest volunteers learn where the hostile one is not there."""
    return gossip(hostile(tmp_path_factory.mktemp("absent"), "absent"))


@pytest.mark.parametrize("attack", ["copycat", "tokens", "speed"])
def test_what_hostile_ones_train_does_not_count(attack: str, tmp_path: Path, alone: RunOutcome) -> None:
    one = gossip(hostile(tmp_path, attack))
    assert one == gossip(hostile(tmp_path, attack)), "bit by bit"
    assert sum(one.peer_tokens) == one.tokens and one.peer_tokens[-1] == 0
    assert one.tokens == alone.tokens and one.inner_steps == alone.inner_steps
    assert one.held_out_loss != alone.held_out_loss


def test_absent_ones_are_not_there(tmp_path: Path) -> None:
    world = HostileWorld(hostile(tmp_path, "absent", percent=50))
    assert [type(peer) for peer in world.peers] == [LearningPeer, LearningPeer]


def named_in(world: HostileWorld) -> list[tuple[bool, int]]:
    """Run, and return whether each reported peer is hostile, and the rounds of the farthest peer."""
    found, told = list[tuple[bool, int]](), world.told

    def noted(peer: str, incident: Any) -> None:
        found.append((world.by_name[peer].number >= world.setting.num_honest, max(one.round for one in world.peers)))
        told(peer, incident)

    for peer in world.peers:
        peer.naming._told = noted
    world.run()
    return found


def test_who_pauses_is_not_named_and_who_always_sends_too_much_is_soon(tmp_path: Path) -> None:
    pauses = [{"peer": 1, "at_s": 0.6, "for_s": 0.4}, {"peer": 0, "at_s": 1.2, "for_s": 0.6}]
    keys = {"merge__method": "gossip", "merge__pacing": True, "merge__robust": "clip"}
    absent, scaled = ({"attack": attack, "percent": 25} for attack in ("absent", "scaled x10"))
    long, short = ({"run.total_tokens": tokens} for tokens in (50_000, 32_000))
    calm = setting(tiny(tmp_path, peers=ALIKE, hostile=absent, hangs=pauses, set=long), **keys)
    assert named_in(HostileWorld(calm)) == []
    struck = setting(tiny(tmp_path, peers=ALIKE, hostile=scaled, set=short), **keys)
    named = named_in(HostileWorld(struck))
    assert named and all(is_hostile for is_hostile, _ in named)
    assert named[0][1] <= 10, "the first five do not count"
