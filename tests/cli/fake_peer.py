"""Fake peer as the commands see it: folder, lock and control service, without training."""

# ruff: noqa: N802

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.v1 import control_pb2_grpc as wire_grpc


def make_status(**changes: Any) -> wire.PeerStatus:
    """Return the status of a volunteer in the middle of a run, with three others."""
    now = time.time()
    status = wire.PeerStatus(
        peer="12D3KooWexampleAnna01",
        name="anna",
        role="volunteer",
        version="0.1.0",
        pid=os.getpid(),
        started_time=now - 4000,
        time=now,
        state=wire.PEER_STATE_TRAINING,
        doing="training round 12: 14 of 25 steps",
        run_name="stdlib-gpt",
        run_sha256="ab" * 32,
        invite_line="swarmtrain join st1" + "x" * 300,
        round=12,
        inner_steps_done=14,
        inner_steps=25,
        run_tokens=1_200_000,
        total_tokens=3_000_000,
        own_tokens=400_000,
        own_tokens_per_s=4100,
        swarm_tokens_per_s=12_300,
        end_time=now + 147.5,
        sent_bytes=12_000_000,
        received_bytes=11_000_000,
        sent_bytes_per_s=1.2e6,
        times_below_allreduce=25.1,
        stall_share=0.034,
        held_out_loss=2.1,
    )
    for number in range(12):
        loss = 5 - number / 4
        status.losses.add(round=number, run_tokens=number * 100_000, loss=loss, held_out_loss=loss if number % 4 else 0)
    for name, tokens, present in (("anna", 400_000, True), ("bert", 600_000, True), ("cleo", 200_000, False)):
        status.peers.add(
            peer=f"12D3KooWexample{name.title()}01",
            name=name,
            tokens=tokens,
            present=present,
            round=12,
            tokens_per_s=4000,
        )
    status.peers.add(peer="12D3KooWexampleBoot01", name="bootstrap", present=True, bootstrap=True)
    status.checkpoint.round, status.checkpoint.time, status.checkpoint.size_bytes = 11, now - 12, 10_200_000
    status.notices.add(time=now - 300, message="the disk is full: training goes on without checkpoints")
    status.limits.threads, status.limits.nice, status.limits.hours = 2, 10, "22-7"
    for name, value in changes.items():
        setattr(status, name, value)
    return status


class FakePeer(wire_grpc.ControlServicer):
    """Fake peer that lives in `folder` from `start` on and records requests in `asked`."""

    def __init__(self, folder: Path, status: wire.PeerStatus | None = None) -> None:
        self.folder = folder
        self.status = status or make_status()
        self.asked: list[Any] = []
        self.watches = 0
        self.on_leave = threading.Event()
        self.hanging = threading.Event()
        """While set, it takes calls and does not answer, like a stopped process."""
        self.refusal = ""
        self.history: wire.RunHistory | None = None
        """Record of its run; None: it is of a version that has none."""
        self._news = threading.Condition()
        self._version = 0
        self._gone = False
        self._lock = -1
        self._server: grpc.Server | None = None
        folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------- its life

    def hold(self) -> FakePeer:
        """Take the lock, as the first thing a peer does."""
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        return self

    def serve(self, *, tcp: bool = False) -> str:
        """Answer from now on; returns the TCP address if `tcp`."""
        self._gone = False
        self._server = grpc.server(ThreadPoolExecutor(16))
        wire_grpc.add_ControlServicer_to_server(self, self._server)
        path = self.folder / "control.sock"
        path.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{path}")
        port = self._server.add_insecure_port("127.0.0.1:0") if tcp else 0
        self._server.start()
        address = f"127.0.0.1:{port}" if tcp else ""
        (self.folder / "control.address").write_text(f"unix:{path}\n{address}\n")
        self.save()
        return address

    def start(self) -> FakePeer:
        """Hold the folder and answer."""
        self.hold()
        self.serve()
        return self

    def save(self) -> None:
        """Write the status into the folder."""
        (self.folder / "status.json").write_text(json_format.MessageToJson(self.status))

    def tell(self, **changes: Any) -> None:
        """Change the status, and notify watchers."""
        with self._news:
            for name, value in changes.items():
                setattr(self.status, name, value)
            self.status.time = time.time()
            self._version += 1
            self._news.notify_all()

    def hang_up(self) -> None:
        """End every call and stop answering."""
        with self._news:
            self._gone = True
            self._news.notify_all()
        if self._server is not None:
            self._server.stop(10).wait()  # calls that were taken are answered
            self._server = None

    def die(self) -> None:
        """Die as by SIGKILL: the socket and the address stay behind, without a last status."""
        self.hang_up()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def end(self, state: int = wire.PEER_STATE_DONE, reason: str = "total_tokens", exit_code: int = 0) -> None:
        """End with a last status."""
        self.tell(state=state, end_reason=reason, exit_code=exit_code)
        self.save()
        (self.folder / "control.address").unlink()
        self.die()

    # ------------------------------------------------------------- its service

    def Status(self, request: Any, context: Any) -> Any:
        with self._news:
            self._news.wait_for(lambda: self._gone or not (self.hanging.is_set() and context.is_active()), 10)
        self.status.time = time.time()
        return self.status

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self.watches += 1
        if self.refusal:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self.refusal)
        seen = -1
        while context.is_active():
            with self._news:
                self._news.wait_for(lambda: self._gone or self._version != seen, 0.2)  # noqa: B023
                if self._version == seen and self._gone:
                    return
                if self._version == seen:
                    continue
                seen, status = self._version, wire.PeerStatus()
                status.CopyFrom(self.status)
            yield status

    def History(self, request: Any, context: Any) -> Any:
        if self.history is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown method")
        return self.history

    def Pause(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return wire.ControlReply(message="pausing: it finishes its step\x1b[2J")

    def Resume(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a bootstrap does not train: there is nothing to resume")

    def Leave(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        self.on_leave.set()
        return wire.ControlReply(message="leaving: it finishes its step, tells the other peers and ends")

    def Limit(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return wire.ControlReply(message="from now on: 3 threads")


@contextlib.contextmanager
def living(peer: FakePeer) -> Iterator[FakePeer]:
    """Run a peer that is gone when the block is left."""
    try:
        yield peer
    finally:
        peer.die()
