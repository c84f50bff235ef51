"""Hostile peer among real trainers and exchanges: what it costs the others, and who is reported."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_gossip_exchange import STEP_TOKENS, STEPS, Peer, World, run_file

from swarmtrain.events import ClippedEvent, RefusedEvent
from swarmtrain.methods.method import GradientFormat
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.snapshots.store import Body
from swarmtrain.peer.merging.updates import LentWeights, LocalUpdate
from swarmtrain.protocol.gossip.fragments import FragmentRound
from swarmtrain.protocol.gossip.messages import MergeFragment
from swarmtrain.protocol.tokens.progress import Progress

pytestmark = pytest.mark.slow


@pytest.fixture
def world_of() -> Iterator[Callable[..., tuple[list[Peer], Peer]]]:
    """(three honest peers, mallory), with these keys of `merge`."""
    made: list[World] = []

    def make(**merge: Any) -> tuple[list[Peer], Peer]:
        made.append(World(run_file(**merge), 4))
        *honest, mallory = made[-1].everyone()
        return honest, mallory

    yield make
    for world in made:
        for peer in world.everyone():
            world.network.run(peer.exchange.gossip.stop(), 10)
        world.network.stop()


def publishes(mallory: Peer, change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`change` makes of weights and pseudo-gradient what mallory publishes of them."""
    codecs = mallory.exchange._codecs
    last: dict[int, torch.Tensor] = {}

    def weights(theta: torch.Tensor, fragment: int) -> Body:
        gradient = last.get(fragment, torch.zeros_like(theta))
        return Body([codecs[fragment].weights.encode(change(theta, gradient)[0])])

    def gradient(lent: LentWeights, of: FragmentRound, fragment: int, format: GradientFormat) -> Body:
        theta, last[fragment] = mallory.trainer.state_of(fragment).theta, lent.gradient()
        return Body([codecs[fragment].gradient.of[format].encode(change(theta, last[fragment])[1])])

    mallory.exchange._encode_weights = weights  # type: ignore[method-assign]
    mallory.exchange._encode_gradient = gradient  # type: ignore[method-assign]


def named(peers: list[Peer], kind: type[RefusedEvent] | type[ClippedEvent]) -> set[tuple[str, str]]:
    return {(event.from_peer, event.rule) for peer in peers for event in peer.events if isinstance(event, kind)}


def train(honest: list[Peer], mallory: Peer, *, partners: int) -> None:
    """Eight rounds of everyone; from the second on each honest peer merges so many others."""
    for number in range(8):
        for peer in (mallory, *honest):
            if peer is not mallory:
                peer.meet(mallory)  # who merges nobody is heard of by nobody
            peer.round(partners=partners if number and peer is not mallory else 0)
    for peer in honest:
        assert statistics.mean(report.loss for report in peer.reports[-2:]) < peer.reports[0].loss - 0.5


def partners_of(peer: Peer) -> list[set[str]]:
    """Return whose gradients it merged in each round."""
    return [
        {one.peer for one in each.merged if one.tokens}
        for report in peer.reports
        if isinstance(report.arrived, tuple)
        for each in report.arrived
    ]


def gradients_taken(peer: Peer) -> list[set[str]]:
    """Record whose gradients enter its merges from now on, however little a rule lets them count.

    An honest gradient of a few steps may point away from its own.
    """
    found, merge_due = list[set[str]](), peer.exchange.gossip.merge_due

    def noted(round: int, fragment: int, **how: Any) -> Any:
        due = merge_due(round, fragment, **how)
        assert isinstance(due, MergeFragment)
        found.append({one.peer for one in due.pulled if one.group == "gradient"})
        return due

    peer.exchange.gossip.merge_due = noted  # type: ignore[method-assign]
    return found


def test_large_numbers_are_cut_to_what_is_usual_and_named(world_of: Callable[..., tuple[list[Peer], Peer]]) -> None:
    honest, mallory = world_of()
    publishes(mallory, lambda theta, gradient: (theta + 50 * gradient, 50 * gradient))
    train(honest, mallory, partners=3)
    assert {(mallory.id, "displacement"), (mallory.id, "gradient")} <= named(honest, ClippedEvent)
    assert named(honest, RefusedEvent) == set()


def test_huge_numbers_are_refused_named_and_another_is_merged(
    world_of: Callable[..., tuple[list[Peer], Peer]],
) -> None:
    honest, mallory = world_of()
    publishes(mallory, lambda theta, gradient: (torch.full_like(theta, 1e30), torch.full_like(gradient, 1e30)))
    train(honest, mallory, partners=2)
    assert named(honest, RefusedEvent) == {(mallory.id, "huge")}
    assert all(mallory.id not in merged for peer in honest for merged in partners_of(peer))


def test_a_flipped_sign_is_refused_named_and_another_is_merged(
    world_of: Callable[..., tuple[list[Peer], Peer]],
) -> None:
    honest, mallory = world_of(robust="direction")
    publishes(mallory, lambda theta, gradient: (theta, -gradient))
    taken = {peer.id: gradients_taken(peer) for peer in honest}
    train(honest, mallory, partners=2)
    assert named(honest, RefusedEvent) == {(mallory.id, "direction")}
    for peer in honest:
        others = {other.id for other in honest} - {peer.id}
        assert all(whose == others for whose in taken[peer.id][-4:])


def test_a_claimed_speed_moves_nobody(world_of: Callable[..., tuple[list[Peer], Peer]]) -> None:
    honest, mallory = world_of(pacing=True)
    for peer in honest:
        peer.swarm.presence.me = dataclasses.replace(peer.swarm.presence.me, steps_per_s=100.0)
    mallory.swarm.presence.me = dataclasses.replace(mallory.swarm.presence.me, steps_per_s=9e8)
    me = honest[0]
    for other in (*honest[1:], mallory):
        other.swarm.presence.me = dataclasses.replace(other.swarm.presence.me, stamp=swarm_time())
        me.meet(other)
    me.exchange.hold([me.trainer.state_of(fragment) for fragment in range(len(me.trainer.fragments))])
    start = me.exchange.start_round(Progress(round=3), 100.0)
    assert (start.inner_steps, start.run_steps_a_step) == (STEPS, 4.0), "mallory counts as the second fastest does"


def test_claimed_tokens_are_counted_as_far_as_a_speed_explains_them_and_named(
    world_of: Callable[..., tuple[list[Peer], Peer]],
) -> None:
    honest, mallory = world_of()
    speeds = {peer.id: 1000.0 for peer in (*honest, mallory)}
    for peer in honest:  # no time passes that could explain anything, nor does a busy machine make anybody slower
        peer.swarm.accounting.clock = lambda began_s=peer.swarm.accounting.rules.began_s: began_s
        peer.swarm.accounting.speeds = lambda: speeds
    publish = mallory.exchange.publish

    def lie(contribution: LocalUpdate) -> None:
        publish(contribution)
        publisher = mallory.exchange.publishers["gradient", 0]
        assert publisher.newest is not None
        publisher.newest = dataclasses.replace(publisher.newest, author_tokens=10**9)

    mallory.exchange.publish = lie  # type: ignore[method-assign]
    train(honest, mallory, partners=3)
    whole = 8 * STEPS * STEP_TOKENS
    assert (mallory.id, "tokens") in named(honest, RefusedEvent)
    assert all(peer.trainer.progress.peer_tokens[mallory.id] <= 2 * STEPS * STEP_TOKENS for peer in honest)
    assert all(peer.trainer.progress.run_tokens <= 4 * whole for peer in honest)


def test_what_was_published_is_known_before_anything_is_accepted(
    world_of: Callable[..., tuple[list[Peer], Peer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Telling of a publication may take a while; huge weights must not pass meanwhile because nothing is usual yet."""
    honest, mallory = world_of()
    monkeypatch.setattr(honest[0].world.network, "submit_unhurried", lambda coroutine: coroutine.close())
    publishes(mallory, lambda theta, gradient: (torch.full_like(theta, 1e30), torch.full_like(gradient, 1e30)))
    train(honest, mallory, partners=2)
    assert named(honest, RefusedEvent) == {(mallory.id, "huge")}
