"""Pacing: slower peers take fewer inner steps, so that all end a round together.

These are the "dynamic local updates" of Asynchronous Local-SGD (arXiv 2401.09135, section 5). Here one liar, or a fifth
of all peers, or one wrong measurement cannot raise the reference speed; if the highest speed were trusted, they could
shrink everybody's round (decision 44). Pure functions; speeds are in inner steps per second.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

_FEWEST_IN_STEP = 16
"""Inner steps below which a round's length is not adjusted: a slower peer's few steps are too coarse for that."""
_MOST_SHARE = 1.5
"""Limit of a round that ends when others' do, as a multiple of `merge.inner_steps`."""
_MOST_FOLLOWED, _FEWEST_FOLLOWED = 1.4, 4
"""Limits on the peers whose ends count: at most 1.4 times as fast as the reference, because a faster one may be in step
in one round and not in the next; and at least 4 steps in a paced round, because fewer are too coarse (decision 43)."""


def reference_speed(speeds: Sequence[float]) -> float:
    """Return the speed (inner steps per second) at which a peer takes the full number of inner steps.

    That is the highest of the live peers' speeds after leaving out the fastest fifth of them (rounded down, at least
    one); of fewer than three speeds simply the highest. Raises ValueError when there is none, or one is negative or not
    finite.
    """
    if not speeds:
        raise ValueError("reference_speed needs at least one speed")
    if not all(math.isfinite(speed) and speed >= 0 for speed in speeds):
        raise ValueError(f"speeds must be finite and not negative, got {list(speeds)}")
    ascending = sorted(speeds)
    num_left_out = max(1, len(ascending) // 5) if len(ascending) >= 3 else 0
    return ascending[-1 - num_left_out]


def paced_inner_steps(own_speed: float, reference: float, inner_steps: int) -> int:
    """Return H_i = clamp(floor(own_speed / reference * H), max(1, ceil(H / 16)), H), where H is `inner_steps`.

    Both speeds are in inner steps per second; a reference of 0 (nobody has measured yet) gives H. Raises ValueError
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
    """Return the number of inner steps, as near to `inner_steps` as possible, with which a round ends when others' do.

    `others_end_in_s`: seconds until their present rounds end. Rounds last about `round_s`, and a round that has ended
    is followed by the next; one that should have ended longer ago than that says nothing. The target is the mean of the
    others' ends on the circle of a round. Nobody waits: this round becomes longer or shorter, but no less than half. It
    keeps its length without others, if their ends have no mean, and if it would exceed `most_inner_steps`. Raises
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
    """Return the inner steps of a peer's round.

    If rounds are `paced`, a slower peer takes fewer than `inner_steps`. None takes more than fit into `limit_s`. Speeds
    of 0 are unknown; while the own one is, the result is `inner_steps`. A paced round is in step
    (`in_step_inner_steps`) with those of `others` whose end is known in `others_end_in_s`, which runs parallel to
    `others`.
    """
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


def small_batch_round(
    own_speed: float, others: Sequence[float], inner_steps: int, batch_sequences: int, limit_s: float
) -> tuple[int, int] | None:
    """Return the inner steps of a far slower peer's paced round and the sequences in each; None if it is not so slow.

    Pacing ends at a sixteenth of `inner_steps`. A peer that is slower than that takes so many steps, each with fewer
    than the run's `batch_sequences`, down to one, so that its rounds still take as long as others'. Its work counts by
    its tokens. Speeds are in steps of the whole batch per second, 0 if unknown; a round takes at most `limit_s`.
    """
    if own_speed <= 0 or batch_sequences == 1:
        return None
    fewest = fewest_inner_steps(inner_steps)
    affordable = own_speed / _reference_of(own_speed, others) * inner_steps
    if affordable >= fewest:
        return None
    sequences = max(1, math.floor(batch_sequences * affordable / fewest + 1e-9))
    most = math.floor(limit_s * own_speed * batch_sequences / sequences)
    return max(1, min(fewest, most)), sequences


def rounds_of_others(own_speed: float, others: Sequence[float], inner_steps: int, batch_sequences: int) -> float:
    """Return how many rounds of the others a peer's shortest paced round takes, with one sequence a step.

    Speeds are in steps of the whole batch per second. 0 where nobody's speed is known, or rounds end in time.
    """
    if own_speed <= 0 or not any(speed > 0 for speed in others):
        return 0.0
    shortest_s = fewest_inner_steps(inner_steps) / (own_speed * batch_sequences)
    return shortest_s * _reference_of(own_speed, others) / inner_steps


def is_in_step(own_speed: float, others: Sequence[float], inner_steps: int) -> bool:
    """Return whether a peer's paced rounds are adjusted to end when others' do.

    They are not if rounds have few inner steps, nor for a peer that is far faster than the reference, or so slow that
    its rounds take longer than others'. `others`: speeds, 0 if unknown.
    """
    reference = _reference_of(own_speed, others)
    slowest = fewest_inner_steps(inner_steps) / (inner_steps / reference)
    return inner_steps >= _FEWEST_IN_STEP and slowest <= own_speed <= _MOST_SHARE * reference


def _reference_of(own_speed: float, others: Sequence[float]) -> float:
    return reference_speed([own_speed, *(speed for speed in others if speed > 0)])


def most_inner_steps(inner_steps: int) -> int:
    """Return the most inner steps of a paced round that ends when others' do: half as many again, rounded up."""
    return math.ceil(_MOST_SHARE * inner_steps)


def first_inner_steps(inner_steps: int, *, paced: bool) -> int:
    """Return the inner steps of a peer's first round where nobody waits: few if rounds are paced, until its speed is
    known."""
    return fewest_inner_steps(inner_steps) if paced else inner_steps


def fewest_inner_steps(inner_steps: int) -> int:
    """Return the fewest inner steps of a paced round, a sixteenth of `inner_steps`, rounded up."""
    return max(1, -(-inner_steps // 16))


def steps_of_everybody(own_speed: float, others: Sequence[float]) -> float:
    """Return the inner steps that all peers together take while this one takes one: how far the run gets meanwhile.

    No speed counts for more than the reference, nor for more than 16 times the own one, which is pacing's range: a liar
    must not move anybody's learning rate. 0 when `own_speed` is unknown (0). Raises ValueError as `reference_speed`
    does.
    """
    reference = reference_speed([own_speed, *others])
    if own_speed == 0:
        return 0.0
    most = min(max(reference, own_speed), 16 * own_speed)
    return 1.0 + sum(min(speed, most) for speed in others) / own_speed
