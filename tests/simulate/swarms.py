"""What the simulated swarm's tests share: the check that a swarm is whole, and schedules of faults."""

from __future__ import annotations

from collections import Counter

from swarmtrain.simulate.messages import Phase, Settings
from swarmtrain.simulate.world import World


def assert_tokens_count_once(world: World) -> None:
    """No publication, and no peer's round, is twice in anybody's past; base and token chains are unbroken."""
    for peer in world.running():
        entries = [(entry.snapshot, entry.peer, r.round) for r in peer.history for entry in r.entries]
        assert max(Counter(snapshot for snapshot, _, _ in entries).values(), default=1) == 1
        assert max(Counter((name, round) for _, name, round in entries).values(), default=1) == 1
        base, tokens = "", 0
        for roster in peer.history:
            assert (roster.base, roster.base_tokens) == (base, tokens), f"{peer.name}: a roster on another's weights"
            assert all(entry.base == base for entry in roster.entries)
            base, tokens = roster.digest, roster.total_tokens


def assert_one_model(world: World, settle_rounds: int = 2, limit_s: float = 120.0) -> None:
    """The faults are over: within `settle_rounds` rounds more, all live peers have equal weights, and stay so."""
    peers = world.running()
    end_s = world.clock.now + limit_s
    start = max(peer.round for peer in peers)
    rounds = start + settle_rounds
    assert world.run_rounds(rounds, end_s), {
        "now": world.clock.now,
        "peers": [(p.name, p.round, p.phase.value, p.guest) for p in peers],
    }
    assert world.run_rounds(rounds + 2, end_s + limit_s)
    for round in (rounds + 1, rounds + 2):
        digests = world.digests(round)
        assert len(digests) == len(peers), (round, digests)
        assert len(set(digests.values())) == 1, (round, digests)
    last = max(peers, key=lambda peer: peer.round).history[rounds + 1]
    assert set(last.peers) == {peer.name for peer in peers}, "two rounds later everyone counts again"
    assert_tokens_count_once(world)


def round_s(settings: Settings, steps_per_s: float) -> float:
    """Seconds that one round's inner steps take."""
    return settings.inner_steps / steps_per_s


def longest_open_wait_s(world: World) -> float:
    """Of those that wait now, in seconds."""
    return max((world.clock.now - p.ended_s for p in world.running() if p.phase is Phase.MERGING), default=0.0)
