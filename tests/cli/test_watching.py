"""`swarmtrain watch` beside a peer that answers, hangs, ends, dies and comes back: in a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from fake_peer import FakePeer, living, make_status
from pseudo_terminal import PseudoTerminal

from swarmtrain.cli import peers
from swarmtrain.cli.follow import Patience, Signal, _Stream, follow
from swarmtrain.cli.peers import Life, Peer, RefusedError, View, look
from swarmtrain.v1 import control_pb2 as wire

QUICK = Patience(tick_s=0.02, come_back_s=0.5, probe_s=0.2)
LASTING = Patience(tick_s=0.02, come_back_s=60.0, probe_s=60.0)
PROBING = replace(LASTING, probe_s=0.5)
"""A call made in the very moment of a peer's death may stay open, and the silence is what tells."""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[FakePeer]:
    with living(FakePeer(tmp_path / "anna").start()) as peer:
        yield peer


class Following:
    """`follow` in a thread; what it shows is waited for."""

    def __init__(self, peer: Peer, patience: Patience) -> None:
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
    with Following(Peer(folder=peer.folder), LASTING) as watch:
        watch.wait(lambda view: view.status.round == 12)
        for round in (13, 14, 15):
            peer.tell(round=round)
            assert watch.wait(lambda view, round=round: view.status.round == round).life is Life.RUNNING
    assert watch.last is None
    assert not peer.asked, "watching asks nothing of the peer"


@pytest.mark.parametrize(
    ("state", "reason", "code", "life"),
    [
        (wire.PEER_STATE_DONE, "total_tokens", 0, Life.ENDED),
        (wire.PEER_STATE_FAILED, "nobody answers", 1, Life.FAILED),
    ],
)
def test_an_end_is_the_last_view(peer: FakePeer, state: int, reason: str, code: int, life: Life) -> None:
    with Following(Peer(folder=peer.folder), PROBING) as watch:
        watch.wait(lambda view: view.status.round)
        peer.end(state, reason, code)
        last = watch.end()
    assert (last.life, last.status.end_reason, last.status.exit_code) == (life, reason, code)


def test_a_death_is_told_at_once_and_waited_over_for_a_while(peer: FakePeer) -> None:
    with Following(Peer(folder=peer.folder), QUICK) as watch:
        watch.wait(lambda view: view.status.round)
        peer.tell(round=20)
        watch.wait(lambda view: view.status.round == 20)
        peer.die()
        waiting = watch.wait(lambda view: view.life is Life.DIED)
        assert waiting.note.startswith("waiting for it to come back, ")
        last = watch.end()
    assert (last.life, last.status.round, last.note) == (Life.DIED, 20, "")


def test_one_that_comes_back_is_shown_again(peer: FakePeer) -> None:
    with Following(Peer(folder=peer.folder), PROBING) as watch:
        for life in range(3):
            watch.wait(lambda view, life=life: view.life is Life.RUNNING and view.status.round == 12 + life)
            peer.die()
            watch.wait(lambda view: view.life is Life.DIED)
            peer.hold()
            watch.wait(lambda view: view.life in (Life.STARTING, Life.SILENT))
            peer.status.round += 1
            peer.serve()


def test_one_that_hangs_is_said_to(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.ask, "__defaults__", (0.3,))
    with Following(Peer(folder=peer.folder), QUICK) as watch:
        watch.wait(lambda view: view.life is Life.RUNNING and view.status.round)
        peer.hanging.set()
        watch.wait(lambda view: view.life is Life.SILENT)
        peer.hanging.clear()
        peer.tell(round=30)
        watch.wait(lambda view: view.life is Life.RUNNING and view.status.round == 30)


def test_one_that_refuses_is_not_asked_again(peer: FakePeer) -> None:
    peer.refusal = "64 watch this peer already; end one of them"
    view = look(Peer(folder=peer.folder))
    with pytest.raises(RefusedError, match="anna: 64 watch this peer already; end one of them"):
        follow(Peer(folder=peer.folder), view, lambda view: None, SimpleQueue(), QUICK)
    assert peer.watches == 1


def test_quiet_is_not_silence(peer: FakePeer) -> None:
    with Following(Peer(folder=peer.folder), QUICK) as watch:
        watch.wait(lambda view: view.status.time)
        first = watch.seen[-1].status.time
        for _ in range(3):  # probed, and it answered
            first = watch.wait(lambda view, first=first: view.status.time > first).status.time
        assert {view.life for view in watch.seen} == {Life.RUNNING}


def test_over_tcp_a_connection_may_be_lost_and_found(tmp_path: Path) -> None:
    with living(FakePeer(tmp_path / "anna").hold()) as peer:
        address = peer.serve(tcp=True)
        with Following(Peer(address=address), QUICK) as watch:
            watch.wait(lambda view: view.status.round)
            peer.die()
            watch.wait(lambda view: view.life is Life.LOST)
            assert watch.end().life is Life.LOST
        peer.hold()
        address, before = peer.serve(tcp=True), peer.watches
        with Following(Peer(address=address), PROBING) as watch:
            watch.wait(lambda view: peer.watches > before)  # else it may ask once more, and hear of no end
            peer.tell(round=13)
            watch.wait(lambda view: view.status.round == 13)  # it hears what happens, and not only what it asked for
            peer.end()
            assert watch.end().life is Life.ENDED


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
        with Following(Peer(address=address) if tcp else Peer(folder=peer.folder), QUICK) as watch:
            assert opened.wait(30)
            peer.die()
            assert watch.end().life is (Life.LOST if tcp else Life.DIED)
        let_go.set()


# ---------------------------------------------------------------- in a terminal


@contextlib.contextmanager
def watched(
    peer: FakePeer, *arguments: str, columns: int = 80, lines: int = 24, **env: str
) -> Iterator[PseudoTerminal]:
    command = [sys.executable, "-m", "swarmtrain.cli", "watch", "--dir", str(peer.folder), *arguments]
    environment = {**os.environ, **env}
    with PseudoTerminal(command, columns=columns, lines=lines, environment=environment) as terminal:
        yield terminal


@pytest.mark.parametrize("key", [b"q", b"\x03"])
@pytest.mark.parametrize("term", ["xterm", "screen"])
def test_the_screen_follows_and_a_key_leaves_it(peer: FakePeer, key: bytes, term: str) -> None:
    with watched(peer, TERM=term) as terminal:
        text = terminal.wait_text("q leaves this screen; the peer goes on")
        assert "training round 12: 14 of 25 steps" in text
        assert "40% of 3 M tokens" in text
        peer.tell(round=13, doing="merging round 13: waiting for bert, 12 s at most")
        terminal.wait_text("merging round 13: waiting for bert, 12 s at most")
        if key == b"\x03":  # the terminal is not the controlling one, which would make a signal of it
            os.kill(terminal.process.pid, signal.SIGINT)
        else:
            terminal.press(key)
        assert terminal.wait() == 0
        terminal.wait_text("anna goes on; `swarmtrain watch` shows it again")
        assert terminal.modes_now() == terminal.modes
        assert b"\x1b[?1049l" in terminal.raw
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l"), "the cursor is there again"
    assert not peer.asked


def test_it_fills_the_window_whatever_its_size(peer: FakePeer) -> None:
    with watched(peer) as terminal:
        terminal.wait_for(lambda text: text.count("│") >= 10, "loss curve")
        terminal.resize(120, 40)
        text = terminal.wait_for(lambda text: text.count("│") > 30, "bigger curve")
        assert len(text.splitlines()[0]) == 120
        terminal.resize(50, 10)
        terminal.wait_for(lambda text: len(text.splitlines()[0]) == 50 and "40% of" in text, "smaller picture")
        terminal.press(b"q")
        assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("state", "reason", "code", "says"),
    [
        (wire.PEER_STATE_DONE, "total_tokens", 0, "ended just now: total_tokens: the run has all of them"),
        (wire.PEER_STATE_FAILED, "the disk is gone", 1, "the disk is gone (exit code 1); start it again"),
    ],
)
def test_the_last_screen_says_how_it_ended(peer: FakePeer, state: int, reason: str, code: int, says: str) -> None:
    with watched(peer) as terminal:
        terminal.wait_text("training round 12")
        peer.end(state, reason, code)
        assert terminal.wait() == code
        text = terminal.wait_for(lambda text: says in text.replace("\n", " "), repr(says))
        assert "contribution" in text
        assert "q leaves" not in text.splitlines()[-1]


def test_a_death_and_a_return_on_the_screen(peer: FakePeer) -> None:
    with watched(peer) as terminal:
        terminal.wait_text("training round 12")
        peer.die()
        waiting = "waiting for it to come back"
        text = terminal.wait_for(lambda text: waiting in text.replace("\n", " "), waiting).replace("\n", " ")
        assert "died without a goodbye about" in text
        assert "(it was training round 12); waiting for it to come back" in text
        assert "s at most; start it again with `swarmtrain join --name anna --dir" in text
        peer.status.doing = "training round 13: 1 of 25 steps"
        peer.start()
        terminal.wait_text("training round 13: 1 of 25 steps")
        terminal.press(b"q")
        assert terminal.wait() == 0


def test_one_that_is_over_is_shown_once(tmp_path: Path) -> None:
    peer = FakePeer(tmp_path / "anna").start()
    peer.die()
    with watched(peer) as terminal:
        assert terminal.wait() == 1
        terminal.wait_text("died without a goodbye")
    peer.start()
    peer.end()
    with watched(peer) as terminal:
        assert terminal.wait() == 0
        terminal.wait_text("ended")


# ---------------------------------------------------------------- elsewhere


def piped(peer: FakePeer, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "swarmtrain.cli", "watch", "--dir", str(peer.folder), *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_pipe_gets_a_line_whenever_something_happens(peer: FakePeer) -> None:
    with piped(peer) as process:
        assert process.stdout is not None
        assert "training round 12: 14 of 25 steps; round 12;" in process.stdout.readline()
        peer.tell(inner_steps_done=15, doing="training round 12: 15 of 25 steps")
        peer.tell(round=13, doing="training round 13: 0 of 25 steps")
        assert "training round 13: 0 of 25 steps; round 13;" in process.stdout.readline(), "steps are no news"
        peer.end()
        rest = process.stdout.read().splitlines()
        assert rest[-1].endswith("anna ended: ended just now: total_tokens: the run has all of them")
        assert process.wait(30) == 0


def test_a_dumb_terminal_gets_lines(peer: FakePeer) -> None:
    with watched(peer, columns=200, TERM="dumb") as terminal:
        terminal.wait_text("anna training: training round 12: 14 of 25 steps; round 12;")
        assert b"\x1b" not in terminal.raw
        terminal.press(b"q")
        assert terminal.wait() == 0


def test_json_lines(peer: FakePeer) -> None:
    with piped(peer, "--json") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert (first["process"], first["state"], first["round"]) == ("running", "training", 12)
        peer.end(reason="asked")
        rest = [json.loads(line) for line in process.stdout]
        assert (rest[-1]["process"], rest[-1]["end_reason"]) == ("ended", "asked")
        assert process.wait(30) == 0


def test_a_signal_detaches_it(peer: FakePeer) -> None:
    with piped(peer) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_reader_that_is_gone_ends_it(peer: FakePeer) -> None:
    with piped(peer) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        peer.tell(round=50)
        assert process.wait(30) == 1


def test_a_peer_without_a_name_is_called_by_its_folder(tmp_path: Path) -> None:
    with living(FakePeer(tmp_path / "anna", make_status(name="")).start()) as peer, piped(peer) as process:
        assert process.stdout is not None
        assert " anna training: " in process.stdout.readline()
        process.terminate()
