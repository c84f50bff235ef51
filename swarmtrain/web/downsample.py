"""Downsampling of curves for a chart: largest triangle three buckets.

From S. Steinarsson, "Downsampling Time Series for Visual Representation" (2013). It keeps the first and the last point
and, of each bucket between, the point that spans the largest triangle with the point kept before it and the mean of
the next bucket: peaks stay, which evenly spaced points or means would lose.
"""

from __future__ import annotations

from collections.abc import Sequence


def largest_triangles(x: Sequence[float], y: Sequence[float], most: int) -> list[int]:
    """Return the places of at most `most` (3 or more) of the points (`x`, `y`), rising; `x` must not fall.

    All places if there are no more points than that.
    """
    if len(x) != len(y) or most < 3:
        raise ValueError(f"{len(x)} x for {len(y)} y, thinned to {most}; as many of each are needed, and 3 or more")
    if len(x) <= most:
        return list(range(len(x)))
    step = (len(x) - 2) / (most - 2)
    edges = [1 + round(number * step) for number in range(most - 1)]  # of the buckets between the first and last point
    kept = [0]
    for number in range(most - 2):
        begin, end = edges[number], edges[number + 1]
        after = (end, edges[number + 2]) if number + 2 < len(edges) else (len(x) - 1, len(x))
        mean_x, mean_y = (sum(axis[slice(*after)]) / (after[1] - after[0]) for axis in (x, y))
        x0, y0 = x[kept[-1]], y[kept[-1]]
        # twice the area of the triangle of (x0, y0), the point, and (mean_x, mean_y)
        areas = [abs((x0 - mean_x) * (y[place] - y0) - (x0 - x[place]) * (mean_y - y0)) for place in range(begin, end)]
        kept.append(begin + max(range(len(areas)), key=areas.__getitem__))
    return [*kept, len(x) - 1]
