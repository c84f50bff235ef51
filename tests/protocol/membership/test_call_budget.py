"""Budget of calls: a peer that calls too often is told so; each has its own budget."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.membership.budgets import CallBudget


def test_a_burst_and_then_so_many_a_second() -> None:
    budget = CallBudget(per_s=10, burst=50)
    assert [budget.allows("a", 0.0) for _ in range(51)] == [True] * 50 + [False]
    allowed = [budget.allows("a", 0.01 * tick) for tick in range(1, 1001)]
    assert sum(allowed) == pytest.approx(100, abs=1), "10 s of it"
    assert budget.allows("b", 10.0), "another is not meant"
    assert [budget.allows("a", 1000.0) for _ in range(51)] == [True] * 50 + [False], (
        "no more than the burst is saved up"
    )


def test_memory_is_bounded_and_those_that_call_stay() -> None:
    budget = CallBudget(per_s=1, burst=1, max_callers=3)
    assert budget.allows("a", 0.0)
    for number in range(100):
        budget.allows(f"stranger {number}", 0.0)
        assert not budget.allows("a", 0.0), "it calls all the time and is remembered"
    assert len(budget._left) == 3
