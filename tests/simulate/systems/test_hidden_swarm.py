"""Simulated swarm in which half of the peers are hidden."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from fault_search.hosts import HostedPeer, HostedSwarm

from swarmtrain.protocol.membership.hosts import MAX_GUESTS, Reach
from swarmtrain.simulate.systems.publications import SimulatedGossipSettings

pytestmark = pytest.mark.slow


def half_hidden(num_peers: int, settings: SimulatedGossipSettings | None = None, *, seed: int = 0) -> HostedSwarm:
    """Every other one is hidden; speeds of 2 to 20 steps a second."""
    swarm, rng = HostedSwarm(lambda name: int(name[1:]) % 2 == 1, settings, seed=seed), random.Random(seed)
    for i in range(num_peers):
        swarm.found(f"p{i:04d}", steps_per_s=2.0 * 10.0 ** rng.random(), theta=rng.uniform(-1, 1))
    return swarm


def hidden_peers(swarm: HostedSwarm) -> list[HostedPeer]:
    return [peer for peer in swarm.running() if isinstance(peer, HostedPeer) and swarm.is_hidden(peer.name)]


def tokens_entered(swarm: HostedSwarm, since_s: float = 0.0) -> Counter[str]:
    """Return by author the tokens that entered any peer's merge."""
    tokens: Counter[str] = Counter()
    for _, whose, _, _, since, until in swarm.entered:
        tokens[whose] += until - since
    return tokens


def test_a_thousand_peers_half_of_them_hidden() -> None:
    swarm = half_hidden(1000, SimulatedGossipSettings(inner_steps=96, sample=12))
    swarm.run_until(24.0)
    hidden = hidden_peers(swarm)
    assert len(hidden) == 500
    assert {peer.reachability.state for peer in hidden} == {Reach.HIDDEN}
    assert not [p for p in swarm.running() if not swarm.is_hidden(p.name) and p.reachability.state is Reach.HIDDEN]
    assert all(len(peer.choice.serving) == 2 for peer in hidden)
    assert max(peer.most_guests for peer in swarm.peers.values()) <= MAX_GUESTS
    entered = tokens_entered(swarm)
    assert len(entered.keys() & {peer.name for peer in hidden}) >= 0.97 * len(hidden), "everyone's tokens count"
    shares = dict.fromkeys((True, False), 0)
    for name, tokens in entered.items():
        shares[swarm.is_hidden(name)] += tokens
    assert shares[True] > 0.5 * shares[False]
    assert not swarm.incidents


def test_hosts_die_and_others_take_over() -> None:
    swarm = half_hidden(12, seed=3)
    swarm.run_until(40.0)
    victims = {host for peer in hidden_peers(swarm)[:3] for host in peer.choice.serving[:1]}
    for name in victims:
        swarm.kill(name)
    before = tokens_entered(swarm)
    swarm.run_until(160.0)
    for peer in hidden_peers(swarm):
        assert len(peer.choice.serving) == 2 and not set(peer.choice.serving) & victims
        assert tokens_entered(swarm)[peer.name] > before[peer.name]


def test_each_inner_step_enters_once_at_most_whichever_way_it_came() -> None:
    swarm = half_hidden(16, seed=5)
    swarm.lose_messages(0.05)
    swarm.run_until(150.0)
    spans = defaultdict(list)
    for one in swarm.entered:
        spans[one.who, one.whose, one.fragment, one.round].append((one.since, one.until))
    for each in spans.values():
        each.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(each))


def test_a_router_that_opens_a_port_makes_a_peer_dialable_again() -> None:
    swarm = half_hidden(8)
    swarm.run_until(40.0)
    hidden = hidden_peers(swarm)
    swarm.is_hidden = lambda name: False
    swarm.run_until(300.0)
    assert {peer.reachability.state for peer in hidden} == {Reach.DIALABLE}
    assert {swarm.board[peer.name].info.hidden for peer in hidden} == {False}
