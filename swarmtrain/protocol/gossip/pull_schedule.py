"""When a peer that gossips pulls: the next merge of each fragment, what is due before it, and when to look again.

Pure: `now` is an argument. How many pulls there are, and when each is due, is worked out by `pulls.plan_pulls`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.pulls import (
    PullPlan,
    PullTimes,
    Section,
    SectionBytes,
    SectionRule,
    WantedPartners,
    plan_pulls,
    total_bytes,
)
from swarmtrain.run import GradientFormat

__all__ = ["Due", "DuePulls", "NextMerge", "PullSchedule"]

_OLD_PULL_S = 30.0
_OLD_PULL_ROUNDS = 2


@dataclass(slots=True)
class NextMerge:
    """Of one fragment."""

    plan: MergePlan | None = None
    """None once it was merged, until the merge after it is planned."""
    began_s: float = -1.0
    """When the fragment's present round did."""
    pulled_for_s: float | None = None
    """When the merge of its present round was expected when the first pull for it began."""
    merged_round: int = -1
    begins_anew: bool = True
    """It has rested since that merge: a round that was given up has all its merges again."""


class DuePulls(NamedTuple):
    """The pulls of a plan."""

    basis: object
    """What they follow from."""
    pulls: PullPlan
    slow_after_s: float


class Due(NamedTuple):
    """So many pulls of a section should have begun for the plan's next merge, of each of these fragments."""

    section: Section
    number: int
    plan: MergePlan
    fragments: Sequence[int]
    slow_after_s: float


class PullSchedule:
    """The next merges, and when pulls for them are due."""

    def __init__(
        self,
        sections: Mapping[Section, SectionRule],
        sizes: Sequence[Mapping[GradientFormat, SectionBytes]],
        wanted: WantedPartners,
    ) -> None:
        self._sections, self._sizes, self._wanted = tuple(sections.items()), sizes, wanted
        self.times = PullTimes()
        self.plans: Sequence[MergePlan] = ()
        self.merges = [NextMerge() for _ in sizes]
        """By fragments."""
        self._pull_plans: dict[tuple[int, ...], DuePulls] = {}
        """By fragments."""
        self.wake_s: float | None = None
        """When to look whether pulls are due; None: not before something happens."""
        self.is_short = False
        """More pulls were due than there was anybody to ask for."""

    # ------------------------------------------------------------- when to look

    def look_by(self, at_s: float | None) -> None:
        """Then at the latest; None: that does not matter."""
        if at_s is not None and (self.wake_s is None or at_s < self.wake_s):
            self.wake_s = at_s

    def looks(self) -> None:
        """It is looked now."""
        self.wake_s, self.is_short = None, False

    def look_when_due(self, num_others: int, now: float) -> None:
        """At once, unless nothing is due yet by the plans."""
        self.looks()
        for _ in self.due(num_others, now):
            self.look_by(now)

    def assume(self, bytes_per_s: float, now: float) -> None:
        """The link carries so much, as long as no pull was measured."""
        if self.times.bytes_per_s is None:
            self.times.assume(bytes_per_s)
            if self.plans:
                self.look_by(now)

    # ------------------------------------------------------------- what is due

    def due(self, num_others: int, now: float) -> Iterator[Due]:
        """What should have begun by now; and it is looked again when more is due."""
        for plan in self.plans:
            fragments = self._fragments_of(plan)
            if not fragments:
                continue  # they are merged
            _, pulls, slow_after_s = self._pull_plan(plan, num_others)
            self.look_by(pulls.next_s(now))
            for section, rule in self._sections:
                if num_due := pulls.num_due(rule, now):
                    yield Due(section, num_due, plan, fragments, slow_after_s)

    def _fragments_of(self, plan: MergePlan) -> Sequence[int]:
        """Those of its fragments that are not merged yet."""
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

    def _sizes_of(self, plan: MergePlan) -> SectionBytes:
        """All that is pulled of one partner."""
        if len(plan.fragments) == 1:
            return self._sizes[plan.fragments[0]][plan.gradient_format]
        return total_bytes(self._sizes[each][plan.gradient_format] for each in plan.fragments)

    def begins_pull(self, fragment: int, plan: MergePlan) -> float:
        """A pull for it begins. How long the round is: a fragment's share of it."""
        merge = self.merges[fragment]
        if merge.pulled_for_s is None:
            merge.pulled_for_s = plan.ends_s
        return (plan.ends_s - plan.started_s) / len(self.merges)

    # ------------------------------------------------------------- rounds

    def planned(self, plans: Sequence[MergePlan]) -> list[int]:
        """These take the place of all plans before. Returns the fragments of which another round has begun."""
        self.plans = plans
        self._pull_plans.clear()  # those of other fragments
        for merge in self.merges:
            merge.plan = None
        begun = []
        for plan in plans:
            for fragment, began_s in zip(plan.fragments, plan.began_s, strict=True):
                merge = self.merges[fragment]
                if plan.round == merge.merged_round and not merge.begins_anew:
                    continue  # its merge was earlier than this plan came here
                merge.plan = plan
                if began_s != merge.began_s:
                    merge.began_s, merge.pulled_for_s = began_s, None
                    begun.append(fragment)
        return begun

    def old_s(self, now: float) -> float:
        """A pull that has gone on since before then, for rounds, would bring what is too old."""
        a_round_s = max((plan.ends_s - plan.started_s for plan in self.plans), default=0.0)
        return now - max(_OLD_PULL_S, _OLD_PULL_ROUNDS * a_round_s)

    def merged_first(self) -> list[int]:
        """The fragments that are merged next, all at once."""
        planned = [(merge.plan.ends_s, each) for each, merge in enumerate(self.merges) if merge.plan is not None]
        first_s = min((ends_s for ends_s, _ in planned), default=0.0)
        return [each for ends_s, each in planned if ends_s == first_s]

    def merge_due(self, fragment: int, round: int, now: float) -> None:
        """It is merged now: how far off the expected moment that is, is learnt."""
        merge = self.merges[fragment]
        plan, merge.plan = merge.plan, None
        merge.merged_round, merge.begins_anew = round, False
        if plan is not None and plan.is_sure and fragment == plan.fragments[0]:
            expected_s = plan.ends_s if merge.pulled_for_s is None else merge.pulled_for_s
            self.times.round_ended(expected_s - plan.started_s, now - plan.started_s)

    def rest(self) -> None:
        """Nothing is due until more is planned."""
        self.plans = ()
        self.looks()
        for merge in self.merges:
            merge.plan, merge.begins_anew = None, True
