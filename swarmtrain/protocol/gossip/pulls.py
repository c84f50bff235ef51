"""How much to pull in a round, and when: as late as the link allows, since what comes late is fresh.

Pure: `now` is an argument, and what pulls took is told.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "LINK_SHARE",
    "PullPlan",
    "PullTimes",
    "Section",
    "SectionBytes",
    "SectionRule",
    "WantedPartners",
    "ahead_rounds",
    "expected_step_s",
    "expected_transfer",
    "gradient_format",
    "idle_s",
    "is_moved",
    "most_pulls",
    "plan_pulls",
    "pull_start",
    "round_began_s",
    "round_ends_s",
    "total_bytes",
]

Section: TypeAlias = str
"""What of a partner is pulled, by its name in the run's list (`network.sections`): such as the weights that its round
began with, or its pseudo-gradient since."""

SectionRule: TypeAlias = Literal["mean", "outer step"]
"""What a merge makes of partners' values: the mean with this peer's own, or, weighted by their tokens, the gradient of
one outer step."""

LARGE_MODEL = 4_000_000
"""Of so many parameters and more, what is held counts for more than the time that it takes to make it again."""
LINK_SHARE = 0.65
"""So much of a round may be spent on pulling."""
_SLACK = 1.5
"""A pull begins so many times as long before the round's end as it is expected to take."""
_SPARE_SHARE, _MOST_SPARE_S, _LONG_SPARE_SHARE = 0.10, 1.5, 0.05
"""And such a share of a round earlier still, at most so many seconds: one that is busy is asked again after a second,
and another is tried where one fails. Of long rounds at least the other share: steps are not all equally quick."""
_SLOW_FACTOR = 3.0
_LEAST_SLOW_S = 1.0
_RETRIES_A_ROUND = 8
_LEAST_IDLE_S = 0.25
_PULLS_A_PARTNER = 4
_MOVED_SHARE, _LEAST_MOVED_S = 0.01, 0.1
_FINE_SHARE = 0.2
"""Pulls of finer gradients may take so much of a round. Where they do, the loss is half a percent less for them; where
they take most of it, it is 0.3 % more (decision 48)."""
_MOST_EARLY_SHARE = 0.25
"""What comes after the round has ended is of no use to it, so where rounds end earlier than expected, pulls begin by so
much earlier too; not by more than this."""


@dataclass(frozen=True)
class PullPlan:
    """When the pulls of a round are due, of each rule the earliest first; with the reason."""

    weights_at_s: tuple[float, ...]
    """Of each section that is averaged."""
    gradients_at_s: tuple[float, ...]
    reason: str

    def num_due(self, rule: SectionRule, now: float) -> int:
        """How many pulls of each section with that rule should have begun."""
        return bisect_right(self.weights_at_s if rule == "mean" else self.gradients_at_s, now)

    def next_s(self, now: float) -> float | None:
        """When the next pull is due; None if all are."""
        found = None
        for at_s in self.weights_at_s, self.gradients_at_s:
            if (passed := bisect_right(at_s, now)) < len(at_s) and (found is None or at_s[passed] < found):
                found = at_s[passed]
        return found


@dataclass(frozen=True)
class SectionBytes:
    """What a partner's weights and its pseudo-gradient weigh as they travel."""

    weights: int
    """With all else that is averaged."""
    gradient: int
    share: float = 1.0
    """One divided by the number of the model's fragments, where they are of one of these."""

    @property
    def both(self) -> int:
        """Together."""
        return self.weights + self.gradient


def total_bytes(sizes: Iterable[SectionBytes]) -> SectionBytes:
    """Of several fragments."""
    sizes = list(sizes)
    weights, gradient = sum(each.weights for each in sizes), sum(each.gradient for each in sizes)
    return SectionBytes(weights, gradient, sum(each.share for each in sizes))


class WantedPartners(NamedTuple):
    """Of how many partners the gradients and the weights are pulled in a round, where the link carries them."""

    gradients: int
    weights: int

    def bytes_of(self, sizes: SectionBytes) -> int:
        """All of it."""
        return self.gradients * sizes.gradient + self.weights * sizes.weights


_Format = TypeVar("_Format", bound=str)


def gradient_format(
    sizes: Mapping[_Format, SectionBytes],
    num_live_others: int,
    round_s: float,
    bytes_per_s: float | None,
    configured: WantedPartners,
) -> _Format:
    """In which of these formats, the coarsest first, a peer publishes its pseudo-gradients in a round that lasts so
    long (0: it is not known).

    What the coarsest loses disappears in the mean of many gradients, and not in that of a few. So it is the finest in
    which what a round pulls, of all that is merged (`sizes`), weighs no more than in the coarsest in a large
    swarm, and takes little of the round.
    """
    formats = list(sizes)
    found, most_bytes = formats[0], configured.bytes_of(sizes[formats[0]])
    if num_live_others < 1 or not bytes_per_s:
        return found
    here = WantedPartners(*(min(each, num_live_others) for each in configured))
    for format in formats[1:]:
        num_bytes = here.bytes_of(sizes[format])
        if num_bytes <= most_bytes and num_bytes / bytes_per_s <= _FINE_SHARE * round_s:
            found = format
    return found


def plan_pulls(
    num_live_others: int,
    started_s: float,
    ends_s: float,
    sizes: SectionBytes,
    times: PullTimes,
    configured: WantedPartners,
) -> PullPlan:
    """What to pull in a round, and when: as late as the link allows, since what comes late is fresh.

    The round is that of the fragments that `sizes` are of, which have so large a share of the link's time. Of
    as many partners as `configured`, at most of everyone, as far as the link carries that in two thirds of the
    time; where it carries less, weights of fewer, then gradients of fewer, never less than one of each. Weights first,
    because they stay what they are for a whole round of their author's, and one pull after the other, so that each has
    the whole link and the last is as fresh as it can be.
    """
    if num_live_others < 1:
        return PullPlan((), (), "nobody else is there")
    wanted, most_weights = (max(1, min(each, num_live_others)) for each in configured)
    rate = times.bytes_per_s
    if not rate:
        half_s = max(started_s, ends_s - sizes.share * (ends_s - started_s) / 2)
        reason = "half of the round: how long a transfer takes is not known yet"
        return PullPlan((half_s,) * most_weights, (half_s,) * wanted, reason)
    lasts_s = ends_s - started_s
    window_s = sizes.share * lasts_s
    carried = rate * LINK_SHARE * window_s
    gradients = max(1, int(min(wanted, (carried - sizes.weights) / max(sizes.gradient, 1))))
    weights = max(1, int(min(most_weights, (carried - gradients * sizes.gradient) / max(sizes.weights, 1))))
    spare_s = max(
        min(_MOST_SPARE_S, _SPARE_SHARE * window_s), _LONG_SPARE_SHARE * window_s, times.early_share * lasts_s
    )
    overhead_s, left_bytes, at_s = times.overhead_s, gradients * sizes.gradient + weights * sizes.weights, []
    for number in range(weights + gradients):
        begins_s = ends_s - (spare_s + _SLACK * (overhead_s + left_bytes / rate))
        at_s.append(begins_s if begins_s > started_s else started_s)
        left_bytes -= sizes.weights if number < weights else sizes.gradient
    reason = f"{gradients} of {wanted} gradients and the weights of {weights}"
    return PullPlan(tuple(at_s[:weights]), tuple(at_s[weights:]), reason)


def expected_step_s(last_round_s: float, passed_s: float, steps_done: int) -> float:
    """What an inner step is expected to take in a round of which so many took so long: as in the last round, or in this
    one so far, if that is less. What is pulled early is a little older; what comes late is of no use."""
    return min(last_round_s, passed_s / steps_done) if steps_done and passed_s > 0 else last_round_s


def is_moved(ends_s: float, now_ends_s: float, way_s: float) -> bool:
    """Whether a merge that was expected at one time and now is at another should be planned anew: from the merge of one
    fragment to that of the next it takes `way_s`."""
    return abs(now_ends_s - ends_s) > max(_MOVED_SHARE * way_s, _LEAST_MOVED_S)


def round_began_s(told_s: float, inner_steps_done: int, steps_per_s: float) -> float | None:
    """When the round began of a peer that was so far at `told_s`; None if it does not know its speed, `steps_per_s`."""
    return told_s - inner_steps_done / steps_per_s if steps_per_s > 0 else None


def round_ends_s(told_s: float, inner_steps: int, inner_steps_done: int, steps_per_s: float) -> float | None:
    """When the round ends, of so many inner steps, of a peer that was so far at `told_s`; None if it does not know its
    speed, or has not told how many those are (0)."""
    return told_s + (inner_steps - inner_steps_done) / steps_per_s if inner_steps and steps_per_s > 0 else None


def ahead_rounds(theirs_began_s: float | None, began_s: float, ends_s: float) -> float:
    """By how much of this peer's round, from 0 to 1, another's began later; 0 if it is not known when that began."""
    if theirs_began_s is None:
        return 0.0
    return min(1.0, max(0.0, theirs_began_s - began_s) / max(ends_s - began_s, 1e-9))


def idle_s(round_s: float) -> float:
    """How long who had nothing new is not asked again, in a round that lasts so long."""
    return max(_LEAST_IDLE_S, round_s / _RETRIES_A_ROUND)


def most_pulls(configured: WantedPartners) -> int:
    """How many may go on at once for a fragment, of all sections, the slow ones too."""
    return _PULLS_A_PARTNER * max(configured)


@dataclass(slots=True)
class BytesBegun:
    """A pull's bytes began to come."""

    at_s: float
    ended_bytes: int
    """Of all pulls, by then."""


@dataclass(slots=True)
class PullTimes:
    """What the last pulls took: besides their bytes, and how fast bytes came meanwhile.

    Pulls that overlap share the link. So a pull's rate counts all bytes that came whole while it went on, others' too:
    of pulls side by side the last one to end has seen the link's whole rate, the first less.
    """

    most: int = 8
    _overheads_s: list[float] = field(default_factory=list)
    _rates: list[float] = field(default_factory=list)
    _early_shares: list[float] = field(default_factory=list)
    _ended_bytes: int = 0
    bytes_per_s: float | None = None
    """Of the last pulls, the (upper) median; None before the first."""
    overhead_s: float = 0.0
    """Of the last pulls: the slower quarter begins there."""
    early_share: float = 0.0
    """By what share of a round the last ones ended earlier than expected, at most."""

    def bytes_begin(self, now: float) -> BytesBegun:
        """Bytes begin to come, beside others or not. What is returned is for `bytes_end`."""
        return BytesBegun(now, self._ended_bytes)

    def bytes_end(self, begun: BytesBegun, now: float, came_bytes: int) -> None:
        """All of them have come. Of a pull that fails nothing is told."""
        self._ended_bytes += came_bytes
        if now > begun.at_s:
            rate = (self._ended_bytes - begun.ended_bytes) / (now - begun.at_s)
            self._rates = [*self._rates, rate][-self.most :]
            self.bytes_per_s = sorted(self._rates)[len(self._rates) // 2]

    def merged(self, overhead_s: float) -> None:
        """A pull took so long from its beginning to a prepared merge, without its bytes."""
        self._overheads_s = [*self._overheads_s, overhead_s][-self.most :]
        self.overhead_s = sorted(self._overheads_s)[(3 * len(self._overheads_s)) // 4]

    def round_ended(self, expected_s: float, lasted_s: float) -> None:
        """A round that was expected to last so long lasted so long."""
        if expected_s > 0:
            self._early_shares = [*self._early_shares, 1.0 - lasted_s / expected_s][-self.most :]
            self.early_share = min(max(0.0, *self._early_shares), _MOST_EARLY_SHARE)

    def assume(self, bytes_per_s: float) -> None:
        """The link carries so much, as something else has shown: one of the rates, until pulls were measured."""
        self._rates, self.bytes_per_s = [bytes_per_s], bytes_per_s

    def slow_after_s(self, sizes: SectionBytes, configured: WantedPartners) -> float:
        """After how long a pull is a slow one, which does not keep another from being tried."""
        rate = self.bytes_per_s
        expected_s = configured.bytes_of(sizes) / rate if rate else 0.0
        return max(_LEAST_SLOW_S, _SLOW_FACTOR * (self.overhead_s + expected_s))


# ---------------------------------------------------------------- one pull a round, from a server


def pull_start(
    round_started_s: float, round_expected_end_s: float, expected_transfer_s: float | None
) -> tuple[float, str]:
    """When to begin to pull, with the reason: as late as the link allows, since what comes late is fresh.

    `expected_transfer_s` is for all partners of the round together; None before the first pull.
    """
    if expected_transfer_s is None:
        half_s = (round_expected_end_s - round_started_s) / 2
        return round_started_s + max(0.0, half_s), "half of the round: how long a transfer takes is not known yet"
    when_s = round_expected_end_s - 2 * expected_transfer_s
    if when_s <= round_started_s:
        return round_started_s, f"at once: the transfers are expected to take {expected_transfer_s:.1f} s"
    return when_s, f"twice the expected {expected_transfer_s:.1f} s before the round's end"


def expected_transfer(durations_s: Sequence[float]) -> float | None:
    """What to expect of the next round's transfers, given the last ones' (all partners of a round together, those
    that came), in seconds: the slower quarter of the last eight begins there. None without any."""
    last = sorted(durations_s[-8:])
    return last[(3 * len(last)) // 4] if last else None
