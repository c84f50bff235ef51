"""Amount and timing of a round's pulls: as late as the link allows, because fresh publications are worth more.

Everything here is pure: `now` is an argument, and the caller reports how long pulls took.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, TypeVar

GroupName: TypeAlias = str
"""Kind of values in a publication, by its name in the run's list (`network.tensor_groups`): for example the weights at
the
start of the author's round, or its pseudo-gradient since then. Each kind is pulled by itself."""

GroupRule: TypeAlias = Literal["mean", "outer step"]
"""Way in which a merge uses the partners' values of a tensor group.

- "mean": average them with this peer's own;
- "outer step": weight them by tokens, and use the mean as the gradient of one outer step.
"""

LARGE_MODEL = 4_000_000
"""Parameters from which on a merge saves memory instead of time: it keeps less, and recomputes it."""
LINK_SHARE = 0.65
"""Share of a round that may be spent on pulling."""
_SLACK = 1.5
"""Time before the round's end at which a pull begins, as a multiple of its expected duration. With 1.25 there is no
time for another partner where one fails (decision 24)."""
_SPARE_SHARE, _MOST_SPARE_S, _LONG_SPARE_SHARE = 0.10, 1.5, 0.05
"""Reserve before the round's end, on top of `_SLACK`: 10 % of the round but at most 1.5 s, and at least 5 % of a long
round. A busy partner is asked again after a second, and a failed one is replaced. Inner steps of long rounds vary by
seconds (decision 34)."""
_SLOW_FACTOR = 3.0
"""Multiple of its expected duration after which a pull is slow, and another partner is asked as well."""
_LEAST_SLOW_S = 1.0
"""Seconds before a pull can count as slow."""
_RETRIES_A_ROUND = 8
"""Times in a round that a partner without new publications may be asked again."""
_LEAST_IDLE_S = 0.25
"""Seconds, at least, before a partner without new publications is asked again."""
_PULLS_A_PARTNER = 4
"""Concurrent pulls for each wanted partner, slow ones included."""
_MOVED_SHARE, _LEAST_MOVED_S = 0.01, 0.1
"""Shift of a merge, as a share of the time between two merges, above which it is planned anew; and a tenth of a
second."""
_FINE_SHARE = 0.2
"""Share of a round that pulls of finer gradients may take. Below it they lower the loss by half a percent; where they
take most of the round, they raise it by 0.3 % (decision 48)."""
_MOST_EARLY_SHARE = 0.25
"""Limit of the extra reserve, as a share of a round, after rounds that ended earlier than expected. What arrives after
a round's end is of no use to that round, so pulls begin earlier by as much as past rounds were shorter."""


@dataclass(frozen=True)
class PullPlan:
    """Times at which the pulls of a round are due, for each rule in ascending order, and the reason for the log."""

    weights_at_s: tuple[float, ...]
    """Due times for each tensor group whose rule is "mean"."""
    gradients_at_s: tuple[float, ...]
    """Due times for the tensor group whose rule is "outer step"."""
    reason: str

    def num_due(self, rule: GroupRule, now: float) -> int:
        """Return how many pulls of each tensor group with that rule should have begun by now."""
        return bisect_right(self.weights_at_s if rule == "mean" else self.gradients_at_s, now)

    def next_s(self, now: float) -> float | None:
        """Return the time at which the next pull is due; None if all are."""
        found = None
        for at_s in self.weights_at_s, self.gradients_at_s:
            if (passed := bisect_right(at_s, now)) < len(at_s) and (found is None or at_s[passed] < found):
                found = at_s[passed]
        return found


@dataclass(frozen=True)
class PublicationBytes:
    """Transfer sizes of one partner's weights and of its pseudo-gradient, in bytes."""

    weights: int
    """Bytes of all tensor groups that are averaged."""
    gradient: int
    share: float = 1.0
    """Share of the model: 1 / number of fragments if these are the sizes of one fragment."""

    @property
    def both(self) -> int:
        """Bytes of the weights and the pseudo-gradient together."""
        return self.weights + self.gradient


def total_bytes(sizes: Iterable[PublicationBytes]) -> PublicationBytes:
    """Add up the sizes of several fragments."""
    sizes = list(sizes)
    weights, gradient = sum(each.weights for each in sizes), sum(each.gradient for each in sizes)
    return PublicationBytes(weights, gradient, sum(each.share for each in sizes))


class WantedPartners(NamedTuple):
    """Number of partners whose gradients, and number whose weights, are pulled in a round if the link carries them."""

    gradients: int
    weights: int

    def bytes_of(self, sizes: PublicationBytes) -> int:
        """Return the bytes of all wanted pulls."""
        return self.gradients * sizes.gradient + self.weights * sizes.weights


_Format = TypeVar("_Format", bound=str)


def gradient_format(
    sizes: Mapping[_Format, PublicationBytes],
    num_live_others: int,
    round_s: float,
    bytes_per_s: float | None,
    configured: WantedPartners,
) -> _Format:
    """Choose the format, of those in `sizes` (coarsest first), in which a peer publishes its pseudo-gradients this
    round.

    `sizes` are the sizes of all fragments together; `round_s` is the round's duration, 0 if unknown. The rounding of
    the coarsest format cancels in the mean of many gradients, but not in the mean of a few. The result is the finest
    format in which a round's pulls weigh no more than in the coarsest format with the full number of partners, and take
    at most `_FINE_SHARE` of the round. It is the coarsest if the duration or the link's rate is unknown.
    """
    formats = list(sizes)
    found, most_bytes = formats[0], configured.bytes_of(sizes[formats[0]])
    if num_live_others < 1 or not bytes_per_s:
        return found
    here = WantedPartners(*(min(each, num_live_others) for each in configured))
    for format in formats[1:]:
        num_bytes = here.bytes_of(sizes[format])
        # With eight wanted partners this allows int4, twice int2's bytes, with at most four others (decision 48).
        if num_bytes <= most_bytes and num_bytes / bytes_per_s <= _FINE_SHARE * round_s:
            found = format
    return found


def plan_pulls(
    num_live_others: int,
    started_s: float,
    ends_s: float,
    sizes: PublicationBytes,
    times: PullTimes,
    configured: WantedPartners,
) -> PullPlan:
    """Plan the pulls of a round: how many, and when.

    The round is that of the fragments whose sizes are given; they may use their share (`sizes.share`) of the link's
    time. A peer pulls from `configured` partners, or from all others if there are fewer, as far as the link carries
    that in `LINK_SHARE` of the time. A slower link carries the weights of fewer partners, then the gradients of fewer,
    but at least one of each.

    Weights come first, because they do not change until their author merges again. Pulls run one after the other: each
    has the whole link, and the last one is as fresh as possible.
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
        # Pulls run one after the other: `left_bytes` are those of this pull and of all that follow it.
        begins_s = ends_s - (spare_s + _SLACK * (overhead_s + left_bytes / rate))
        at_s.append(begins_s if begins_s > started_s else started_s)
        left_bytes -= sizes.weights if number < weights else sizes.gradient
    reason = f"{gradients} of {wanted} gradients and the weights of {weights}"
    return PullPlan(tuple(at_s[:weights]), tuple(at_s[weights:]), reason)


def expected_step_s(last_round_s: float, passed_s: float, steps_done: int) -> float:
    """Estimate the duration of an inner step, `steps_done` steps after a round's start, `passed_s` ago.

    The estimate is the lower of the last round's and of this round's so far. Underestimating is safe: what is pulled
    too early is a little older, but what comes too late is of no use.
    """
    return min(last_round_s, passed_s / steps_done) if steps_done and passed_s > 0 else last_round_s


def is_moved(ends_s: float, now_ends_s: float, way_s: float) -> bool:
    """Return whether a merge moved far enough to plan its pulls anew; `way_s` is the time between two fragments'
    merges."""
    return abs(now_ends_s - ends_s) > max(_MOVED_SHARE * way_s, _LEAST_MOVED_S)


def round_began_s(told_s: float, inner_steps_done: int, steps_per_s: float) -> float | None:
    """Return the time at which a peer's round began, given that the peer had done `inner_steps_done` steps at `told_s`;
    None if its speed is unknown (0)."""
    return told_s - inner_steps_done / steps_per_s if steps_per_s > 0 else None


def round_ends_s(told_s: float, inner_steps: int, inner_steps_done: int, steps_per_s: float) -> float | None:
    """Return the time at which a peer's round ends, given that the peer had done `inner_steps_done` of its steps at
    `told_s`.

    None if its speed or its number of steps is unknown (0).
    """
    return told_s + (inner_steps - inner_steps_done) / steps_per_s if inner_steps and steps_per_s > 0 else None


def ahead_rounds(theirs_began_s: float | None, began_s: float, ends_s: float) -> float:
    """Return by how much another peer's round began later than this peer's, in rounds of this peer, from 0 to 1.

    0 if the other's start is unknown.
    """
    if theirs_began_s is None:
        return 0.0
    return min(1.0, max(0.0, theirs_began_s - began_s) / max(ends_s - began_s, 1e-9))


def idle_s(round_s: float) -> float:
    """Return for how many seconds a peer that had nothing new is not asked again, in a round of that duration."""
    return max(_LEAST_IDLE_S, round_s / _RETRIES_A_ROUND)


def most_pulls(configured: WantedPartners) -> int:
    """Return how many pulls of a fragment may be open at once, of all tensor groups and including slow ones."""
    return _PULLS_A_PARTNER * max(configured)


@dataclass(slots=True)
class BytesBegun:
    """Beginning of a pull's download, for `PullTimes.bytes_end`."""

    at_s: float
    ended_bytes: int
    """Bytes of all downloads that had ended when this download began."""


@dataclass(slots=True)
class PullTimes:
    """Measurements of the last pulls: the link's rate, and the overhead of a pull besides its bytes.

    Concurrent pulls share the link. So a pull's rate counts all bytes that arrived while it ran, those of other pulls
    too: of several concurrent pulls the last one to end has seen the link's whole rate, the first less.
    """

    most: int = 8
    """Number of measurements that are kept."""
    _overheads_s: list[float] = field(default_factory=list)
    _rates: list[float] = field(default_factory=list)
    _early_shares: list[float] = field(default_factory=list)
    _ended_bytes: int = 0
    bytes_per_s: float | None = None
    """Upper median of the last pulls' rates; None before the first. The median is not moved by one failure or one very
    slow partner."""
    overhead_s: float = 0.0
    """Third quartile of the last pulls' overhead in seconds."""
    early_share: float = 0.0
    """Largest share of a round by which one of the last rounds ended earlier than expected."""

    def bytes_begin(self, now: float) -> BytesBegun:
        """Record that a download begins, and return what `bytes_end` needs."""
        return BytesBegun(now, self._ended_bytes)

    def bytes_end(self, begun: BytesBegun, now: float, came_bytes: int) -> None:
        """Record that a download is complete. Failed downloads are not recorded."""
        self._ended_bytes += came_bytes
        if now > begun.at_s:
            rate = (self._ended_bytes - begun.ended_bytes) / (now - begun.at_s)
            self._rates = [*self._rates, rate][-self.most :]
            self.bytes_per_s = sorted(self._rates)[len(self._rates) // 2]

    def merged(self, overhead_s: float) -> None:
        """Record a pull's time from the question to the prepared merge, without the time of its bytes."""
        self._overheads_s = [*self._overheads_s, overhead_s][-self.most :]
        self.overhead_s = sorted(self._overheads_s)[(3 * len(self._overheads_s)) // 4]

    def round_ended(self, expected_s: float, lasted_s: float) -> None:
        """Record a round's expected and actual duration."""
        if expected_s > 0:
            self._early_shares = [*self._early_shares, 1.0 - lasted_s / expected_s][-self.most :]
            self.early_share = min(max(0.0, *self._early_shares), _MOST_EARLY_SHARE)

    def assume(self, bytes_per_s: float) -> None:
        """Use a rate that other transfers have measured until pulls are measured."""
        self._rates, self.bytes_per_s = [bytes_per_s], bytes_per_s

    def slow_after_s(self, sizes: PublicationBytes, configured: WantedPartners) -> float:
        """Return after how many seconds a pull counts as slow, so that another partner is tried as well."""
        rate = self.bytes_per_s
        expected_s = configured.bytes_of(sizes) / rate if rate else 0.0
        return max(_LEAST_SLOW_S, _SLOW_FACTOR * (self.overhead_s + expected_s))


# ---------------------------------------------------------------- one pull a round, from a server


def pull_start(
    round_started_s: float, round_expected_end_s: float, expected_transfer_s: float | None
) -> tuple[float, str]:
    """Choose when to pull from the server, and return it with the reason.

    The pull begins twice its expected duration before the round's end, because fresh weights are worth more.
    `expected_transfer_s` is the duration of all transfers of a round together; None before the first.
    """
    if expected_transfer_s is None:
        half_s = (round_expected_end_s - round_started_s) / 2
        return round_started_s + max(0.0, half_s), "half of the round: how long a transfer takes is not known yet"
    when_s = round_expected_end_s - 2 * expected_transfer_s
    if when_s <= round_started_s:
        return round_started_s, f"at once: the transfers are expected to take {expected_transfer_s:.1f} s"
    return when_s, f"twice the expected {expected_transfer_s:.1f} s before the round's end"


def expected_transfer(durations_s: Sequence[float]) -> float | None:
    """Estimate the duration of the next round's transfers in seconds: the third quartile of the last eight rounds'.

    Each item is the time of all successful transfers of one round together. None without any.
    """
    last = sorted(durations_s[-8:])
    return last[(3 * len(last)) // 4] if last else None
