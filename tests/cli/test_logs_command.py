"""`logs`: what of a peer's log is printed, and that following it loses nothing when it is rotated or its peer ends."""

from __future__ import annotations

import datetime
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from codes import codes_in
from fake_peer import FakePeer, living

from swarmtrain.cli import logs
from swarmtrain.cli.logs import LogReader, parse_since
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
    out, err = capsys.readouterr()
    assert out == "line 249\n" and "-F" in err


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


NOW = datetime.datetime(2026, 11, 25, 12, 0, 30)


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ("90s", datetime.datetime(2026, 11, 25, 11, 59)),
        ("10m", datetime.datetime(2026, 11, 25, 11, 50, 30)),
        ("10 min", datetime.datetime(2026, 11, 25, 11, 50, 30)),
        ("36h", datetime.datetime(2026, 11, 24, 0, 0, 30)),
        ("3d", datetime.datetime(2026, 11, 22, 12, 0, 30)),
        ("11:30", datetime.datetime(2026, 11, 25, 11, 30)),
        ("22:30", datetime.datetime(2026, 11, 24, 22, 30)),
        ("2026-11-20", datetime.datetime(2026, 11, 20)),
        ("2026-11-20 08:15:59", datetime.datetime(2026, 11, 20, 8, 15, 59)),
        ("999999999d", datetime.datetime(1926, 12, 20, 12, 0, 30)),
    ],
)
def test_since_is_so_long_ago_or_a_time(text: str, begin: datetime.datetime) -> None:
    assert parse_since(text, NOW) == begin


def test_a_time_with_its_zone_is_this_machines_time() -> None:
    moment = parse_since("2026-11-20T08:00:00+00:00", NOW)
    assert moment.tzinfo is None
    assert moment.timestamp() == datetime.datetime(2026, 11, 20, 8, tzinfo=datetime.UTC).timestamp()


@pytest.mark.parametrize("text", ["", "yesterday", "10", "10 weeks", "25:00", "2026-13-01"])
def test_what_is_no_time_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", "--dir", str(tmp_path), "--since", text]) == 2
    assert codes_in(capsys.readouterr().err) == ["not-a-time"]


def test_lines_since_a_time_come_from_older_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "2026-11-25 {}:00.000 info    event: {}\n"
    first = head.format("08:00", "a") + head.format("09:00", "b") + "    its second line\n"
    (tmp_path / "peer.log.1").write_text(first)
    (tmp_path / "peer.log").write_text(head.format("10:00", "c"))
    (tmp_path / "lock").touch()

    def printed(*words: str) -> list[str]:
        assert run(["logs", "--dir", str(tmp_path), *words]) == 0
        return [line.strip().rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]

    assert printed("--since", "2026-11-25 08:30") == ["b", "line", "c"]
    assert printed("--since", "2026-11-25 08:30", "-n", "2") == ["line", "c"][1:], "a line without its head is no begin"
    assert printed("--since", "2026-11-25 10:00:00") == ["c"]
    assert printed("--since", "2026-11-25 10:00:01") == []
    assert printed("--since", "2026-11-25") == ["a", "b", "line", "c"]


def test_a_reader_that_was_stopped_for_a_while_misses_no_file(tmp_path: Path) -> None:
    """Rotated twice and more between two reads; what was there before is not printed again."""
    path = tmp_path / "peer.log"
    (tmp_path / "peer.log.1").write_bytes(b"old\n")
    path.write_bytes(b"read\n")

    def rotate_thrice() -> None:
        path.write_bytes(b"read\nend of the first\n")
        for number in range(3):
            for older in (3, 2, 1):
                if (tmp_path / f"peer.log.{older}").exists():
                    (tmp_path / f"peer.log.{older}").rename(tmp_path / f"peer.log.{older + 1}")
            path.rename(tmp_path / "peer.log.1")
            path.write_bytes(f"file {number}\n".encode())

    with LogReader(path) as log:
        assert log.last_lines(1) == ["read"]
        steps = iter([rotate_thrice, lambda: None])
        found = list(log.new_lines(lambda: (step := next(steps, None)) is not None and step() is None, lambda: None))
    assert found == ["end of the first", "file 0", "file 1", "file 2"]


def test_a_log_that_somebody_emptied_or_removed_is_followed_on(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    (tmp_path / "peer.log.1").write_bytes(b"of the rotation before\n")
    path.write_bytes(b"a long line that was there before\n")

    def removed() -> None:
        path.unlink()
        path.write_bytes(b"begun anew\n")

    steps: list[Callable[[], object]] = [lambda: path.write_bytes(b"short\n"), removed, lambda: None]
    assert followed(path, steps) == ["short", "begun anew"]


def test_a_peer_that_comes_back_is_followed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With -F: the peer is killed, started again, and killed; then a person presses Ctrl-C."""
    folder = tmp_path / "anna"
    peer = FakePeer(folder).start()
    (folder / "peer.log").write_text("first life\n")

    def write_line(text: str) -> None:
        with (folder / "peer.log").open("a") as file:
            file.write(text)

    def back() -> None:
        FakePeer.start(peer)
        write_line("second life\n")

    def interrupt() -> None:
        raise KeyboardInterrupt

    steps = iter([lambda: write_line("last words\n"), peer.die, back, peer.die, interrupt])

    monkeypatch.setattr(logs, "_pause", lambda: next(steps)())
    with living(peer):
        assert run(["logs", "--dir", str(folder), "-F"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["first life", "last words", "second life"]
    assert [line.partition(";")[0] for line in err.splitlines()] == [
        "no peer runs here now",
        "the peer runs again",
        "no peer runs here now",
    ]


def test_a_log_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peer.log"
    waited = iter([lambda: None, lambda: path.write_text("there\n")])
    monkeypatch.setattr(logs, "_pause", lambda: next(waited)())
    with living(FakePeer(tmp_path).start()):
        monkeypatch.setattr(logs.LogReader, "new_lines", lambda *words: iter(()))
        assert run(["logs", "--dir", str(tmp_path), "-F"]) == 0
    assert capsys.readouterr().out == "there\n" and next(waited, None) is None
