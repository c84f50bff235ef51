"""`swarmtrain watch` of a peer that answers, hangs, ends, dies and comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from codes import raises_code
from fake_peer import FakePeer, living

from swarmtrain.cli import peers
from swarmtrain.cli.follow import Patience, Signal, _Stream, follow
from swarmtrain.cli.peers import LocalPeer, PeerPhase, RefusedError, View, look
from swarmtrain.v1 import control_pb2 as wire

pytestmark = pytest.mark.slow  # they wait by the real clock, as who watches does

QUICK = Patience(tick_s=0.02, come_back_s=0.5, probe_s=0.2)
LASTING = Patience(tick_s=0.02, come_back_s=60.0, probe_s=60.0)
PROBING = replace(LASTING, probe_s=0.5)
"""Patience with early probes: a call made at the moment of a peer's death may stay open, and only silence tells."""


class Following:
    """`follow` in a thread; what it shows is waited for."""

    def __init__(self, peer: LocalPeer, patience: Patience) -> None:
        self.seen: list[View] = []
        self.news: SimpleQueue[Any] = SimpleQueue()
        self.last: View | None = None
        self._more = threading.Condition()
        self._peer, self._patience, self._first = peer, patience, look(peer)
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Following:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.news.put(Signal.DETACH)
        self.thread.join(30)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        self.last = follow(self._peer, self._first, self._show, self.news, self._patience)

    def _show(self, view: View) -> None:
        with self._more:
            self.seen.append(view)
            self._more.notify_all()

    def wait(self, condition: Callable[[View], object]) -> View:
        with self._more:
            found = self._more.wait_for(lambda: self.seen and condition(self.seen[-1]), 30)
            assert found, self.seen[-3:]
            return self.seen[-1]

    def end(self) -> View:
        self.thread.join(30)
        assert self.last is not None
        return self.last


def test_every_status_is_shown_until_one_detaches(peer: FakePeer) -> None:
    with Following(LocalPeer(folder=peer.folder), LASTING) as watch:
        watch.wait(lambda view: view.status.round == 12)
        for round in (13, 14, 15):
            peer.tell(round=round)
            assert watch.wait(lambda view, round=round: view.status.round == round).phase is PeerPhase.RUNNING
    assert watch.last is None
    assert not peer.asked, "watching asks nothing of the peer"


@pytest.mark.parametrize(
    ("state", "reason", "code", "phase"),
    [
        (wire.PEER_STATE_DONE, "total_tokens", 0, PeerPhase.ENDED),
        (wire.PEER_STATE_FAILED, "nobody answers", 1, PeerPhase.FAILED),
    ],
)
def test_an_end_is_the_last_view(peer: FakePeer, state: int, reason: str, code: int, phase: PeerPhase) -> None:
    with Following(LocalPeer(folder=peer.folder), PROBING) as watch:
        watch.wait(lambda view: view.status.round)
        peer.end(state, reason, code)
        last = watch.end()
    assert (last.phase, last.status.end_reason, last.status.exit_code) == (phase, reason, code)


def test_a_death_is_told_at_once_and_waited_over_for_a_while(peer: FakePeer) -> None:
    with Following(LocalPeer(folder=peer.folder), QUICK) as watch:
        watch.wait(lambda view: view.status.round)
        peer.tell(round=20)
        watch.wait(lambda view: view.status.round == 20)
        peer.die()
        watch.wait(lambda view: view.phase is PeerPhase.DIED)
        waiting = next(view for view in watch.seen if view.phase is PeerPhase.DIED)  # by now it may be over
        assert waiting.note.startswith("waiting for it to come back, ")
        last = watch.end()
    assert (last.phase, last.status.round, last.note) == (PeerPhase.DIED, 20, "")


def test_one_that_comes_back_is_shown_again(peer: FakePeer) -> None:
    with Following(LocalPeer(folder=peer.folder), PROBING) as watch:
        for phase in range(3):
            watch.wait(lambda view, phase=phase: view.phase is PeerPhase.RUNNING and view.status.round == 12 + phase)
            peer.die()
            watch.wait(lambda view: view.phase is PeerPhase.DIED)
            peer.hold()
            watch.wait(lambda view: view.phase in (PeerPhase.STARTING, PeerPhase.SILENT))
            peer.status.round += 1
            peer.serve()


def test_one_that_hangs_is_said_to(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.ask, "__defaults__", (0.3,))
    with Following(LocalPeer(folder=peer.folder), QUICK) as watch:
        watch.wait(lambda view: view.phase is PeerPhase.RUNNING and view.status.round)
        peer.hanging.set()
        watch.wait(lambda view: view.phase is PeerPhase.SILENT)
        peer.hanging.clear()
        peer.tell(round=30)
        watch.wait(lambda view: view.phase is PeerPhase.RUNNING and view.status.round == 30)


def test_one_that_refuses_is_not_asked_again(peer: FakePeer) -> None:
    peer.refusal = "64 watch this peer already; end one of them"
    view = look(LocalPeer(folder=peer.folder))
    with raises_code("peer-refused", RefusedError, "anna: 64 "):
        follow(LocalPeer(folder=peer.folder), view, lambda view: None, SimpleQueue(), QUICK)
    assert peer.watches == 1


def test_quiet_is_not_silence(peer: FakePeer) -> None:
    with Following(LocalPeer(folder=peer.folder), QUICK) as watch:
        watch.wait(lambda view: view.status.time)
        first = watch.seen[-1].status.time
        for _ in range(3):  # probed, and it answered
            first = watch.wait(lambda view, first=first: view.status.time > first).status.time
        assert {view.phase for view in watch.seen} == {PeerPhase.RUNNING}


def test_over_tcp_a_connection_may_be_lost_and_found(tmp_path: Path) -> None:
    with living(FakePeer(tmp_path / "anna").hold()) as peer:
        address = peer.serve(tcp=True)
        with Following(LocalPeer(address=address), QUICK) as watch:
            watch.wait(lambda view: view.status.round)
            peer.die()
            watch.wait(lambda view: view.phase is PeerPhase.LOST)
            assert watch.end().phase is PeerPhase.LOST
        peer.hold()
        address, before = peer.serve(tcp=True), peer.watches
        with Following(LocalPeer(address=address), PROBING) as watch:
            watch.wait(lambda view: peer.watches > before)  # else it may ask once more, and hear of no end
            peer.tell(round=13)
            watch.wait(lambda view: view.status.round == 13)  # it hears what happens, and not only what it asked for
            peer.end()
            assert watch.end().phase is PeerPhase.ENDED


@pytest.mark.parametrize("tcp", [False, True])
def test_a_call_that_stays_open_when_its_peer_dies_is_hung_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tcp: bool
) -> None:
    opened, let_go = threading.Event(), threading.Event()

    def stay_open(_: _Stream) -> None:
        opened.set()
        let_go.wait(60)

    monkeypatch.setattr(_Stream, "_watch", stay_open)
    with living(FakePeer(tmp_path / "anna").hold()) as peer:
        address = peer.serve(tcp=tcp)
        with Following(LocalPeer(address=address) if tcp else LocalPeer(folder=peer.folder), QUICK) as watch:
            assert opened.wait(30)
            peer.die()
            assert watch.end().phase is (PeerPhase.LOST if tcp else PeerPhase.DIED)
        let_go.set()
