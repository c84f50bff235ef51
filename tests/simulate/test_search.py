"""The search for faults: it finds nothing in the product, every broken rule, and the shortest schedule that shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from swarmtrain.simulate.search import Fault, Schedule, as_test, draw, play, shrink
from swarmtrain.simulate.search.__main__ import main

WORLDS = ("rounds", "gossip", "stages", "microbatches")


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_the_rules_hold_in_the_first_schedules(first: int) -> None:
    for seed in range(first, first + 20):
        assert not play(draw(seed)), as_test(draw(seed))


@pytest.mark.processes
def test_two_thousand_schedules_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schedules", "2000", "--seed", "0"]) == 0, capsys.readouterr().out
    assert not capsys.readouterr().out


@pytest.mark.parametrize("world", WORLDS)
def test_a_schedule_plays_the_same_in_a_process_that_hashes_otherwise(world: str) -> None:
    said = (
        "from swarmtrain.simulate.search import draw, replay\n"
        f"print([replay(draw(seed, {world!r})).fingerprint for seed in range(4)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", said], env=os.environ | {"PYTHONHASHSEED": hashed}, capture_output=True, check=True
        ).stdout
        for hashed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 40
