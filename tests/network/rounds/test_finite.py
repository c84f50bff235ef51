"""Numbers that came from another peer are looked at piece by piece: a state may be as large as the memory allows."""

from __future__ import annotations

import asyncio
import math
import tracemalloc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from codes import raises_code

from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import body_of
from swarmtrain.network.finite import all_finite
from swarmtrain.network.identity import new_identity
from swarmtrain.network.rounds.downloads import check_finite, check_not_negative
from swarmtrain.network.rounds.state_fetch import NewState, PeerStates
from swarmtrain.network.snapshots.state_provider import StateProvider, state_specs
from swarmtrain.network.snapshots.store import SnapshotStore, TensorSpec
from swarmtrain.protocol.tokens.progress import Progress

NUMBERS = 4_000_001


def check(numbers: np.ndarray) -> None:
    asyncio.run(check_finite(memoryview(numbers).cast("B")))


@pytest.mark.parametrize("place", [0, NUMBERS // 2, NUMBERS - 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(place: int, bad: float) -> None:
    numbers = np.full(NUMBERS, 3e38, dtype="<f4")
    numbers[place] = bad
    with raises_code("not-finite", BadBytesError):
        check(numbers)


def test_a_whole_state_is_looked_at_without_a_copy() -> None:
    numbers = np.zeros(NUMBERS, dtype="<f4")
    check(numbers)
    tracemalloc.start()
    try:
        assert all_finite(memoryview(numbers).cast("B"))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bad", [-1e-30, math.nan])
def test_one_number_below_zero_is_found(bad: float) -> None:
    numbers = np.zeros(NUMBERS, dtype="<f4")
    numbers[0] = -0.0
    asyncio.run(check_not_negative(memoryview(numbers).cast("B")))
    numbers[NUMBERS - 1] = bad
    with raises_code("bad-number", BadBytesError):
        asyncio.run(check_not_negative(memoryview(numbers).cast("B")))


@pytest.mark.parametrize(("num_moments", "place", "is_taken"), [(1, 5, True), (2, 5, True), (2, 8, False)])
def test_a_state_whose_second_moments_have_a_sign_is_refused(num_moments: int, place: int, is_taken: bool) -> None:
    """Their roots would make all weights NaN; a weight, a momentum and a first moment may be negative."""
    specs = state_specs([TensorSpec("w", (2,)), TensorSpec("b", (1,))], num_moments)
    vector = torch.ones(3 * (1 + num_moments))
    vector[[0, 3, place]] = -1.0
    provider = StateProvider(new_identity(b"e" * 32), "ab" * 32, specs, SnapshotStore())
    held = provider._build(Progress(round=1), body_of(vector[:3], vector[3:]), lambda manifest: None)

    async def pull(*arguments: Any) -> None:
        pass

    downloads: Any = SimpleNamespace(store=SimpleNamespace(showing=lambda held: nullcontext()), pull=pull)
    settings: Any = SimpleNamespace(run_sha256="ab" * 32, state_specs=specs)
    nobodys: Any = None
    states = PeerStates(downloads, settings, nobodys)
    new = NewState(held=held, roster=nobodys, signed_roster=nobodys, from_peer="eve")
    if is_taken:
        asyncio.run(states.take(new))
    else:
        with raises_code("bad-number", BadBytesError, "below 0"):
            asyncio.run(states.take(new))
