"""`swarmtrain logs`: print the last lines of a peer's log, and follow it."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from swarmtrain.cli.common import WhichPeer, example

__all__ = ["LogReader", "command"]

_LINES = 100
_MAX_LINES = 10**6
_READ_EVERY_S = 0.5


@click.command(
    name="logs", epilog=example("swarmtrain logs", "swarmtrain logs anna --lines 20", "swarmtrain logs anna -f")
)
@click.argument("name", metavar="[NAME]", default="")
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="The peer's folder, or one that holds several peers' folders.  [default: the folder of this user's peers]")  # fmt: skip
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come, until the peer ends.")
@click.option("-n", "--lines", type=click.IntRange(0, _MAX_LINES), default=_LINES, show_default=True, metavar="N", help="Number of existing lines to print.")  # fmt: skip
def command(name: str, directory: Path | None, follow: bool, lines: int) -> None:
    """Print the last lines of a peer's log.

    NAME is as for `status`. The log is `peer.log` in the peer's folder, and stays there after the peer has ended. With
    -f, press Ctrl-C to stop reading; the peer keeps running.
    """
    import sys

    from swarmtrain.cli.peers import find
    from swarmtrain.peer.control.logs import LOG_NAME

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    folder = find(WhichPeer(name=name, directory=directory)).folder
    assert folder is not None, "without an address peers are found by their folders"
    try:
        for line in _read(folder / LOG_NAME, lines, follow):
            click.echo(line)
    except KeyboardInterrupt:
        return


def _read(path: Path, lines: int, follow: bool) -> Iterator[str]:
    """Yield the last `lines` lines of the log, and the new ones if `follow`. Raises UserError if it cannot be read.

    What goes wrong while a line is printed is not caught here: a closed pipe is no fault of the log.
    """
    import threading

    from swarmtrain.errors import UserError
    from swarmtrain.peer.lifecycle.folder_lock import Holder, holder

    try:
        with LogReader(path) as log:
            yield from log.last_lines(lines, only_whole=follow)
            if follow:
                yield from log.new_lines(
                    lives=lambda: holder(path.parent) is not Holder.NOBODY,
                    pause=lambda: threading.Event().wait(_READ_EVERY_S),
                )
    except OSError as error:
        raise UserError(
            f"{path}: no log to read ({error.strerror}); give the peer's folder with --dir", code="no-log"
        ) from None


class LogReader:
    """Reader of a log from its last lines on, while it is written and rotated."""

    def __init__(self, path: Path) -> None:
        """Open the log. Raises OSError if there is none."""
        self._path = path
        self._file = path.open("rb")
        self._begun = b""
        """Beginning of a line that is not written to its end yet."""

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def last_lines(self, number: int, *, only_whole: bool = False) -> list[str]:
        """Read the last `number` lines, from older files too if the newest has fewer.

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
        return list(map(_shown, found))

    def _older(self) -> list[Path]:
        """Return the older log files, newest first. A person's `peer.log.1.gz` is none."""
        name = re.compile(re.escape(self._path.name) + r"\.([0-9]{1,9})")
        numbered = ((name.fullmatch(path.name), path) for path in self._path.parent.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]

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
        """Read what is new in the log file, and in the one that has replaced it by rotation."""
        try:
            newest = self._path.open(
                "rb"
            )  # before the old one is read: nobody writes to the old one once there is a new one
        except FileNotFoundError:
            newest = None  # renamed, and not yet created again
        yield self._file.read()
        if newest is None:
            return
        if os.path.samestat(os.fstat(self._file.fileno()), os.fstat(newest.fileno())):
            newest.close()
            return
        self._file.close()
        self._file = newest
        yield self._file.read()


def _shown(line: bytes) -> str:
    """Make a line fit for a terminal: libraries may write anything into the log."""
    from swarmtrain.words import one_line

    return one_line(line.decode(errors="replace").rstrip("\r").replace("\t", "    "))
