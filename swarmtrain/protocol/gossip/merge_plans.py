"""Plans of a peer's next merges, estimated from its trainer's progress. Gossip schedules its pulls by them.

Everything here is pure: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain.methods.method import GradientFormat
from swarmtrain.protocol.gossip.pulls import ahead_rounds, expected_step_s, is_moved

_GUESSED_ROUND_S = 1.0
"""Duration that a round is assumed to have before this peer knows its speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergePlan:
    """Next merge of one fragment, or of several that are merged together.

    It has the number of the fragments' round, when that began and when it should end, in seconds of the caller's clock.
    """

    round: int
    began_s: tuple[float, ...]
    """Start of each fragment's round."""
    ends_s: float
    gradient_format: GradientFormat
    """Format of this peer's pseudo-gradients. It assumes that its partners use the same, to estimate transfers."""
    is_sure: bool = True
    """False if the end is a guess, from which nothing must be learned."""
    fragments: tuple[int, ...] = (0,)

    @property
    def started_s(self) -> float:
        """Start of the earliest of the fragments' rounds."""
        return min(self.began_s)

    def ahead_rounds(self, fragment: int, theirs_began_s: float | None) -> float:
        """Return by how many rounds another peer's round of the fragment began later than this peer's; see
        `pulls.ahead_rounds`."""
        return ahead_rounds(theirs_began_s, self.began_s[self.fragments.index(fragment)], self.ends_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainersRound:
    """Facts of a trainer's round that are known when it begins."""

    number: int
    inner_steps: int
    merge_after: Sequence[int]
    """Number of inner steps of this round after which each fragment is merged."""
    gradient_format: GradientFormat
    steps_per_s: float
    """Speed of this peer; 0 if unknown."""


@dataclass(slots=True)
class MergePlanner:
    """Plans the merges of a peer's fragments.

    Its methods are called at each round's start, after inner steps and after merges. They return the plans that replace
    all earlier ones, or None if those still hold.

    A trainer on a device takes steps while a merge is computed. Those steps belong to what begins with that merge
    (`steps_taken`), so it began when they did.
    """

    num_fragments: int
    sure_share: float = 1.0
    """Share of a round's expected duration after which pulls must have arrived; below 1 where rounds vary in
    duration."""
    began_s: list[float] = field(init=False)
    """Start of each fragment's present round."""
    _of: TrainersRound = field(init=False)
    _round_began_s: float = 0.0
    _newest: Sequence[MergePlan] = ()

    def __post_init__(self) -> None:
        self.began_s = [0.0] * self.num_fragments

    def round_began(
        self, of: TrainersRound, now: float, *, all_begin: bool = False, steps_taken: int = 0
    ) -> Sequence[MergePlan]:
        """Plan the merges of a round that begins now, of which `steps_taken` inner steps are done.

        `all_begin`: the weights were not merged here, so that the rounds of all fragments begin, not only the last
        one's.
        """
        self._of = of
        done, self._round_began_s = self._begun(0, steps_taken, now)
        for fragment in range(self.num_fragments) if all_begin else [self.num_fragments - 1]:
            self.began_s[fragment] = self._round_began_s
        self._newest = self._plans(done, now)
        return self._newest

    def merged(self, fragment: int, now: float, steps_taken: int = 0) -> Sequence[MergePlan] | None:
        """Begin a fragment's next round after its merge, of which `steps_taken` inner steps are done, and plan.

        None after the last fragment, since `round_began` follows, and after all but the last of fragments that are
        merged at the same step.
        """
        if fragment == self.num_fragments - 1:
            return None
        after = self._of.merge_after[fragment]
        done, self.began_s[fragment] = self._begun(after, steps_taken, now)
        if self._of.merge_after[fragment + 1] == after:
            return None
        self._newest = self._plans(done, now)
        return self._newest

    def _begun(self, after: int, steps_taken: int, now: float) -> tuple[int, float]:
        """Return (the round's inner steps done; the time at which `after` of them were), `steps_taken` steps later.

        A merge that these steps have made due is still to come: plans count those before it only.
        """
        most = min((each - after for each in self._of.merge_after if each > after), default=1) - 1
        steps_taken, speed = min(steps_taken, most), self._of.steps_per_s
        if steps_taken <= 0 or speed <= 0:
            return after, now
        return after + steps_taken, now - steps_taken / speed

    def steps_done(self, done: int, now: float) -> Sequence[MergePlan] | None:
        """Plan anew if the merges, after `done` inner steps, are expected at other times than planned."""
        if done in self._of.merge_after or not self._is_steady:
            return None
        plans, way_s = self._plans(done, now), self._of.inner_steps / self._of.steps_per_s / self.num_fragments
        was_s, is_s = (min(plan.ends_s for plan in each) for each in (self._newest, plans))
        # Inner steps are not equally fast on a busy machine: without new plans a tenth of the pseudo-gradients came too
        # late, and the loss was 1.8811, not 1.8523 (decision 47).
        if not is_moved(was_s, is_s, way_s):
            return None
        self._newest = plans
        return plans

    @property
    def _is_steady(self) -> bool:
        return self._of.steps_per_s > 0 and self.sure_share == 1

    def _plans(self, done: int, now: float) -> list[MergePlan]:
        """Plan each fragment's next merge after `done` steps; merges that are due at `done` count as done."""
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
