"""Shares by bandwidth in a simulated swarm whose transfers share its links: how fast, and under faults."""

from __future__ import annotations

import math
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


def with_a_liar(share: float | None, told_mbit: float = 0.0, sends_every_s: float = math.inf) -> float:
    """Let the lowest peer sign rosters that give p3 this part of the mean (None: equal shares), and p3 send a piece of
    it every so many seconds. Return the seconds from the first roster to the last other volunteer that has the mean."""
    world = SynchronousWorld(replace(SETTINGS, inner_steps=590))
    for number, rate in enumerate(SIX):
        told = told_mbit * MBIT if number == 3 else 0.0
        link = SimulatedLink(latency_s=0.0125, bytes_per_s=rate * MBIT, told_bytes_per_s=told)
        world.join(f"p{number}", steps_per_s=1.0, link=link)

    def lies(peers: Sequence[str], num_chunks: int, body_bytes: int) -> tuple[int, ...]:
        if share is None:
            return ()
        its, others = int(share * num_chunks), [peer for peer in peers if peer != "p3"]
        rest = dict(zip(others, equal_shares(num_chunks - its, [True] * len(others)), strict=True))
        return tuple(rest.get(peer, its) for peer in peers)

    world.peers["p0"].engine.claims.shares = lies  # type: ignore[method-assign]
    transfers, next_s = world.peers["p3"].transfers, 0.0
    keep = transfers.keep

    def keep_back(what: str) -> None:
        nonlocal next_s
        if not what.startswith("share-of-"):
            keep(what)
        elif sends_every_s < math.inf:
            next_s = max(next_s, world.clock.now) + sends_every_s
            world.at(next_s, keep, what)

    transfers.keep = keep_back  # type: ignore[method-assign]
    others = [peer for name, peer in world.peers.items() if name != "p3"]
    while any(peer.round < 1 for peer in others):
        world.clock.step()
    assert len({peer.digest_at[1] for peer in others}) == 1
    signed = [event.time_s for event in world.events("signed")]
    return world.clock.now - signed[0]


@pytest.mark.parametrize("told_mbit", [100.0, 0.26])
def test_a_signer_that_gives_all_to_an_accomplice_delays_as_one_silent_owner(told_mbit: float) -> None:
    """`docs/results/untrusted-peers.md` has what it took before."""
    equal_s = with_a_liar(None)
    took_s = {
        "all, nothing": with_a_liar(1.0, told_mbit),
        "all, every 20 s": with_a_liar(1.0, told_mbit, sends_every_s=20.0),
        "half, nothing": with_a_liar(0.5, told_mbit),
        "half, every 20 s": with_a_liar(0.5, told_mbit, sends_every_s=20.0),
    }
    print(f"told {told_mbit} Mbit/s: equal {equal_s:.1f} s", *(f"{case} {each:.1f} s" for case, each in took_s.items()))
    assert took_s["all, nothing"] == pytest.approx(equal_s) and took_s["all, every 20 s"] <= equal_s
    assert took_s["half, nothing"] <= 1.6 * equal_s, "the most that it may give"
    assert took_s["half, every 20 s"] <= 2.2 * equal_s
