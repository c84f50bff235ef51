"""Shares by bandwidth in a simulated swarm whose transfers share its links: how fast, and under faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from swarmtrain.protocol.rounds.roles import averaging_s, divide, equal_shares
from swarmtrain.simulate.systems.messages import Settings, SimulatedLink
from swarmtrain.simulate.systems.world import SynchronousWorld

MBIT = 125_000.0
SIX = (10, 20, 50, 100, 200, 50)
"""Links of six volunteers in Mbit/s; the last is a hidden peer's."""
SETTINGS = Settings(
    inner_steps=10, silence_s=15.0, publication_bytes=25_000_000, state_bytes=1000, transfers_share_links=True
)
MEASURED = 2
"""Round that is measured: in the first ones volunteers have still to meet."""


def a_world(mbit: Sequence[float], hidden: Sequence[int] = (), **settings: object) -> SynchronousWorld:
    world = SynchronousWorld(replace(SETTINGS, **settings))  # type: ignore[arg-type]
    for number, rate in enumerate(mbit):
        link = SimulatedLink(latency_s=0.0125, bytes_per_s=rate * MBIT, can_be_dialled=number not in hidden)
        world.join(f"p{number}", steps_per_s=1.0, link=link)
    return world


def seconds(world: SynchronousWorld, round: int = MEASURED) -> float:
    """Return the time from a round's roster to the last volunteer that has its mean; all have the same weights."""
    assert world.run_rounds(round + 1, 3600.0)
    assert len(set(world.digests(round + 1).values())) == 1
    signed = [event.time_s for event in world.events("signed") if event.round == round]
    return max(event.time_s for event in world.events("applied") if event.round == round) - min(signed)


@pytest.mark.parametrize(
    ("mbit", "hidden", "faster"), [(SIX, (5,), 1.45), ((10, 20, 50, 100, 200, 20, 50, 100), (), 1.5)]
)
def test_averaging_is_as_fast_as_the_linear_program_says(
    mbit: Sequence[float], hidden: Sequence[int], faster: float
) -> None:
    world = a_world(mbit, hidden)
    took_s = seconds(world)
    links = [peer.link.rates for peer in world.peers.values()]
    body, num = SETTINGS.publication_bytes, SETTINGS.num_chunks
    roles = divide(links, num, body)
    last = world.peers["p0"].last
    assert last is not None and last.shares == roles.shares and last.shares[0] == 0
    assert not any(last.shares[number] for number in hidden)
    assert roles.averaging_s <= took_s <= 1.15 * roles.averaging_s

    equal = a_world(mbit, hidden, by_bandwidth=False)
    equal_s = seconds(equal)
    assert equal.peers["p0"].last is not None and equal.peers["p0"].last.shares == ()
    by_model_s = averaging_s(links, equal_shares(num, [True] * len(links)), body)
    assert equal_s == pytest.approx(by_model_s, rel=0.05)
    assert equal_s >= faster * took_s


def test_equal_links_have_equal_shares_and_lose_nothing() -> None:
    world = a_world([40] * 6)
    took_s = seconds(world)
    assert world.peers["p0"].last is not None and world.peers["p0"].last.shares == ()
    assert took_s == pytest.approx(seconds(a_world([40] * 6, by_bandwidth=False)))


@pytest.mark.parametrize("fault", ["kill", "freeze", "cut_off"])
def test_a_round_goes_on_without_the_owner_of_the_largest_share(fault: str) -> None:
    world = a_world(SIX, (5,))
    world.run_rounds(1, 3600.0)
    begins_s = max(event.time_s for event in world.events("applied"))
    world.at(begins_s + 20.0, getattr(world, fault), "p4")  # ten seconds into averaging
    others = [peer for name, peer in world.peers.items() if name != "p4"]
    world.run_until(begins_s + 120.0)
    assert all(peer.round > 1 for peer in others)
    first = next(event.roster for event in world.events("signed") if event.round == 1)
    assert first is not None and first.shares[4] == max(first.shares)
    roster = others[0].history[1]
    assert roster.attempt > 0 and "p4" not in roster.peers, "its own gradient is nowhere else"
    assert len({peer.digest_at[2] for peer in others}) == 1


def test_one_that_tells_of_a_link_that_it_does_not_have_is_believed_less() -> None:
    world = a_world((50, 50, 50, 100, 100))
    lies = SimulatedLink(latency_s=0.0125, bytes_per_s=5 * MBIT, told_bytes_per_s=400 * MBIT)
    world.join("p5", steps_per_s=1.0, link=lies)
    assert world.run_rounds(5, 36000.0)
    signed = [event.roster for event in world.events("signed")]
    shares = [roster.shares[5] for roster in signed if roster is not None and roster.shares]
    assert shares[0] == SETTINGS.num_chunks / 2, "it was believed at first, and got as much as anybody can"
    assert shares[-1] < shares[0] / 4
    assert len(set(world.digests(5).values())) == 1
