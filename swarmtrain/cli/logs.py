"""`swarmtrain logs`: print the last lines of a peer's log, and follow it."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from swarmtrain.cli.common import WhichPeer, example
from swarmtrain.cli.option_errors import OptionError
from swarmtrain.cli.output import echo

_LINES = 100
_MAX_LINES = 10**6
_READ_EVERY_S = 0.5
_UNITS = {"s": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days"}
_TIME = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_LONGEST_BACK = datetime.timedelta(days=36_500)


def parse_since(text: str, now: datetime.datetime) -> datetime.datetime:
    """Return the local time that `text` means at `now`: how long ago (`90s`, `10m`, `2h`, `3d`), or a time of day, a
    date, or both (`22:30`, `2026-11-25`, `2026-11-25 22:30`). Raises ValueError, which says what is allowed.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\d{1,9}) ?(s|min|m|h|d)", text):
        ago = datetime.timedelta(**{_UNITS[match[2]]: int(match[1])})
        return now - min(ago, _LONGEST_BACK)
    with contextlib.suppress(ValueError):
        clock = datetime.time.fromisoformat(text)
        if clock.tzinfo is None and ":" in text:
            moment = datetime.datetime.combine(now.date(), clock)
            return moment if moment <= now else moment - datetime.timedelta(days=1)
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(text)
        return moment if moment.tzinfo is None else moment.astimezone().replace(tzinfo=None)
    raise ValueError(f"{text!r} is not a time; write 10m, 2h or 3d for so long ago, 22:30, or 2026-11-25 22:30")


def _since(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime.datetime | None:
    try:
        return None if value is None else parse_since(value, datetime.datetime.now())
    except ValueError as error:
        raise OptionError(str(error), ctx, param, code="not-a-time") from None


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Lines of a log that a person wants to see."""

    lines: int
    since: datetime.datetime | None
    follows: bool
    waits: bool
    """Follow on after the peer has ended, until it is started again."""


@click.command(
    name="logs",
    epilog=example(
        "swarmtrain logs",
        "swarmtrain logs anna --lines 20",
        "swarmtrain logs anna --since 2h",
        "swarmtrain logs anna -f",
    ),
)
@click.argument("name", metavar="[NAME]", default="")
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="The peer's folder, or one that holds several peers' folders.  [default: the folder of this user's peers]")  # fmt: skip
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come, until the peer ends.")
@click.option("-F", "--retry", is_flag=True, help="Like -f, and when the peer has ended wait until it is started again.")  # fmt: skip
@click.option("-n", "--lines", type=click.IntRange(0, _MAX_LINES), metavar="N", help="Number of existing lines to print.  [default: 100; with --since all]")  # fmt: skip
@click.option("--since", callback=_since, metavar="TIME", help="Print existing lines from then on: 10m, 2h or 3d ago, or this machine's time, such as 22:30 or '2026-11-25 22:30'.")  # fmt: skip
def command(
    name: str,
    directory: Path | None,
    follow: bool,
    retry: bool,
    lines: int | None,
    since: datetime.datetime | None,
) -> None:
    """Print the last lines of a peer's log.

    NAME is as for `status`. The log is `peer.log` in the peer's folder, and stays there after the peer has ended. With
    -f or -F, press Ctrl-C to stop reading; the peer keeps running.
    """
    import sys

    from swarmtrain.cli.peers import find
    from swarmtrain.peer.control.logs import LOG_NAME

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    folder = find(WhichPeer(name=name, directory=directory)).folder
    assert folder is not None, "without an address peers are found by their folders"
    number = lines if lines is not None else _LINES if since is None else _MAX_LINES
    wanted = _Wanted(lines=number, since=since, follows=follow or retry, waits=retry)
    try:
        for line in _read(folder / LOG_NAME, wanted):
            echo(line)
    except KeyboardInterrupt:
        return


def _read(path: Path, wanted: _Wanted) -> Iterator[str]:
    """Yield the wanted lines of the log. Raises UserError if it cannot be read.

    What goes wrong while a line is printed is not caught here: a closed pipe is no fault of the log.
    """
    from swarmtrain.errors import UserError
    from swarmtrain.peer.lifecycle.folder_lock import Holder, holder

    def lives() -> bool:
        return holder(path.parent) is not Holder.NOBODY

    try:
        with _opened(path, wanted.waits) as log:
            yield from log.last_lines(wanted.lines, only_whole=wanted.follows, since=wanted.since)
            if wanted.waits:
                yield from log.new_lines(_Waiting(lives).goes_on, _pause)
            elif wanted.follows:
                yield from log.new_lines(lives, _pause)
                echo("the peer has ended; with -F this waits until it is started again", err=True)
    except OSError as error:
        raise UserError(
            f"{path}: no log to read ({error.strerror}); give the peer's folder with --dir", code="no-log"
        ) from None


def _pause() -> None:
    import threading

    threading.Event().wait(_READ_EVERY_S)


def _opened(path: Path, waits: bool) -> LogReader:
    """Open the log; with `waits`, once there is one. Raises OSError if there is none."""
    while True:
        try:
            return LogReader(path)
        except FileNotFoundError:
            if not waits:
                raise
        _pause()


class _Waiting:
    """Says on standard error when a followed peer ends, and when it is there again."""

    def __init__(self, lives: Callable[[], bool]) -> None:
        self._lives = lives
        self._lived = True

    def goes_on(self) -> bool:
        """Return True: the log is followed on."""
        if self._lived != (lives := self._lives()):
            self._lived = lives
            echo("the peer runs again" if lives else "no peer runs here now; waiting for it", err=True)
        return True


class LogReader:
    """Reader of a log from its last lines on, while it is written and rotated."""

    def __init__(self, path: Path) -> None:
        """Open the log. Raises OSError if there is none."""
        self._path = path
        self._file: IO[bytes] = path.open("rb")
        self._begun = b""
        """Beginning of a line that is not written to its end yet."""
        self._read = {_identity(file) for file in self._older_files()}
        """Older files of the rotation that are no news."""

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def last_lines(self, number: int, *, only_whole: bool = False, since: datetime.datetime | None = None) -> list[str]:
        """Read the last `number` lines, from older files too if the newest has fewer, and of them those `since` then.

        If `only_whole`, a last line without its end is left to `new_lines`.
        """
        data = self._file.read()
        if only_whole:
            end = data.rfind(b"\n") + 1
            data, self._begun = data[:end], data[end:]
        found = deque(data.splitlines(), maxlen=number)
        for path in self._older():
            if len(found) < number:
                lines = path.read_bytes().splitlines()
                found.extendleft(reversed(lines[len(found) - number :]))
        return list(map(_shown, found if since is None else _from(since, list(found))))

    def _older(self) -> list[Path]:
        """Return the older log files, newest first. A person's `peer.log.1.gz` is none."""
        name = re.compile(re.escape(self._path.name) + r"\.([0-9]{1,9})")
        numbered = ((name.fullmatch(path.name), path) for path in self._path.parent.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]

    def _older_files(self) -> Iterator[IO[bytes]]:
        """Yield the older log files, newest first, each open while it is looked at."""
        for path in self._older():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                yield file

    def new_lines(self, lives: Callable[[], bool], pause: Callable[[], object]) -> Iterator[str]:
        """Yield lines written from now on, until the peer is gone. `pause` is called between two reads."""
        begun, self._begun = self._begun, b""
        while True:
            lived = lives()  # before reading, so that what the peer wrote last is read once it is gone
            for part in self._new_parts():
                *whole, begun = (begun + part).split(b"\n")
                yield from map(_shown, whole)
            if not lived:
                if begun:
                    yield _shown(begun)
                return
            pause()

    def _new_parts(self) -> Iterator[bytes]:
        """Read what is new in the log file, and in those that have replaced it by rotation."""
        try:
            newest = self._path.open(
                "rb"
            )  # before the old one is read: nobody writes to the old one once there is a new one
        except FileNotFoundError:
            newest = None  # renamed, and not yet created again
        yield self._file.read()
        if newest is None:
            return
        if _identity(newest) == _identity(self._file):
            newest.close()
            if self._file.tell() > os.fstat(self._file.fileno()).st_size:  # somebody has emptied it
                self._file.seek(0)
                yield self._file.read()
            return
        yield from reversed(self._replaced_meanwhile(but=_identity(newest)))
        self._file.close()
        self._file = newest
        yield self._file.read()

    def _replaced_meanwhile(self, but: tuple[int, int]) -> list[bytes]:
        """Read the files that were begun after the one that is open and rotated away since, newest first, except `but`.

        Whoever stops the reader for a while (Ctrl-Z, a pager) misses several.
        """
        found, own, is_newer = list[bytes](), _identity(self._file), True
        identities = set()
        for file in self._older_files():
            identities.add(identity := _identity(file))
            is_newer = is_newer and identity != own
            if is_newer and identity not in (*self._read, but):
                found.append(file.read())
        self._read = identities
        return found


def _identity(file: IO[bytes]) -> tuple[int, int]:
    """Return what tells an open file from others, whatever it is called by now."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _from(since: datetime.datetime, lines: list[bytes]) -> list[bytes]:
    """Return the lines from the first one that was written at `since` or later; lines without a time belong to the one
    before."""
    begin = since.strftime("%Y-%m-%d %H:%M:%S").encode()
    times = (_TIME.match(line) for line in lines)
    return lines[next((n for n, time in enumerate(times) if time and time[0] >= begin), len(lines)) :]


def _shown(line: bytes) -> str:
    """Make a line fit for a terminal: libraries may write anything into the log."""
    from swarmtrain.words import one_line

    return one_line(line.decode(errors="replace").rstrip("\r").replace("\t", "    "))
