"""hivemind's libp2p daemon, made to live and die with this process; and hivemind itself, imported lightly.

What is gone round here, and why (measured; see docs/decisions):
- `import hivemind` pulls in averagers, experts and optimizers: 47 MB and 0.3 to 0.7 s. Its package is entered
  without running its `__init__`.
- The daemon would outlive a crash in some cases and die of Ctrl-C before our goodbye. A shim starts it in its own
  session with PR_SET_PDEATHSIG: it ends when the thread that spawned it ends, and that is the network thread.
- hivemind reads messages of any announced size into memory. Frames are limited here.
- Its clock is `time.time`, which jumps when the machine's is set. Ours does not, and can be corrected by the median of
  the others' (`set_clock_offset`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

__all__ = [
    "MAX_FRAME_BYTES",
    "hivemind_module",
    "own_time",
    "owned_process_args",
    "set_clock_offset",
    "start_daemon",
    "stop_daemon",
    "stop_left_daemons",
    "swarm_time",
]

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""No message from another peer may be larger; the daemon's own limit for small calls is the same."""

_MAX_FOLDER_CHARACTERS = 72
"""A socket's path may have 107 on Linux and 103 on macOS; hivemind's names take 30."""

_NOWHERE = logging.NullHandler()
_libp2p = logging.getLogger("libp2p")
_GO_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_UNUSED = ("dht", "dht/RtRefreshManager")  # its own DHT, which nobody uses here, and which complains of that
_GREETING = ("Peer ID:", "Peer Addrs:", "Control socket:", "/")
_MAX_LINE_CHARACTERS = 1000

_begun: dict[Any, tuple[asyncio.AbstractEventLoop, Path]] = {}
"""hivemind's P2Ps that have not been stopped, with the loop they belong to and the folder of their sockets."""

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the machine sleeps, on Linux and on macOS, and is never set."""

_clock_base_s = time.time() - time.clock_gettime(_STEADY)
_clock_offset_s = 0.0

# Runs in the child: own session (Ctrl-C in a terminal does not reach it), die with the parent, then become the daemon.
_SHIM = (
    "import ctypes,os,sys;"
    "os.setsid();"
    "ctypes.CDLL(None).prctl(1,int(sys.argv[2]),0,0,0);"
    "os.getppid()==int(sys.argv[1]) or os._exit(1);"
    "os.execv(sys.argv[3],sys.argv[3:])"
)


def owned_process_args(args: list[str], *, signal_number: int = 9) -> list[str]:
    """A command line that starts `args` so that it gets `signal_number` when the thread that spawned it ends.

    Linux only; elsewhere the arguments are returned as they are and the child ends when its socket closes.
    """
    if not sys.platform.startswith("linux"):
        return args
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), str(signal_number), *args]


def own_time() -> float:
    """Unix seconds by this machine's clock as it was when this process began.

    Setting that clock later changes nothing: presences from another hour would be refused, and the peer be alone.
    """
    return _clock_base_s + time.clock_gettime(_STEADY)


def swarm_time() -> float:
    """`own_time`, corrected by the offset to the other peers' clocks."""
    return own_time() + _clock_offset_s


def set_clock_offset(offset_s: float) -> None:
    """Correct this process's swarm time (and hivemind's) by `offset_s`; the machine's clock stays as it is."""
    global _clock_offset_s
    _clock_offset_s = offset_s


@functools.cache
def hivemind_module(name: str) -> Any:
    """`hivemind.<name>`, without the parts of hivemind that are not used here."""
    if "hivemind" not in sys.modules:
        spec = importlib.util.find_spec("hivemind")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("hivemind is not installed")
        package = types.ModuleType("hivemind")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["hivemind"] = package
    module = importlib.import_module(f"hivemind.{name}")
    _quieten_and_limit()
    return module


def _quieten_and_limit() -> None:
    logs = sys.modules.get("hivemind.utils.logging")
    if logs is not None:
        logs.use_hivemind_log_handler("nowhere")  # to the root logger, as everyone else's
        logging.getLogger("hivemind").addHandler(_NOWHERE)  # without one, Python prints warnings
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a stream whose reader has hung up is no news
    for name, module in list(sys.modules.items()):
        if name.startswith("hivemind.") and "get_dht_time" in vars(module):
            vars(module)["get_dht_time"] = swarm_time
    daemon = sys.modules.get("hivemind.p2p.p2p_daemon")
    if daemon is not None:
        daemon.P2P.receive_raw_data = staticmethod(_receive_limited)


async def _receive_limited(reader: asyncio.StreamReader) -> bytes:
    """hivemind's frame (8 bytes of length, then the data) with a limit on the length."""
    size = int.from_bytes(await reader.readexactly(8), "big")
    if size > MAX_FRAME_BYTES:
        raise ConnectionError(f"a message of {size} bytes, more than the {MAX_FRAME_BYTES} allowed")
    return await reader.readexactly(size)


async def start_daemon(directory: Path, key_path: Path, **settings: Any) -> tuple[Any, Path]:
    """Start the daemon from the network thread; returns hivemind's P2P and the folder of its sockets."""
    p2p_class = hivemind_module("p2p.p2p_daemon").P2P
    sockets = _sockets_folder(directory)
    made: list[Any] = []

    class OwnedP2P(p2p_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            _begun[self] = (asyncio.get_running_loop(), sockets)

        _UNIX_SOCKET_PREFIX = f"/unix{sockets}/"
        DHT_MODE_MAPPING = {**p2p_class.DHT_MODE_MAPPING, "off": {}}  # noqa: RUF012 - as hivemind has it

        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            # By TLS: AES is in the processors, what Noise has is not, and cost a fifth more in the daemons.
            return owned_process_args([*p2p_class._make_process_args(*args, **kwargs), "-noise=0"])

        @staticmethod
        def _log_p2pd_message(line: str) -> None:
            _log_daemon_line(line)

    try:
        p2p = await OwnedP2P.create(identity_path=str(key_path), check_if_identity_free=False, **settings)
    except BaseException:
        for p2p in made:  # hivemind leaves its process and pipes, which would be let go of after the loop's end
            await stop_daemon(p2p, sockets)
        shutil.rmtree(sockets, ignore_errors=True)
        raise
    _mend_control(p2p._client.control)
    _note_connections(p2p._client.control.daemon_connector)
    return p2p, sockets


def _log_daemon_line(line: str) -> None:
    """What the daemon says: JSON of its loggers, its greeting, or (a crash) anything at all."""
    try:
        said = json.loads(line)
        level = _GO_LEVELS.get(str(said["level"]), logging.ERROR)
        logger = str(said.get("logger", "daemon"))
        words = [f"{logger}: {said.get('msg', '')}", str(said.get("error", ""))]
        if logger in _UNUSED and level <= logging.WARNING:
            level = logging.DEBUG
    except (ValueError, TypeError, KeyError, AttributeError):
        level = logging.DEBUG if line.startswith(_GREETING) else logging.WARNING
        words = [line]
    _libp2p.log(level, "%s", ": ".join(word for word in words if word)[:_MAX_LINE_CHARACTERS])


def _sockets_folder(directory: Path) -> Path:
    """An empty folder that only we can enter, in `directory` if its path is short enough for a socket's.

    Otherwise one among the temporary files whose name follows from `directory`, so that what a killed predecessor
    left is found and removed. If somebody else took that name, a fresh one.
    """
    sockets = directory / "sockets"
    if len(str(sockets)) > _MAX_FOLDER_CHARACTERS:
        name = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]
        temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"
        sockets = Path(temporary) / f"swarmtrain-{os.getuid()}-{name}"
    shutil.rmtree(sockets, ignore_errors=True)
    try:
        sockets.mkdir(mode=0o700, parents=True)  # fails if anything is there, a link too
    except FileExistsError:
        return Path(tempfile.mkdtemp(prefix="swarmtrain-", dir=sockets.parent))
    return sockets


class _PendingCalls(dict[Any, Any]):
    """hivemind's calls that wait for an answer, without those that were cancelled.

    A call that is cancelled just when its answer arrives makes hivemind's reader set a result twice: the reader ends,
    and every call of this process hangs from then on. It asks `in` before it sets, so here is where that is mended.
    """

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


class _HandlerTasks(dict[Any, Any]):
    """hivemind's running handlers; it forgets to drop those that were cancelled."""

    def __setitem__(self, call: Any, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call, task)
        task.add_done_callback(lambda ended: self.pop(call, None))


def _mend_control(control: Any) -> None:
    control._pending_calls = _PendingCalls(control._pending_calls)
    control._handler_tasks = _HandlerTasks(control._handler_tasks)


_connections: ContextVar[list[asyncio.StreamWriter] | None] = ContextVar("connections", default=None)


def _note_connections(connector: Any) -> None:
    plain = connector.open_connection

    async def open_connection() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await plain()
        opened = _connections.get()
        if opened is not None:
            opened.append(writer)
        return reader, writer

    connector.open_connection = open_connection


@contextlib.contextmanager
def closed_on_failure() -> Iterator[None]:
    """If what is inside fails, the connections to the daemon that it opened are closed: hivemind leaves them open."""
    opened: list[asyncio.StreamWriter] = []
    token = _connections.set(opened)
    try:
        yield
    except BaseException:
        for writer in opened:
            writer.close()
        raise
    finally:
        _connections.reset(token)


async def stop_daemon(p2p: Any, sockets: Path) -> None:
    """End the daemon and remove its sockets; also when this is cancelled, as it is when the daemon hangs."""
    _begun.pop(p2p, None)
    try:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(p2p.shutdown(), 2)
    finally:
        if p2p._child is not None:
            # Kills it if it lives, and lets go of its pipes: left to the garbage collector, they would be let go of
            # after the loop's end, which Python complains of.
            p2p._child._transport.close()
        shutil.rmtree(sockets, ignore_errors=True)
    if p2p._child is not None:
        await p2p._child.wait()


async def stop_left_daemons() -> None:
    """End every daemon of this loop, which is about to end: the start of one may have been cancelled just before
    somebody had its node."""
    loop = asyncio.get_running_loop()
    for p2p, (begun_in, sockets) in list(_begun.items()):
        if begun_in is loop:
            await stop_daemon(p2p, sockets)
