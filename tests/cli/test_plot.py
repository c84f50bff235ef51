"""Loss curve in characters."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.cli.plot import plot


def test_a_line_goes_from_corner_to_corner() -> None:
    drawn = plot([(0, 4), (3, 1)], [], 4, 4, ascii_only=True)
    assert drawn.lines == ("*   ", " *  ", "  * ", "   *")
    assert drawn.labels == (("4.00", "1.00"), ("", ""))


def test_braille_has_eight_dots_a_character() -> None:
    drawn = plot([(0, 0), (7, 7)], [], 4, 2)
    assert drawn.lines == ("  ⡠⠊", "⡠⠊  ")


def test_neighbours_are_joined() -> None:
    drawn = plot([(0, 0), (1, 9)], [], 2, 4, ascii_only=True)
    rows = ["".join(line) for line in drawn.lines]
    assert sum(row.count("*") for row in rows) == 4
    assert all("*" in row for row in rows)


def test_no_line_is_drawn_over_a_gap() -> None:
    """Seen: hours in which nobody trained looked like a slow descent."""
    curve = [(x, 9) for x in range(10)] + [(19, 4)] + [(x, 0) for x in range(30, 40)]
    rows = plot(curve, [], 40, 3, ascii_only=True).lines
    assert rows == ("*" * 10 + " " * 30, " " * 19 + "*" + " " * 20, " " * 30 + "*" * 10)
    seldom = plot([(0, 2), (20, 1), (39, 0)], [], 40, 3, ascii_only=True).lines
    assert sum(row.count("*") for row in seldom) == 40, "no gap: they are always so far apart"


@pytest.mark.parametrize(("lowest", "labels"), [(1.99, ("2.04", "1.95")), (1.0, ("2.00", "1.00")), (2.0, ("2.00", ""))])
def test_a_percent_does_not_fill_the_height(lowest: float, labels: tuple[str, str]) -> None:
    drawn = plot([(0, 2.0), (9, lowest)], [], 10, 20, ascii_only=True)
    assert drawn.labels[0] == labels
    lines = [number for number, line in enumerate(drawn.lines) if line.strip()]
    assert lines == list(range(20)) if lowest == 1.0 else len(lines) <= 6


def test_points_of_one_column_become_their_mean() -> None:
    drawn = plot([(0, 0), (0.1, 4), (10, 0), (20, 4)], [], 3, 3, ascii_only=True)
    assert [line[0] for line in drawn.lines] == [" ", "*", " "]


def test_the_mean_of_the_largest_numbers_is_one_too() -> None:
    largest = sys.float_info.max
    for sign in (1, -1):
        drawn = plot([], [(0, 0), *[(1, sign * largest)] * 3], 2, 1, ascii_only=True)
        assert drawn.lines == (" o",)


def test_marks_lie_over_the_line_with_an_axis_of_their_own() -> None:
    drawn = plot([(0, 1), (30, 1)], [(0, 8), (1, 8), (30, 2)], 31, 3, ascii_only=True)
    assert drawn.lines == (" o" + 29 * " ", 31 * "*", 30 * " " + "o")
    assert drawn.labels == (("1.00", ""), ("8.00", "2.00"))
    assert drawn.owners[0][1] == 1
    assert drawn.owners[1][1] == 0
    assert drawn.owners[0][0] == -1


def test_nothing_and_one_point() -> None:
    assert plot([], [], 3, 2).lines == ("   ", "   ")
    assert plot([(5, 5)], [], 3, 3, ascii_only=True).lines == ("   ", " * ", "   ")


NUMBER = st.floats(allow_nan=True, allow_infinity=True)
CURVE = st.lists(st.tuples(NUMBER, NUMBER), max_size=30)


@given(CURVE, CURVE, st.integers(1, 30), st.integers(1, 8), st.booleans())
def test_whatever_the_numbers_it_fits(
    line: list[tuple[float, float]], marks: list[tuple[float, float]], width: int, height: int, ascii_only: bool
) -> None:
    drawn = plot(line, marks, width, height, ascii_only=ascii_only)
    assert [len(text) for text in drawn.lines] == [width] * height
    assert [len(owners) for owners in drawn.owners] == [width] * height
    assert all(len(label) <= 8 for labels in drawn.labels for label in labels)
    if any(math.isfinite(x) and math.isfinite(y) for x, y in line):
        assert any(text.strip() for text in drawn.lines)
