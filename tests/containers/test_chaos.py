"""A small set of the chaos scenarios; all of them, compared with runs without a fault, are `make chaos`."""

from __future__ import annotations

import dataclasses

import pytest
from chaos.faults import build_images
from chaos.run import run
from chaos.scenarios import read
from docker_engine import ROOT, build

pytestmark = pytest.mark.containers

GAP_S = 15.0
"""This machine may have other work; whether anybody stands still for as little as 3 s, `make chaos` asks."""
STALL_SHARE = 0.05


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    build()
    build_images(frozenset())


@pytest.mark.parametrize("name", ["kill", "halves"])
def test_a_swarm_survives(name: str) -> None:
    scenario = read(ROOT / "tests" / "chaos" / f"{name}.toml")
    found = run(dataclasses.replace(scenario, gap_s=GAP_S, stall_share=STALL_SHARE), seed=0)
    assert not found.failed, found.failed
    assert found.return_s is not None and found.return_s <= scenario.return_within_s
