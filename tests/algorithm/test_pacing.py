"""Pacing: the rule, its edges, and that one liar cannot shrink everybody's round."""

from __future__ import annotations

import cmath
import math
import random
from bisect import insort
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.algorithm.pacing import (
    first_inner_steps,
    in_step_inner_steps,
    is_in_step,
    most_inner_steps,
    paced_inner_steps,
    reference_speed,
    round_inner_steps,
    rounds_of_others,
    small_batch_round,
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
        ([float(v) for v in range(1, 10)], 8.0),
        ([float(v) for v in range(1, 11)], 8.0),
        ([float(v) for v in range(1, 15)], 12.0),
        ([float(v) for v in range(1, 21)], 16.0),
        ([float(v) for v in range(1, 101)], 80.0),
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


@pytest.mark.parametrize(
    ("inner_steps", "speed", "ends_in_s", "round_s", "taken"),
    [
        (40, 10.0, [4.0, 4.0], 4.0, 40),  # in step already
        (40, 10.0, [1.0], 4.0, 50),  # a quarter of a round later
        (40, 10.0, [3.0], 4.0, 30),
        (40, 10.0, [0.5, 1.5], 4.0, 50),  # the mean
        (40, 10.0, [-0.2, 0.2], 4.0, 40),  # over, or nearly: the next one counts
        (40, 10.0, [3.8, 0.2], 4.0, 40),  # on a circle, 3.8 s and 0.2 s are near each other
        (30, 10.0, [3.9], 4.0, 39),  # a fast one's round lasts shorter, and is moved to where the others' end
        (40, 10.0, [1.0, -4.5], 4.0, 50),  # of one of them nothing has been heard since the round before
        (40, 10.0, [], 4.0, 40),
        (40, 10.0, [0.0, 2.0], 4.0, 40),  # opposite each other: no mean
        (2, 2.5, [0.9], 1.0, 2),  # to the nearest step
        (1, 1.0, [0.5], 1.0, 1),  # never none
        (40, 10.0, [math.inf, math.nan, 1.0], 4.0, 50),
        (40, 10.0, [-1e308, 1e308], 4.0, 40),
    ],
)
def test_a_round_ends_when_those_of_others_do(
    inner_steps: int, speed: float, ends_in_s: list[float], round_s: float, taken: int
) -> None:
    assert in_step_inner_steps(inner_steps, speed, ends_in_s, round_s) == taken


@pytest.mark.parametrize(("speed", "round_s"), [(0.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan), (-1.0, 1.0)])
def test_no_speed_or_no_time_is_refused(speed: float, round_s: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        in_step_inner_steps(4, speed, [0.0], round_s)


@given(
    steps=st.integers(1, 1000),
    speed=st.floats(1e-3, 1e3),
    share=st.floats(1.0, 1.5),
    ends=st.lists(st.floats(-3.0, 3.0), max_size=5),
)
def test_in_step_a_round_is_never_less_than_half_nor_half_as_much_again(
    steps: int, speed: float, share: float, ends: list[float]
) -> None:
    round_s = share * steps / speed  # a fast one's ends sooner than others' do
    taken = in_step_inner_steps(steps, speed, [end * round_s for end in ends], round_s)
    assert steps <= 2 * taken
    assert taken <= most_inner_steps(steps)
    known = [cmath.rect(1.0, math.tau * end) for end in ends if end >= -1.0]
    if abs(sum(known)) > 1e-3 and taken != steps:
        apart_s = math.remainder(taken / speed - cmath.phase(sum(known)) / math.tau * round_s, round_s)
        assert abs(apart_s) <= 0.5 / speed + 1e-6 * round_s


def test_who_is_faster_or_slower_than_pacing_reaches_is_in_step_with_nobody() -> None:
    how = {"paced": True, "limit_s": 1e9}
    for own, others, ends_in_s, steps in (
        (10.0, [10.0, 10.0], [1.0, None], 50),
        (10.0, [10.0, 10.0], [None, None], 40),
        (10.0, [10.0, 10.0, 20.0], [1.0, 1.0, 3.0], 50),  # who is twice as fast counts for nothing
        (10.0, [10.0, 10.0, 0.1], [1.0, 1.0, 3.0], 50),
        (20.0, [10.0, 10.0], [1.0, 1.0], 40),
        (0.1, [10.0, 10.0], [1.0, 1.0], 3),
        (13.0, [10.0, 10.0], [4.0, 4.0], 52),  # in step a fast one takes more than `inner_steps`
    ):
        assert round_inner_steps(own, others, 40, others_end_in_s=ends_in_s, **how) == steps
    assert round_inner_steps(10.0, [10.0], 40, paced=False, limit_s=1e9, others_end_in_s=[1.0]) == 40
    assert round_inner_steps(10.0, [10.0], 16, others_end_in_s=[0.4], **how) == 20
    assert round_inner_steps(10.0, [10.0], 15, others_end_in_s=[0.4], **how) == 15, "too few to be moved"
    assert round_inner_steps(10.0, [10.0], 40, paced=True, limit_s=2.0, others_end_in_s=[1.0]) == 10


def lived(
    speeds: Sequence[float], steps: int, num_rounds: int, *, limit_s: float = 1e9, noise: float = 0.0
) -> list[list[tuple[float, int]]]:
    """Return for each of several peers that see each other when its rounds began and how many steps they took.

    Its measured speed is its real one with `noise`."""
    rng, now = random.Random(0), 0.0
    ends_s = [rng.random() * min(steps / max(speeds), limit_s) for _ in speeds]
    told = list(speeds)
    due = sorted((end_s, number) for number, end_s in enumerate(ends_s))
    rounds: list[list[tuple[float, int]]] = [[] for _ in speeds]
    while min(map(len, rounds)) < num_rounds:
        now, number = due.pop(0)
        told[number] = speeds[number] * (1 + noise * rng.uniform(-1, 1))
        others = [one for one in range(len(speeds)) if one != number]
        known, in_s = [told[one] for one in others], [ends_s[one] - now for one in others]
        taken = round_inner_steps(told[number], known, steps, paced=True, limit_s=limit_s, others_end_in_s=in_s)
        rounds[number].append((now, taken))
        ends_s[number] = now + taken / speeds[number]
        insort(due, (ends_s[number], number))
    return rounds


def apart_s(rounds: list[list[tuple[float, int]]], which: int) -> float:
    """Return how far apart they began that round."""
    began_s = [of[which][0] for of in rounds]
    return max(began_s) - min(began_s)


@pytest.mark.parametrize("speeds", [(10.0, 10.0), (10.0, 4.0), (10.0, 8.0, 5.0), (5.0, 4.0, 2.0, 1.0) * 4])
def test_whoever_begins_when_all_are_in_step_within_two_rounds(speeds: tuple[float, ...]) -> None:
    rounds, round_s = lived(speeds, 200, 6), 200 / max(speeds)
    assert max(apart_s(rounds, which) for which in range(2, 6)) < 0.06 * round_s


@pytest.mark.parametrize(
    ("speeds", "steps"),
    [
        ((15.0, 10.0, 10.0), 64),  # half as fast again, as far as it can be measured: in step now and then
        ((10.0, 10.0, 0.9), 16),  # one or two steps a round
    ],
)
def test_who_cannot_be_in_step_moves_nobody(speeds: tuple[float, ...], steps: int) -> None:
    rounds = lived(speeds, steps, 20, noise=0.02)
    equal = [of for of, speed in zip(rounds, speeds, strict=True) if speed == 10.0]
    taken = [steps for of in equal for _, steps in of[3:]]
    assert max(taken) <= 1.1 * steps and min(taken) >= 0.9 * steps, taken


@given(own=_speeds, reference=_speeds, inner_steps=st.integers(1, 1000))
def test_steps_stay_within_bounds_and_never_end_late(own: float, reference: float, inner_steps: int) -> None:
    steps = paced_inner_steps(own, reference, inner_steps)
    fewest = max(1, math.ceil(inner_steps / 16))
    assert fewest <= steps <= inner_steps
    if steps > fewest:  # it ends its round no later than the reference peer, up to rounding
        assert steps / own <= inner_steps / reference * (1 + 1e-6)


@given(honest=st.lists(_speeds, min_size=2, max_size=40), lie=st.floats(min_value=1e4, max_value=1e9))
def test_neither_one_liar_nor_a_fifth_can_raise_the_reference_above_the_honest(honest: list[float], lie: float) -> None:
    for num_liars in (1, len(honest) // 4):  # a fifth of all
        assert reference_speed([*honest, *[lie] * num_liars]) <= max(honest)


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


def test_rounds_are_in_step_of_who_is_neither_far_faster_than_the_others_nor_far_slower() -> None:
    others = [10.0, 10.0, 8.0]
    found = {speed: is_in_step(speed, others, 40) for speed in (16.0, 15.0, 10.0, 0.75, 0.74)}
    assert found == {16.0: False, 15.0: True, 10.0: True, 0.75: True, 0.74: False}
    assert not is_in_step(10.0, others, 15), "rounds of so few steps are not moved"
    assert is_in_step(10.0, [0.0, 0.0], 40), "nobody else knows its speed"


# ---------------------------------------------------------------- far slower peers


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (1.0, None),
        (1 / 16, None),
        (0.0, None),  # not known yet
        (1 / 32, (32, 8)),  # half of what pacing's fewest steps take: half of the batch
        (1 / 100, (32, 2)),
        (1 / 256, (32, 1)),
        (1e-6, (32, 1)),  # not even one sequence a step ends its round with the others
    ],
)
def test_a_far_slower_peers_steps_have_fewer_sequences(own: float, expected: tuple[int, int] | None) -> None:
    assert small_batch_round(own, [1.0, 1.0, 1.0], 512, 16, 1e12) == expected


@given(own=st.floats(1e-4, 1.0), inner_steps=st.integers(1, 1000), batch=st.integers(1, 512))
def test_such_a_round_takes_no_longer_than_others(own: float, inner_steps: int, batch: int) -> None:
    found = small_batch_round(own, [1.0, 1.0, 1.0], inner_steps, batch, 1e12)
    if found is None:
        fewest = paced_inner_steps(0.0, 1.0, inner_steps)
        assert batch == 1 or own * inner_steps >= fewest * (1 - 1e-9), "pacing alone is enough"
        return
    steps, sequences = found
    assert steps == paced_inner_steps(0.0, 1.0, inner_steps) and 1 <= sequences < batch
    assert sequences == 1 or steps * sequences / batch / own <= inner_steps * (1 + 1e-6)
    assert steps * (sequences + 1) / batch / own > inner_steps * (1 - 1e-6), "and no shorter than it must be"


def test_such_a_round_keeps_to_the_time_limit() -> None:
    assert small_batch_round(1e-4, [1.0, 1.0, 1.0], 512, 16, 16_000.0) == (25, 1), "a sixteenth of 10,000 s a step"


@pytest.mark.parametrize(
    ("own", "others", "rounds"),
    [(1.0, [1.0], 1 / 16 / 16), (1 / 256, [1.0, 1.0], 1.0), (1e-4, [1.0, 1.0], 10_000 / 256), (0.1, [0.0], 0.0)],
)
def test_how_many_rounds_of_others_the_shortest_round_takes(own: float, others: list[float], rounds: float) -> None:
    assert rounds_of_others(own, others, 512, 16) == pytest.approx(rounds)
