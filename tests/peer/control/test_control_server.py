"""Control server over a real socket, with a fake peer: what it answers, refuses and survives."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from codes import raises_code
from grpc_health.v1 import health_pb2, health_pb2_grpc

from swarmtrain.errors import CODE_KEY, RunTimeError, UserError
from swarmtrain.peer.control.server import MAX_WATCHERS, SERVICE, ControlHandlers, ControlServer, read_status
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc

LIMIT_S = 30.0
TICK_S = 0.05


@dataclass
class FakePeer:
    """Fake peer that obeys and records its orders."""

    round: int = 1
    serving: bool = True
    state: int = pb.PEER_STATE_TRAINING
    asked: list[str] = field(default_factory=list)
    looked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    trouble: Exception | None = None

    def powers(self) -> ControlHandlers:
        return ControlHandlers(
            status=self.status,
            healthy=self.healthy,
            leave=lambda: self._did("leave"),
            pause=lambda: self._did("pause"),
            resume=lambda: self._did("resume"),
            checkpoint=self.checkpoint,
            limit=lambda limits: self._did(f"threads {limits.threads}"),
        )

    def status(self) -> pb.PeerStatus:
        return pb.PeerStatus(pid=7, name="anna", state=self.state, round=self.round, time=time.monotonic())

    def healthy(self) -> bool:
        self.looked.release()
        return self.serving

    def checkpoint(self) -> pb.CheckpointReply:
        self._did("checkpoint")
        return pb.CheckpointReply(round=self.round, path="/there")

    def _did(self, what: str) -> str:
        self.asked.append(what)
        if self.trouble is not None:
            raise self.trouble
        return f"{what} it is"

    def wait_looks(self, number: int) -> None:
        """Until the server has looked at the peer `number` more times."""
        while self.looked.acquire(blocking=False):
            pass
        for _ in range(number):
            assert self.looked.acquire(timeout=LIMIT_S)


def addresses(folder: Path) -> list[str]:
    return (folder / "control.address").read_text().splitlines()


@contextlib.contextmanager
def serving(
    folder: Path, peer: FakePeer, powers: ControlHandlers | None = None, tcp: str = ""
) -> Iterator[ControlServer]:
    server = ControlServer(folder, powers or peer.powers(), tcp, TICK_S)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def client(folder: Path, line: int = 0) -> Iterator[Any]:
    with grpc.insecure_channel(addresses(folder)[line]) as channel:
        yield pb_grpc.ControlStub(channel)


@pytest.fixture
def peer() -> FakePeer:
    return FakePeer()


@pytest.fixture
def folder(tmp_path: Path, peer: FakePeer) -> Iterator[Path]:
    with serving(tmp_path, peer):
        yield tmp_path


@pytest.fixture
def stub(folder: Path) -> Iterator[Any]:
    with client(folder) as stub:
        yield stub


def refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details()  # type: ignore[attr-defined]


def assert_serves(stub: Any) -> None:
    assert stub.Status(pb.StatusRequest(), timeout=LIMIT_S).name == "anna"


# ---------------------------------------------------------------- what it answers


def test_status_and_powers(stub: Any, peer: FakePeer) -> None:
    assert_serves(stub)
    assert stub.Pause(pb.PauseRequest(), timeout=LIMIT_S).message == "pause it is"
    assert stub.Resume(pb.ResumeRequest(), timeout=LIMIT_S).message == "resume it is"
    assert stub.Leave(pb.LeaveRequest(), timeout=LIMIT_S).message == "leave it is"
    assert stub.Limit(pb.Limits(threads=3), timeout=LIMIT_S).message == "threads 3 it is"
    reply = stub.Checkpoint(pb.CheckpointRequest(), timeout=LIMIT_S)
    assert (reply.round, reply.path) == (1, "/there")
    assert peer.asked == ["pause", "resume", "leave", "threads 3", "checkpoint"]


@pytest.mark.parametrize(
    ("trouble", "status", "detail", "metadata"),
    [
        (
            UserError("not here", code="not-a-volunteer"),
            "FAILED_PRECONDITION",
            "not here",
            {CODE_KEY: "not-a-volunteer"},
        ),
        (RunTimeError("not yet", code="no-checkpoint"), "FAILED_PRECONDITION", "not yet", {CODE_KEY: "no-checkpoint"}),
        (OSError(28, "No space left on device"), "INTERNAL", "No space left on device", {}),
    ],
)
def test_a_power_that_fails_is_told_to_the_caller(
    stub: Any, peer: FakePeer, trouble: Exception, status: str, detail: str, metadata: dict[str, str]
) -> None:
    peer.trouble = trouble
    code = grpc.StatusCode[status]
    with pytest.raises(grpc.RpcError) as refused:
        stub.Resume(pb.ResumeRequest(), timeout=LIMIT_S)
    assert dict(refused.value.trailing_metadata()) == metadata
    assert refusal(lambda: stub.Pause(pb.PauseRequest(), timeout=LIMIT_S))[0] == code
    assert detail in refusal(lambda: stub.Checkpoint(pb.CheckpointRequest(), timeout=LIMIT_S))[1]
    assert_serves(stub)


def test_a_power_that_is_not_there(tmp_path: Path, peer: FakePeer) -> None:
    powers = ControlHandlers(status=peer.status, healthy=peer.healthy, leave=lambda: "")
    with serving(tmp_path, peer, powers), client(tmp_path) as stub:
        code, detail = refusal(lambda: stub.Limit(pb.Limits(), timeout=LIMIT_S))
        assert (code, detail) == (grpc.StatusCode.UNIMPLEMENTED, "this peer cannot change its limits")


def test_a_power_that_takes_long_keeps_nobody_else_waiting(tmp_path: Path, peer: FakePeer) -> None:
    written = threading.Event()

    def checkpoint() -> pb.CheckpointReply:
        assert written.wait(LIMIT_S)
        return pb.CheckpointReply(round=5)

    powers = ControlHandlers(status=peer.status, healthy=peer.healthy, leave=lambda: "", checkpoint=checkpoint)
    with serving(tmp_path, peer, powers), client(tmp_path) as stub:
        reply = stub.Checkpoint.future(pb.CheckpointRequest(), timeout=LIMIT_S)
        assert_serves(stub)
        assert not reply.done()
        written.set()
        assert reply.result().round == 5


def test_health_follows_the_peer(folder: Path, peer: FakePeer) -> None:
    kinds = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(addresses(folder)[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def answers() -> set[int]:
            requests = [health_pb2.HealthCheckRequest(service=service) for service in ("", SERVICE)]
            return {stub.Check(request, timeout=LIMIT_S).status for request in requests}

        peer.wait_looks(2)
        assert answers() == {kinds.SERVING}
        peer.serving = False
        peer.wait_looks(2)
        assert answers() == {kinds.NOT_SERVING}
        unknown = health_pb2.HealthCheckRequest(service="other")
        assert refusal(lambda: stub.Check(unknown, timeout=LIMIT_S))[0] == grpc.StatusCode.NOT_FOUND


# ---------------------------------------------------------------- watching


def test_a_watcher_gets_the_status_at_once_and_then_what_changes(stub: Any, peer: FakePeer) -> None:
    stream = stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)
    assert next(stream).round == 1
    for number in (2, 3, 4):
        peer.round = number
        assert next(stream).round == number
    stream.cancel()


def test_a_watcher_hears_nothing_while_nothing_changes(stub: Any, peer: FakePeer) -> None:
    stream = stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)
    assert next(stream).round == 1
    peer.wait_looks(2)  # the status is told once more at most, since the stream began between two looks
    told: list[int] = []
    reader = threading.Thread(target=lambda: told.extend(status.round for status in _until_the_end(stream)))
    reader.start()
    peer.wait_looks(3)
    assert len(told) <= 1
    stream.cancel()
    reader.join(LIMIT_S)


def _until_the_end(stream: Any) -> Iterator[pb.PeerStatus]:
    with contextlib.suppress(grpc.RpcError):
        yield from stream


def test_changes_are_told_once_a_look_at_most(stub: Any, peer: FakePeer) -> None:
    stream = stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)
    next(stream)
    told = []
    busy = threading.Event()

    def change() -> None:
        while not busy.is_set():
            peer.round += 1

    changer = threading.Thread(target=change)
    changer.start()
    began_s = next(stream).time
    for _ in range(4):
        told.append(next(stream))
    busy.set()
    changer.join(LIMIT_S)
    assert told[-1].time - began_s >= 3 * TICK_S
    stream.cancel()


def test_the_last_status_ends_the_stream(tmp_path: Path, peer: FakePeer) -> None:
    with serving(tmp_path, peer) as server, client(tmp_path) as stub:
        stream = stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)
        assert next(stream).round == 1
        peer.round, peer.state = 9, pb.PEER_STATE_DONE
        ending = threading.Thread(target=server.stop)
        ending.start()
        *_, last = stream
        ending.join(LIMIT_S)
        assert (last.round, last.state) == (9, pb.PEER_STATE_DONE)


def test_one_watcher_too_many_is_told_so_until_another_ends(folder: Path, stub: Any, peer: FakePeer) -> None:
    streams = [stub.Watch(pb.WatchRequest(), timeout=LIMIT_S) for _ in range(MAX_WATCHERS)]
    for stream in streams:
        assert next(stream).round == 1
    code, detail = refusal(lambda: next(stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)))
    assert (code, detail) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"{MAX_WATCHERS} watch this peer already; end one of them",
    )
    assert_serves(stub)
    streams.pop().cancel()
    for _ in range(200):  # the server notices a moment later
        peer.wait_looks(1)
        stream = stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)
        try:
            assert next(stream).round == 1
            break
        except grpc.RpcError:
            continue
    else:
        pytest.fail("the place of a watcher that left stays taken")
    for stream in streams:
        stream.cancel()


def test_a_watcher_that_reads_slowly_misses_states(folder: Path, peer: FakePeer) -> None:
    """One that reads nothing: its connection fills up, and the server keeps one state for it, not a queue."""
    big = "x" * 2_000_000
    powers = ControlHandlers(
        status=lambda: pb.PeerStatus(name="anna", round=peer.round, doing=f"{peer.round} {big}"),
        healthy=peer.healthy,
        leave=lambda: "",
    )
    second = folder / "second"
    second.mkdir()
    with serving(second, peer, powers), client(second) as stub:
        stream = stub.Watch(pb.WatchRequest(), timeout=LIMIT_S)
        for number in range(8):
            peer.round = 2 + number
            peer.wait_looks(2)
        peer.round = 100
        seen = []
        for status in stream:
            seen.append(status.round)
            if status.round == 100:
                break
        assert len(seen) < 10
        stream.cancel()


# ---------------------------------------------------------------- what it refuses and survives


def test_garbage_and_oversized_requests_leave_it_serving(folder: Path, stub: Any, peer: FakePeer) -> None:
    path = addresses(folder)[0].removeprefix("unix:")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(LIMIT_S)
            raw.connect(path)
            with contextlib.suppress(OSError):
                raw.sendall(garbage)
                while raw.recv(4096):
                    pass
        assert_serves(stub)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/Limit")
        code, _ = refusal(lambda: call(b"\xff" * 100, timeout=LIMIT_S))
        assert code == grpc.StatusCode.UNKNOWN, "bytes that are no message"
        code, _ = refusal(lambda: call(pb.Limits(hours="x" * 100_000).SerializeToString(), timeout=LIMIT_S))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        code, _ = refusal(lambda: channel.unary_unary(f"/{SERVICE}/Destroy")(b"", timeout=LIMIT_S))
        assert code == grpc.StatusCode.UNIMPLEMENTED
    assert peer.asked == []
    assert_serves(stub)


def test_only_the_owner_can_open_the_socket(folder: Path, stub: Any) -> None:
    path = Path(addresses(folder)[0].removeprefix("unix:"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "control.address").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "status.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused(peer: FakePeer) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # the socket's own mode must be enough
        with serving(folder, peer), client(folder) as stub:
            path = addresses(folder)[0].removeprefix("unix:")
            become = "import os, socket; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
            script = f"{become}; os.stat({path!r}); socket.socket(socket.AF_UNIX).connect({path!r})"
            tried = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd="/")
            assert tried.returncode == 1
            assert "PermissionError: [Errno 13]" in tried.stderr
            assert_serves(stub)


def test_a_folder_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path, peer: FakePeer) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with serving(folder, peer):
        path = Path(addresses(folder)[0].removeprefix("unix:"))
        assert len(str(path)) < 100
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with client(folder) as stub:
            assert_serves(stub)
    assert not path.parent.exists()
    assert not (folder / "control.address").exists()


def test_a_folder_with_signs_of_an_address_in_its_name_has_its_socket_inside(tmp_path: Path, peer: FakePeer) -> None:
    folder = tmp_path / "o%dd?a#b c"
    folder.mkdir()
    with serving(folder, peer):
        assert (folder / "control.sock").is_socket()
        with client(folder) as stub:
            assert_serves(stub)


def test_the_socket_of_a_killed_peer_is_replaced(tmp_path: Path, peer: FakePeer) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control.sock"))
    (tmp_path / "control.address").write_text("unix:/nowhere\n")
    with serving(tmp_path, peer), client(tmp_path) as stub:
        assert_serves(stub)
    assert {path.name for path in tmp_path.iterdir()} == {"status.json"}


def test_tcp_only_if_it_was_asked_for(tmp_path: Path, peer: FakePeer) -> None:
    with serving(tmp_path, peer):
        assert len(addresses(tmp_path)) == 1
    with serving(tmp_path, peer, tcp="127.0.0.1:0"):
        assert addresses(tmp_path)[1].startswith("127.0.0.1:")
        with client(tmp_path, 1) as stub:
            assert_serves(stub)
        second = tmp_path / "second"
        second.mkdir()
        taken = ControlServer(second, peer.powers(), addresses(tmp_path)[1])
        with raises_code("port-taken", UserError, "--control"):
            taken.start()
        assert not (second / "control.address").exists()


# ---------------------------------------------------------------- what it leaves


def test_the_last_status_stays_in_the_folder(tmp_path: Path, peer: FakePeer) -> None:
    with serving(tmp_path, peer):
        peer.round = 12
        peer.state = pb.PEER_STATE_DONE
    left = read_status(tmp_path)
    assert left is not None
    assert (left.name, left.round, left.state) == ("anna", 12, pb.PEER_STATE_DONE)


def test_a_change_is_on_the_disk_before_the_end(tmp_path: Path, peer: FakePeer) -> None:
    with serving(tmp_path, peer):
        peer.state = pb.PEER_STATE_PAUSED
        peer.wait_looks(3)  # soon after the start that is enough
        left = read_status(tmp_path)
        assert left is not None
        assert left.state == pb.PEER_STATE_PAUSED


def test_a_disk_without_room_costs_the_file_and_nothing_else(
    tmp_path: Path, peer: FakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if path.name == "status.json":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("swarmtrain.peer.control.server.write_atomically", full)
    with serving(tmp_path, peer), client(tmp_path) as stub:
        peer.round = 2
        peer.wait_looks(5)
        assert_serves(stub)
    assert read_status(tmp_path) is None


def test_a_torn_or_strange_status_is_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    for text in ("", "{", "[]", '{"round": "many"}', "\xff"):
        (tmp_path / "status.json").write_bytes(text.encode("latin-1"))
        assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text('{"pid": 3, "round": "7", "of_a_later_version": 1}')
    status = read_status(tmp_path)
    assert status is not None
    assert status.round == 7
