"""Schedule of pulls: the next merge of each fragment, the pulls that are due before it, and when to check again.

Everything here is pure: `now` is an argument. `pulls.plan_pulls` computes how many pulls there are and when each is
due.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swarmtrain.methods.method import GradientFormat
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.pulls import (
    GroupName,
    GroupRule,
    PublicationBytes,
    PullPlan,
    PullTimes,
    WantedPartners,
    plan_pulls,
    total_bytes,
)

_OLD_PULL_S = 30.0
"""Seconds after which a pull is given up, or `_OLD_PULL_ROUNDS` rounds if that is longer."""
_OLD_PULL_ROUNDS = 2


@dataclass(slots=True)
class NextMerge:
    """Next merge of one fragment."""

    plan: MergePlan | None = None
    """None after a merge, until the next one is planned."""
    began_s: float = -1.0
    """Start of the fragment's present round."""
    pulled_for_s: float | None = None
    """Expected time of the present round's merge at the moment when its first pull began; None before that."""
    merged_round: int = -1
    begins_anew: bool = True
    """True if pulls have been paused since the last merge. The round was given up then, and the next round has all its
    merges."""


class DuePulls(NamedTuple):
    """Pulls of one plan, with the values that they were computed from."""

    basis: object
    """Inputs of the computation; if they change, the pulls are planned again."""
    pulls: PullPlan
    slow_after_s: float


class Due(NamedTuple):
    """Number of pulls of a tensor group that should have begun by now for each of `fragments`, which share one plan."""

    group: GroupName
    number: int
    plan: MergePlan
    fragments: Sequence[int]
    slow_after_s: float


class PullSchedule:
    """Next merges of all fragments, and the times at which pulls for them are due."""

    def __init__(
        self,
        groups: Mapping[GroupName, GroupRule],
        sizes: Sequence[Mapping[GradientFormat, PublicationBytes]],
        wanted: WantedPartners,
    ) -> None:
        self._groups, self._sizes, self._wanted = tuple(groups.items()), sizes, wanted
        self.times = PullTimes()
        self.plans: Sequence[MergePlan] = ()
        self.merges = [NextMerge() for _ in sizes]
        """Next merge of each fragment, by its number."""
        self._pull_plans: dict[tuple[int, ...], DuePulls] = {}
        """Cached pulls, by the plan's fragments."""
        self.wake_s: float | None = None
        """Time of the next check whether pulls are due; None: not before another event."""
        self.is_short = False
        """True if more pulls were due than there were peers to ask."""

    # ------------------------------------------------------------- when to look

    def look_by(self, at_s: float | None) -> None:
        """Schedule the next check for `at_s` at the latest; None changes nothing."""
        if at_s is not None and (self.wake_s is None or at_s < self.wake_s):
            self.wake_s = at_s

    def looks(self) -> None:
        """Record that the scheduled check takes place now."""
        self.wake_s, self.is_short = None, False

    def look_when_due(self, num_others: int, now: float) -> None:
        """Check at once if a pull is due by the plans, otherwise when the next one is."""
        self.looks()
        for _ in self.due(num_others, now):
            self.look_by(now)

    def assume(self, bytes_per_s: float, now: float) -> None:
        """Use this link rate, measured by other transfers, until a pull is measured."""
        if self.times.bytes_per_s is None:
            self.times.assume(bytes_per_s)
            if self.plans:
                self.look_by(now)

    # ------------------------------------------------------------- what is due

    def due(self, num_others: int, now: float) -> Iterator[Due]:
        """Yield how many pulls of each tensor group should have begun by now, and schedule the next check for the time
        when more are due."""
        for plan in self.plans:
            fragments = self._fragments_of(plan)
            if not fragments:
                continue  # they are merged
            _, pulls, slow_after_s = self._pull_plan(plan, num_others)
            self.look_by(pulls.next_s(now))
            for group, rule in self._groups:
                if num_due := pulls.num_due(rule, now):
                    yield Due(group, num_due, plan, fragments, slow_after_s)

    def _fragments_of(self, plan: MergePlan) -> Sequence[int]:
        """Return the plan's fragments that are not merged yet."""
        merges = self.merges
        if len(plan.fragments) == 1:
            return plan.fragments if merges[plan.fragments[0]].plan is plan else ()
        return [each for each in plan.fragments if merges[each].plan is plan]

    def _pull_plan(self, plan: MergePlan, num_others: int) -> DuePulls:
        times = self.times
        basis = num_others, times.bytes_per_s, times.overhead_s, times.early_share
        known = self._pull_plans.get(plan.fragments)
        if known is None or known.basis != basis:
            sizes = self._sizes_of(plan)
            found = plan_pulls(num_others, plan.started_s, plan.ends_s, sizes, times, self._wanted)
            known = self._pull_plans[plan.fragments] = DuePulls(basis, found, times.slow_after_s(sizes, self._wanted))
        return known

    def _sizes_of(self, plan: MergePlan) -> PublicationBytes:
        """Return the bytes that one partner's publications for this plan take together."""
        if len(plan.fragments) == 1:
            return self._sizes[plan.fragments[0]][plan.gradient_format]
        return total_bytes(self._sizes[each][plan.gradient_format] for each in plan.fragments)

    def begins_pull(self, fragment: int, plan: MergePlan) -> float:
        """Record that a pull begins, and return the fragment's share of the round's duration in seconds."""
        merge = self.merges[fragment]
        if merge.pulled_for_s is None:
            merge.pulled_for_s = plan.ends_s
        return (plan.ends_s - plan.started_s) / len(self.merges)

    # ------------------------------------------------------------- rounds

    def planned(self, plans: Sequence[MergePlan]) -> list[int]:
        """Replace all plans. Return the fragments whose next round has begun."""
        self.plans = plans
        self._pull_plans.clear()  # those of other fragments
        for merge in self.merges:
            merge.plan = None
        begun = []
        for plan in plans:
            for fragment, began_s in zip(plan.fragments, plan.began_s, strict=True):
                merge = self.merges[fragment]
                if plan.round == merge.merged_round and not merge.begins_anew:
                    continue  # the fragment was merged before this plan arrived
                merge.plan = plan
                if began_s != merge.began_s:
                    merge.began_s, merge.pulled_for_s = began_s, None
                    begun.append(fragment)
        return begun

    def old_s(self, now: float) -> float:
        """Return the time before which a pull must have begun to be too old: two rounds ago, and at least 30 s."""
        a_round_s = max((plan.ends_s - plan.started_s for plan in self.plans), default=0.0)
        return now - max(_OLD_PULL_S, _OLD_PULL_ROUNDS * a_round_s)

    def merged_first(self) -> list[int]:
        """Return the fragments of the earliest planned merge; several if they are merged at the same moment."""
        planned = [(merge.plan.ends_s, each) for each, merge in enumerate(self.merges) if merge.plan is not None]
        first_s = min((ends_s for ends_s, _ in planned), default=0.0)
        return [each for ends_s, each in planned if ends_s == first_s]

    def merge_due(self, fragment: int, round: int, now: float) -> None:
        """Record that a fragment is merged now, and by how much the expected time was wrong."""
        merge = self.merges[fragment]
        plan, merge.plan = merge.plan, None
        merge.merged_round, merge.begins_anew = round, False
        # The error is measured against the plan of the first pull, not the last one: later plans are nearly right by
        # then, but the pulls had begun by the first (decision 47).
        if plan is not None and plan.is_sure and fragment == plan.fragments[0]:
            expected_s = plan.ends_s if merge.pulled_for_s is None else merge.pulled_for_s
            self.times.round_ended(expected_s - plan.started_s, now - plan.started_s)

    def rest(self) -> None:
        """Drop all plans: nothing is due until merges are planned again."""
        self.plans = ()
        self.looks()
        for merge in self.merges:
            merge.plan, merge.begins_anew = None, True
