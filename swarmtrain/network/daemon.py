"""Run hivemind's libp2p daemon so that it lives and dies with this process, and import hivemind lightly.

Workarounds, all measured (see docs/decisions):
- `import hivemind` loads averagers, experts and optimizers: 47 MB and 0.3 to 0.7 s. Here its package is entered
  without running its `__init__`.
- The daemon would outlive some crashes, and die of Ctrl-C before our goodbye. A shim starts it in its own session
  with PR_SET_PDEATHSIG: it ends when the thread that spawned it ends, and that is the network thread.
- hivemind reads messages of any announced size into memory. Frames are limited here.
- Its clock is `time.time`, which jumps when the machine's clock is set. Ours does not, and can be corrected by the
  median of other peers' clocks (`set_clock_offset`).
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

from swarmtrain.environment import DAEMON, minimal_environment

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""Largest message from another peer; the daemon's own limit for small calls is the same."""

_MAX_FOLDER_CHARACTERS = 72
"""Longest path of a folder for sockets: a socket's may have 107 characters on Linux and 103 on macOS, of which
hivemind's names take 30."""

_NOWHERE = logging.NullHandler()
_libp2p = logging.getLogger("libp2p")
_GO_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_UNUSED = ("dht", "dht/RtRefreshManager")  # libp2p's own DHT, which nobody uses here, and which complains about that
_GREETING = ("Peer ID:", "Peer Addrs:", "Control socket:", "/")
_MAX_LINE_CHARACTERS = 1000

_begun: dict[Any, tuple[asyncio.AbstractEventLoop, Path]] = {}
"""hivemind's P2Ps that have not been stopped, with their event loops and the folders of their sockets."""

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Clock that runs while the machine sleeps, on Linux and macOS, and is never set."""

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
    """Return a command line that runs `args`, and sends it `signal_number` when the thread that spawned it ends.

    Linux only. Elsewhere returns the arguments unchanged, and the child ends when its socket closes.
    """
    if not sys.platform.startswith("linux"):
        return args
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), str(signal_number), *args]


def own_time() -> float:
    """Return Unix seconds by this machine's clock as it was when this process began.

    Setting that clock later changes nothing: otherwise others would refuse presences from another hour, and the peer
    would be alone.
    """
    return _clock_base_s + time.clock_gettime(_STEADY)


def swarm_time() -> float:
    """Return `own_time` corrected by the offset to the other peers' clocks."""
    return own_time() + _clock_offset_s


def set_clock_offset(offset_s: float) -> None:
    """Correct this process's swarm time, and hivemind's, by `offset_s`. The machine's clock stays as it is."""
    global _clock_offset_s
    _clock_offset_s = offset_s


@functools.cache
def hivemind_module(name: str) -> Any:
    """Import `hivemind.<name>` without the parts of hivemind that are not used here."""
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
        logs.use_hivemind_log_handler("nowhere")  # to the root logger, like all others
        logging.getLogger("hivemind").addHandler(_NOWHERE)  # without a handler Python prints warnings
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a stream whose reader has hung up is no news
    for name, module in list(sys.modules.items()):
        if name.startswith("hivemind.") and "get_dht_time" in vars(module):
            vars(module)["get_dht_time"] = swarm_time
    daemon = sys.modules.get("hivemind.p2p.p2p_daemon")
    if daemon is not None:
        daemon.P2P.receive_raw_data = staticmethod(_receive_limited)


async def _receive_limited(reader: asyncio.StreamReader) -> bytes:
    """Read hivemind's frame (8 bytes of length, then the data) with a limit on the length."""
    size = int.from_bytes(await reader.readexactly(8), "big")
    if size > MAX_FRAME_BYTES:
        raise ConnectionError(f"a message of {size} bytes, more than the {MAX_FRAME_BYTES} allowed")
    return await reader.readexactly(size)


async def start_daemon(directory: Path, key_path: Path, **settings: Any) -> tuple[Any, Path]:
    """Start the daemon from the network thread. Returns hivemind's P2P and the folder of its sockets."""
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
            # TLS: processors accelerate AES, but not Noise's cipher, which cost a fifth more in the daemons (decision
            # 23).
            given = [*p2p_class._make_process_args(*args, **kwargs), "-noise=0"]
            return owned_process_args([*_without_secrets(), *given])

        @staticmethod
        def _log_p2pd_message(line: str) -> None:
            _log_daemon_line(line)

    try:
        p2p = await OwnedP2P.create(identity_path=str(key_path), check_if_identity_free=False, **settings)
    except BaseException:
        for p2p in made:  # hivemind leaves its process and pipes open; they would be closed after the loop's end
            await stop_daemon(p2p, sockets)
        shutil.rmtree(sockets, ignore_errors=True)
        raise
    _mend_control(p2p._client.control)
    _note_connections(p2p._client.control.daemon_connector)
    return p2p, sockets


def _without_secrets() -> list[str]:
    """Return the beginning of a command in a minimal environment, since hivemind gives the daemon this process's."""
    others = os.environ.keys() - minimal_environment(DAEMON)
    return [shutil.which("env") or "/usr/bin/env", *(f"-u{name}" for name in others)]


def _log_daemon_line(line: str) -> None:
    """Log a line of the daemon: JSON of its loggers, its greeting, or (after a crash) anything at all."""
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
    """Return an empty folder that only this user can enter, in `directory` if its path is short enough for a socket's.

    Otherwise it lies among the temporary files, under a name that follows from `directory`, so that leftovers of a
    killed process are found and removed. If another user has taken that name, a fresh one is chosen.
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
    """hivemind's calls that wait for a reply, without cancelled ones.

    If a call is cancelled just as its reply arrives, hivemind's reader sets a result twice. The reader then ends, and
    every later call of this process hangs. It tests `in` before it sets a result, so this class fixes it there.
    """

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


class _HandlerTasks(dict[Any, Any]):
    """hivemind's running handler tasks, by call. A task is removed when it ends, because hivemind does not remove
    cancelled ones."""

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
    """Close the connections to the daemon that the block opened, if it fails: hivemind leaves them open."""
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
    """End the daemon and remove its sockets, even if this is cancelled, as it is when the daemon hangs."""
    _begun.pop(p2p, None)
    try:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(p2p.shutdown(), 2)
    finally:
        if p2p._child is not None:
            # Kills it if it lives, and closes its pipes. The garbage collector would close them after the loop's end,
            # which Python reports as an error.
            p2p._child._transport.close()
        shutil.rmtree(sockets, ignore_errors=True)
    if p2p._child is not None:
        await p2p._child.wait()


async def stop_left_daemons() -> None:
    """End every daemon of this loop, which is about to end: a start may have been cancelled just before its node
    existed."""
    loop = asyncio.get_running_loop()
    for p2p, (begun_in, sockets) in list(_begun.items()):
        if begun_in is loop:
            await stop_daemon(p2p, sockets)
