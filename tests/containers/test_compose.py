"""A swarm by `docker compose up`, in real containers: needs an engine (`make test-containers`)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.containers

ROOT = Path(__file__).parents[2]
PROJECT = f"swarmtrain-test-{os.getpid()}"
IMAGE = "swarmtrain-test"
HEALTHY_S = 60.0


def docker(*arguments: str, limit_s: float = 120.0) -> str:
    """What a docker command writes; its error output when it fails."""
    environment = os.environ | {"SWARMTRAIN_IMAGE": IMAGE, "SWARMTRAIN_PORT": "0", "COMPOSE_PROJECT_NAME": PROJECT}
    done = subprocess.run(
        ["docker", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def compose(*arguments: str, limit_s: float = 120.0) -> str:
    return docker("compose", *arguments, limit_s=limit_s)


def containers() -> dict[str, dict[str, str]]:
    """By name, what compose says of each."""
    rows = [json.loads(line) for line in compose("ps", "--all", "--format", "json").splitlines()]
    return {row["Name"]: row for row in rows}


def in_container(name: str, *arguments: str) -> str:
    return docker("exec", name, "swarmtrain", *arguments)


def wait_until_healthy(num: int, limit_s: float) -> float:
    """Seconds until so many are."""
    began_s = time.monotonic()
    while (now_s := time.monotonic() - began_s) < limit_s:
        rows = containers()
        if sum(row["Health"] == "healthy" for row in rows.values()) >= num:
            return now_s
        time.sleep(1.0)
    pytest.fail(f"not healthy in {limit_s:g} s: {rows}\n{compose('logs', '--tail', '30')}")


def wait_until_restarted(name: str, limit_s: float = 30.0) -> None:
    """By the engine, after its process died."""
    give_up_s = time.monotonic() + limit_s
    while docker("inspect", "--format", "{{.RestartCount}} {{.State.Running}}", name).split() != ["1", "true"]:
        assert time.monotonic() < give_up_s, "it is not started again"
        time.sleep(0.5)


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    docker("build", "--quiet", "--tag", IMAGE, ".", limit_s=1200.0)


@pytest.fixture
def swarm() -> Iterator[list[str]]:
    """A bootstrap and three volunteers, healthy; the names of the volunteers."""
    try:
        compose("up", "--detach", "--no-build", "--scale", "volunteer=3", "--wait", "--wait-timeout", "120")
        yield sorted(name for name in containers() if "volunteer" in name)
    finally:
        compose("down", "--volumes", "--timeout", "5")


def test_a_swarm_of_containers_lives_through_a_kill_and_leaves_nothing(swarm: list[str]) -> None:
    assert len(swarm) == 3
    first, second, third = swarm
    status = json.loads(in_container(first, "status", "--json"))
    assert status["state"] == "training" and len(status["peers"]) == 4, "nobody typed an address"
    assert docker("exec", first, "id", "-u").strip() != "0"

    rounds = status["round"]
    pid = json.loads(in_container(second, "status", "--json"))["pid"]
    docker("exec", second, "python", "-c", f"import os; os.kill({pid}, 9)")
    wait_until_restarted(second)
    wait_until_healthy(4, HEALTHY_S)
    assert json.loads(in_container(second, "status", "--json"))["state"] == "training"
    assert json.loads(in_container(first, "status", "--json"))["round"] > rounds, "the others went on"

    docker("stop", "--time", "30", third)
    row = containers()[third]
    assert (row["State"], row["ExitCode"]) == ("exited", 0), "SIGTERM is Ctrl-C"

    compose("down", "--volumes", "--timeout", "30")
    label = f"label=com.docker.compose.project={PROJECT}"
    for kind in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
        assert not docker(*kind, "--quiet", "--filter", label).strip(), kind
