"""The consensus of several peers' states, with a liar among them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.network.identity import new_identity, peer_bytes
from swarmtrain.peer.consensus import consensus_of, counts_in_untrusted, mean_of_near, not_far_behind, round_of

LAYOUT = layout_of([(3, 4), (4,)])
IDS = [new_identity(bytes([number]) * 32).peer_id for number in range(5)]


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


def test_momentum_is_that_of_one_who_is_in_it() -> None:
    honest = [state(number, near(number)) for number in range(4)]
    assert torch.equal(consensus_of(honest, LAYOUT).momentum, torch.full((16,), 0.5))
    liar = state(4, torch.full((16,), 1e8))
    assert not consensus_of([liar, *honest], LAYOUT).momentum.any()
    assert not consensus_of([state(0, near(0), momentum=1e20), *honest[1:]], LAYOUT).momentum.any()


def test_weights_many_rounds_behind_are_left_out() -> None:
    fresh, starved = state(0, near(0), round=60), state(1, near(1), round=4)
    for both in ([fresh, starved], [starved, fresh]):
        assert not_far_behind(both, 8) == [fresh] and not_far_behind(both, 56) == both
    other, liar = state(2, near(2), round=58), state(3, near(3), round=2**39)
    assert not_far_behind([liar, fresh, other], 8) == [liar, fresh, other], "one that claims more displaces nobody"
    assert not_far_behind([fresh], 8) == [fresh]


def test_the_momentum_of_one_that_is_not_whole_is_none() -> None:
    part = state(0, near(0))
    part.whole = False
    assert not consensus_of([part, state(1, near(1))], LAYOUT).momentum.any()


def test_tokens_that_one_tells_are_outvoted() -> None:
    states = [
        state(0, near(0), p0=100, p1=50, p2=10),
        state(1, near(1), p0=90, p1=60, p2=20),
        state(2, near(2), p0=10**15, p1=10**15, p2=30, p4=10**15),
    ]
    assert counts_in_untrusted(states, ()) == {IDS[0]: 100, IDS[1]: 60, IDS[2]: 30, IDS[4]: 0}


def test_one_state_alone_is_believed_about_those_who_are_known() -> None:
    alone = [state(0, near(0), p0=100, p1=50, p4=10**15)]
    assert counts_in_untrusted(alone, {IDS[1]}) == {IDS[0]: 100, IDS[1]: 50}


def test_its_round_is_no_liars() -> None:
    assert round_of([state(0, near(0), round=7), state(1, near(1), round=8), state(2, near(2), round=2**39)]) == 8
    assert round_of([state(0, near(0), round=7), state(1, near(1), round=2**39)]) == 7
