"""Two minutes of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import ROUND_TOKENS, ROUNDS, VOLUNTEERS, Plan, compare, one_run

pytestmark = [pytest.mark.processes, pytest.mark.long]


def test_a_swarm_under_kills_stops_and_restarts_reaches_its_end(tmp_path: Path) -> None:
    plan = Plan(seed=20261125, total_tokens=ROUNDS * ROUND_TOKENS * len(VOLUNTEERS))
    baseline = one_run(tmp_path / "baseline", plan, with_faults=False)
    outcome = compare(tmp_path / "faults", plan, baseline)
    print(f"without faults {baseline}\nwith {outcome}")
