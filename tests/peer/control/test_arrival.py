"""Reports while the swarm's current weights arrive."""

from __future__ import annotations

from swarmtrain.events import ArrivingEvent, CaughtUpEvent, Event, StartedEvent
from swarmtrain.network.snapshots.store import HeldSnapshot, Snapshot, empty_held
from swarmtrain.peer.control.arrival import DownloadProgress
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.health import health
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import control_pb2 as control_pb
from swarmtrain.v1 import snapshot_pb2 as pb


def room(num_chunks: int) -> HeldSnapshot:
    manifest = pb.Manifest(total_bytes=num_chunks * CHUNK_BYTES - 100, chunk_sha256=bytes(32 * num_chunks))
    return empty_held(Snapshot(manifest, pb.Signed(), "", ""))


def test_the_board_is_told_at_once_and_events_come_now_and_then() -> None:
    board, events, now_s = StatusBoard("volunteer", 0.0), list[Event](), [100.0]
    arrival, held = DownloadProgress(board, events.append, lambda: now_s[0]), room(1000)
    arrival.look(None)
    assert not board.status().doing
    for chunk in range(1000):
        held.have.add(chunk)
        arrival.look(held)
        now_s[0] += 0.125
    assert board.status().doing == "fetching the swarm's current weights: 262 MB of 262 MB"
    assert len(events) == 62 and all(isinstance(event, ArrivingEvent) for event in events)
    first = events[0]
    assert isinstance(first, ArrivingEvent)
    assert (first.received_bytes, first.total_bytes) == (17 * CHUNK_BYTES, 1000 * CHUNK_BYTES - 100)
    assert first.seconds == 2.0


def test_what_stands_still_is_not_told_again_and_slow_ones_seldom() -> None:
    board, events, now_s = StatusBoard("volunteer", 0.0), list[Event](), [0.0]
    arrival, held = DownloadProgress(board, events.append, lambda: now_s[0]), room(1000)
    held.have.add(0)
    arrival.look(held)
    before = board._beats
    for _ in range(100):
        now_s[0] += 1.0
        arrival.look(held)
    assert board._beats == before, "a pull that stands still is no progress"
    assert not events
    for chunk in range(1, 31):
        now_s[0] += 60.0
        held.have.add(chunk)
        arrival.look(held)
    assert len(events) == 3, "once in a hundredth"
    arrival.look(room(1000))
    assert len(events) == 3


def test_another_state_begins_anew() -> None:
    board, events, now_s = StatusBoard("volunteer", 0.0), list[Event](), [0.0]
    arrival = DownloadProgress(board, events.append, lambda: now_s[0])
    for held in (room(10), room(10)):
        arrival.look(held)
        now_s[0] += 5.0
        held.have.update(range(5))
        arrival.look(held)
    assert [(event.received_bytes, event.seconds) for event in events if isinstance(event, ArrivingEvent)] == [
        (5 * CHUNK_BYTES, 5.0)
    ] * 2


def test_who_falls_behind_takes_weights_while_it_trains_and_stays_healthy() -> None:
    """A volunteer that was killed comes back rounds behind the others, and takes their weights in its first merge."""
    now_s = [0.0]
    board = StatusBoard("volunteer", 0.0, now=lambda: now_s[0])
    board.take(StartedEvent(inner_steps_per_round=10, num_parameters=1000, total_tokens=10_000, startup_s=1.0))
    pulse = Pulse(state=control_pb.PEER_STATE_TRAINING, doing="merging round 4")
    board.watch(Watched(pulse=lambda: pulse))
    held = room(10)
    held.have.update(range(5))
    DownloadProgress(board, lambda event: None, lambda: now_s[0]).look(held)
    assert board.status().doing == "fetching the swarm's current weights: 1.31 MB of 2.62 MB"
    assert board.status().state == control_pb.PEER_STATE_TRAINING and health(board.tick(), now_s[0])[0]
    DownloadProgress(board, lambda event: None, lambda: now_s[0]).look(None)
    assert board.status().doing == "merging round 4", "nobody gives it"
    DownloadProgress(board, lambda event: None, lambda: now_s[0]).look(held)
    board.take(CaughtUpEvent(round=9, from_peer="", reason="it was 5 rounds behind the others"))
    assert board.status().doing == "merging round 4" and health(board.tick(), now_s[0])[0]
