"""Largest triangle three buckets."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from swarmtrain.web.downsample import largest_triangles


def reference(x: Sequence[float], y: Sequence[float], most: int) -> list[int]:
    """Select points as the thesis describes it (Steinarsson 2013, section 4.2), point by point."""
    step, kept, last = (len(x) - 2) / (most - 2), [0], len(x) - 1
    for bucket in range(most - 2):
        begin, end = 1 + round(bucket * step), 1 + round((bucket + 1) * step)
        until = 1 + round((bucket + 2) * step) if bucket < most - 3 else last + 1
        after = list(range(end, until))
        mean = sum(x[n] for n in after) / len(after), sum(y[n] for n in after) / len(after)
        a = x[kept[-1]], y[kept[-1]]
        best, most_area = begin, -1.0
        for n in range(begin, end):
            area = abs(a[0] * (y[n] - mean[1]) + x[n] * (mean[1] - a[1]) + mean[0] * (a[1] - y[n])) / 2
            if area > most_area + 1e-9:
                best, most_area = n, area
        kept.append(best)
    return [*kept, last]


@pytest.mark.parametrize("most", [3, 4, 17, 100, 399, 400])
def test_it_matches_the_description(most: int) -> None:
    chosen = random.Random(most)
    x = [float(n) for n in range(400)]
    y = [5 / (1 + n / 50) + chosen.gauss(0, 0.1) for n in range(400)]
    kept = largest_triangles(x, y, most)
    assert len(kept) == most and kept == sorted(set(kept)) and (kept[0], kept[-1]) == (0, 399)
    assert kept == (reference(x, y, most) if most < 400 else list(range(400)))


def test_a_peak_stays_that_even_spacing_would_lose() -> None:
    y = [1.0] * 10_000
    y[4321] = 9.0
    kept = largest_triangles(list(range(10_000)), y, 50)
    assert 4321 in kept and len(kept) == 50


def test_few_points_stay_as_they_are_and_bad_questions_are_refused() -> None:
    assert largest_triangles([], [], 3) == []
    assert largest_triangles([1, 2], [math.e, math.pi], 3) == [0, 1]
    for x, y, most in (([1.0], [], 3), ([1.0], [1.0], 2)):
        with pytest.raises(ValueError):
            largest_triangles(x, y, most)
