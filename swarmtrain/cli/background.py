"""`--background`: run a peer as a process that outlives the terminal.

The command starts itself again in a new session, reads the new process's events over a pipe until the peer has joined
or failed, prints how to control it, and ends. A pipe is used because it also ends when the process dies. The new
process writes nothing else to it: its log is in its folder, and its standard output and error follow that log.
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

from swarmtrain.cli.output import echo
from swarmtrain.environment import BY_TRACKER, PEER, minimal_environment
from swarmtrain.errors import INTERRUPTED, with_code
from swarmtrain.words import one_line

if TYPE_CHECKING:
    import subprocess

    from swarmtrain.events import Event

_PIPE = "SWARMTRAIN_BACKGROUND"  # in the new process's environment: the descriptor of the pipe
_LAST_WORDS_BYTES = 4000


# ---------------------------------------------------------------- in the new process


@functools.cache
def _pipe() -> int | None:
    number = os.environ.pop(_PIPE, "")  # removed, so that no child inherits it, the network daemon included
    if not number.isdigit():
        return None
    os.set_inheritable(int(number), False)
    return int(number)


def is_the_background() -> bool:
    """Return whether `start_in_background` started this process."""
    return _pipe() is not None


def outputs_to_log() -> tuple[int, ...]:
    """Return the descriptors that must follow the log: in the background, standard output and error."""
    return (1, 2) if is_the_background() else ()


def report(event: Event) -> None:
    """Send an event to the waiting command, which stops waiting once the peer is up."""
    from swarmtrain.events import to_json_line

    _write(to_json_line(event))
    if _is_up(event):
        _close()


def report_folder(folder: Path) -> None:
    """Send the peer's folder to the waiting command."""
    _write(json.dumps({"folder": str(folder.absolute())}))


def say(words: str) -> None:
    """Print a line on standard error for the person who starts a peer. In the background, the command that waits prints
    it."""
    if is_the_background():
        _write(json.dumps({"said": words}))
    else:
        echo(words, err=True)


def _write(line: str) -> None:
    descriptor = _pipe()
    assert descriptor is not None, "asked for in the background only"
    with contextlib.suppress(OSError):  # closed, or the reader has gone away
        os.write(descriptor, line.encode() + b"\n")


@functools.cache
def _close() -> None:
    """End the pipe, so that the waiting command ends. From now on everything is in the log."""
    descriptor = _pipe()
    assert descriptor is not None, "asked for in the background only"
    # Replaced and not closed: another file would take its number.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def _is_up(event: Event) -> bool:
    return event.event in ("invite", "paused")  # a bootstrap invites once it serves, a volunteer once it has joined


# ---------------------------------------------------------------- in the one that waits


def start_in_background(show: Callable[[Event], None], by_folder: bool) -> int:
    """Start this command line again in the background; return the exit code once the peer has joined or failed.

    `show` receives its events until then. `by_folder`: the person named the folder, not the peer.
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
            env={**minimal_environment(" ".join([PEER, *BY_TRACKER.values()])), _PIPE: str(writing)},
            start_new_session=True,
        )
        os.close(writing)
        peer = _Started(process, by_folder)
        with os.fdopen(reading, "rb") as pipe:
            try:
                peer.listen(pipe, show)
                return peer.tell_up() if peer.up else peer.tell_end(early)
            except KeyboardInterrupt:
                echo(f"stopped waiting: it keeps running in the background, process {process.pid}{peer.log_words()}")
                process.returncode = 0  # it is nobody's child once we have ended
                return INTERRUPTED


class _Started:
    """Process that was started in the background, as far as it has reported."""

    def __init__(self, process: subprocess.Popen[bytes], by_folder: bool) -> None:
        self.process = process
        self.by_folder = by_folder
        self.folder: Path | None = None
        self.name = ""
        self.up: Event | None = None
        self.trains = False
        self.error = ""

    def listen(self, pipe: IO[bytes], show: Callable[[Event], None]) -> None:
        """Read the process's reports until the peer is up or has ended."""
        from swarmtrain.events import ErrorEvent, parse_event

        for line in pipe:
            try:
                if self.folder is None and line.startswith(b'{"folder"'):
                    self.folder = Path(json.loads(line)["folder"])
                    continue
                if line.startswith(b'{"said"'):
                    echo(json.loads(line)["said"], err=True)
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
        """Print how to watch and end the peer; returns the exit code."""
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
        echo("\n".join(rows), err=True)
        self.process.returncode = 0  # no warning about a child that runs on: it is meant to
        return 0

    def tell_end(self, early: IO[bytes]) -> int:
        """Print why the peer ended before it was up; returns its exit code."""
        code = self.process.wait()
        if self.error:
            echo(one_line(f"error: {self.error}"), err=True)
        elif code:
            early.seek(max(0, early.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            words = " ".join(early.read().decode(errors="replace").split())
            ended = f"signal {-code}" if code < 0 else f"code {code}"
            said = f": {words}" if words else ""
            line = f"error: the process in the background ended with {ended}{said}{self.log_words()}"
            echo(with_code(line, "background-ended"), err=True)
        return 1 if code < 0 else code
