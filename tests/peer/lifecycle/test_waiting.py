"""Waiting that a signal interrupts: nothing is lost, nothing hangs."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from codes import raises_code
from patience import PATIENCE_S

from swarmtrain.cli.stop_signals import stop_on_signals
from swarmtrain.errors import Problem, RunTimeError
from swarmtrain.events import DoneEvent, parse_event
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag, explained_on_signal


def test_a_result_is_returned_also_when_the_end_was_asked_for() -> None:
    stop, future = StopFlag(), Future[int]()
    stop.stop()
    future.set_result(7)
    assert wait_for(future, stop) == 7


def test_a_time_limit_of_the_work_itself_is_not_taken_for_ours() -> None:
    future = Future[int]()
    future.set_exception(TimeoutError("the work's own"))
    with pytest.raises(TimeoutError, match="the work's own"):
        wait_for(future, StopFlag())


def test_an_end_cancels_what_is_waited_for() -> None:
    stop, future = StopFlag(), Future[int]()
    threading.Timer(0.05, stop.stop).start()
    with pytest.raises(Interrupted):
        wait_for(future, stop)
    assert future.cancelled()


def test_a_failure_ends_the_wait_with_its_reason() -> None:
    stop = StopFlag()
    stop.fail(Problem("it ended", "daemon-died"))
    with raises_code("daemon-died", RunTimeError, "it ended"):
        stop.sleep(10)


def test_the_last_work_is_left_undone_when_its_time_is_over_or_the_end_is_asked_for_again() -> None:
    stop = StopFlag()
    stop.stop("asked")
    last = stop.last_work(3600.0)
    stop.stop()
    last.check()  # a second reason to end is no hurry
    stop.insist()
    with pytest.raises(Interrupted):
        last.sleep(3600.0)
    assert stop.reason == "asked" and stop.last_work(3600.0).is_set()
    over = StopFlag().last_work(0.01)
    with pytest.raises(Interrupted):
        over.sleep(3600.0)


def test_sigterm_twice_insists_and_sigterm_after_ctrl_c_does_not() -> None:
    with stop_on_signals() as stop:
        for number in (signal.SIGINT, signal.SIGTERM):  # as from a terminal, then from a parent
            os.kill(os.getpid(), number)
        last = stop.last_work(3600.0)
        assert stop.is_set() and not last.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert last.is_set()


def test_ctrl_c_while_sleeping_wakes_up() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell may have it ignored
    with stop_on_signals() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Interrupted):
            stop.sleep(30)
    assert signal.getsignal(signal.SIGINT) is before


STOPPED_FIRST = """
import os, signal, sys
from swarmtrain.cli.stop_signals import stop_on_signals
with stop_on_signals() as stop:
    if sys.argv[1] == "asked":
        stop.stop("asked")
    else:
        os.kill(os.getpid(), int(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGINT)
    print("still ending cleanly", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never said", flush=True)
"""


@pytest.mark.parametrize("first", ["asked", str(int(signal.SIGTERM)), str(int(signal.SIGHUP))])
def test_ctrl_c_once_spoils_no_clean_end_twice_ends_at_once(first: str) -> None:
    command = [sys.executable, "-c", STOPPED_FIRST, first]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "still ending cleanly\n", "")


def test_sigusr1_explains() -> None:
    explained = threading.Event()
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)  # nobody explains anything yet, and nothing ends
        with explained_on_signal(explained.set):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert explained.wait(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.is_set()


def test_before_it_has_begun_an_end_that_is_asked_for_is_one_at_once() -> None:
    ended: list[str] = []
    stop = StopFlag(lambda: ended.append("at once"))
    stop.begin()
    with stop.before_it_begins():
        assert not ended
    stop.stop()
    assert not ended and stop.is_set()
    asked = StopFlag(lambda: ended.append("at once"))
    asked.begin()
    with pytest.raises(Interrupted), asked.before_it_begins():
        asked.stop()
    assert ended == ["at once"]
    StopFlag(lambda: ended.append("again")).stop()
    assert ended == ["at once", "again"]


INTERRUPTED_AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from swarmtrain.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["join", "bootstrap"])
@pytest.mark.slow  # each starts an interpreter that imports a peer
def test_ctrl_c_while_a_peer_is_still_importing_is_a_clean_end(command: str, tmp_path: Path) -> None:
    invite = Invite("ab" * 32, (InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/1",)),))
    (tmp_path / "run.toml").write_text("[run]\ntotal_tokens = 1_000_000\n")
    what = format_invite(invite) if command == "join" else str(tmp_path / "run.toml")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_IMPORT, command, what, "--json", "--dir", str(tmp_path / "peer")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "interrupted before it began\n")
    event = parse_event(done.stdout)
    assert isinstance(event, DoneEvent)
    assert event.reason == "interrupted"
    assert not (tmp_path / "peer").exists()


SCRIPT = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if "ignored" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from swarmtrain.cli.stop_signals import stop_on_signals
from swarmtrain.peer.lifecycle.stop import Interrupted
with stop_on_signals() as stop:
    print("ready", flush=True)
    try:
        stop.sleep(60)
    except Interrupted:
        print("goodbye", flush=True)
        sys.stderr.write("goodbye")
        sys.exit(7)
"""


@pytest.mark.parametrize(("ignored", "code"), [(False, 7), (True, None)])
def test_a_closed_terminal_is_a_clean_end_unless_that_is_ignored(ignored: bool, code: int | None) -> None:
    """A process in a terminal of its own, which is then closed; ignored, as `nohup` does, it goes on."""
    terminal, its_end = pty.openpty()

    command = [sys.executable, "-c", SCRIPT, *(["ignored"] if ignored else [])]
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True)
    try:
        os.close(its_end)
        said = b""
        while b"\n" not in said:  # before its line has ended it is still writing, and would fail
            said += os.read(terminal, 100)
        os.close(terminal)
        try:
            assert process.wait(0.5 if ignored else 30) == code
        except subprocess.TimeoutExpired:
            assert ignored
    finally:
        process.kill()
        process.wait()
