"""Control of peers that live: status, watching, health and leaving over their sockets, and what they leave behind."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from swarm import PATIENCE_S, Child, Swarm, wait_until, write_run

from swarmtrain.events import ArchivedEvent, DoneEvent
from swarmtrain.peer.control.server import SERVICE, read_status
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.processes, pytest.mark.long]


@contextmanager
def channel_to(child: Child) -> Iterator[Any]:
    address = wait_until(lambda: _read(child.folder / "control.address"), f"control of {child.name}")
    with grpc.insecure_channel(address.splitlines()[0]) as channel:
        yield channel


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def is_serving(channel: Any) -> bool:
    stub, kinds = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckResponse
    requests = [health_pb2.HealthCheckRequest(service=service) for service in ("", SERVICE)]
    return {stub.Check(request, timeout=PATIENCE_S).status for request in requests} == {kinds.SERVING}


def left_by(child: Child) -> pb.PeerStatus:
    status = read_status(child.folder)
    assert status is not None
    return status


def metrics(child: Child) -> list[str]:
    (url,) = re.findall(r"metrics at (http://\S+)", (child.folder / "peer.log").read_text())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=PATIENCE_S) as reply:
        return reply.read().decode().splitlines()  # type: ignore[no-any-return]


def test_status_watch_health_pause_and_leave(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder), "--metrics", "0")
    anna, ben = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    for child in (anna, ben):
        child.wait_round(2)
    with ExitStack() as stack:
        channels = {child.name: stack.enter_context(channel_to(child)) for child in (bootstrap, anna, ben)}
        stubs = {name: pb_grpc.ControlStub(channel) for name, channel in channels.items()}
        for name, channel in channels.items():
            wait_until(lambda channel=channel: is_serving(channel), f"{name} serving")
        check_volunteer(wait_until(lambda: _with_rates(stubs["anna"]), "rates of anna"), anna, ben, bootstrap)
        served = stubs["bootstrap"].Status(pb.StatusRequest(), timeout=PATIENCE_S)
        assert (served.state, served.role, served.run_name) == (pb.PEER_STATE_SERVING, "bootstrap", "tiny")
        assert served.doing.startswith("serving 2 volunteers in round ")
        assert {'swarmtrain_peers{role="volunteer"} 2.0', "swarmtrain_healthy 1.0"} <= set(metrics(bootstrap))

        rounds = set()
        for status in stubs["anna"].Watch(pb.WatchRequest(), timeout=PATIENCE_S):
            assert not rounds or status.round >= max(rounds)
            rounds.add(status.round)
            if len(rounds) == 3:
                break

        for name in ("anna", "bootstrap"):
            written = stubs[name].Checkpoint(pb.CheckpointRequest(), timeout=PATIENCE_S)
            kept = stubs[name].Status(pb.StatusRequest(), timeout=PATIENCE_S).checkpoint
            assert Path(written.path).exists() and kept.round >= written.round > 0 and kept.size_bytes > 0
        stubs["anna"].Limit(pb.Limits(nice=3), timeout=PATIENCE_S)
        assert stubs["anna"].Status(pb.StatusRequest(), timeout=PATIENCE_S).limits.nice == 3

        stubs["ben"].Pause(pb.PauseRequest(), timeout=PATIENCE_S)
        paused = wait_until(lambda: _in_state(stubs["ben"], pb.PEER_STATE_PAUSED), "ben paused")
        assert paused.doing == "paused: you asked for it"
        wait_until(lambda: not is_serving(channels["ben"]), "ben not serving while it rests")
        stubs["ben"].Resume(pb.ResumeRequest(), timeout=PATIENCE_S)
        wait_until(lambda: _in_state(stubs["ben"], pb.PEER_STATE_TRAINING), "ben training")
        ben.wait_more_rounds(1)

        stream = stubs["ben"].Watch(pb.WatchRequest(), timeout=PATIENCE_S)
        next(stream)
        assert stubs["ben"].Leave(pb.LeaveRequest(), timeout=PATIENCE_S).message.startswith("leaving")
        *_, last = stream
        assert (last.state, last.end_reason) == (pb.PEER_STATE_DONE, "asked")
    assert ben.wait() == 0, ben.story()
    assert [done.reason for done in ben.all(DoneEvent)] == ["asked"]
    left = left_by(ben)
    assert (left.state, left.end_reason, left.exit_code, left.peer) == (pb.PEER_STATE_DONE, "asked", 0, ben.id)
    assert left.losses[-1].round == ben.last_round
    assert not (ben.folder / "control.address").exists()

    anna.wait_more_rounds(1)
    newest = anna.last_round
    swarm.interrupt_some([bootstrap])
    assert left_by(bootstrap).state == pb.PEER_STATE_DONE
    assert bootstrap.all(ArchivedEvent)[-1].round > newest, "it takes one last archive"
    anna.kill()
    left = left_by(anna)
    assert (left.state, left.end_reason) == (pb.PEER_STATE_TRAINING, "")
    assert left.round > 0


def _in_state(stub: Any, state: int) -> pb.PeerStatus | None:
    status = stub.Status(pb.StatusRequest(), timeout=PATIENCE_S)
    return status if status.state == state else None


def _with_rates(stub: Any) -> pb.PeerStatus | None:
    """Once it has trained for long enough to have any, and has read how fast the other is and what it has trained."""
    status = stub.Status(pb.StatusRequest(), timeout=PATIENCE_S)
    told = [peer.tokens_per_s for peer in status.peers if not peer.bootstrap]
    read = [peer.acknowledged_tokens for peer in status.peers if peer.peer != status.peer and not peer.bootstrap]
    return status if min(status.own_tokens_per_s, status.swarm_tokens_per_s, *told, *read) > 0 else None


def check_volunteer(status: pb.PeerStatus, anna: Child, ben: Child, bootstrap: Child) -> None:
    """Everything a volunteer can know by now is there."""
    event = min((e for e in anna.rounds().values() if e.round >= 2), key=lambda e: e.round)  # it may have joined later
    assert (status.peer, status.name, status.role) == (anna.id, "anna", "volunteer")
    assert status.pid == anna.process.pid
    assert 0 < status.started_time < status.time
    assert status.state == pb.PEER_STATE_TRAINING
    assert status.doing.startswith(("training round ", "merging round "))
    assert (status.run_name, status.run_sha256, status.total_tokens) == ("tiny", anna.invite.run_sha256, 10**9)
    assert status.invite_line == anna.invite.line
    assert status.round > event.round
    assert status.inner_steps == 10
    assert status.run_tokens >= event.run_tokens
    assert 0 < status.own_tokens < status.run_tokens
    assert status.sent_bytes_per_s > 0 and status.received_bytes_per_s > 0
    losses = {point.round: point for point in status.losses}
    assert losses[event.round].loss == pytest.approx(event.loss)
    assert losses[event.round].run_tokens == event.run_tokens
    assert status.sent_bytes > 0 and status.received_bytes > 0
    assert status.times_below_allreduce > 0
    assert 0 <= status.stall_share < 1
    peers = {peer.name: peer for peer in status.peers}
    assert set(peers) == {"anna", "ben", "bootstrap"}
    assert {name for name, peer in peers.items() if peer.bootstrap} == {"bootstrap"}
    assert all(peer.present for peer in peers.values())
    assert peers["ben"].peer == ben.id and peers["ben"].tokens >= peers["ben"].acknowledged_tokens > 0
    assert sum(peer.tokens for peer in peers.values()) >= event.run_tokens
    assert peers["bootstrap"].peer == bootstrap.id and peers["bootstrap"].tokens == 0
    assert not status.end_reason
