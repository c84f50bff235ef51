"""`--background`: the peer as a process of its own, which outlives the terminal.

The command starts itself again in a session of its own, reads the new process's events over a pipe until it has
joined or failed, says how to go on, and ends. The pipe tells more than files could: it ends when the process does.
The new process writes nothing else to it; its log is in its folder, and what it writes besides follows that log.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from swarmtrain.errors import with_code

if TYPE_CHECKING:
    import subprocess

    from swarmtrain.events import Event

__all__ = ["is_the_background", "outputs_to_log", "report", "report_folder", "say", "start_in_background"]

_PIPE = "SWARMTRAIN_BACKGROUND"  # in the new process's environment: the descriptor of the pipe
_INTERRUPTED = 130
_LAST_WORDS_BYTES = 4000


# ---------------------------------------------------------------- in the new process


@functools.cache
def _pipe() -> int | None:
    number = os.environ.pop(_PIPE, "")  # nobody else's business: not the daemon's either
    if not number.isdigit():
        return None
    os.set_inheritable(int(number), False)
    return int(number)


def is_the_background() -> bool:
    """Whether this process was started by `start_in_background`."""
    return _pipe() is not None


def outputs_to_log() -> tuple[int, ...]:
    """The descriptors that are to follow the log: in the background, standard output and error."""
    return (1, 2) if is_the_background() else ()


def report(event: Event) -> None:
    """Tell whoever waits; nobody does any more once the peer is up."""
    from swarmtrain.events import to_json_line

    _write(to_json_line(event))
    if _is_up(event):
        _close()


def report_folder(folder: Path) -> None:
    """Tell whoever waits where the peer lives."""
    _write(json.dumps({"folder": str(folder.absolute())}))


def say(words: str) -> None:
    """Say a line to the person who starts a peer, on standard error: in the background, to whoever waits there."""
    if is_the_background():
        _write(json.dumps({"said": words}))
    else:
        click.echo(words, err=True)


def _write(line: str) -> None:
    descriptor = _pipe()
    assert descriptor is not None, "asked for in the background only"
    with contextlib.suppress(OSError):  # closed, or the reader has gone away
        os.write(descriptor, line.encode() + b"\n")


@functools.cache
def _close() -> None:
    """Let whoever waits go on: whatever happens from now on is in the log."""
    descriptor = _pipe()
    assert descriptor is not None, "asked for in the background only"
    # Not closed: another file would take its number.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def _is_up(event: Event) -> bool:
    return event.event in ("invite", "paused")  # a bootstrap invites once it serves, a volunteer once it has joined


# ---------------------------------------------------------------- in the one that waits


def start_in_background(show: Callable[[Event], None], by_folder: bool) -> int:
    """Start this command line again in the background; the exit code, once the peer has joined or failed.

    `show` gets its events until then. `by_folder`: the person named the folder, and not the peer.
    """
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as early:  # what is written before there is a log
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=early,
            stderr=early,
            pass_fds=(writing,),
            env={**os.environ, _PIPE: str(writing)},
            start_new_session=True,
        )
        os.close(writing)
        peer = _Started(process, by_folder)
        with os.fdopen(reading, "rb") as pipe:
            try:
                peer.listen(pipe, show)
                return peer.tell_up() if peer.up else peer.tell_end(early)
            except KeyboardInterrupt:
                click.echo(
                    f"stopped waiting: it keeps running in the background, process {process.pid}{peer.log_words()}"
                )
                process.returncode = 0  # it is nobody's child once we have ended
                return _INTERRUPTED


class _Started:
    """The process in the background, as far as it has told."""

    def __init__(self, process: subprocess.Popen[bytes], by_folder: bool) -> None:
        self.process = process
        self.by_folder = by_folder
        self.folder: Path | None = None
        self.name = ""
        self.up: Event | None = None
        self.trains = False
        self.error = ""

    def listen(self, pipe: IO[bytes], show: Callable[[Event], None]) -> None:
        """Read what it tells until it is up or has ended."""
        from swarmtrain.events import ErrorEvent, parse_event

        for line in pipe:
            try:
                if self.folder is None and line.startswith(b'{"folder"'):
                    self.folder = Path(json.loads(line)["folder"])
                    continue
                if line.startswith(b'{"said"'):
                    click.echo(json.loads(line)["said"], err=True)
                    continue
                event = parse_event(line)
            except ValueError:  # torn: it was killed while it wrote
                continue
            self.name = event.name or self.name
            self.trains = self.trains or event.event in ("joined", "paused")
            if isinstance(event, ErrorEvent):
                self.error = with_code(event.message, event.code)
            show(event)
            if _is_up(event):
                self.up = event
                return

    def log_words(self) -> str:
        return f"; its log is {self.folder / 'peer.log'}" if self.folder is not None else ""

    def tell_up(self) -> int:
        """How to go on."""
        assert self.folder is not None and self.up is not None
        which = f"--dir {shlex.quote(str(self.folder))}" if self.by_folder else self.folder.name
        state = "is paused" if self.up.event == "paused" else "runs"
        rows = [
            f"{self.name} {state} in the background, process {self.process.pid}",
            f"  its log   {self.folder / 'peer.log'}",
            f"  look      swarmtrain watch {which}",
            *([f"  pause     swarmtrain pause {which}"] if self.trains else []),
            f"  end       swarmtrain leave {which}",
        ]
        click.echo("\n".join(rows), err=True)
        self.process.returncode = 0  # it is nobody's child once we have ended
        return 0

    def tell_end(self, early: IO[bytes]) -> int:
        """Why it ended before it was up; its exit code."""
        code = self.process.wait()
        if self.error:
            click.echo(f"error: {self.error}", err=True)
        elif code:
            early.seek(max(0, early.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            words = " ".join(early.read().decode(errors="replace").split())
            ended = f"signal {-code}" if code < 0 else f"code {code}"
            said = f": {words}" if words else ""
            click.echo(f"error: the process in the background ended with {ended}{said}{self.log_words()}", err=True)
        return 1 if code < 0 else code
