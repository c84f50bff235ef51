"""`swarmtrain watch` as a process beside a peer: in a terminal, in a pipe, and by signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_peer import FakePeer, living, make_status
from pseudo_terminal import PseudoTerminal

from swarmtrain.v1 import control_pb2 as wire

pytestmark = pytest.mark.slow  # each starts an interpreter that imports the command line

ENDED = r"ended (just now|\d+ s ago): total_tokens: the run has trained all of them"


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
        text = terminal.wait_text("q closes this screen")
        assert "training round 12: 14 of 25 steps" in text
        assert "40% of 3 M tokens" in text
        peer.tell(round=13, doing="merging round 13: waiting for bert, 12 s at most")
        terminal.wait_text("merging round 13: waiting for bert, 12 s at most")
        if key == b"\x03":  # the terminal is not the controlling one, which would make a signal of it
            os.kill(terminal.process.pid, signal.SIGINT)
        else:
            terminal.press(key)
        assert terminal.wait() == 0
        terminal.wait_text("anna keeps running; `swarmtrain watch --dir")
        assert terminal.modes_now() == terminal.modes
        assert b"\x1b[?1049l" in terminal.raw
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l"), "the cursor is there again"
    assert not peer.asked


def test_it_fills_the_window_whatever_its_size(peer: FakePeer) -> None:
    with watched(peer) as terminal:
        terminal.wait_for(lambda text: text.count("│") >= 10, "loss curve")
        terminal.resize(120, 40)
        # Together: what is read may be the middle of a picture.
        terminal.wait_for(lambda text: text.count("│") > 30 and len(text.splitlines()[0]) == 120, "bigger curve")
        terminal.resize(50, 10)
        terminal.wait_for(lambda text: len(text.splitlines()[0]) == 50 and "40% of" in text, "smaller picture")
        terminal.press(b"q")
        assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("state", "reason", "code", "says"),
    [
        (wire.PEER_STATE_DONE, "total_tokens", 0, ENDED),
        (wire.PEER_STATE_FAILED, "the disk is gone", 1, r"the disk is gone \(exit code 1\); start it again"),
    ],
)
def test_the_last_screen_says_how_it_ended(peer: FakePeer, state: int, reason: str, code: int, says: str) -> None:
    with watched(peer) as terminal:
        terminal.wait_text("training round 12")
        peer.end(state, reason, code)
        assert terminal.wait() == code
        text = terminal.wait_for(lambda text: re.search(says, text.replace("\n", " ")), repr(says))
        assert "contribution" in text
        assert "q leaves" not in text.splitlines()[-1]


def test_a_death_and_a_return_on_the_screen(peer: FakePeer) -> None:
    with watched(peer) as terminal:
        terminal.wait_text("training round 12")
        peer.die()
        waiting = "waiting for it to come back"
        text = terminal.wait_for(lambda text: waiting in text.replace("\n", " "), waiting).replace("\n", " ")
        assert "died about" in text
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
        terminal.wait_text("died about")
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
        assert re.search(f"anna ended: {ENDED}$", rest[-1])
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
