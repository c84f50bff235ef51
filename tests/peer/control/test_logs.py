"""Log of a peer: what goes to the file and to the terminal, and what a full disk costs."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from codes import raises_code

from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import Event, PausedEvent, WarningEvent
from swarmtrain.network import daemon
from swarmtrain.peer.control import logs
from swarmtrain.peer.control.logs import LOG_NAME, LogFormatter, log_to_terminal, logged, peer_log
from swarmtrain.peer.lifecycle.stop import Interrupted

OURS = logging.getLogger("swarmtrain.network.rounds.runner")
HIVEMIND = logging.getLogger("hivemind.dht.node")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Handlers and levels are the process's; put them back."""
    before = {logger: (list(logger.handlers), logger.level) for logger in map(logging.getLogger, (None, "swarmtrain"))}
    logging.root.handlers[:] = [one for one in logging.root.handlers if not isinstance(one, logs._Terminal)]
    yield
    logging.captureWarnings(False)
    for logger, (handlers, level) in before.items():
        logger.handlers[:] = handlers
        logger.setLevel(level)


def terminal(monkeypatch: pytest.MonkeyPatch, level: str) -> io.StringIO:
    log_to_terminal(level)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)  # after it was set up, as a display does
    return screen


def say_something() -> None:
    OURS.debug("our detail")
    OURS.info("our message")
    OURS.warning("our warning")
    HIVEMIND.info("their message")
    HIVEMIND.warning("their warning")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("error", []),
        ("warning", ["our warning"]),
        ("info", ["our message", "our warning"]),
        ("debug", ["our detail", "our message", "our warning", "their message", "their warning"]),
    ],
)
def test_the_terminal_has_what_was_asked_for_and_nothing_of_others(
    level: str, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch, level)
    say_something()
    assert [line.rpartition(": ")[2] for line in screen.getvalue().splitlines()] == shown


@pytest.mark.parametrize("level", ["error", "warning", "info"])
def test_the_file_has_ours_from_info_on_and_others_warnings(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch, level)
    with peer_log(tmp_path):
        say_something()
    words = [line[24:] for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert words == [
        "info    rounds.runner: our message",
        "warning rounds.runner: our warning",
        "warning hivemind: their warning",
    ]


def test_warnings_of_libraries_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, "info")
    with peer_log(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("a library's", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "warning py: " in (tmp_path / LOG_NAME).read_text()
    assert screen.getvalue() == ""


def test_debug_writes_everything_from_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch, "debug")
    with peer_log(tmp_path):
        say_something()
    text = (tmp_path / LOG_NAME).read_text()
    assert "our detail" in text and "hivemind: their message" in text


def test_events_are_lines_of_the_file_and_not_of_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, "info")
    seen: list[Event] = []
    emit = logged(seen.append)
    with peer_log(tmp_path):
        emit(PausedEvent(reason="outside the hours 22-7"))
        emit(WarningEvent(message="the disk is full"))
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert [line[24:] for line in lines] == [
        "info    event: paused: outside the hours 22-7",
        "warning event: warning: the disk is full",
    ]
    assert len(seen) == 2
    assert screen.getvalue() == ""


def test_what_others_send_cannot_forge_a_line() -> None:
    record = logging.makeLogRecord({"name": "libp2p", "levelno": 30, "msg": "a\x1b[2J\n2026-11-25 00:00:00 error x"})
    first, second = LogFormatter().format(record).split("\n")
    assert first.endswith(r"warning libp2p: a\x1b[2J")
    assert second == "    2026-11-25 00:00:00 error x"


def test_it_is_rotated_and_a_descriptor_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOG_MAX_BYTES", 2000)
    with (tmp_path / "elsewhere").open("wb") as other, peer_log(tmp_path, [other.fileno()]):
        for number in range(500):
            OURS.info("message %d", number)
        other.write(b"from below python\n")
        other.flush()
    names = sorted(path.name for path in tmp_path.glob("peer.log*"))
    assert names == [LOG_NAME, *(f"{LOG_NAME}.{number}" for number in range(1, logs.LOGS_KEPT + 1))]
    assert all(path.stat().st_size <= 2100 for path in tmp_path.glob("peer.log*"))
    assert (tmp_path / LOG_NAME).read_text().endswith("message 499\nfrom below python\n")
    assert (tmp_path / "elsewhere").read_bytes() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOG_NAME).symlink_to("/dev/full")
    with peer_log(tmp_path):
        OURS.info("lost")
        (tmp_path / LOG_NAME).unlink()
        OURS.info("room again")
    assert (tmp_path / LOG_NAME).read_text()[24:] == "info    rounds.runner: room again\n"
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_is_gone_costs_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with peer_log(tmp_path / "never made"):
        OURS.info("lost")
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_one_line_for_the_person_and_a_traceback_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(RunTimeError) as caught, peer_log(tmp_path):
        raise KeyError("made up")
    line = str(caught.value)
    assert line.startswith("a bug in swarmtrain, not yours (KeyError: 'made up')")
    assert str(tmp_path / LOG_NAME) in line and "report" in line
    text = (tmp_path / LOG_NAME).read_text()
    assert "Traceback (most recent call last):" in text and "test_logs.py" in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
    ],
)
def test_too_little_memory_is_no_bug(tmp_path: Path, error: Exception) -> None:
    with raises_code("too-little-memory", RunTimeError, "memory", "`swarmtrain check RUN.toml`"), peer_log(tmp_path):
        raise error


def test_torch_says_that_there_is_no_memory_in_these_words() -> None:
    """`bug_in_words` knows it by its text."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**60, dtype=torch.uint8)


def test_why_it_ended_is_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError), peer_log(tmp_path):
        raise UserError("give another folder")
    with pytest.raises(Interrupted), peer_log(tmp_path):
        raise Interrupted
    assert (tmp_path / LOG_NAME).read_text()[24:] == "error   event: error: give another folder\n"


def test_a_thread_that_fails_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("in a thread")

    hook = threading.excepthook
    with peer_log(tmp_path):
        thread = threading.Thread(target=fail, name="the worker")
        thread.start()
        thread.join()
    text = (tmp_path / LOG_NAME).read_text()
    assert "thread the worker ended by an error" in text and "KeyError: 'in a thread'" in text
    assert threading.excepthook is hook
    assert capsys.readouterr() == ("", "")


def test_the_daemons_words_are_libp2ps(tmp_path: Path) -> None:
    with peer_log(tmp_path):
        daemon._log_daemon_line('{"level":"warn","logger":"swarm2","msg":"dial failed","error":"refused"}')
        daemon._log_daemon_line('{"level":"info","logger":"swarm2","msg":"listening"}')
        daemon._log_daemon_line('{"level":"warn","logger":"dht/RtRefreshManager","msg":"no peer in table"}')
        daemon._log_daemon_line("Peer ID: 12D3KooW")
        daemon._log_daemon_line("panic: runtime error")
        daemon._log_daemon_line("[1]")
    lines = [line[24:] for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert lines == [
        "warning libp2p: swarm2: dial failed: refused",
        "warning libp2p: panic: runtime error",
        "warning libp2p: [1]",
    ]


def test_hivemind_writes_nothing_by_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    daemon.hivemind_module("utils.logging").get_logger("hivemind.p2p").warning("alone")
    assert logging.getLogger("hivemind").propagate
    with peer_log(tmp_path):
        logging.getLogger("hivemind.p2p").warning("with a log")
    assert (tmp_path / LOG_NAME).read_text()[24:] == "warning hivemind: with a log\n"
    assert capfd.readouterr() == ("", "")
