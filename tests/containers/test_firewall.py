"""Hidden peer behind a firewall: it trains, counts, and finds another host when one dies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_engine import BUILD_S, ROOT, Project, build, docker, status

pytestmark = pytest.mark.containers

FIREWALL = "swarmtrain-test-firewall"
FOUND_S = 90.0
"""Presence of a host that died lasts for half a minute, and a new one is asked for after that."""
STDLIB = ROOT / "examples" / "stdlib-gpt.toml"


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    build()
    docker("build", "--quiet", "--tag", FIREWALL, "peers/firewall", limit_s=BUILD_S)


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Project]:
    """Start a swarm whose run outlasts the test."""
    files = ("peers/compose.yaml", "peers/unreachable.yaml")
    run_file = tmp_path / "run.toml"
    run_file.write_text(re.sub(r"(?m)^total_tokens = .*$", "total_tokens = 1_000_000_000", STDLIB.read_text()))
    project = Project(files, {"SWARMTRAIN_FIREWALL_IMAGE": FIREWALL, "SWARMTRAIN_RUN_FILE": str(run_file)})
    try:
        project.up("--scale", "volunteer=2")
        yield project
    finally:
        project.down()


def test_a_volunteer_behind_a_firewall_counts_and_its_host_may_die(swarm: Project) -> None:
    (hidden,) = swarm.of_service("unreachable")
    (bootstrap,) = swarm.of_service("bootstrap")
    volunteers = {container: status(container)["peer"][-6:] for container in swarm.of_service("volunteer")}

    def hosts() -> str:
        reach: str = status(hidden)["reach"]
        return reach.partition("its work goes through")[2]

    def counted_tokens() -> int:
        counted = [each for each in status(bootstrap)["peers"] if each["name"] == "unreachable"]
        return int(counted[0]["tokens"]) if counted else 0

    swarm.wait_until(lambda: " and " in hosts(), "two others serve its work on", FOUND_S)
    host = next(container for container, peer in volunteers.items() if peer in hosts())
    docker("kill", host)  # for good: the engine does not start what a person has killed
    swarm.wait_until(lambda: volunteers[host] not in hosts() and " and " in hosts(), "another takes over", FOUND_S)
    before = counted_tokens()
    swarm.wait_until(lambda: counted_tokens() > before, "it counts", FOUND_S)
    assert status(hidden)["state"] == "training"
