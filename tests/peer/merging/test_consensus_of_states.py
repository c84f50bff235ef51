"""Consensus of several peers' states, with a liar among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.errors import BadBytesError
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.identity import new_identity, peer_bytes
from swarmtrain.peer.merging import consensus
from swarmtrain.peer.merging.asynchronous_exchange import AsynchronousExchange
from swarmtrain.peer.merging.consensus import (
    consensus_of,
    consensus_of_vectors,
    counts_in_untrusted,
    mean_of_near,
    not_far_behind,
    round_of,
)
from swarmtrain.protocol.tokens.tally import CountingRules

LAYOUT = layout_of([(3, 4), (4,)])
IDS = [new_identity(bytes([number]) * 32).peer_id for number in range(5)]


def identity(number: int) -> str:
    return IDS[number]


def near(number: int) -> torch.Tensor:
    return 1 + 0.1 * torch.rand(16, generator=torch.Generator().manual_seed(number))


def state(number: int, theta: torch.Tensor, momentum: float = 0.5, round: int = 3, **counts: int) -> Any:
    vector = torch.cat([theta, torch.full((16,), momentum)])
    items = [SimpleNamespace(peer=peer_bytes(IDS[int(name[1:])]), tokens=tokens) for name, tokens in counts.items()]
    held = SimpleNamespace(
        buffer=bytearray(vector.numpy().tobytes()),
        snapshot=SimpleNamespace(manifest=SimpleNamespace(peer_tokens=items, round=round)),
    )
    return SimpleNamespace(peer=IDS[number], held=held, round=round, whole=True)


def only_weights(whole: Any) -> Any:
    return SimpleNamespace(**{**vars(whole), "whole": False})


@pytest.mark.parametrize("wrong", [1e8, -1e30, -5.0])
def test_weights_far_from_all_others_are_left_out(wrong: float) -> None:
    honest = [near(number) for number in range(3)]
    mean, kept = mean_of_near([torch.full((16,), wrong), *honest], LAYOUT)
    assert kept == {1, 2, 3}
    assert torch.equal(mean, mean_of_near(honest, LAYOUT)[0])


def test_honest_weights_are_all_in_it() -> None:
    assert mean_of_near([near(number) for number in range(5)], LAYOUT)[1] == {0, 1, 2, 3, 4}
    assert mean_of_near([near(0), near(1)], LAYOUT)[1] == {0, 1}
    assert mean_of_near([near(0)] * 4, LAYOUT)[1] == {0, 1, 2, 3}


def test_momentum_is_that_of_those_who_are_in_it() -> None:
    def honest() -> list[FetchedState]:  # anew each time: the mean takes the place of the first one's weights
        return [state(number, near(number), momentum=0.1) for number in range(4)]

    def liar() -> FetchedState:
        return state(4, torch.full((16,), 1e8), momentum=1e8)

    assert torch.equal(consensus_of(honest(), LAYOUT).momentum, torch.full((16,), 0.1))
    assert torch.equal(consensus_of([liar(), *honest()], LAYOUT).momentum, torch.full((16,), 0.1))
    assert not consensus_of([liar(), *map(only_weights, honest())], LAYOUT).momentum.any()


LIES = [1e20, -1e20, 1.0, -1.0, -0.1, 0.0]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("place", range(3))
def test_a_momentum_that_one_of_three_makes_up_is_outvoted(lie: float, place: int) -> None:
    """As long as the weights, or longer, or back the way that all came."""
    honest = [0.1 + 0.05 * torch.rand(16, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    momenta = [*honest[:place], torch.full((16,), lie), *honest[place:]]
    thetas = [near(number) for number in range(3)]
    found = consensus_of_vectors(thetas, dict(enumerate(momenta)), LAYOUT).momentum
    assert bool((found >= torch.minimum(*honest)).all()) and bool((found <= torch.maximum(*honest)).all())


@pytest.mark.parametrize("lie", LIES)
def test_a_momentum_that_one_of_two_makes_up_takes_from_the_others_at_the_most(lie: float) -> None:
    honest = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(7))
    for momenta in ({0: honest, 1: torch.full((16,), lie)}, {0: torch.full((16,), lie), 2: honest}):
        found = consensus_of_vectors([near(number) for number in range(3)], momenta, LAYOUT).momentum
        assert bool((found.abs() <= honest.abs()).all()) and bool((found * honest >= 0).all())


@pytest.mark.parametrize("lie", [1.0, -1.0, 1e20])
def test_a_momentum_that_one_alone_makes_up_is_no_longer_than_is_usual(lie: float) -> None:
    state = consensus_of_vectors([near(number) for number in range(3)], {1: torch.full((16,), lie)}, LAYOUT)
    assert float(state.momentum.norm()) <= 0.2501 * float(state.theta.norm())
    usual = torch.full((16,), 0.1)
    assert torch.equal(consensus_of_vectors([near(0)], {0: usual}, LAYOUT).momentum, usual), "what is usual stays"


def test_an_adapters_momentum_may_be_as_long_as_its_weights() -> None:
    """B begins with zeros: after its first round, momentum is long beside it."""
    layout, theta = dataclasses.replace(LAYOUT, corrected=(False,) * 2), torch.ones(16)
    for momentum, found in ((0.7, 0.7), (1.0, 1.0), (1e6, 1.0)):
        state = consensus_of_vectors([theta.clone()], {0: torch.full((16,), momentum)}, layout)
        assert torch.allclose(state.momentum, torch.full((16,), found))


def test_weights_many_rounds_behind_are_left_out() -> None:
    fresh, starved = state(0, near(0), round=60), state(1, near(1), round=4)
    for both in ([fresh, starved], [starved, fresh]):
        assert not_far_behind(both, 8) == [fresh] and not_far_behind(both, 56) == both
    other, liar = state(2, near(2), round=58), state(3, near(3), round=2**39)
    assert not_far_behind([liar, fresh, other], 8) == [liar, fresh, other], "one that claims more displaces nobody"
    assert not_far_behind([fresh], 8) == [fresh]


def test_the_momentum_of_those_that_are_not_whole_is_none() -> None:
    assert not consensus_of([only_weights(state(0, near(0))), only_weights(state(1, near(1)))], LAYOUT).momentum.any()
    found = consensus_of([only_weights(state(0, near(0))), state(1, near(1), momentum=0.1)], LAYOUT)
    assert torch.equal(found.momentum, torch.full((16,), 0.1)), "of the one that is"


def test_the_counts_of_a_state_are_those_of_its_manifest_the_greatest_of_very_many() -> None:
    told = {identity(n): n for n in range(5)}
    items = [SimpleNamespace(peer=peer_bytes(peer), tokens=tokens) for peer, tokens in told.items()]
    manifest: Any = SimpleNamespace(peer_tokens=items)
    assert counts_in_untrusted(manifest) == told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consensus, "_MAX_COUNTS", 2)
        assert sorted(counts_in_untrusted(manifest).values()) == [3, 4]
    items.append(SimpleNamespace(peer=b"nobody", tokens=9))
    with pytest.raises(BadBytesError):
        counts_in_untrusted(manifest)


def test_a_newcomers_counts_are_those_of_three_sources_and_one_alone_ends_no_run() -> None:
    """What a joiner makes of the states that it pulled, and of what others count where these are too few."""

    def counted(*told: dict[str, int], more: Sequence[dict[str, int]] = (), **options: bool) -> int:
        rules = CountingRules(began_s=0.0, burst_tokens=200, most_tokens=3_000_100, total_tokens=3_000_000)

        async def nothing(kind: str, prefix: str) -> dict[str, Any]:
            return {}

        accounting = TokenAccounting(IDS[4], rules, nothing, dict, lambda: 86_400.0, lambda *_: None)
        exchange: Any = SimpleNamespace(swarm=SimpleNamespace(accounting=accounting))
        states = [state(number, near(number), **counts) for number, counts in enumerate(told)]
        others = [{IDS[int(name[1:])]: tokens for name, tokens in counts.items()} for counts in more]
        return AsynchronousExchange._progress_of(exchange, states, 0, others, **options).run_tokens

    honest, lie = {"p0": 300_000, "p1": 120_000}, {"p0": 300_000, "p1": 2_700_000}
    assert counted(honest) == counted(honest, honest, lie) == counted(lie, more=[honest, honest]) == 420_000
    assert counted(honest, lie) == 420_000, "of two the lesser"
    assert counted(lie) == 3_000_000 - 200, "one alone never says that the run is over"
    assert counted(lie, is_server=True) == 3_000_000, "but the server that the run names"


def test_its_round_is_no_liars() -> None:
    assert round_of([state(0, near(0), round=7), state(1, near(1), round=8), state(2, near(2), round=2**39)]) == 8
    assert round_of([state(0, near(0), round=7), state(1, near(1), round=2**39)]) == 7
