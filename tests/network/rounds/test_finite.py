"""Numbers that came from another peer are looked at piece by piece: a state may be as large as the memory allows."""

from __future__ import annotations

import asyncio
import math
import tracemalloc

import numpy as np
import pytest
from codes import raises_code

from swarmtrain.errors import BadBytesError
from swarmtrain.network.rounds.downloads import check_finite
from swarmtrain.network.snapshots.store import all_finite

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
