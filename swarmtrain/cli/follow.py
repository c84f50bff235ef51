"""Following a peer: show its statuses as they come, and find out what happened when they stop.

A peer that ends is followed to its last status. A peer that dies is waited for a while, since somebody may start it
again. A hanging peer is told apart from one without news by asking it. Nothing here disturbs the peer.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from swarmtrain.cli.peers import (
    LocalPeer,
    NoAnswerError,
    PeerPhase,
    RefusedError,
    View,
    ask,
    channel,
    in_words,
    look_without_asking,
)
from swarmtrain.errors import SwarmtrainError
from swarmtrain.peer.lifecycle.folder_lock import Holder, holder
from swarmtrain.v1 import control_pb2 as wire


class Signal(enum.Enum):
    """Input other than a status."""

    DETACH = "detach"
    REDRAW = "redraw"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Waiting times."""

    tick_s: float = 0.5  # longest time between two drawings: ages and the time left change
    come_back_s: float = 30.0  # for a peer that is gone
    probe_s: float = 10.0  # without news, before the peer is asked whether it is alive


@dataclass(frozen=True)
class _Broken:
    stream: _Stream
    error: SwarmtrainError | None


@dataclass(frozen=True)
class _Probed:
    stream: _Stream
    status: Any  # None: no answer
    nobody_answers: bool = False  # and takes no calls


News = SimpleQueue[Any]


def follow(peer: LocalPeer, first: View, show: Callable[[View], None], news: News, patience: Patience) -> View | None:
    """Show a view whenever something changes, until the peer is over; return the last view, or None on `DETACH`.

    Raises RefusedError if the peer refuses to be watched, for example because too many watch it already. `news` takes a
    `Signal` from the keyboard or from a signal handler.
    """
    following = _Following(peer, first, news, patience)
    try:
        while True:
            show(following.view())
            try:
                item = news.get(timeout=patience.tick_s)
            except Empty:
                item = None
            if item is Signal.DETACH:
                return None
            if following.take(item):
                return following.view()
    finally:
        following.close()


class _Following:
    def __init__(self, peer: LocalPeer, first: View, news: News, patience: Patience) -> None:
        self._peer, self._news, self._patience = peer, news, patience
        self._view = first
        self._heard_s = time.monotonic()
        self._gone_s: float | None = None
        self._probing = False
        self._stream: _Stream | None = _Stream(peer, news)

    def view(self) -> View:
        """Return what is known now."""
        return dataclasses.replace(self._view, now=time.time())

    def close(self) -> None:
        """Stop following."""
        self._hang_up()

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _is_held(self) -> bool | None:
        """Return whether a process holds the peer's folder; None without a folder."""
        folder = self._peer.folder
        return None if folder is None else holder(folder) is not Holder.NOBODY

    def _may_be_there(self, probed: _Probed) -> bool:
        held = self._is_held()
        return not probed.nobody_answers if held is None else held

    def take(self, item: Any) -> bool:
        """Take what has arrived (None: nothing); returns whether the peer is over."""
        match item:
            case wire.PeerStatus():
                self._receive(item)
            case _Probed() if item.stream is self._stream:
                self._probing = False
                if item.status is not None:
                    self._receive(item.status)
                elif not self._may_be_there(item):  # a call made at the moment of its death may stay open
                    self._hang_up()
                else:
                    self._be(self._phase_of_one_that_is_there(timed_out=not item.nobody_answers))
            case _Broken() if item.stream is self._stream:
                self._hang_up()
                if isinstance(item.error, RefusedError):
                    raise item.error
            case _:
                pass
        if self._stream is None:
            return self._reach()
        if time.monotonic() - self._heard_s > self._patience.probe_s and not self._probing:
            self._probing, self._heard_s = True, time.monotonic()
            self._stream.probe()
        return False

    def _receive(self, status: Any) -> None:
        self._heard_s, self._gone_s = time.monotonic(), None
        self._view = View(status=status, phase=PeerPhase.RUNNING, folder=self._peer.folder)

    def _be(self, phase: PeerPhase, note: str = "") -> None:
        self._view = dataclasses.replace(self._view, phase=phase, note=note)

    def _reach(self) -> bool:
        """Find out what happened to a peer without a stream, and call it again if it may answer."""
        if self._is_held() and not (there := self._phase_of_one_that_is_there()).over:
            self._gone_s = None
            self._be(there)
        else:
            phase = self._after_its_end()
            now = time.monotonic()
            self._gone_s = now if self._gone_s is None else self._gone_s
            left_s = self._patience.come_back_s - (now - self._gone_s)
            if phase in (PeerPhase.ENDED, PeerPhase.FAILED) or left_s <= 0:
                self._be(phase)
                return True
            self._be(phase, f"waiting for it to come back, {left_s:.0f} s at most")
            if self._peer.folder is not None:
                return False
        self._stream, self._probing, self._heard_s = _Stream(self._peer, self._news), False, time.monotonic()
        return False

    def _phase_of_one_that_is_there(self, *, timed_out: bool = False) -> PeerPhase:
        """Decide whether a peer that does not answer starts, ends or hangs."""
        if self._peer.folder is None:
            return PeerPhase.SILENT
        problem = NoAnswerError("", timed_out=timed_out)  # no text: no person reads it
        return look_without_asking(self._peer, problem=problem, heard=self._view.status).phase

    def _after_its_end(self) -> PeerPhase:
        """Decide how the peer ended, by its last status: the one in its folder, or the last that arrived."""
        heard = self._view.status
        if self._peer.folder is not None:
            left = look_without_asking(self._peer)
            if left.status.time >= heard.time:
                self._view = dataclasses.replace(self._view, status=left.status)
                return left.phase
        ends = {wire.PEER_STATE_DONE: PeerPhase.ENDED, wire.PEER_STATE_FAILED: PeerPhase.FAILED}
        return ends.get(heard.state, PeerPhase.DIED if self._peer.folder is not None else PeerPhase.LOST)


class _Stream:
    """Call of `Watch` in a thread of its own, which puts statuses into `news`, and a `_Broken` at the end."""

    def __init__(self, peer: LocalPeer, news: News) -> None:
        self._peer, self._news = peer, news
        self._call: Any = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the call; what still arrives from it is ignored."""
        with self._lock:
            self._closed = True
            if self._call is not None:
                self._call.cancel()
        self._thread.join(1.0)

    def probe(self) -> None:
        """Ask whether the peer is alive; a `_Probed` arrives in `news`."""
        threading.Thread(target=self._probe, name="probe", daemon=True).start()

    def _probe(self) -> None:
        try:
            found = _Probed(self, ask(self._peer, "Status", wire.StatusRequest()))
        except NoAnswerError as error:
            found = _Probed(self, None, nobody_answers=not error.timed_out)
        except SwarmtrainError:
            found = _Probed(self, None)
        self._news.put(found)

    def _read(self) -> None:
        error: SwarmtrainError | None = None
        try:
            self._news.put(ask(self._peer, "Status", wire.StatusRequest()))  # with a time limit, unlike the stream
            self._watch()
        except SwarmtrainError as problem:
            error = problem
        self._news.put(_Broken(self, error))

    def _watch(self) -> None:
        with channel(self._peer) as stub:
            import grpc

            with self._lock:
                if self._closed:
                    return
                self._call = stub.Watch(wire.WatchRequest())
            try:
                for status in self._call:
                    self._news.put(status)
            except grpc.RpcError as problem:
                raise in_words(problem, self._peer) from None
