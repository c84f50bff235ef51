"""Page of one peer: shows what `watch` shows, and carries out its user's orders.

It is a client of the peer's control service like any other. It follows the peer only while somebody has the page open:
a page that nobody looks at costs the peer nothing, and one that many look at costs what one watcher does. `watch --web`
runs it in its own process, `--web` of a peer in a child process of low priority, which ends with the peer.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from swarmtrain.cli.follow import Patience, Signal, follow
from swarmtrain.cli.page import MachineUse, page_of
from swarmtrain.cli.page_address import PageAddress
from swarmtrain.cli.peers import LocalPeer, NoAnswerError, PeerPhase, View, look, run_history, tell
from swarmtrain.errors import SwarmtrainError, UserError
from swarmtrain.protocol.limits import parse_hours, parse_size, parse_temperature
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.web.server import PageServer

_EVERY_S = 1.0
_LOOK_AGAIN_S = 1.0
"""Seconds between two looks whether a peer that has ended is back."""
_REFUSED_AGAIN_S = 5.0
_NOBODY_S = 30.0
"""Seconds for which the peer is still followed when nobody looks any more: a page that is loaded again comes back."""
_NICE = 10
_USE_EVERY_S = 2.0
_HISTORY_EVERY_S, _HISTORY_AGAIN_S = 15.0, 3.0


class _NobodyLooksError(Exception):
    """Leaves `follow`: the page is not open anywhere."""


class PageService:
    """Serves the page of `peer` on a socket that listens already. `key` is that of the peer's own user."""

    def __init__(self, peer: LocalPeer, sock: socket.socket, address: PageAddress, key: str) -> None:
        self._peer = peer
        self.news: SimpleQueue[Any] = SimpleQueue()
        """Input: `Signal.DETACH` ends `run`."""
        self._num_readers = 0
        self._read_s = time.monotonic()
        self._shown_s, self._shown = -_EVERY_S, (PeerPhase.STARTING, "")
        self._use = _UseMeter(peer)
        self._history = _HistoryReader(peer)
        names = {address.host.lower(), socket.gethostname(), f"{socket.gethostname()}.local"}
        self._server = PageServer(
            sock, lambda name, given: carry_out(peer, name, given), key, names=names, on_readers=self._readers_are
        )
        self.admit = self._server.admit

    def _readers_are(self, number: int) -> None:
        self._num_readers, self._read_s = number, time.monotonic()
        self.news.put(Signal.REDRAW)

    def run(self) -> None:
        """Serve until `Signal.DETACH` arrives; then show how the peer is a last time."""
        self._server.start()
        try:
            while self._serve_once():
                pass
            with contextlib.suppress(SwarmtrainError):
                self._publish(look(self._peer))
        finally:
            self._server.stop()

    def _serve_once(self) -> bool:
        """Show the peer until nobody looks or it is over; return False to end."""
        if not self._num_readers:
            return self._wait(None)
        try:
            view = look(self._peer)
        except NoAnswerError:
            view = View(status=wire.PeerStatus(), phase=PeerPhase.LOST, now=time.time())
        self._publish(view)
        if view.phase.over:
            return self._wait(_LOOK_AGAIN_S)
        try:
            last = follow(self._peer, view, self._show, self.news, Patience())
        except _NobodyLooksError:
            return True
        except SwarmtrainError:  # it refuses to be watched: too many watch it already
            return self._wait(_REFUSED_AGAIN_S)
        if last is not None:
            self._publish(last)
        return last is not None

    def _wait(self, limit_s: float | None) -> bool:
        """Wait for news, or for `limit_s`; return False if the service must end."""
        with contextlib.suppress(Empty):
            return self.news.get(timeout=limit_s) is not Signal.DETACH
        return True

    def _show(self, view: View) -> None:
        if not self._num_readers and time.monotonic() - self._read_s > _NOBODY_S:
            raise _NobodyLooksError
        if time.monotonic() - self._shown_s >= _EVERY_S or (view.phase, view.note) != self._shown:
            self._publish(view)

    def _publish(self, view: View) -> None:
        self._shown_s, self._shown = time.monotonic(), (view.phase, view.note)
        self._server.publish(*page_of(view, self._use.of(view), self._history.of(view)))


def serve_until_parent_ends(folder: Path, descriptor: int, key: str) -> None:
    """Serve the page of the peer that has started this process, on the socket that it gave, until it is gone."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    sock = socket.socket(fileno=descriptor)
    host, port = sock.getsockname()[:2]
    shown_host = f"[{host}]" if sock.family == socket.AF_INET6 else host
    service = PageService(LocalPeer(folder=folder), sock, PageAddress(host=shown_host, port=port), key)

    def wait_for_the_end() -> None:
        for line in sys.stdin.buffer:  # ends with the process that holds its other end
            service.admit(line.decode().strip())
        service.news.put(Signal.DETACH)

    threading.Thread(target=wait_for_the_end, name="parent", daemon=True).start()
    service.run()


def open_in_browser(url: str) -> None:
    """Open a page where this machine's person sees it; nothing without a screen, or over SSH."""
    import webbrowser

    has_screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if has_screen and "SSH_CONNECTION" not in os.environ:
        with contextlib.suppress(webbrowser.Error, OSError):
            webbrowser.open(url)


# ---------------------------------------------------------------- orders


def carry_out(peer: LocalPeer, name: str, given: Mapping[str, Any]) -> str:
    """Carry out an order of the page; return what the peer says. Raises KeyError for an unknown order."""
    requests: dict[str, tuple[str, Any]] = {
        "pause": ("Pause", wire.PauseRequest),
        "resume": ("Resume", wire.ResumeRequest),
        "leave": ("Leave", wire.LeaveRequest),
    }
    if name == "limits":
        return tell(peer, "Limit", _limits_of(given))
    method, request = requests[name]
    return tell(peer, method, request())


def _limits_of(given: Mapping[str, Any]) -> wire.Limits:
    """Return the limits of a form. Raises UserError, which says what is allowed."""
    limits = wire.Limits()
    readers: dict[str, Any] = {
        "threads": ("threads", _whole),
        "memory": ("memory_bytes", parse_size),
        "nice": ("nice", _whole),
        "hours": ("hours", lambda text: parse_hours(text).text),
        "up": ("up_mbit", _mbit),
        "down": ("down_mbit", _mbit),
        "only_when_idle": ("only_when_idle", lambda text: text == "true"),
        "gpu_share": ("gpu_share", _whole),
        "max_temperature": ("max_temperature", parse_temperature),
    }
    for key, value in given.items():
        if key not in readers:
            raise UserError(f"{key!r} is no limit; there are {', '.join(readers)}", code="bad-limit")
        name, read = readers[key]
        try:
            setattr(limits, name, read(str(value)))
        except ValueError as error:
            raise UserError(str(error), code="bad-limit") from None
    return limits


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 9:
        raise ValueError(f"{text!r} is not a whole number; write one, such as 2")
    return int(text)


def _mbit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100_000:  # false for NaN too
        raise ValueError(f"{text!r} is not a limit in Mbit/s; write a number, such as 10, or 0 for no limit")
    return value


# ---------------------------------------------------------------- the run's history


class _HistoryReader:
    """Asks a peer for the record of its run now and then, beside the following of its status."""

    def __init__(self, peer: LocalPeer) -> None:
        self._peer = peer
        self._last: Any = None
        self._next_s = -math.inf
        self._asking: threading.Thread | None = None

    def of(self, view: View) -> Any:
        """Return the newest record; None while there is none. It is asked for sooner after the first time, since a peer
        may have to ask others."""
        is_asking = self._asking is not None and self._asking.is_alive()
        if time.monotonic() >= self._next_s and not is_asking:
            self._next_s = time.monotonic() + (_HISTORY_EVERY_S if self._last is not None else _HISTORY_AGAIN_S)
            self._asking = threading.Thread(target=self._ask, args=(view,), name="history", daemon=True)
            self._asking.start()
        return self._last

    def _ask(self, view: View) -> None:
        self._last = run_history(self._peer, view) or self._last


# ---------------------------------------------------------------- the machine


class _UseMeter:
    """Measures what a peer of this machine and its daemon use."""

    def __init__(self, peer: LocalPeer) -> None:
        self._peer = peer
        self._before: tuple[int, float, float] | None = None
        """Process, time, and processor seconds at the last measurement."""
        self._last: MachineUse | None = None

    def of(self, view: View) -> MachineUse | None:
        """Return the use since the last measurement, 2 s ago or more; None without one, or for another machine."""
        import psutil

        now_s, pid = time.monotonic(), int(view.status.pid)
        if self._peer.folder is None or view.phase is not PeerPhase.RUNNING or not pid:
            self._before = self._last = None
            return None
        if self._before is not None and self._before[0] == pid and now_s - self._before[1] < _USE_EVERY_S:
            return self._last
        try:
            process = psutil.Process(pid)
            used_s, memory_bytes = 0.0, 0
            for each in (process, *process.children(recursive=True)):
                times = each.cpu_times()
                if each.pid == os.getpid():  # this page's own
                    continue
                used_s += times.user + times.system
                memory_bytes += each.memory_info().rss
        except psutil.Error:
            return None
        before, self._before = self._before, (pid, now_s, used_s)
        if before is not None and before[0] == pid:
            share = max(0.0, used_s - before[2]) / (now_s - before[1])
            self._last = MachineUse(processor_share=share, memory_bytes=memory_bytes)
        return self._last
