"""Pacing: the rule, its edges, and that one liar cannot shrink everybody's round."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.algorithm.pacing import (
    first_inner_steps,
    paced_inner_steps,
    reference_speed,
    round_inner_steps,
    steps_of_everybody,
)

_speeds = st.floats(min_value=1e-3, max_value=1e3)


@pytest.mark.parametrize(
    ("speeds", "reference"),
    [
        ([2.0], 2.0),
        ([1.0, 3.0], 3.0),
        ([1.0, 3.0, 2.0], 2.0),
        ([5.0, 5.0, 1.0], 5.0),
        ([float(v) for v in range(1, 11)], 9.0),
        ([float(v) for v in range(1, 12)], 10.0),
        ([float(v) for v in range(1, 21)], 18.0),
        ([float(v) for v in range(1, 101)], 90.0),
    ],
)
def test_reference_speed(speeds: list[float], reference: float) -> None:
    assert reference_speed(speeds) == reference
    assert reference_speed(speeds[::-1]) == reference


@pytest.mark.parametrize(
    ("own", "reference", "inner_steps", "taken"),
    [
        (1.0, 1.0, 25, 25),
        (2.0, 1.0, 25, 25),
        (0.5, 1.0, 25, 12),
        (0.1, 0.3, 30, 10),
        (0.01, 1.0, 25, 2),
        (0.01, 1.0, 16, 1),
        (0.01, 1.0, 17, 2),
        (0.0, 1.0, 1, 1),
        (0.0, 0.0, 25, 25),
    ],
)
def test_paced_inner_steps(own: float, reference: float, inner_steps: int, taken: int) -> None:
    assert paced_inner_steps(own, reference, inner_steps) == taken


def test_a_round_is_paced_by_the_speeds_that_are_known_and_has_a_limit() -> None:
    for own, others, paced, limit_s, steps in (
        (1.0, [2.0, 2.0], True, 600.0, 20),
        (1.0, [2.0, 0.0], True, 600.0, 20),
        (1.0, [0.0, 0.0], True, 600.0, 40),
        (1.0, [2.0, 2.0], False, 600.0, 40),
        (1.0, [2.0, 2.0], True, 10.0, 10),
        (0.5, [0.5], False, 1.0, 1),
        (0.0, [2.0, 2.0], True, 1.0, 40),
    ):
        assert round_inner_steps(own, others, 40, paced=paced, limit_s=limit_s) == steps
    assert (first_inner_steps(40, paced=True), first_inner_steps(40, paced=False)) == (3, 40)


@given(own=_speeds, reference=_speeds, inner_steps=st.integers(1, 1000))
def test_steps_stay_within_bounds_and_never_end_late(own: float, reference: float, inner_steps: int) -> None:
    steps = paced_inner_steps(own, reference, inner_steps)
    fewest = max(1, math.ceil(inner_steps / 16))
    assert fewest <= steps <= inner_steps
    if steps > fewest:  # it ends its round no later than the reference peer, up to rounding
        assert steps / own <= inner_steps / reference * (1 + 1e-6)


@given(honest=st.lists(_speeds, min_size=2, max_size=40), lie=st.floats(min_value=1e4, max_value=1e9))
def test_one_liar_cannot_raise_the_reference_above_the_honest(honest: list[float], lie: float) -> None:
    assert reference_speed([*honest, lie]) <= max(honest)


@pytest.mark.parametrize("speeds", [[], [-1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_speeds_that_make_no_sense(speeds: list[float]) -> None:
    with pytest.raises(ValueError, match="speed"):
        reference_speed(speeds)


@pytest.mark.parametrize(("own", "reference", "inner_steps"), [(-1.0, 1.0, 5), (1.0, math.nan, 5), (1.0, 1.0, 0)])
def test_pacing_that_makes_no_sense(own: float, reference: float, inner_steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        paced_inner_steps(own, reference, inner_steps)


def test_the_run_gets_as_far_in_a_step_as_all_do_together() -> None:
    assert steps_of_everybody(2.0, [2.0, 1.0, 1.0]) == 3.0
    assert steps_of_everybody(1.0, [4.0, 4.0]) == 9.0
    assert steps_of_everybody(2.0, []) == 1.0
    assert steps_of_everybody(0.0, [5.0]) == 0.0


def test_a_lie_about_speed_moves_the_run_no_further_than_the_second_fastest() -> None:
    assert steps_of_everybody(1.0, [2.0, 1.0, 1e9]) == 1.0 + 2.0 + 1.0 + 2.0
    assert steps_of_everybody(1.0, [1e9]) == 17.0
