"""Run of one chaos scenario; `make chaos` plays all of them and compares with runs without a fault.

A kill is in `test_compose.py`, and a volunteer behind a firewall whose host dies in `test_firewall.py`.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from chaos.faults import build_images
from chaos.run import run
from chaos.scenarios import Scenario, read
from docker_engine import ROOT, build

from swarmtrain.peer.training.speed import measure_speed
from swarmtrain.run import load_run

pytestmark = pytest.mark.containers

GAP_S = 15.0
"""Seconds of delay allowed on a busy machine; `make chaos` checks for delays of 3 s."""
STALL_SHARE = 0.05
ASKING_S = 30.0
"""Seconds that requests to containers may take."""
MARGIN = 1.3
"""Over the most that the volunteers of `chaos.yaml` could train; a machine with other work trains less."""


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    build()
    build_images(frozenset())


def long_enough(scenario: Scenario) -> int:
    """Tokens for which volunteers on this machine take longer than the scenario lasts, however quick it is."""
    lasts_s = scenario.settle_s + scenario.watch_s + sum(step.after_s for step in scenario.steps) + ASKING_S
    torch.set_num_threads(1)  # as volunteers have it
    stdlib = load_run(ROOT / "examples" / "stdlib-gpt.toml")
    speed = max(measure_speed(stdlib) for _ in range(3))
    slowdown = re.search(r'SLOWDOWN: "(\d+)"', (ROOT / "tests" / "chaos" / "chaos.yaml").read_text(encoding="utf-8"))
    assert slowdown is not None
    return max(scenario.total_tokens, int(MARGIN * lasts_s * speed * scenario.volunteers / int(slowdown[1])))


def test_a_swarm_that_is_parted_into_halves_is_one_again() -> None:
    scenario = read(ROOT / "tests" / "chaos" / "halves.toml")
    tokens = long_enough(scenario)
    found = run(dataclasses.replace(scenario, gap_s=GAP_S, stall_share=STALL_SHARE, total_tokens=tokens), seed=0)
    assert not found.failed, found.failed
    assert found.return_s is not None and found.return_s <= scenario.return_within_s
