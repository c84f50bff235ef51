"""Plans of a trainer that takes steps while a merge is computed: those steps are done when the next round begins."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from swarmtrain.protocol.gossip.merge_plans import MergePlan, MergePlanner, TrainersRound


def round_of(merge_after: Sequence[int], steps_per_s: float = 2.0) -> TrainersRound:
    return TrainersRound(
        number=5,
        inner_steps=merge_after[-1],
        merge_after=merge_after,
        gradient_format="int2",
        steps_per_s=steps_per_s,
    )


def ends(plans: Sequence[MergePlan] | None) -> dict[tuple[int, ...], tuple[int, float]]:
    assert plans is not None
    return {plan.fragments: (plan.round, plan.ends_s) for plan in plans}


def test_a_round_that_begins_with_steps_began_when_they_did() -> None:
    late, early = MergePlanner(2), MergePlanner(2)
    plans = late.round_began(round_of([8, 16]), 103.0, steps_taken=6)
    assert ends(plans) == ends(early.round_began(round_of([8, 16]), 100.0)) == {(0,): (5, 104.0), (1,): (5, 108.0)}
    assert late.began_s == early.began_s == [0.0, 100.0]
    assert ends(late.steps_done(12, 110.0)) == ends(early.steps_done(12, 110.0))


def test_a_fragments_round_that_begins_with_steps_began_when_they_did() -> None:
    planner = MergePlanner(2)
    planner.round_began(round_of([8, 16]), 100.0)
    assert ends(planner.merged(0, 105.0, steps_taken=2)) == {(0,): (6, 112.0), (1,): (5, 108.0)}
    assert planner.began_s == [104.0, 100.0]


@pytest.mark.parametrize("steps_taken", [7, 8, 30])
def test_a_merge_that_is_due_already_is_not_counted_as_done(steps_taken: int) -> None:
    planner = MergePlanner(2)
    plans = planner.round_began(round_of([8, 16]), 100.0, steps_taken=steps_taken)
    assert ends(plans)[0,] == (5, 100.5), "a step from now"
    planner.round_began(round_of([8, 16]), 100.0)
    plans = planner.merged(0, 107.5, steps_taken=steps_taken)
    assert ends(plans)[1,] == (5, 108.0)


def test_who_does_not_know_its_speed_begins_now() -> None:
    planner = MergePlanner(1)
    plans = planner.round_began(round_of([4], steps_per_s=0.0), 100.0, steps_taken=3)
    assert planner.began_s == [100.0] and ends(plans) == {(0,): (5, 101.0)}
