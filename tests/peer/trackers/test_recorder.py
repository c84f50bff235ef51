"""Recorder: when curves begin, what each tracker gets, and what the folder remembers."""

from __future__ import annotations

import json
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from swarmtrain.events import (
    DeviceEvent,
    EvalEvent,
    Event,
    FetchedEvent,
    InviteEvent,
    JoinedEvent,
    RoundEvent,
    StartedEvent,
)
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.trackers.points import Point
from swarmtrain.peer.trackers.recorder import CurveRecorder
from swarmtrain.peer.trackers.sinks import TrackedPeer
from swarmtrain.run import run_sha256
from swarmtrain.v1 import control_pb2 as pb

RUN_FILE = """[run]
name = "tiny"
total_tokens = 9000

[inner]
learning_rate = 0.1
"""
STARTED = StartedEvent(inner_steps_per_round=64, num_parameters=10, total_tokens=9000, startup_s=1.0)
INVITE = InviteEvent(line="swarmtrain join st1secret", invite="st1secret", run_sha256="ab", addresses=("/ip4/9.9.9.9",))
FETCHED = FetchedEvent(run_sha256="ab" * 32, run_name="tiny", held_out_bytes=1, from_peer="B", total_tokens=9000)
JOINED = JoinedEvent(round=6, run_tokens=6000, num_peers=2, state_from="", wall_s=1.0, peer="P", name="anna")
DEVICE = DeviceEvent(
    device="cuda:0", title="A Card", precision="bf16", microbatch_sequences=4, batch_sequences=8, why="it works"
)


def a_round(number: int, run_tokens: int) -> RoundEvent:
    given: dict[str, Any] = {"round": number, "inner_steps": 64, "tokens": 1000, "run_tokens": run_tokens, "loss": 2.5}
    given |= {"first_loss": 3.0, "learning_rate": 0.1, "seconds": 8.0, "merge_s": 1.5, "stall_s": 0.5}
    return RoundEvent(**given, bytes_sent=1, bytes_received=1, partners=("P",), weights=(1,))


class FakeTrackers:
    """Trackers that keep their points in memory."""

    def __init__(self, peer: TrackedPeer) -> None:
        self.peer = peer
        self.points: list[Point] = []
        self.ended: list[str] = []
        self.got = threading.Condition()

    def add(self, point: Point) -> None:
        with self.got:
            self.points.append(point)
            self.got.notify_all()

    def close(self) -> None:
        self.ended.append("close")


class Life:
    """One process of a peer, and the trackers that it has started."""

    def __init__(
        self,
        folder: Path,
        role: str = "volunteer",
        every_s: float = 1e3,
        before: pb.PeerStatus | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.trackers = folder, []
        self.board = StatusBoard(role, 0.0)
        make: Any = self._make
        self.recorder = CurveRecorder(folder, self.board, make, before=before, sample_every_s=every_s)
        self.board.add_listener(self.recorder.take)

    trackers: list[FakeTrackers]

    def _make(self, peer: TrackedPeer) -> FakeTrackers:
        self.trackers.append(FakeTrackers(peer))
        return self.trackers[-1]

    def tell(self, *events: Event) -> None:
        for event in events:
            self.board.take(event)


def until(condition: Callable[[], object]) -> None:
    """Wait until the recorder's thread has done something."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s
        threading.Event().wait(0.001)


@contextmanager
def living(life: Life) -> Iterator[Life]:
    (life.folder / "run.toml").write_text(RUN_FILE)
    life.recorder.start()
    try:
        yield life
    finally:
        life.recorder.close()


def test_a_volunteers_curves_begin_with_its_first_step(tmp_path: Path) -> None:
    with living(Life(tmp_path)) as life:
        life.tell(FETCHED, INVITE, JOINED, DEVICE, STARTED, a_round(6, 7000), a_round(7, 8000))
        life.tell(EvalEvent(round=7, held_out_loss=1.5))
    (tracker,) = life.trackers
    assert [point.step for point in tracker.points] == [7000, 8000, 8001] and tracker.ended == ["close"]
    peer = life.trackers[0].peer
    assert (peer.run, peer.name, peer.role, peer.step, peer.folder) == ("tiny", "anna", "volunteer", 0, str(tmp_path))
    assert peer.group.startswith("tiny-") and len(peer.group) == len("tiny-") + 12
    assert peer.run_file == RUN_FILE and peer.config["run"] == tomllib.loads(RUN_FILE)
    machine = peer.config["machine"]
    assert (machine["device"], machine["card"], machine["precision"]) == ("cuda:0", "A Card", "bf16")
    assert machine["cores"] >= 1 and machine["memory_gb"] > 0
    told = json.dumps([peer.config, *(dict(point.values) for point in life.trackers[0].points)])
    assert "secret" not in told and "9.9.9.9" not in told


def test_who_never_trains_draws_nothing(tmp_path: Path) -> None:
    with living(Life(tmp_path)) as life:
        life.tell(FETCHED, INVITE, JOINED, EvalEvent(round=7, held_out_loss=1.5))
    assert life.trackers == [] and not (tmp_path / "trackers.json").exists()


def test_a_bootstrap_draws_what_its_status_says(tmp_path: Path) -> None:
    with living(Life(tmp_path, role="bootstrap", every_s=0.01)) as life:
        tokens = [1000]

        def look(status: pb.PeerStatus) -> None:
            status.run_tokens = tokens[0]
            status.swarm_loss = 2.0

        life.board.add_looker(look)
        life.tell(INVITE, STARTED)
        until(lambda: life.trackers)
        (tracker,) = life.trackers
        with tracker.got:
            assert tracker.got.wait_for(lambda: tracker.points, PATIENCE_S)
        tokens[0] = 3000
        with tracker.got:
            assert tracker.got.wait_for(lambda: len(tracker.points) > 1, PATIENCE_S)
        life.tell(EvalEvent(round=7, held_out_loss=1.5))
        tokens[0] = 4000
    runs = [point.values["train/tokens"] for point in tracker.points if "train/tokens" in point.values]
    assert runs == [1000.0, 3000.0, 4000.0]
    assert [point.values["eval/loss"] for point in tracker.points if "eval/loss" in point.values] == [1.5]
    assert tracker.peer.role == "bootstrap"
    assert tracker.peer.run == "tiny" and tracker.peer.group.startswith("tiny-"), "its status does not know it yet"


def test_the_next_process_continues_the_same_curves(tmp_path: Path) -> None:
    with living(Life(tmp_path)) as first:
        first.tell(FETCHED, STARTED, a_round(6, 7000), a_round(7, 8000))
    # Killed, and back with an older state.
    with living(Life(tmp_path)) as second:
        second.tell(FETCHED, STARTED, a_round(5, 6000), a_round(6, 7000), a_round(8, 9000))
    assert second.trackers[0].peer.id == first.trackers[0].peer.id
    assert second.trackers[0].peer.step == 8000
    assert [point.step for point in second.trackers[0].points] == [8001, 8002, 9000]
    with living(Life(tmp_path / "other")) as other:
        other.tell(FETCHED, STARTED)
    assert other.trackers[0].peer.id != first.trackers[0].peer.id


def test_a_step_is_in_the_folder_before_a_tracker_has_it(tmp_path: Path) -> None:
    """Else a peer that is killed in between would draw a lower step after a higher one."""
    with living(Life(tmp_path)) as life:
        life.tell(FETCHED, STARTED)
        until(lambda: life.trackers)
        (tracker,), kept = life.trackers, []
        add = tracker.add

        def look_first(point: Point) -> None:
            kept.append(json.loads((tmp_path / "trackers.json").read_text())["step"])
            add(point)

        tracker.add = look_first  # type: ignore[method-assign]
        life.tell(a_round(6, 7000), a_round(7, 8000))
    assert kept == [7000, 8000]


def test_curves_that_begin_late_have_the_losses_from_before(tmp_path: Path) -> None:
    losses = [pb.LossPoint(round=n, run_tokens=1000 * n, loss=3.0) for n in (1, 2)]
    with living(Life(tmp_path, before=pb.PeerStatus(run_sha256=run_sha256(RUN_FILE.encode()), losses=losses))) as life:
        life.tell(FETCHED, STARTED, a_round(6, 7000))
    assert [point.step for point in life.trackers[0].points] == [1000, 2000, 7000]
    with living(Life(tmp_path / "new", before=pb.PeerStatus(run_sha256="cd" * 32, losses=losses))) as life:
        life.tell(FETCHED, STARTED, a_round(6, 7000))
    assert [point.step for point in life.trackers[0].points] == [7000], "those of another run are not this one's"


@pytest.mark.parametrize("kept", ["", "[]", '{"id": "x"}', '{"id": "x", "step": "seven"}', "no json"])
def test_a_damaged_memory_begins_new_curves(tmp_path: Path, kept: str) -> None:
    (tmp_path / "trackers.json").write_text(kept)
    with living(Life(tmp_path)) as life:
        life.tell(FETCHED, STARTED, a_round(6, 7000))
    assert [point.step for point in life.trackers[0].points] == [7000] and life.trackers[0].peer.id != "x"


def test_a_look_that_fails_costs_one_point(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def look(status: pb.PeerStatus) -> None:
        if broken:
            raise RuntimeError("dictionary changed size during iteration")

    broken: list[int] = []
    with living(Life(tmp_path)) as life:
        life.board.add_looker(look)
        life.tell(FETCHED, STARTED, a_round(6, 7000))
        until(lambda: life.trackers and life.trackers[0].points)
        broken.append(1)
        life.tell(a_round(7, 8000))
        until(lambda: "could not be drawn" in caplog.text)
        broken.clear()
        life.tell(a_round(8, 9000))
    assert [point.step for point in life.trackers[0].points] == [7000, 9000]
