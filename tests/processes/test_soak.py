"""One minute of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import ROUND_TOKENS, VOLUNTEERS, Plan, assert_enough_faults, one_run

pytestmark = [pytest.mark.processes, pytest.mark.long]


ROUNDS = 60
PLAN = Plan(seed=20261125, total_tokens=ROUNDS * ROUND_TOKENS * len(VOLUNTEERS))
LOSS_WITHOUT_FAULTS = 0.917
LOSS_TOLERANCE = 0.05
"""Tolerance for so short a run, whose loss still falls quickly; that of `make soak` is 0.02."""


def test_a_swarm_under_kills_stops_and_restarts_reaches_its_end(tmp_path: Path) -> None:
    outcome = one_run(tmp_path, PLAN, with_faults=True)
    print(outcome)
    assert_enough_faults(outcome)
    assert outcome.loss <= LOSS_WITHOUT_FAULTS * (1 + LOSS_TOLERANCE)
