"""Swarm by `docker compose up`, in real containers: needs an engine (`make test-containers`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from docker_engine import Project, build, docker, status

pytestmark = pytest.mark.containers

RESTARTED_S = 30.0
"""Time limit of a restart; the engine waits longer with each restart, and not before the first."""
LEAVES_S = 30
"""Seconds to leave before the engine kills it."""
HEALTHY_S = 120.0
"""However busy the machine is: four peers that start at once."""


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    build()


@pytest.fixture
def swarm() -> Iterator[Project]:
    """Start a bootstrap and three volunteers, all healthy."""
    project = Project()
    try:
        project.up("--scale", "volunteer=3")
        yield project
    finally:
        project.down()


def restarts(container: str) -> list[str]:
    return docker("inspect", "--format", "{{.RestartCount}} {{.State.Running}}", container).split()


def test_a_swarm_of_containers_lives_through_a_kill_and_leaves_nothing(swarm: Project) -> None:
    first, second, third = swarm.of_service("volunteer")
    before = status(first)
    assert before["state"] == "training" and len(before["peers"]) == 4, "nobody typed an address"
    assert docker("exec", first, "id", "-u").strip() != "0"

    docker("exec", second, "python", "-c", f"import os; os.kill({status(second)['pid']}, 9)")
    swarm.wait_until(lambda: restarts(second) == ["1", "true"], "it is started again", RESTARTED_S)
    # Health alone would not do: for a moment after it was started again, it is still that of the life before.
    swarm.wait_until(
        lambda: status(second)["state"] == "training" and swarm.num_healthy() == 4, "all four are healthy", HEALTHY_S
    )
    assert status(first)["round"] > before["round"], "the others went on"

    docker("stop", "--time", str(LEAVES_S), third)
    row = swarm.containers()[third]
    assert (row["State"], row["ExitCode"]) == ("exited", 0), "SIGTERM is Ctrl-C"

    swarm.down(LEAVES_S)
    assert not swarm.leftovers()
