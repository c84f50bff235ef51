"""Choice of the clock that a peer uses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.membership.membership import MOST_CORRECTED_S, judge_clock

YEARS_31 = 31 * 365.25 * 86_400


def among(*offsets_s: float) -> dict[str, float]:
    return {f"peer {number}": offset_s for number, offset_s in enumerate(offsets_s)}


def test_the_median_holds_and_those_far_from_it_are_named() -> None:
    assert judge_clock({}).offset_s == 0.0
    assert judge_clock(among(math.nan, math.inf)).offset_s == 0.0
    assert judge_clock(among(0.4, -0.4, 0.5)).offset_s == 0.0, "within the tolerance"
    verdict = judge_clock(among(100.0, 101.0, -5000.0, 100.5, math.nan, math.inf))
    assert verdict.offset_s == 100.0 and verdict.outliers == (("peer 2", -5000.0),) and not verdict.is_doubtful


@pytest.mark.parametrize("lie_s", [YEARS_31, -YEARS_31, 1200.0])
def test_a_liar_alone_is_doubted_and_outvoted_by_two_and_loses_against_one(lie_s: float) -> None:
    assert judge_clock(among(lie_s)).is_doubtful
    for honest in ([0.2, -0.2], [0.2]):
        verdict = judge_clock(among(lie_s, *honest))
        assert verdict.offset_s == 0.0 and verdict.outliers == (("peer 0", lie_s),) and not verdict.is_doubtful
    assert judge_clock(among(lie_s, lie_s, 0.0)).is_doubtful, "two of three: a person looks"


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=9), st.data())
def test_a_minority_moves_no_clock_further_than_honest_ones_are_off(lies_s: list[float], data: st.DataObject) -> None:
    honest = data.draw(st.lists(st.floats(-5, 5), min_size=len(lies_s), max_size=12))
    verdict = judge_clock(among(*lies_s, *honest))
    assert abs(verdict.offset_s) <= 5


@given(st.lists(st.floats(), max_size=9))
def test_whatever_is_told(offsets_s: list[float]) -> None:
    verdict = judge_clock(among(*offsets_s))
    assert math.isfinite(verdict.offset_s) and verdict.is_doubtful == (abs(verdict.offset_s) > MOST_CORRECTED_S)
