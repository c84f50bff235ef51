"""Speed of a machine over time: its owner and other programs use it too."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Random speeds of volunteers.

    Every `lasts_s` virtual seconds each volunteer's speed is drawn anew: lognormal around its own speed, in which work
    is counted, with `deviation` the standard deviation of the logarithm. With 0 all steps take the same time.
    """

    deviation: float = 0.0
    lasts_s: float = 30.0
    seed: int = 0

    def done_s(self, number: int, since_s: float, work_s: float) -> float:
        """Return the time at which volunteer `number`, which starts at `since_s`, has done work that takes `work_s`
        seconds at its usual speed."""
        if not self.deviation:
            return since_s + work_s
        for speed, until_s in self._speeds(number, since_s):
            done_s = since_s + work_s / speed
            if done_s <= until_s:
                return done_s
            work_s, since_s = work_s - speed * max(0.0, until_s - since_s), max(since_s, until_s)
        raise AssertionError

    def worked_s(self, number: int, since_s: float, until_s: float) -> float:
        """Return the work that volunteer `number` does from `since_s` to `until_s`, in seconds at its usual speed."""
        if not self.deviation or since_s >= until_s:  # it may not have begun: at infinity
            return max(0.0, until_s - since_s)
        worked_s = 0.0
        for speed, drawn_s in self._speeds(number, since_s):
            if since_s >= until_s:
                break
            worked_s += speed * max(0.0, min(until_s, drawn_s) - since_s)
            since_s = max(since_s, drawn_s)
        return worked_s

    def _speeds(self, number: int, since_s: float) -> Iterator[tuple[float, float]]:
        """Yield (speed relative to the usual one, time until which it lasts) for each drawn speed, one after the
        other."""
        for span in itertools.count(int(since_s // self.lasts_s)):
            yield _drawn(self.seed, self.deviation, number, span), (span + 1) * self.lasts_s


# By number and span, not one after the other: whatever is asked first, a span has the same speed.
@functools.lru_cache(maxsize=1 << 16)
def _drawn(seed: int, deviation: float, number: int, span: int) -> float:
    return random.Random(f"pace {seed} {number} {span}").lognormvariate(0.0, deviation)
