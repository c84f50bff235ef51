"""Rests between steps: the share of the time in which a device is busy, by virtual time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.duty_cycle import LEAST_REST_S, MOST_STEPS_AT_ONCE, DutyCycle


def busy_share(cycle: DutyCycle, steps_s: Iterable[float], share: float, late_s: float = 0.0) -> float:
    """Return the share of the time that the steps took; each rest lasts `late_s` longer than planned."""
    busy_s = rested_s = 0.0
    for step_s in steps_s:
        busy_s += step_s
        if planned_s := cycle.rest_s(step_s, share):
            cycle.rested(planned_s + late_s)
            rested_s += planned_s + late_s
    return busy_s / (busy_s + rested_s)


def test_half_of_the_time_is_as_long_a_rest_as_the_step() -> None:
    cycle = DutyCycle()
    for _ in range(10):
        assert cycle.rest_s(0.1, 0.5) == pytest.approx(0.1)
        cycle.rested(0.1)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.75, 0.99])
def test_the_share_is_kept_whatever_steps_take(share: float) -> None:
    steps_s = [(0.02, 0.11, 0.3, 0.05, 0.02)[number % 5] for number in range(2000)]
    assert busy_share(DutyCycle(), steps_s, share) == pytest.approx(share, rel=0.001)


@given(st.lists(st.floats(0.05, 0.4), min_size=200, max_size=200), st.integers(1, 99))
def test_the_share_is_kept_over_many_steps(steps_s: list[float], percent: int) -> None:
    assert busy_share(DutyCycle(), steps_s, percent / 100) == pytest.approx(percent / 100, rel=0.01)


def test_what_is_slept_too_long_is_taken_off_the_next_rests() -> None:
    assert busy_share(DutyCycle(), [0.1] * 1000, 0.8, late_s=0.004) == pytest.approx(0.8, rel=0.001)


def test_rests_too_short_to_fall_asleep_for_are_added_up() -> None:
    cycle, rests_s = DutyCycle(), list[float]()
    for _ in range(1000):
        rests_s.append(cycle.rest_s(0.002, 0.5))
        cycle.rested(rests_s[-1])
    assert min(rest_s for rest_s in rests_s if rest_s) >= LEAST_REST_S
    assert sum(rests_s) == pytest.approx(2.0, abs=LEAST_REST_S)


def test_an_hour_for_which_the_process_was_stopped_is_not_rested_for() -> None:
    cycle = DutyCycle()
    busy_share(cycle, [0.1] * 10, 0.5)
    assert cycle.rest_s(3600.0, 0.5) == pytest.approx(MOST_STEPS_AT_ONCE * 0.1)


def test_a_rest_that_lasted_an_hour_saves_up_no_more_than_itself() -> None:
    cycle = DutyCycle()
    cycle.rested(cycle.rest_s(0.1, 0.5) + 3600.0)
    assert cycle.rest_s(0.1, 0.5) == 0.0
    assert cycle.rest_s(0.1, 0.5) == pytest.approx(0.1)


def test_after_a_pause_nothing_is_owed() -> None:
    cycle = DutyCycle()
    cycle.rest_s(0.1, 0.5)
    cycle.forget()
    assert cycle.rest_s(0.1, 0.5) == pytest.approx(0.1)
