"""Limits of a volunteer, kept and changed in real processes; joining again without an invite."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from codes import codes_in
from swarm import PATIENCE_S, Child, Swarm, exit_limit_s, wait_until, write_run

from swarmtrain.errors import CODE_KEY
from swarmtrain.events import (
    ArrivingEvent,
    JoinedEvent,
    PausedEvent,
    PeerLeftEvent,
    ResumedEvent,
    RoundEvent,
    WarningEvent,
)
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc

pytestmark = pytest.mark.processes


@contextmanager
def control_of(child: Child) -> Iterator[Any]:
    address = child.folder / "control.address"
    wait_until(address.exists, f"control of {child.name}")
    with grpc.insecure_channel(address.read_text().splitlines()[0]) as channel:
        yield pb_grpc.ControlStub(channel)


def not_now() -> str:
    """Hours that begin in some and end before they are over, whatever the time is."""
    hour = datetime.datetime.now().hour
    return f"{(hour + 10) % 24}-{(hour + 12) % 24}"


def niceness(child: Child) -> set[int]:
    """Return the niceness of its main thread and its daemon's threads; the checkpoint writer's is higher."""
    tasks = [child.process.pid, *(int(path.name) for path in Path(f"/proc/{child.daemon()}/task").iterdir())]
    return {os.getpriority(os.PRIO_PROCESS, task) for task in tasks}


def test_hours_rest_it_at_once_and_a_change_brings_it_back(swarm: Swarm) -> None:
    """Beside one that trains; and one that must not take enough memory is refused before anything is built."""
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    beside = swarm.join("beside", bootstrap.invite.invite)
    small = swarm.join("small", bootstrap.invite.invite, "--memory", "100MB")
    assert small.wait() == 2
    assert codes_in(small.error_line()) == ["too-little-memory"] and "100 MB" in small.error_line()
    beside.wait_event(JoinedEvent)
    hours = not_now()
    anna = swarm.join("anna", bootstrap.invite.invite, "--hours", hours, "--nice", "7")
    paused = anna.wait_event(PausedEvent)
    assert paused.reason.startswith(f"outside the hours {hours}; training resumes at ")
    with control_of(anna) as stub:
        told = stub.Status(pb.StatusRequest(), timeout=PATIENCE_S).limits
        assert (told.hours, told.nice, told.threads, told.only_when_idle) == (hours, 7, 1, False)
        assert niceness(anna) == {7}
        with pytest.raises(grpc.RpcError) as refused:
            stub.Limit(pb.Limits(hours="never"), timeout=PATIENCE_S)
        assert dict(refused.value.trailing_metadata()) == {CODE_KEY: "bad-limit"}
        said = stub.Limit(pb.Limits(hours="any", nice=9), timeout=PATIENCE_S).message
        assert said == "niceness 9; trains at any hour; it trains"
        anna.wait_round(1)
        assert niceness(anna) == {9}
        stub.Limit(pb.Limits(hours=hours), timeout=PATIENCE_S)
        beside.wait_event(PeerLeftEvent, lambda event: event.left == anna.id)
        stub.Limit(pb.Limits(hours="any", threads=2), timeout=PATIENCE_S)
        anna.wait_event(ResumedEvent)
        anna.wait_more_rounds(1)
        assert stub.Status(pb.StatusRequest(), timeout=PATIENCE_S).limits.threads == 2
    swarm.interrupt_all([anna, beside, bootstrap])


ON_A_CARD = """
from pathlib import Path
from swarmtrain.peer.control import limits
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.lifecycle import context
from swarmtrain.protocol import watches

class Cards:
    problem = ""
    def measure(self):
        share = 0.9 if Path("busy").exists() else 0.0
        return [watches.CardMeasurement(name="cuda:0", others_share=share, program="blender", celsius=60.0)]

class Card(ComputeDevice):
    is_host = False

limits.LOOK_EVERY_S, watches.AVERAGE_S = 0.1, 0.3
trains_on, rests = limits.LimitEnforcer.trains_on, context.VolunteerContext.rests
limits.LimitEnforcer.trains_on = lambda self, devices: trains_on(self, ["cuda:0"], Cards())
context.VolunteerContext.rests = lambda self, compute: rests(self, Card(compute.device))
context.finish = lambda device: Path("finished").open("a").write("x")
"""
"""Takes the processor for a graphics card, which another program uses while there is a file `busy`."""


def test_it_leaves_a_card_to_another_program_and_rests_after_its_steps(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    beside = swarm.join("beside", bootstrap.invite.invite, "--gpu-share", "50")
    anna = swarm.join("anna", bootstrap.invite.invite, "--gpu-share", "50", prelude=ON_A_CARD)
    beside.wait_event(WarningEvent, lambda event: event.code == "gpu-share-on-processor")
    anna.wait_round(0)
    assert (swarm.folder / "finished").stat().st_size >= anna.wait_event(RoundEvent).inner_steps, "each is waited for"
    with control_of(anna) as stub:
        told = stub.Status(pb.StatusRequest(), timeout=PATIENCE_S).limits
        assert (told.gpu_share, told.gpu_any_time) == (50, False)
        assert stub.Limit(pb.Limits(gpu_share=100), timeout=PATIENCE_S).message.startswith(
            "uses a graphics card for 100%"
        )
        (swarm.folder / "busy").touch()
        paused = anna.wait_event(PausedEvent)
        assert paused.reason == "another program uses cuda:0 (blender); training resumes after a quiet minute"
        beside.wait_event(PeerLeftEvent, lambda event: event.left == anna.id)
        assert paused.reason in stub.Status(pb.StatusRequest(), timeout=PATIENCE_S).doing
        stub.Limit(pb.Limits(gpu_any_time=True), timeout=PATIENCE_S)
        anna.wait_event(ResumedEvent)
    swarm.interrupt_all([anna, beside, bootstrap])


def test_joining_again_without_an_invite(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, ben = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    anna.wait_round(2)
    wait_until((anna.folder / "peers.json").exists, "whom anna knew")
    peer = anna.id
    swarm.interrupt_some([anna])
    again = swarm.start(
        "anna",
        ["join", "--json", "--threads", "1", "--data", str(swarm.folder), "--dir", str(anna.folder), "--name", "anna"],
    )
    again.wait_event(JoinedEvent)
    again.wait_more_rounds(1)
    assert again.id == peer
    swarm.interrupt_all([again, ben, bootstrap])


def test_without_an_invite_and_without_a_run(swarm: Swarm) -> None:
    finished = swarm.run("join", "--dir", str(swarm.folder / "empty"), "--json", limit_s=exit_limit_s() + 30)
    assert finished.code == 2
    assert codes_in(finished.stderr) == ["nothing-to-resume"]
    assert not (swarm.folder / "empty").exists()


def test_a_late_joiner_on_a_slow_link_sees_the_weights_arrive_and_merges_on_a_faster_one(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder, model={"width": 128}))
    swarm.join("anna", bootstrap.invite.invite).wait_round(0)
    ben = swarm.join("ben", bootstrap.invite.invite, "--down", "6")
    joined = ben.wait_event(JoinedEvent)
    assert joined.state_from and joined.round >= 1
    told = ben.all(ArrivingEvent)
    assert told and all(0 < event.received_bytes <= event.total_bytes for event in told)
    taken_s = joined.time - told[0].time + told[0].seconds
    assert taken_s >= (told[0].total_bytes - 2 * 256 * 1024) * 8 / 6e6
    with control_of(ben) as stub:
        assert stub.Status(pb.StatusRequest(), timeout=PATIENCE_S).limits.down_mbit == 6.0
        said = stub.Limit(pb.Limits(down_mbit=0), timeout=PATIENCE_S).message
        assert said.startswith("receives as fast as the link; ")
    ben.wait_more_rounds(1)  # with the limit it would always come too late
