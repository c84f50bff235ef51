"""Layout of a batch: inputs, targets and positions of each of its three forms, and the way from one form to another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.batch import (
    IGNORED,
    compacted,
    inputs_of,
    join_rows,
    num_rows,
    num_targets,
    positions_of,
    targets_of,
    with_rows,
)

TOKENS = np.array([[7, 8, 9, 10], [1, 2, 3, 4]], np.uint16)
SOME = np.array([[1, 0, 1, 0], [0, 0, 0, 1]], np.bool_)
ALONE, TWO = np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), np.array([[0, 1, 2, 3], [0, 1, 0, 1]])


def test_of_plain_tokens_each_but_the_first_is_a_target() -> None:
    batch = join_rows(TOKENS)
    assert batch.dtype == torch.int64 and num_rows(batch) == 1 and num_targets(batch) == 6
    assert inputs_of(batch).tolist() == [[7, 8, 9], [1, 2, 3]] and targets_of(batch).tolist() == [[8, 9, 10], [2, 3, 4]]
    assert positions_of(batch) is None


def test_labels_say_which_tokens_are_targets_and_positions_where_documents_begin() -> None:
    batch = join_rows(TOKENS, SOME, TWO)
    assert num_rows(batch) == 3 and num_targets(batch) == 2, "the first token of a sequence has nothing before it"
    assert targets_of(batch).tolist() == [[IGNORED, 9, IGNORED], [IGNORED, IGNORED, 4]]
    positions = positions_of(batch)
    assert positions is not None and positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert inputs_of(batch).tolist() == inputs_of(join_rows(TOKENS)).tolist()


@pytest.mark.parametrize(
    ("is_target", "positions", "rows"),
    [(SOME, TWO, 3), (None, TWO, 3), (SOME, ALONE, 2), (SOME, None, 2), (None, ALONE, 1), (None, None, 1)],
)
def test_rows_that_say_nothing_are_left_out_and_come_back(
    is_target: np.ndarray | None, positions: np.ndarray | None, rows: int
) -> None:
    batch = join_rows(TOKENS, is_target, positions)
    found = compacted(batch)
    assert num_rows(found) == rows and num_targets(found) == num_targets(batch)
    again = with_rows(found, 3)
    assert torch.equal(inputs_of(again), inputs_of(batch)) and torch.equal(targets_of(again), targets_of(batch))
    assert torch.equal(_positions(again), _positions(batch))
    assert with_rows(batch, num_rows(batch)) is batch


def _positions(batch: Tensor) -> Tensor:
    found = positions_of(batch)
    return torch.arange(3).expand(2, 3) if found is None else found
