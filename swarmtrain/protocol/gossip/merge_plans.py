"""When a peer's fragments are merged next, as its trainer can tell: what gossip plans its pulls by.

Pure: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain.protocol.gossip.pulls import ahead_rounds, expected_step_s, is_moved
from swarmtrain.run import GradientFormat

__all__ = ["MergePlan", "MergePlanner", "TrainersRound"]

_GUESSED_ROUND_S = 1.0
"""How long a round is taken to last before this peer knows how fast it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergePlan:
    """The next merge of one fragment, or of several at once: in which round of theirs, since when that goes on and when
    it should end, in seconds of the driver's clock."""

    round: int
    began_s: tuple[float, ...]
    """Each fragment's."""
    ends_s: float
    gradient_format: GradientFormat
    """Of this peer's own pseudo-gradients: it takes others' to have the same."""
    is_sure: bool = True
    """False: when it ends is a guess, and nothing is learnt from it."""
    fragments: tuple[int, ...] = (0,)

    @property
    def started_s(self) -> float:
        """When the first of these rounds began."""
        return min(self.began_s)

    def ahead_rounds(self, fragment: int, theirs_began_s: float | None) -> float:
        """By how much of this peer's round of a fragment another's began later; see `pulls.ahead_rounds`."""
        return ahead_rounds(theirs_began_s, self.began_s[self.fragments.index(fragment)], self.ends_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainersRound:
    """What is known of a round of the trainer's as it begins."""

    number: int
    inner_steps: int
    merge_after: Sequence[int]
    """After how many of its inner steps each fragment is merged."""
    gradient_format: GradientFormat
    steps_per_s: float
    """Of this peer; 0 before that is known."""


@dataclass(slots=True)
class MergePlanner:
    """Plans the merges of a peer's fragments. Tell it of each round's beginning, of steps, and of merges; it answers
    with the plans that take the place of those before, or None where those still hold."""

    num_fragments: int
    sure_share: float = 1.0
    """After this part of the time that a round should take, what is pulled has to be there: less where rounds are not
    all equally long."""
    began_s: list[float] = field(init=False)
    """When each fragment's round began."""
    _of: TrainersRound = field(init=False)
    _round_began_s: float = 0.0
    _newest: Sequence[MergePlan] = ()

    def __post_init__(self) -> None:
        self.began_s = [0.0] * self.num_fragments

    def round_began(self, of: TrainersRound, now: float, *, all_begin: bool = False) -> Sequence[MergePlan]:
        """The trainer begins a round. `all_begin`: with weights that were not merged here, so that all fragments'
        rounds begin, and not only that of the last."""
        self._of, self._round_began_s = of, now
        for fragment in range(self.num_fragments) if all_begin else [self.num_fragments - 1]:
            self.began_s[fragment] = now
        self._newest = self._plans(0, now)
        return self._newest

    def merged(self, fragment: int, now: float) -> Sequence[MergePlan] | None:
        """A fragment was merged, and its next round begins. With the last one the trainer's round ends: the next
        `round_began` has the plans. Of several that are merged at once the last one has."""
        if fragment == self.num_fragments - 1:
            return None
        self.began_s[fragment] = now
        after = self._of.merge_after[fragment]
        if self._of.merge_after[fragment + 1] == after:
            return None
        self._newest = self._plans(after, now)
        return self._newest

    def steps_done(self, done: int, now: float) -> Sequence[MergePlan] | None:
        """So many inner steps of the round are done: new plans if merges come at other times than was planned."""
        if done in self._of.merge_after or not self._is_steady:
            return None
        plans, way_s = self._plans(done, now), self._of.inner_steps / self._of.steps_per_s / self.num_fragments
        was_s, is_s = (min(plan.ends_s for plan in each) for each in (self._newest, plans))
        if not is_moved(was_s, is_s, way_s):
            return None
        self._newest = plans
        return plans

    @property
    def _is_steady(self) -> bool:
        return self._of.steps_per_s > 0 and self.sure_share == 1

    def _plans(self, done: int, now: float) -> list[MergePlan]:
        """Each fragment's next merge after so many steps, when those are merged that are due."""
        speed = self._of.steps_per_s
        if self._is_steady:
            speed = 1 / expected_step_s(1 / speed, now - self._round_began_s, done)
        found = []
        for moment in sorted(set(self._of.merge_after)):
            is_over = moment <= done
            steps_left = moment - done + (self._of.inner_steps if is_over else 0)
            fragments = tuple(each for each, after in enumerate(self._of.merge_after) if after == moment)
            plan = MergePlan(
                round=self._of.number + is_over,
                began_s=tuple(self.began_s[each] for each in fragments),
                ends_s=now + (self.sure_share * steps_left / speed if speed > 0 else _GUESSED_ROUND_S),
                gradient_format=self._of.gradient_format,
                is_sure=speed > 0,
                fragments=fragments,
            )
            found.append(plan)
        return found
