"""`logs`: what of a peer's log is printed, and that following it loses nothing when it is rotated or its peer ends."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from codes import codes_in
from fake_peer import FakePeer, living

from swarmtrain.cli import logs
from swarmtrain.cli.logs import LogReader
from swarmtrain.cli.main import run
from swarmtrain.peer.control.logs import peer_log


def write(folder: Path, name: str, first: int, end: int) -> None:
    (folder / name).write_text("".join(f"line {number}\n" for number in range(first, end)))


def followed(path: Path, steps: list[Callable[[], object]]) -> list[str]:
    """Return what is read while `steps` happen in turn; after the last one the peer is gone."""
    left = iter(steps)

    def lives() -> bool:
        step = next(left, None)
        if step is not None:
            step()
        return step is not None

    with LogReader(path) as log:
        log.last_lines(0)
        return list(log.new_lines(lives, lambda: None))


def test_the_last_lines_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with living(FakePeer(tmp_path / "anna").start()) as peer:
        write(peer.folder, "peer.log", 0, 250)
        assert run(["logs", "--dir", str(peer.folder)]) == 0
        assert capsys.readouterr().out.splitlines() == [f"line {number}" for number in range(150, 250)]
        assert run(["logs", "anna", "--dir", str(tmp_path), "-n", "2"]) == 0
        assert capsys.readouterr().out == "line 248\nline 249\n"
        assert run(["logs", "--dir", str(peer.folder), "-n", "0"]) == 0
        assert capsys.readouterr().out == ""
    assert run(["log", "--dir", str(peer.folder), "-n", "1", "-f"]) == 0, "one that has ended is followed to its end"
    assert capsys.readouterr().out == "line 249\n"


def test_lines_of_older_files_come_before(tmp_path: Path) -> None:
    for name, first, end in (("peer.log.2", 0, 3), ("peer.log.1", 3, 5), ("peer.log", 5, 6)):
        write(tmp_path, name, first, end)
    for number in range(8):
        with LogReader(tmp_path / "peer.log") as log:
            assert log.last_lines(number) == [f"line {each}" for each in range(max(0, 6 - number), 6)]


def test_only_files_of_the_rotation_are_older_logs(tmp_path: Path) -> None:
    for name, first, end in (("peer.log.10", 0, 1), ("peer.log.9", 1, 2), ("peer.log", 2, 3)):
        write(tmp_path, name, first, end)
    for name in ("peer.log.1.gz", "peer.log.1~", "peer.log.2-before", "peer.log.gz"):
        (tmp_path / name).write_bytes(b"a person's own\n")
    with LogReader(tmp_path / "peer.log") as log:
        assert log.last_lines(100) == ["line 0", "line 1", "line 2"]


def test_more_lines_than_any_log_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", "--dir", str(tmp_path), "-n", str(2**63)]) == 2
    assert "0<=x<=1000000" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_it_in_silence(tmp_path: Path) -> None:
    with living(FakePeer(tmp_path / "anna").start()) as peer:
        write(peer.folder, "peer.log", 0, 50_000)
        command = [sys.executable, "-m", "swarmtrain.cli", "logs", "-n", "50000", "--dir", str(peer.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == b"line 0\n"
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "peer.log").write_bytes(b"a\x1b[2J\tb\xff\r\n")
    with LogReader(tmp_path / "peer.log") as log:
        assert log.last_lines(5) == ["a\\x1b[2J    b\ufffd"]


def test_a_line_is_printed_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    path.write_bytes(b"before\n")
    with path.open("ab", buffering=0) as file:
        steps = [lambda text=text: file.write(text) for text in (b"one\ntw", b"o\n", "größer".encode()[:3], b"\xb6")]
        assert followed(path, [*steps, lambda: None]) == ["one", "two", "grö"]


def test_a_line_that_was_half_written_at_first_is_printed_as_one(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    for before, first in ((b"one\ntw", ["one"]), (b"tw", []), (b"one\n", ["one"])):
        path.write_bytes(before)
        with LogReader(path) as log, path.open("ab", buffering=0) as file:
            assert log.last_lines(5, only_whole=True) == first
            rest = b"o\n" if before.endswith(b"tw") else b"two\n"
            assert list(log.new_lines(lambda file=file, rest=rest: not file.write(rest), lambda: None)) == ["two"]


def test_following_loses_nothing_when_the_log_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written by a real peer, and rotated after a few lines."""
    monkeypatch.setattr("swarmtrain.peer.control.logs.LOG_MAX_BYTES", 400)
    log = logging.getLogger("swarmtrain.test")
    with peer_log(tmp_path):
        log.warning("number 0")
        steps = [lambda number=number: log.warning("number %d", number) for number in range(1, 30)]
        found = followed(tmp_path / "peer.log", [*steps, lambda: None])
    assert [line.rpartition(": ")[2] for line in found] == [f"number {number}" for number in range(1, 30)]
    assert (tmp_path / "peer.log.3").exists(), "it was rotated several times"


def test_last_words_are_read_once_the_peer_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    path.write_bytes(b"")

    def end() -> None:
        path.write_bytes(b"goodbye\n")

    with LogReader(path) as log:
        assert list(log.new_lines(lambda: bool(end()), lambda: None)) == ["goodbye"]


def test_while_the_new_file_is_not_there_yet_nothing_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    path.write_bytes(b"")
    steps = [lambda: path.rename(tmp_path / "peer.log.1"), lambda: None, lambda: path.write_bytes(b"new\n")]
    assert followed(path, steps) == ["new"]


def test_without_a_log_it_says_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with living(FakePeer(tmp_path / "anna").start()) as peer:
        assert run(["logs", "--dir", str(peer.folder)]) == 2
    said = capsys.readouterr().err
    assert codes_in(said) == ["no-log"] and str(peer.folder / "peer.log") in said


def test_ctrl_c_leaves_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: object, **keys: object) -> object:
        raise KeyboardInterrupt

    with living(FakePeer(tmp_path / "anna").start()) as peer:
        (peer.folder / "peer.log").touch()
        monkeypatch.setattr(logs.LogReader, "new_lines", interrupted)
        assert run(["logs", "--dir", str(peer.folder), "-f"]) == 0
