"""Pacing: slower peers take fewer inner steps, so that all end a round together.

"Dynamic local updates" of Asynchronous Local-SGD (arXiv 2401.09135, section 5), with a reference speed that one
liar, or a fifth of all, or one peer measured wrongly, cannot raise: trusting the highest speed, they could shrink
everybody's round.
Pure functions; speeds are in inner steps per second.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

__all__ = [
    "fewest_inner_steps",
    "first_inner_steps",
    "in_step_inner_steps",
    "is_in_step",
    "most_inner_steps",
    "paced_inner_steps",
    "reference_speed",
    "round_inner_steps",
    "steps_of_everybody",
]

_FEWEST_IN_STEP = 16
"""Rounds of fewer inner steps are not moved: a slower peer's few steps are too coarse for it."""
_MOST_SHARE = 1.5
"""So many times `merge.inner_steps` a round takes at most that ends when others' do."""
_MOST_FOLLOWED, _FEWEST_FOLLOWED = 1.4, 4
"""Nobody follows who is so much faster than the reference, and may be in step or not from round to round, nor whose
paced rounds have fewer steps and so end where they do, whoever follows whom."""


def reference_speed(speeds: Sequence[float]) -> float:
    """The speed (inner steps per second) at which a peer takes the full number of inner steps.

    The highest of the live peers' speeds but for the fastest fifth of them (rounded down), and for one at least; of
    fewer than three the highest. Raises ValueError when there is none, or one is negative or not finite.
    """
    if not speeds:
        raise ValueError("reference_speed needs at least one speed")
    if not all(math.isfinite(speed) and speed >= 0 for speed in speeds):
        raise ValueError(f"speeds must be finite and not negative, got {list(speeds)}")
    ascending = sorted(speeds)
    num_left_out = max(1, len(ascending) // 5) if len(ascending) >= 3 else 0
    return ascending[-1 - num_left_out]


def paced_inner_steps(own_speed: float, reference: float, inner_steps: int) -> int:
    """H_i = clamp(floor(own_speed / reference * H), max(1, ceil(H / 16)), H), where H is `inner_steps`.

    Both speeds in inner steps per second; a reference of 0 (nobody has measured yet) gives H. Raises ValueError
    when a speed is negative or not finite, or H is below 1.
    """
    if inner_steps < 1:
        raise ValueError(f"inner_steps must be at least 1, got {inner_steps}")
    if not (math.isfinite(own_speed) and own_speed >= 0 and math.isfinite(reference) and reference >= 0):
        raise ValueError(f"speeds must be finite and not negative, got {own_speed} and {reference}")
    if own_speed >= reference:
        return inner_steps
    steps = math.floor(own_speed / reference * inner_steps + 1e-9)  # 0.1 / 0.3 * 30 is 10, not 9
    return min(max(steps, fewest_inner_steps(inner_steps)), inner_steps)


def in_step_inner_steps(inner_steps: int, own_speed: float, others_end_in_s: Sequence[float], round_s: float) -> int:
    """How many inner steps, as near to `inner_steps` as may be, a round takes that ends when others' do.

    `others_end_in_s`: in how many seconds their present rounds end. One that is over by then is followed by the next,
    and all last about `round_s`; what is over for longer than that tells nothing. The end is the mean of theirs, on the
    circle of a round. Nobody waits: this round is longer or shorter instead, never less than half. It stays as it is
    without others, where their ends have no mean, and where it would have to take more than `most_inner_steps`. Raises
    ValueError when `own_speed` or `round_s` is not positive and finite.
    """
    if not (0 < own_speed < math.inf and 0 < round_s < math.inf):
        raise ValueError(f"a speed and a round's time must be positive and finite, got {own_speed} and {round_s}")
    known_s = [end_s for end_s in others_end_in_s if -round_s <= end_s < math.inf]
    angles = [math.tau * math.fmod(end_s, round_s) / round_s for end_s in known_s]
    mean = sum(cmath.rect(1.0, angle) for angle in angles)
    if abs(mean) < 1e-9 * max(1, len(angles)):
        return inner_steps
    late_s = cmath.phase(mean) / math.tau * round_s - inner_steps / own_speed
    steps = round(inner_steps + own_speed * math.remainder(late_s, round_s))
    if 2 * steps < inner_steps:
        steps = round(steps + own_speed * round_s)
    return steps if steps <= most_inner_steps(inner_steps) else inner_steps


def round_inner_steps(
    own_speed: float,
    others: Sequence[float],
    inner_steps: int,
    *,
    paced: bool,
    limit_s: float,
    others_end_in_s: Sequence[float | None] = (),
) -> int:
    """The inner steps of a peer's round: fewer than `inner_steps` for a slower one if rounds are `paced`, and none
    beyond `limit_s`. A speed of 0 is not known yet; before the own one is, it is `inner_steps`. A paced round is in
    step (`in_step_inner_steps`) with those of `others` of which `others_end_in_s`, beside them, says when they end."""
    if own_speed <= 0:
        return inner_steps
    most = max(1, math.floor(limit_s * own_speed))
    if not paced:
        return min(inner_steps, most)
    reference = _reference_of(own_speed, others)
    fewest, round_s = fewest_inner_steps(inner_steps), inner_steps / reference
    steps = min(paced_inner_steps(own_speed, reference, inner_steps), most)
    ends = zip(others, others_end_in_s, strict=bool(others_end_in_s))
    followed = (max(fewest, _FEWEST_FOLLOWED) / round_s, _MOST_FOLLOWED * reference)
    end_in_s = [end_s for speed, end_s in ends if end_s is not None and followed[0] <= speed <= followed[1]]
    if end_in_s and is_in_step(own_speed, others, inner_steps):
        steps = max(in_step_inner_steps(steps, own_speed, end_in_s, min(round_s, limit_s)), fewest)
    return min(steps, most)


def is_in_step(own_speed: float, others: Sequence[float], inner_steps: int) -> bool:
    """Whether a peer's paced rounds are moved so that they end when others' do: not where rounds have few inner steps,
    nor of who is far faster than the reference, or so slow that its rounds take longer. `others`: 0 where unknown."""
    reference = _reference_of(own_speed, others)
    slowest = fewest_inner_steps(inner_steps) / (inner_steps / reference)
    return inner_steps >= _FEWEST_IN_STEP and slowest <= own_speed <= _MOST_SHARE * reference


def _reference_of(own_speed: float, others: Sequence[float]) -> float:
    return reference_speed([own_speed, *(speed for speed in others if speed > 0)])


def most_inner_steps(inner_steps: int) -> int:
    """The most inner steps of a paced round that ends when others' do: half as many again, rounded up."""
    return math.ceil(_MOST_SHARE * inner_steps)


def first_inner_steps(inner_steps: int, *, paced: bool) -> int:
    """Of a peer's first round where nobody waits: a short one if rounds are paced, until it knows how fast it is."""
    return fewest_inner_steps(inner_steps) if paced else inner_steps


def fewest_inner_steps(inner_steps: int) -> int:
    """The fewest inner steps of a paced round, a sixteenth of `inner_steps`, rounded up."""
    return max(1, -(-inner_steps // 16))


def steps_of_everybody(own_speed: float, others: Sequence[float]) -> float:
    """Inner steps that all take together while this peer takes one: how far the run gets meanwhile.

    No speed counts for more than the reference, nor for more than 16 times the own one, the range of pacing: a liar
    must not move anybody's learning rate. 0 when `own_speed` is not known (0). Raises ValueError as `reference_speed`.
    """
    reference = reference_speed([own_speed, *others])
    if own_speed == 0:
        return 0.0
    most = min(max(reference, own_speed), 16 * own_speed)
    return 1.0 + sum(min(speed, most) for speed in others) / own_speed
