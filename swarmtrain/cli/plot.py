"""Curves in a few lines of text: braille dots if the terminal can show them, else ASCII.

Pure: numbers in, lines out. Each curve has its own axis, since their units differ: the first on the left, the second on
the right. The first is a line: points that share a column are averaged, and neighbours are joined unless a gap is
between them. The second is measured more seldom and drawn over it as single marks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BRAILLE = 0x2800
_MARK_EVERY = 4  # characters, so that the line below can be seen
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column within a character

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines of equal length. `owners` says what drew each character: 0 the line, 1 a mark, -1 nothing."""

    lines: tuple[str, ...]
    owners: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[str, str], tuple[str, str]]  # of each curve: its values at the first and the last line, or ""


def plot(line: Curve, marks: Curve, width: int, height: int, *, ascii_only: bool = False) -> Plot:
    """Draw two curves of (x, y) into `height` lines of `width` characters, with one range of x for both.

    Points that are not finite are left out.
    """
    across, down = (1, 1) if ascii_only else (2, 4)
    line, marks = _finite(line), _finite(marks)
    x_range = _range([x for x, _ in (*line, *marks)])
    line_range, marks_range = _widened(_range([y for _, y in line])), _widened(_range([y for _, y in marks]))
    cells = [[" "] * width for _ in range(height)]
    owners = [[-1] * width for _ in range(height)]
    dots: dict[tuple[int, int], int] = {}
    for column, row in _dots(_by_column(line, x_range, width * across), line_range, height * down):
        place = row // down, column // across
        dots[place] = dots.get(place, 0) | _DOTS[row % down][column % across]
    for (row, column), bits in dots.items():
        cells[row][column], owners[row][column] = "*" if ascii_only else chr(_BRAILLE + bits), 0
    by_column = _by_column(marks, x_range, width)
    for column in _apart(by_column):
        row = height - 1 - _place(by_column[column], marks_range, height)
        cells[row][column], owners[row][column] = "o" if ascii_only else "•", 1
    return Plot(
        lines=tuple(map("".join, cells)),
        owners=tuple(map(tuple, owners)),
        labels=(_labels(line_range) if line else ("", ""), _labels(marks_range) if marks else ("", "")),
    )


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)]


def _apart(columns: Iterable[int]) -> list[int]:
    """Thin out `columns` (rising) to at least `_MARK_EVERY` apart; keeps the last one."""
    kept: list[int] = []
    for column in sorted(columns, reverse=True):
        if not kept or kept[-1] - column >= _MARK_EVERY:
            kept.append(column)
    return kept


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 0.0)


def _widened(y_range: tuple[float, float]) -> tuple[float, float]:
    """Widen a range to a twentieth of its values, so that a change by a percent does not look like a fall."""
    lowest, highest = y_range
    middle = lowest / 2 + highest / 2
    least = abs(middle) / 20
    wide = (middle - least / 2, middle + least / 2)
    return wide if 0 < highest - lowest < least and all(map(math.isfinite, wide)) else y_range


def _labels(y_range: tuple[float, float]) -> tuple[str, str]:
    lowest, highest = y_range
    return _number(highest), _number(lowest) if highest > lowest else ""


def _number(value: float) -> str:
    """Format a number in at most seven characters."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0e}"


def _place(value: float, span: tuple[float, float], size: int) -> int:
    """Return which of `size` places `value` falls into; the middle one if all values are equal."""
    lowest, highest = span
    if not highest > lowest:
        return (size - 1) // 2
    # Halves first: the difference of two huge numbers may not be finite.
    part = (value / 2 - lowest / 2) / (highest / 2 - lowest / 2)
    return min(size - 1, max(0, round(part * (size - 1))))


def _by_column(curve: Curve, x_range: tuple[float, float], columns: int) -> dict[int, float]:
    """Average y in each column that has points, from left to right."""
    found: dict[int, list[float]] = {}
    for x, y in curve:
        found.setdefault(_place(x, x_range, columns), []).append(y)
    return {column: _mean(ys) for column, ys in sorted(found.items())}


def _mean(values: Sequence[float]) -> float:
    """Average without overflow; clamped, since rounded shares of huge numbers can sum to more than the maximum."""
    return max(min(values), min(max(values), sum(value / len(values) for value in values)))


def _dots(by_column: dict[int, float], y_range: tuple[float, float], rows: int) -> set[tuple[int, int]]:
    """Return (column, row) of each dot, row 0 on top: the points, and straight lines between neighbours.

    There is no line to a neighbour that is eight times as far away as usual, and further than a twentieth of the width.
    """
    points = [(column, rows - 1 - _place(y, y_range, rows)) for column, y in by_column.items()]
    dots = set(points)
    apart = sorted(right - left for left, right in itertools.pairwise(by_column))
    furthest = max(8 * apart[len(apart) // 2], max(by_column) / 20) if apart else 0
    for (column, row), (next_column, next_row) in itertools.pairwise(points):
        if next_column - column > furthest:
            continue
        steps = max(next_column - column, abs(next_row - row))
        for step in range(1, steps):
            part = step / steps
            dots.add((column + round(part * (next_column - column)), row + round(part * (next_row - row))))
    return dots
