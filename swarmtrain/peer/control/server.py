"""Control server: through it a person, a health check or a dashboard talks to a running peer.

gRPC on a Unix socket in the peer's folder, which only its owner can open. It runs in a thread and an event loop of its
own, so that neither the network nor the training waits for a caller. The server knows nothing of the peer but its
`ControlHandlers`; what a caller sends can at worst be refused.

control.address   where clients find the server: a line for the socket, a second one for TCP if that was asked for
control.sock      the socket, unless the folder's path is too long for one
status.json       the peer's last status, for when it no longer runs
history.pb        the record of the run from its start
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # else gRPC writes to standard error at each fork
import grpc
import grpc.aio
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from swarmtrain.errors import CODE_KEY, RunTimeError, SwarmtrainError, UserError
from swarmtrain.network.files import write_atomically
from swarmtrain.peer.control.board import OVER
from swarmtrain.peer.control.history import HISTORY_NAME
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

SERVICE = "swarmtrain.v1.Control"
MAX_WATCHERS = 32
_TICK_S = 0.5
_WATCHERS_A_TICK = 8
_TICKS_A_SAVE, _FIRST_TICKS = 4, 60
"""Ticks between two writes of the file if there is news; with each tick in the first half minute, so that a peer killed
soon after it began to train leaves more than that it was starting.
"""
_SAVE_ANYWAY_S = 15.0
_SAVE_HISTORY_S = 30.0
_START_S = 10.0
_GRACE_S = 2.0  # for the last status to watchers, on a busy machine too
_MAX_SOCKET_PATH_BYTES = 100
_MAX_REQUEST_BYTES = 16_384
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_allowed_incoming_connections", 512),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 60_000),  # frees the place of a watcher that is suspended or behind a dead line
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),
)
_MAX_CALLS = 512
_REFUSAL_S = 0.2
_MAX_WAITING_REFUSALS = 400


@dataclass(frozen=True, kw_only=True)
class ControlHandlers:
    """Functions by which the server acts on its peer. They return sentences for the person who asked.

    `status` and `healthy` are called in the server's loop and only read; the others run on a pool and may take time.
    None: this peer cannot do that. The caller is told the text of a `SwarmtrainError` that they raise.
    """

    status: Callable[[], pb.PeerStatus]
    healthy: Callable[[], bool]
    """Returns whether the peer really trains or serves now; called every half second."""
    leave: Callable[[], str]
    pause: Callable[[], str] | None = None
    resume: Callable[[], str] | None = None
    checkpoint: Callable[[], pb.CheckpointReply] | None = None
    limit: Callable[[pb.Limits], str] | None = None
    history: Callable[[], pb.RunHistory] | None = None
    """Returns the record of the run."""
    ask_history: Callable[[], None] = lambda: None
    """Makes the peer ask others for what it does not know of the run, for a later answer."""


def read_status(folder: Path) -> pb.PeerStatus | None:
    """Return the status that the peer of this folder left; None if there is none or it is malformed."""
    try:
        status = Parse((folder / "status.json").read_bytes(), pb.PeerStatus(), ignore_unknown_fields=True)
    except (OSError, ParseError, ValueError):
        return None
    return status if status.pid else None


class ControlServer:
    """Serves `powers` from `start` to `stop`; `tcp` is an address (HOST:PORT) to serve at as well.

    It looks at the peer every `tick_s` seconds, and updates watchers at most that often.
    """

    def __init__(self, folder: Path, powers: ControlHandlers, tcp: str = "", tick_s: float = _TICK_S) -> None:
        self._folder, self._powers, self._tcp, self._tick_s = folder, powers, tcp, tick_s
        self._private: Path | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="control", daemon=True)
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="control-work")
        self._calls: _Calls | None = None
        self._server: Any = None
        self._beat: asyncio.Task[None] | None = None
        self._saving = threading.Lock()
        self._saved: tuple[int, int, float] = (-1, -1, 0.0)
        self._history_saved_s = 0.0

    # ------------------------------------------------------------- life

    def start(self) -> None:
        """Start serving. Raises UserError if the TCP address is taken, RunTimeError if no socket can be made."""
        self._thread.start()
        try:
            self._in_loop(self._start(), _START_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Send the watchers the last status, end, and leave that status in the folder. May be called again."""
        if self._thread.is_alive():
            try:
                self._in_loop(self._stop(), _START_S)
            except Exception as error:  # whatever happens at the end, the thread ends
                _log.debug("ending the control server failed: %r", error)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_START_S)
            if not self._thread.is_alive():
                self._loop.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        for path in (self._folder / "control.address", self._folder / "control.sock"):
            with contextlib.suppress(OSError):
                path.unlink()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
        self._save(self._powers.status())

    def _in_loop(self, work: Any, limit_s: float) -> None:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result(limit_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise RunTimeError(
                f"the control server did not answer within {limit_s:g} s; start this peer again", code="no-control"
            ) from None

    async def _start(self) -> None:
        server = self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
        calls = self._calls = _Calls(self._powers, self._workers)
        pb_grpc.add_ControlServicer_to_server(calls, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(calls.health, server)
        await calls.set_health(False)
        lines = [self._bind_socket(server)]
        if self._tcp:
            lines.append(self._bind_tcp(server))
        await server.start()
        self._save(self._powers.status())
        write_atomically(self._folder / "control.address", "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
        self._beat = asyncio.create_task(self._keep_telling())

    def _bind_socket(self, server: Any) -> str:
        """Bind a socket that only this user can open: in the folder, or else in a short private one."""
        path = self._folder / "control.sock"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
            try:
                return _listen_privately(server, path)
            except (OSError, RuntimeError) as error:  # a file system without sockets
                _log.info("no socket in %s: %s", self._folder, error)
        self._private = Path(tempfile.mkdtemp(prefix="swarmtrain-"))
        try:
            return _listen_privately(server, self._private / "control.sock")
        except (OSError, RuntimeError) as error:
            raise RunTimeError(
                f"cannot create the control socket: {error}; give another folder with --dir", code="no-control"
            ) from None

    def _bind_tcp(self, server: Any) -> str:
        host = self._tcp.rpartition(":")[0]
        try:
            port = server.add_insecure_port(self._tcp)
        except RuntimeError:
            port = 0
        if not port:
            raise UserError(
                f"cannot listen at {self._tcp}: the port is taken; choose another with --control", code="port-taken"
            )
        return f"{host}:{port}"

    async def _stop(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        if self._calls is not None:
            await self._calls.end()
        if self._server is not None:
            await self._server.stop(_GRACE_S)

    # ------------------------------------------------------------- telling

    async def _keep_telling(self) -> None:
        """Update the health, the watchers and the file, twice a second."""
        assert self._calls is not None
        for tick in itertools.count():
            try:
                await self._calls.set_health(self._powers.healthy())
                is_told = self._calls.are_due(tick)
                may_be_saved = tick % _TICKS_A_SAVE == 0 or tick < _FIRST_TICKS
                status = self._powers.status() if is_told or may_be_saved else pb.PeerStatus()
                if is_told:
                    self._calls.tell(status)
                if may_be_saved and self._is_due(status):
                    await self._loop.run_in_executor(self._workers, self._save, status)
            except Exception:  # the boundary of this task: the server must go on
                _log.exception("the control server's look at the peer failed")
            await asyncio.sleep(self._tick_s)

    def _is_due(self, status: pb.PeerStatus) -> bool:
        state, round, saved_s = self._saved
        since_s = time.monotonic() - saved_s
        return (status.state, status.round) != (state, round) or since_s >= _SAVE_ANYWAY_S

    def _save(self, status: pb.PeerStatus) -> None:
        """Write `status` to the folder. A disk without room only costs the file."""
        text = MessageToJson(status, preserving_proto_field_name=True, indent=1)
        try:
            with self._saving:
                self._saved = (status.state, status.round, time.monotonic())
                write_atomically(self._folder / "status.json", text.encode(), mode=0o600)
                self._save_history(now=status.state in OVER)
        except OSError as error:
            _log.debug("status.json: %s", error)

    def _save_history(self, now: bool) -> None:
        """Write the record of the run, at most every half minute, or `now`. Raises OSError."""
        is_due = now or time.monotonic() - self._history_saved_s >= _SAVE_HISTORY_S
        if self._powers.history is None or not is_due:
            return
        history = self._powers.history()
        if history.run_sha256:
            self._history_saved_s = time.monotonic()
            write_atomically(self._folder / HISTORY_NAME, history.SerializeToString(), mode=0o600)


def _listen_privately(server: Any, path: Path) -> str:
    """Listen at `path` so that nobody else can open it at any moment."""
    with contextlib.suppress(FileNotFoundError):
        # Left by a peer that was killed: whoever holds the folder's lock is alone here.
        path.unlink()
    address = f"unix:{urllib.parse.quote(str(path))}"  # gRPC reads it as a URI: `%`, `?` and `#` mean something there
    before = os.umask(0o177)
    try:
        server.add_insecure_port(address)
    finally:
        os.umask(before)
    path.chmod(0o600)
    return address


class _Calls(pb_grpc.ControlServicer):
    """Methods of the gRPC service, which run in the server's loop."""

    def __init__(self, powers: ControlHandlers, workers: ThreadPoolExecutor) -> None:
        self.health = health_aio.HealthServicer()
        self._powers, self._workers = powers, workers
        self._latest: pb.PeerStatus | None = None
        self._told = b""
        self._version = 0
        self._news = asyncio.Event()
        self._num_watchers = 0
        self._num_refused = 0
        self._refusing = asyncio.Lock()
        self._ended = False

    # ------------------------------------------------------------- telling

    async def set_health(self, serving: bool) -> None:
        """Set what the health service answers from now on."""
        kinds = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            await self.health.set(service, kinds.SERVING if serving else kinds.NOT_SERVING)

    def are_due(self, tick: int) -> bool:
        """Return whether watchers are to be updated in this tick. The more watchers there are, the fewer updates each
        gets."""
        return self._num_watchers > 0 and tick % (1 + (self._num_watchers - 1) // _WATCHERS_A_TICK) == 0

    def tell(self, status: pb.PeerStatus) -> None:
        """Wake the watchers if anything but the time has changed."""
        made, status.time = status.time, 0.0
        told = status.SerializeToString(deterministic=True)
        status.time = made
        if told != self._told:
            self._told, self._latest = told, status
            self._wake()

    def _wake(self) -> None:
        self._version += 1
        self._news.set()
        self._news = asyncio.Event()

    async def end(self) -> None:
        """Send the watchers the last status and end their streams."""
        await self.health.enter_graceful_shutdown()
        self._ended, self._latest = True, self._powers.status()
        self._wake()

    # ------------------------------------------------------------- the service

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.PeerStatus:
        """See the proto."""
        return self._powers.status()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.PeerStatus]:
        """See the proto. A slow reader misses states; it gets no old ones."""
        if self._num_watchers >= MAX_WATCHERS:
            await self._take_time_to_refuse()
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch this peer already; end one of them"
            )
        self._num_watchers += 1
        try:
            seen = self._version
            yield self._powers.status()
            while not self._ended or seen != self._version:
                if seen == self._version:
                    await self._news.wait()
                seen = self._version
                assert self._latest is not None
                yield self._latest
        finally:
            self._num_watchers -= 1

    async def _take_time_to_refuse(self) -> None:
        """Delay a refusal. A refusal costs as much as an answer, so peers that ask again at once get theirs one after
        the other.
        """
        if self._num_refused >= _MAX_WAITING_REFUSALS:
            return
        self._num_refused += 1
        try:
            async with self._refusing:
                await asyncio.sleep(_REFUSAL_S)
        finally:
            self._num_refused -= 1

    async def Pause(self, request: pb.PauseRequest, context: Any) -> pb.ControlReply:
        """See the proto."""
        return pb.ControlReply(message=await self._use(context, self._powers.pause, "pause"))

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> pb.ControlReply:
        """See the proto."""
        return pb.ControlReply(message=await self._use(context, self._powers.resume, "resume"))

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.ControlReply:
        """See the proto."""
        return pb.ControlReply(message=await self._use(context, self._powers.leave, "leave"))

    async def Checkpoint(self, request: pb.CheckpointRequest, context: Any) -> pb.CheckpointReply:
        """See the proto."""
        return await self._use(context, self._powers.checkpoint, "write a checkpoint")

    async def Limit(self, request: pb.Limits, context: Any) -> pb.ControlReply:
        """See the proto."""
        limit = self._powers.limit
        work = None if limit is None else lambda: limit(request)
        return pb.ControlReply(message=await self._use(context, work, "change its limits"))

    async def History(self, request: pb.RunHistoryRequest, context: Any) -> pb.RunHistory:
        """See the proto."""
        self._powers.ask_history()
        return await self._use(context, self._powers.history, "tell the run's history")

    async def _use(self, context: Any, power: Callable[[], _T] | None, what: str) -> _T:
        """Run the handler `power` on the pool and return its answer; abort the call with a sentence if the handler
        fails or is missing."""
        told: tuple[tuple[str, str], ...] = ()
        if power is None:
            status, message = grpc.StatusCode.UNIMPLEMENTED, f"this peer cannot {what}"
        else:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._workers, power)
            except SwarmtrainError as error:
                status, message, told = grpc.StatusCode.FAILED_PRECONDITION, str(error), ((CODE_KEY, error.code),)
            except OSError as error:
                status, message = grpc.StatusCode.INTERNAL, f"this peer could not {what}: {error.strerror or error}"
        await context.abort(status, message, told)
        raise AssertionError("abort raises")
