"""`swarmtrain doctor` against a live swarm: all is well in a healthy one, and each answer is the truth."""

from __future__ import annotations

import os
import signal

import pytest
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import CheckEvent

pytestmark = pytest.mark.processes


HELD = """
import pathlib, signal
from swarmtrain.peer.doctor.doctor import Doctor
start = Doctor._start
def held(self, *arguments):
    node = start(self, *arguments)
    pathlib.Path({mark!r}).touch()
    signal.pause()
    return node
Doctor._start = held
"""


def doctor(swarm: Swarm, *arguments: str, prelude: str = "") -> Child:
    """Run `doctor` with JSON, with its temporary files below the swarm's folder."""
    own = ["--json", "--dir", str(swarm.folder / "patient")]
    swarm.temporary = swarm.folder / "temporary"
    swarm.temporary.mkdir(exist_ok=True)
    return swarm.start("doctor", ["doctor", *own, *arguments], prelude=prelude)


def checks(child: Child) -> dict[str, list[CheckEvent]]:
    found: dict[str, list[CheckEvent]] = {}
    for event in child.all(CheckEvent):
        found.setdefault(event.check, []).append(event)
    return found


def assert_nothing_left(swarm: Swarm, *peers: Child) -> None:
    alive = {pid for peer in peers for pid in (peer.process.pid, peer.daemon())}
    assert not list((swarm.folder / "temporary").glob("*swarmtrain*"))  # torch makes an empty folder of its own
    assert not (swarm.folder / "patient").exists()
    wait_until(lambda: not set(swarm.leftovers()) - alive, lambda: f"still there: {swarm.leftovers()}")


@pytest.mark.long
def test_all_is_well_in_a_healthy_swarm(swarm: Swarm) -> None:
    # Paced, for then nobody waits for a machine that is busy with other tests, and its speed is no matter.
    bootstrap = swarm.bootstrap(write_run(swarm.folder, merge={"pacing": True}))
    anna = swarm.join("anna", bootstrap.invite.invite)
    anna.wait_round(1)
    child = doctor(swarm, anna.invite.invite)
    assert child.wait() == 0, child.story()
    found = checks(child)
    assert not child.noise
    found.pop("power", None)  # of a laptop
    assert {event.level for events in found.values() for event in events} == {"ok"}, found
    assert list(found) == [
        "python", "torch", "daemon", "ports", "addresses", "invite", "peers", "run", "clock",
        "device", "speed", "reachable",
    ]  # fmt: skip
    assert {event.found.split()[0] for event in found["peers"]} == {"anna", "bootstrap"}
    assert all(" ms at /ip4/127.0.0.1/tcp/" in event.found for event in found["peers"])
    assert found["run"][0].found.startswith("tiny, ")
    assert "could dial this machine at /ip4/127.0.0.1/tcp/" in found["reachable"][0].found
    assert_nothing_left(swarm, bootstrap, anna)

    # The others are reached from 127.0.0.1, so that is where they dial, and there nobody listens now.
    child = doctor(swarm, anna.invite.invite, "--listen", "127.0.0.2:0")
    assert child.wait() == 0, child.story()
    (closed,) = checks(child)["reachable"]
    assert closed.level == "warning" and "could not dial this machine at port " in closed.found
    assert "anna" in closed.found and "bootstrap" in closed.found
    assert_nothing_left(swarm, bootstrap, anna)

    swarm.interrupt_all([bootstrap, anna])


def test_interrupted_it_leaves_nothing(swarm: Swarm) -> None:
    """Held when it has a daemon and a temporary folder, so that it cannot be over before it is interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        mark = swarm.folder / f"held-{number}"
        child = doctor(swarm, prelude=HELD.format(mark=str(mark)))
        wait_until(mark.exists, child.story)
        assert child.daemon() and list((swarm.folder / "temporary").glob("swarmtrain-doctor-*"))
        os.kill(child.process.pid, number)
        assert child.wait() == 130, child.story()
        assert_nothing_left(swarm)


def test_nobody_is_there_any_more(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    invite = bootstrap.invite.invite
    swarm.interrupt_all([bootstrap])
    child = doctor(swarm, invite)
    assert child.wait() == 1
    (silence,) = checks(child)["peers"]
    assert silence.level == "problem" and "does not answer at /ip4/127.0.0.1/tcp/" in silence.found
    assert_nothing_left(swarm)
