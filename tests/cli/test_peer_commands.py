"""pause, resume, leave, limits: what they ask of the peer, what they say, how they end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from codes import codes_in
from fake_peer import FakePeer, living, make_status

from swarmtrain.cli import leave
from swarmtrain.cli.facts import limits_in_words
from swarmtrain.cli.main import run
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.v1 import control_pb2 as wire


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePeer]:
    monkeypatch.setattr(leave, "_is_process", lambda number: False)  # this process, which goes on
    with living(FakePeer(tmp_path / "anna").start()) as peer:
        yield peer


def test_pause(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pause", "--dir", str(peer.folder)]) == 0
    assert peer.asked == [wire.PauseRequest()]
    assert capsys.readouterr().out == "pausing: it finishes its step\\x1b[2J\n"


def test_a_refusal_is_an_error_in_its_words(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["resume", "--dir", str(peer.folder)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: anna: a bootstrap does not train") and codes_in(said) == ["peer-refused"]


def test_leave_waits_for_the_end(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    def end() -> None:
        assert peer.on_leave.wait(30)
        peer.end(reason="asked")

    thread = threading.Thread(target=end)
    thread.start()
    assert run(["leave", "--dir", str(peer.folder)]) == 0
    thread.join()
    assert capsys.readouterr().out == "anna: ended just now: it was asked to leave\n"
    assert run(["leave", "--dir", str(peer.folder)]) == 1
    assert codes_in(capsys.readouterr().err) == ["peer-not-running"]


def test_leave_says_what_the_peer_warns_of_while_it_ends(
    peer: FakePeer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leave, "_LOOK_FOR_WARNINGS_S", 0.0)
    told = threading.Event()
    say = leave._Warnings.say

    def heard(self: leave._Warnings, status: wire.PeerStatus) -> None:
        say(self, status)
        if len(status.notices) == 2:
            told.set()

    monkeypatch.setattr(leave._Warnings, "say", heard)

    def end() -> None:
        assert peer.on_leave.wait(30)
        peer.status.notices.add(time=time.time(), message="waiting a minute for a bootstrap")
        assert told.wait(30), "it is said while it waits"
        peer.status.notices.add(
            time=time.time(), message="they are kept: 'swarmtrain join --dir X' continues from them"
        )
        peer.end(reason="asked")

    thread = threading.Thread(target=end)
    thread.start()
    assert run(["leave", "--dir", str(peer.folder)]) == 0
    thread.join()
    assert capsys.readouterr().err == (
        "warning: waiting a minute for a bootstrap\n"
        "warning: they are kept: 'swarmtrain join --dir X' continues from them\n"
    ), "not what it warned of before"


def test_leave_of_one_that_reached_the_runs_end_meanwhile_does_not_tell_to_go_on(
    peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    StartedFile(peer.folder).keep_command(Started(("join",), {}))
    (peer.folder / "run.toml").touch()
    (peer.folder / "model").mkdir()
    (peer.folder / "model" / "config.json").touch()

    def end() -> None:
        assert peer.on_leave.wait(30)
        peer.end(reason="total_tokens")

    thread = threading.Thread(target=end)
    thread.start()
    assert run(["leave", "--dir", str(peer.folder)]) == 0
    thread.join()
    said = capsys.readouterr().out
    assert "continues" not in said and f"the model is in {peer.folder / 'model'}; " in said


def test_leave_need_not_wait(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["leave", "--dir", str(peer.folder), "--no-wait"]) == 0
    assert capsys.readouterr().out == "leaving: it finishes its step, tells the other peers and ends\n"


def test_leave_gives_up(peer: FakePeer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave, "END_LIMIT_S", 0.0)
    assert run(["leave", "--dir", str(peer.folder)]) == 1
    said = capsys.readouterr().err
    assert codes_in(said) == ["still-ending"] and " 0 s " in said and "`swarmtrain status`" in said


def test_leave_says_when_it_ended_badly(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    def die() -> None:
        assert peer.on_leave.wait(30)
        peer.die()

    thread = threading.Thread(target=die)
    thread.start()
    assert run(["leave", "--dir", str(peer.folder)]) == 1
    thread.join()
    assert "died about" in capsys.readouterr().out


def test_leave_waits_for_the_process_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with contextlib.closing(process.stdout) as out:  # type: ignore[type-var]
        assert out is not None
        assert out.readline() == "held\n"
        assert leave._is_process(process.pid)
        assert run(["leave", "--dir", str(tmp_path)]) == 1
        assert not leave._is_process(process.pid), "nobody has asked for its code yet"
        assert process.wait(30) == 0
    assert "died while it was starting, without an error message" in capsys.readouterr().out


def test_leave_over_tcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with living(FakePeer(tmp_path / "anna").hold()) as peer:
        address = peer.serve(tcp=True)

        def end() -> None:
            assert peer.on_leave.wait(30)
            peer.end(reason="asked")

        thread = threading.Thread(target=end)
        thread.start()
        assert run(["leave", "--address", address]) == 0
        thread.join()
    assert capsys.readouterr().out == f"{address} has ended\n"


HOLD = """
import fcntl, os, signal, sys
lock = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.write(lock, str(os.getpid()).encode())
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it may come before anybody waits for it
print("held", flush=True)
signal.sigwait({signal.SIGTERM})
"""


def test_leave_of_one_that_does_not_answer_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with contextlib.closing(process.stdout) as out:  # type: ignore[type-var]
        assert out is not None
        assert out.readline() == "held\n"
        assert run(["leave", "--dir", str(tmp_path), "--no-wait"]) == 0
        assert process.wait(30) == 0
    said = capsys.readouterr().out
    assert said == f"process {process.pid} was told to end (SIGTERM): it does not answer its control socket\n"


def test_limits_are_shown(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["limits", "--dir", str(peer.folder)]) == 0
    assert capsys.readouterr().out == ("anna may use 2 threads, any memory, nice 10, at any load, in the hours 22-7\n")
    assert not peer.asked


def test_limits_say_that_it_is_slowed_on_purpose() -> None:
    limits = wire.Limits(threads=1, slowdown=5.2)
    assert limits_in_words(limits).endswith(", at any hour, slowed 5.2 times for a rehearsal")


def test_limits_are_changed(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--dir", str(peer.folder)]
    assert run(["limits", *where, "--threads", "3"]) == 0
    assert capsys.readouterr().out == "from now on: 3 threads\n"
    assert run(["limits", *where, "--memory", "4GB", "--nice", "0", "--any-time", "--hours", "22-7"]) == 0
    assert run(["limits", *where, "--memory", "none", "--only-when-idle", "--hours", "any", "--threads", "0"]) == 0
    assert run(["limits", *where, "--up", "2.5", "--down", "0"]) == 0
    assert (
        run(["limits", *where, "--gpu-share", "50", "--gpu-any-time", "--on-battery", "--max-temperature", "80"]) == 0
    )
    assert run(["limits", *where, "--gpu-when-idle", "--mains-only", "--max-temperature", "none"]) == 0
    assert run(["limits", *where, "--max-temperature", "auto"]) == 0
    assert peer.asked == [
        wire.Limits(threads=3),
        wire.Limits(memory_bytes=4 * 10**9, nice=0, only_when_idle=False, hours="22-7"),
        wire.Limits(memory_bytes=0, only_when_idle=True, hours="any", threads=0),
        wire.Limits(up_mbit=2.5, down_mbit=0),
        wire.Limits(gpu_share=50, gpu_any_time=True, on_battery=True, max_temperature=80),
        wire.Limits(gpu_any_time=False, on_battery=False, max_temperature=0),
        wire.Limits(max_temperature=-1),
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--memory", "4"], ["--memory", "x"], ["--nice", "20"], ["--nice", "-1"], ["--hours", "7"], ["--hours", "7-7"],
     ["--gpu-share", "0"], ["--gpu-share", "101"], ["--max-temperature", "20"], ["--max-temperature", "hot"],
     ["--hours", "7-25"], ["--threads", "-1"], ["--up", "-1"], ["--down", "x"],
     ["--address", "here"], ["--address", "h:99999"]],
)  # fmt: skip
def test_bad_options(arguments: list[str], peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["limits", "--dir", str(peer.folder), *arguments]) == 2
    assert "Invalid value" in capsys.readouterr().err
    assert not peer.asked


def test_names_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with contextlib.ExitStack() as stack:
        anna, bert = (
            stack.enter_context(living(FakePeer(tmp_path / "swarmtrain" / name, make_status(name=name)).start()))
            for name in ("anna", "bert")
        )
        assert run(["pause"]) == 2
        assert codes_in(capsys.readouterr().err) == ["several-peers"]
        assert not anna.asked and not bert.asked
        assert run(["pause", "bert"]) == 0
        assert anna.asked == []
        assert bert.asked == [wire.PauseRequest()]
    assert os.environ["XDG_DATA_HOME"] == str(tmp_path)
