"""Logging of a peer: `peer.log` in its folder for later, and the terminal for what was asked for.

The file has swarmtrain's messages from info on, the events as a person reads them, and warnings of hivemind, libp2p
(its daemon included) and others. It is rotated; a full disk costs lines, never the training. The terminal has
swarmtrain's messages only, unless everything is asked for.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO, TypeVar

from swarmtrain.errors import Problem, RunTimeError, SwarmtrainError, with_code
from swarmtrain.events import Event, WarningEvent, in_words
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.words import one_line

LOG_NAME = "peer.log"
LOG_MAX_BYTES = 5_000_000
LOGS_KEPT = 3  # older files, besides the current one

_TORCH_HAS_NO_MEMORY = "can't allocate memory"
_OURS = "swarmtrain"
_log = logging.getLogger(__name__)
_events = logging.getLogger(f"{_OURS}.event")
_E = TypeVar("_E", bound=Event)


class LogFormatter(logging.Formatter):
    """Formats time, level, short name and message: `2026-11-25 16:40:07.123 warning libp2p: ...`.

    Text from other peers cannot forge a line: control characters are escaped, and further lines are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        first, *more = self._text(record).split("\n")
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        level = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "error"}.get(record.levelno, "info")
        name = _short_name(record.name) if _is_ours(record) else record.name.partition(".")[0]
        head = f"{clock}.{int(record.msecs):03d} {level:<7} {name}: {one_line(first)}"
        return "\n".join([head, *(f"    {one_line(line)}" for line in more)])

    def _text(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _short_name(name: str) -> str:
    """Return a logger's name below its folder: `rounds.runner` for `swarmtrain.network.rounds.runner`."""
    return ".".join(name.split(".")[2:]) or name.rpartition(".")[2]


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == _OURS


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at that moment, since a display on the same terminal replaces it."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.setLevel(level)
        self.setFormatter(LogFormatter())
        self.addFilter(self._is_wanted)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None: ...

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        """Return whether a record belongs on the terminal.

        Events and final errors are shown there anyway; others' messages only if everything is asked for.
        """
        return record.name != _events.name and (self.level <= logging.DEBUG or _is_ours(record))


class _LogFile(RotatingFileHandler):
    """Rotated log file. `descriptors` of this process, such as standard error, follow it from file to file."""

    def __init__(self, path: Path, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors
        super().__init__(
            path, maxBytes=LOG_MAX_BYTES, backupCount=LOGS_KEPT, encoding="utf-8", errors="backslashreplace", delay=True
        )
        self.setFormatter(LogFormatter())

    def _open(self) -> io.TextIOWrapper:
        stream = super()._open()
        for descriptor in self._descriptors:
            os.dup2(stream.fileno(), descriptor)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        """Drop the line, as the disk is full or the folder gone; the next line opens the file again."""
        self._drop_stream()

    def close(self) -> None:
        self._drop_stream()
        super().close()

    def _drop_stream(self) -> None:
        stream, self.stream = self.stream, None  # opened again at the next line
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()


def log_to_terminal(level: str) -> None:
    """Send swarmtrain's messages from `level` on to standard error; with "debug" everybody's, and into the file too."""
    log_to_file_only(level)
    logging.root.addHandler(_Terminal(logging.getLevelName(level.upper())))


def log_to_file_only(level: str) -> None:
    """Send nothing to standard error; with "debug" everything goes into the file."""
    for handler in [handler for handler in logging.root.handlers if isinstance(handler, _Terminal)]:
        logging.root.removeHandler(handler)
    _set_levels(level == "debug")
    logging.captureWarnings(True)


def _set_levels(everything: bool) -> None:
    logging.root.setLevel(logging.DEBUG if everything else logging.WARNING)
    logging.getLogger(_OURS).setLevel(logging.DEBUG if everything else logging.INFO)


@contextmanager
def peer_log(folder: Path, descriptors: Sequence[int] = ()) -> Iterator[None]:
    """Write `peer.log` in `folder` while inside the context, including the error that ends it.

    `descriptors` are redirected into the file too. A bug becomes a `RunTimeError` that names the file.
    """
    if logging.getLogger(_OURS).level == logging.NOTSET:
        _set_levels(everything=False)  # another program that uses swarmtrain with logging of its own
    handler = _LogFile(folder / LOG_NAME, descriptors)
    logging.root.addHandler(handler)
    hook, threading.excepthook = threading.excepthook, _thread_ended
    try:
        yield
    except SwarmtrainError as error:
        _events.error("error: %s", with_code(str(error), error.code))
        raise
    except StopTraining:
        raise
    except Exception as error:
        _events.critical("a bug", exc_info=error)
        raise RunTimeError(bug_in_words(error, folder / LOG_NAME)) from error
    finally:
        threading.excepthook = hook
        logging.root.removeHandler(handler)
        handler.close()


def bug_in_words(error: Exception, path: Path | str) -> Problem:
    """Return one line for a person who met a bug with its traceback in `path`, or whose machine lacks memory."""
    if isinstance(error, MemoryError) or _TORCH_HAS_NO_MEMORY in str(error):
        return Problem(
            "there is not enough memory here for this peer's part of the run: `swarmtrain check RUN.toml` says what it "
            f"takes; close other programs, or join a run with more stages; what happened is in {path}",
            "too-little-memory",
        )
    return Problem(
        f"a bug in swarmtrain, not yours ({type(error).__name__}: {str(error)[:200]}); what happened is in {path}: "
        "please report it with that file",
        "bug",
    )


def _thread_ended(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        name = failure.thread.name if failure.thread is not None else "unknown"
        _log.error("thread %s ended by an error", name, exc_info=failure.exc_value)


def logged(emit: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return an `emit` that also logs each event."""
    return _Logged(emit)


class _Logged:
    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self.identify: Callable[[str, str], None] = getattr(emit, "identify", lambda peer, name: None)

    def __call__(self, event: Event) -> None:
        self._emit(log_event(event))


def log_event(event: _E) -> _E:
    """Log the event as a line, and return it."""
    level = logging.WARNING if isinstance(event, WarningEvent) else logging.INFO
    _events.log(level, "%s", in_words(event))
    return event
