"""Peers behind links of ours in containers: they train, and nothing goes round the links."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from docker_engine import BUILD_S, Project, build, docker, status

pytestmark = pytest.mark.containers

WAN = "swarmtrain-test-wan"
PORT = 5000
ROUNDS_S = 60.0
"""Until three rounds have ended behind links of 100 ms."""
RATE_BITS_PER_S, ROUND_TRIP_S = 20e6, 0.1
"""Upload rate and round-trip time of the links in `peers/wan.yaml`."""
SIZE_BYTES = 2_000_000

LISTEN = f"""
import socket
with socket.create_server(("0.0.0.0", {PORT})) as server:
    near, _ = server.accept()
    near.sendall(bytes({SIZE_BYTES}))
    near.close()
"""
ASK = f"""
import socket, sys, time
began = time.monotonic()
far = socket.create_connection((sys.argv[1], {PORT}))
while far.recv(65536): pass
print(time.monotonic() - began)
"""
WITHOUT_TCP = """
import socket, sys
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", (sys.argv[1], 5000))
except PermissionError:
    print("refused")
"""
AS_PEER = ("exec", "--user", "swarmtrain")


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    build()
    docker("build", "--quiet", "--target", "wan", "--tag", WAN, ".", limit_s=BUILD_S)


@pytest.fixture
def swarm() -> Iterator[Project]:
    project = Project(("peers/compose.yaml", "peers/wan.yaml"), {"SWARMTRAIN_WAN_IMAGE": WAN})
    try:
        project.up("--scale", "volunteer=2")
        yield project
    finally:
        project.down()


def address(container: str) -> str:
    return docker("inspect", "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container).strip()


def counted(container: str, chain: str) -> int:
    """Packets or connections that a chain's rule has counted."""
    listed = docker("exec", "--user", "root", container, "nft", "list", "chain", "ip", "wan", chain)
    return int(re.search(r"counter packets (\d+)", listed)[1])  # type: ignore[index]


def test_a_swarm_behind_links_trains_and_nothing_goes_round_them(swarm: Project) -> None:
    first, second = swarm.of_service("volunteer")
    (bootstrap,) = swarm.of_service("bootstrap")
    assert [status(name)["state"] for name in (first, second)] == ["training", "training"]
    swarm.wait_until(lambda: status(first)["round"] > 2, "rounds end", ROUNDS_S)

    for name in (first, second):
        peer = status(name)["pid"]
        uid = docker("exec", name, "stat", "--format=%U", f"/proc/{peer}").strip()
        assert uid == "swarmtrain", "the peer has no rights"
        assert counted(name, "dialling") > 0
        assert counted(name, "others") == 0, "the peer tried to say something past its link"
    assert counted(bootstrap, "dialled") > 0

    docker("exec", "--detach", second, "python", "-c", LISTEN)
    took_s = float(docker(*AS_PEER, first, "python", "-c", ASK, address(second)))
    assert took_s >= SIZE_BYTES * 8 / RATE_BITS_PER_S + ROUND_TRIP_S, "as its line up, and a round trip"
    assert docker(*AS_PEER, first, "python", "-c", WITHOUT_TCP, address(second)).strip() == "refused"
