"""Number and times of pulls in a round, and what is learnt from their durations."""

from __future__ import annotations

import math
import random

import pytest

from swarmtrain.protocol.gossip.pulls import (
    PublicationBytes,
    PullTimes,
    WantedPartners,
    ahead_rounds,
    expected_step_s,
    expected_transfer,
    gradient_format,
    idle_s,
    is_moved,
    plan_pulls,
    pull_start,
    round_began_s,
    round_ends_s,
    total_bytes,
)

THREE = WantedPartners(gradients=3, weights=3)
SIZES = PublicationBytes(weights=200, gradient=100)


def known(bytes_per_s: float, overhead_s: float = 0.0) -> PullTimes:
    times = PullTimes()
    times.assume(bytes_per_s)
    times.merged(overhead_s)
    return times


def test_a_fragment_has_its_share_of_the_links_time_and_may_be_pulled_before_others_are_merged() -> None:
    """Of four: a quarter of the bytes, of the time that links carry and of what is kept in reserve; but calls last as
    long as they do."""
    fragment = PublicationBytes(weights=50, gradient=25, share=0.25)
    for rate, carried in ((900 / 65, (3, 3)), (499 / 65, (1, 2))):
        plan = plan_pulls(9, 1000.0, 1100.0, fragment, known(rate), THREE)
        assert (len(plan.weights_at_s), len(plan.gradients_at_s)) == carried
    plan = plan_pulls(3, 1000.0, 1100.0, fragment, known(20.0, overhead_s=40.0), THREE)
    assert plan.gradients_at_s == tuple(1100 - 1.5 - 1.5 * (40 + 25 * left / 20) for left in (3, 2, 1))
    assert total_bytes([fragment] * 4) == PublicationBytes(200, 100, 1.0)


@pytest.mark.parametrize(
    ("others", "rate", "weights", "gradients"),
    [
        (0, 1e6, 0, 0),
        (1, 1e6, 1, 1),
        (9, math.inf, 3, 3),
        (9, 1e6, 3, 3),
        (9, 900 / 65, 3, 3),  # bytes a second of which 65 of 100 seconds carry all
        (9, 899 / 65, 2, 3),
        (9, 699 / 65, 1, 3),
        (9, 499 / 65, 1, 2),
        (9, 399 / 65, 1, 1),
        (9, 1e-9, 1, 1),
    ],
)
def test_a_slow_link_costs_weights_first_then_gradients_and_never_the_last_of_either(
    others: int, rate: float, weights: int, gradients: int
) -> None:
    plan = plan_pulls(others, 1000.0, 1100.0, SIZES, known(rate), THREE)
    assert (len(plan.weights_at_s), len(plan.gradients_at_s)) == (weights, gradients), plan.reason
    assert all(1000.0 <= at_s <= 1100.0 for at_s in plan.weights_at_s + plan.gradients_at_s)


def test_weights_come_first_then_one_gradient_after_the_other_as_late_as_the_link_allows() -> None:
    plan = plan_pulls(3, 1000.0, 1100.0, SIZES, known(20.0, overhead_s=2.0), THREE)
    assert plan.weights_at_s == tuple(1100 - 5 - 1.5 * (2 + (300 + 200 * left) / 20) for left in (3, 2, 1))
    assert plan.gradients_at_s == tuple(1100 - 5 - 1.5 * (2 + 100 * left / 20) for left in (3, 2, 1))
    short = plan_pulls(3, 1000.0, 1001.0, SIZES, known(1e9), THREE)
    assert short.gradients_at_s == pytest.approx((1000.9,) * 3), "a tenth of a round for another try"
    assert plan.reason == "3 of 3 gradients and the weights of 3"
    assert [plan.num_due("mean", now) for now in (1000.0, 1039.4, 1100.0)] == [0, 1, 3]
    assert plan.next_s(1000.0) == plan.weights_at_s[0] and plan.next_s(plan.gradients_at_s[-1]) is None


@pytest.mark.parametrize(
    ("others", "rate", "weights", "gradients"),
    [
        (20, math.inf, 1, 8),
        (3, math.inf, 1, 3),
        (20, 1000 / 65, 1, 8),
        (20, 999 / 65, 1, 7),
        (20, 1e-9, 1, 1),
    ],
)
def test_gradients_of_many_and_the_weights_of_one(others: int, rate: float, weights: int, gradients: int) -> None:
    wanted = WantedPartners(gradients=8, weights=1)
    plan = plan_pulls(others, 1000.0, 1100.0, SIZES, known(rate), wanted)
    assert (len(plan.weights_at_s), len(plan.gradients_at_s)) == (weights, gradients), plan.reason
    assert wanted.bytes_of(SIZES) == 1000


FORMATS = {"int2": PublicationBytes(weights=800, gradient=225), "int4": PublicationBytes(weights=800, gradient=450)}


@pytest.mark.parametrize(
    ("others", "round_s", "rate", "found"),
    [
        (0, 100.0, 1e6, "int2"),
        (1, 100.0, 1e6, "int4"),
        (4, 100.0, 1e6, "int4"),  # four times 450, as eight times 225
        (5, 100.0, 1e6, "int2"),
        (99, 100.0, 1e6, "int2"),
        (4, 0.0, 1e6, "int2"),  # how long a round lasts is not known
        (4, 100.0, None, "int2"),  # or how fast bytes come
        (4, 100.0, 130.0, "int4"),  # 2600 bytes in a fifth of the round
        (4, 100.0, 129.0, "int2"),
        (3, 100.0, 107.5, "int4"),
    ],
)
def test_gradients_are_finer_where_they_are_few_and_cost_next_to_no_time(
    others: int, round_s: float, rate: float | None, found: str
) -> None:
    wanted = WantedPartners(gradients=8, weights=1)
    assert gradient_format(FORMATS, others, round_s, rate, wanted) == found
    assert gradient_format({"fp32": FORMATS["int4"]}, others, round_s, rate, wanted) == "fp32"


def test_whoever_wants_few_partners_gets_no_finer_gradients_for_that() -> None:
    assert gradient_format(FORMATS, 9, 100.0, 1e6, THREE) == "int2"
    assert gradient_format(FORMATS, 1, 100.0, 1e6, THREE) == "int4"


def test_a_step_is_expected_to_take_what_it_does_in_this_round_if_that_is_less_than_in_the_last() -> None:
    assert expected_step_s(2.0, 0.0, 0) == 2.0, "none was taken yet"
    assert expected_step_s(2.0, 15.0, 10) == 1.5
    assert expected_step_s(2.0, -1.0, 10) == 2.0, "a clock was put back"
    assert expected_step_s(2.0, 500.0, 10) == 2.0, "it may have hung"


def test_a_merge_is_planned_anew_where_it_moves_by_a_hundredth_of_the_way_to_it() -> None:
    assert not is_moved(100.0, 100.5, 60.0) and not is_moved(100.0, 99.5, 60.0)
    assert is_moved(100.0, 100.7, 60.0) and is_moved(100.0, 99.3, 60.0)


def test_when_a_round_ends_is_known_of_who_tells_how_long_it_is_and_how_fast_it_is() -> None:
    assert round_ends_s(100.0, 40, 10, 2.0) == 115.0
    assert round_ends_s(100.0, 40, 50, 2.0) == 95.0, "it has told more than there is to do"
    assert round_ends_s(100.0, 0, 10, 2.0) is None and round_ends_s(100.0, 40, 10, 0.0) is None


def test_where_rounds_end_early_pulls_begin_earlier() -> None:
    """Two seconds do not help where steps are not all equally quick, and a round of a minute ends five early."""
    times = known(1e9)
    for lasted_s in (101.0, 92.0, 99.0):
        times.round_ended(100.0, lasted_s)
    assert plan_pulls(3, 1000.0, 1100.0, SIZES, times, THREE).gradients_at_s == pytest.approx((1092.0,) * 3)
    assert plan_pulls(3, 1000.0, 1010.0, SIZES, times, THREE).gradients_at_s == pytest.approx((1009.0,) * 3), (
        "a tenth will do"
    )
    for _ in range(8):
        times.round_ended(100.0, 130.0)
    assert plan_pulls(3, 1000.0, 1100.0, SIZES, times, THREE).gradients_at_s == pytest.approx((1095.0,) * 3), (
        "a twentieth at least"
    )
    times.round_ended(100.0, 1.0)
    assert plan_pulls(3, 1000.0, 1100.0, SIZES, times, THREE).gradients_at_s == pytest.approx((1075.0,) * 3), (
        "a quarter at most"
    )


def test_what_is_not_known_is_pulled_from_half_of_the_round_on() -> None:
    plan = plan_pulls(9, 100.0, 160.0, SIZES, PullTimes(), THREE)
    assert plan.weights_at_s == plan.gradients_at_s == (130.0,) * 3 and "not known yet" in plan.reason
    assert plan_pulls(9, 100.0, 90.0, SIZES, PullTimes(), THREE).weights_at_s == (100.0,) * 3
    assert plan_pulls(0, 100.0, 160.0, SIZES, PullTimes(), THREE).reason == "nobody else is there"


def test_pulls_that_overlap_share_the_link_and_the_last_has_seen_all_of_its_rate() -> None:
    times = PullTimes()
    assert times.bytes_per_s is None
    first, second, third = times.bytes_begin(10.0), times.bytes_begin(10.0), times.bytes_begin(10.0)
    for begun in (first, second, third):
        times.bytes_end(begun, 12.0, 100)
    assert sorted(times._rates) == [50.0, 100.0, 150.0] and times.bytes_per_s == 100.0
    for now in range(20, 28):  # one after the other
        times.bytes_end(times.bytes_begin(now), now + 1, 150)
    assert times.bytes_per_s == 150.0


def test_neither_one_that_fails_nor_one_that_trickles_spoils_the_rate() -> None:
    times = PullTimes()
    trickle = times.bytes_begin(0.0)
    for now in range(0, 1000, 100):
        times.bytes_begin(now)  # fails
        times.bytes_end(times.bytes_begin(now), now + 1, 100)
    times.bytes_end(trickle, 1000.0, 100)
    assert times.bytes_per_s == 100.0


def test_a_link_that_is_never_idle_is_measured_all_the_same() -> None:
    times = PullTimes()
    begun = times.bytes_begin(0.0)
    for now in range(2, 200, 2):
        following = times.bytes_begin(now)
        times.bytes_end(begun, now + 1, 500)
        begun = following
    assert times.bytes_per_s == pytest.approx(2 * 500 / 3)


def test_what_is_learnt_is_a_middle_rate_and_a_long_overhead_of_the_last_few() -> None:
    times, chance, now = PullTimes(), random.Random(3), 0.0
    for rate in [5.0] * 20 + chance.sample([100.0] * 6 + [1.0, 1e6], 8):
        times.bytes_end(times.bytes_begin(now), now + 10, int(10 * rate))
        now += 20
    assert times.bytes_per_s == 100.0
    assert times.overhead_s == 0.0
    for overhead_s in [9.0, 9.0, *[1.0] * 6, 2.0, 3.0]:
        times.merged(overhead_s)
    assert times.overhead_s == 2.0


# ---------------------------------------------------------------- one pull a round, from a server


def test_a_pull_is_slow_after_thrice_what_is_expected_and_who_has_nothing_new_rests_an_eighth_of_a_round() -> None:
    times, sizes = PullTimes(), PublicationBytes(weights=600, gradient=400)
    assert times.slow_after_s(sizes, THREE) == 1.0
    times.assume(1000.0)
    times.merged(0.5)
    assert times.slow_after_s(sizes, THREE) == pytest.approx(3 * (0.5 + 3.0))
    assert (idle_s(80.0), idle_s(1.0)) == (10.0, 0.25)


def test_a_pull_starts_as_late_as_the_link_allows() -> None:
    assert pull_start(100.0, 160.0, None)[0] == 130.0
    assert pull_start(100.0, 160.0, 10.0)[0] == 140.0
    assert pull_start(100.0, 160.0, 0.0)[0] == 160.0
    assert pull_start(100.0, 160.0, 31.0)[0] == 100.0
    assert pull_start(100.0, 90.0, None)[0] == 100.0
    assert "twice" in pull_start(100.0, 160.0, 10.0)[1] and "at once" in pull_start(100.0, 160.0, 31.0)[1]


def test_the_expected_transfer_is_a_slow_one_but_no_outlier() -> None:
    assert expected_transfer([]) is None
    assert expected_transfer([2.0]) == 2.0
    assert expected_transfer([1.0, 3.0]) == 3.0
    assert expected_transfer([1.0] * 7 + [99.0]) == 1.0
    assert expected_transfer([99.0] + [1.0] * 8) == 1.0


def test_how_much_later_another_began_its_round() -> None:
    assert round_began_s(1000.0, 30, 2.0) == 985.0
    assert round_began_s(1000.0, 0, 2.0) == 1000.0
    assert round_began_s(1000.0, 30, 0.0) is None, "its speed is not known yet"
    assert ahead_rounds(985.0, 980.0, 1000.0) == 0.25
    assert ahead_rounds(980.0, 985.0, 1000.0) == 0.0, "earlier: nothing is added"
    assert ahead_rounds(2000.0, 985.0, 1000.0) == 1.0, "whatever it says"
    assert ahead_rounds(None, 985.0, 1000.0) == 0.0
    assert ahead_rounds(999.0, 1000.0, 1000.0) == 0.0 and ahead_rounds(1001.0, 1000.0, 1000.0) == 1.0
