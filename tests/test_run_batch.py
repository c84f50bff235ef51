"""Size of a large batch: fixed, or growing with the run's tokens, the same for all who count the same tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.run_batch import GROWTH, BatchTarget

GROWS = BatchTarget(1000, 10**6, grows=True)


def sizes(target: BatchTarget) -> list[int]:
    """Batches of a run in which each has its size."""
    found, tokens = list[int](), 0
    while tokens < target.total_tokens:
        found.append(target.at(tokens))
        tokens += found[-1]
    return found


def test_a_fixed_batch_has_its_size_throughout() -> None:
    target = BatchTarget(1000, 10**6)
    assert {target.at(tokens) for tokens in (0, 10**5, 10**6, 10**9)} == {1000}
    assert (target.most_tokens, target.mean_tokens, target.num_steps) == (1000, 1000, 1000)


def test_a_growing_batch_is_a_share_of_the_tokens_before_it() -> None:
    assert GROWS.at(0) == GROWS.at(int(1000 / GROWTH)) == 1000, "not below the first"
    assert GROWS.at(500_000) == round(500_000 * GROWTH)
    assert GROWS.at(999_500) == 1000 and GROWS.at(10**6) == 1000, "what is left, or the first"
    assert GROWS.at(10**6 - 5000) == 5000


def test_the_steps_of_a_run_are_as_many_as_said() -> None:
    found = sizes(GROWS)
    assert len(found) == pytest.approx(GROWS.num_steps, abs=2) and max(found) <= GROWS.most_tokens
    assert sum(found) / len(found) == pytest.approx(GROWS.mean_tokens, rel=0.02)
    assert len(found) < len(sizes(BatchTarget(1000, 10**6))) / 2


@given(st.integers(1, 10**7), st.integers(1, 10**9), st.integers(0, 2 * 10**9))
def test_a_batch_is_never_below_the_first_nor_beyond_the_most(first: int, total: int, tokens: int) -> None:
    target = BatchTarget(first, total, grows=True)
    assert first <= target.at(tokens) <= target.most_tokens
    assert target.at(tokens) <= max(first, total - tokens), "no more than is left of the run"
    assert 1 <= target.num_steps <= -(-total // first)
