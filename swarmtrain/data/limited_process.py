"""Process that computes with a stranger's file: it has little memory and little time.

The peer writes a line of JSON for each question to the process's standard input and reads a line back. The process
imports neither torch nor anything of the network, so it starts in a fraction of a second.
"""

from __future__ import annotations

import json
import logging
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from swarmtrain.environment import minimal_environment
from swarmtrain.words import one_line

_log = logging.getLogger(__name__)
_START_S = 60.0
"""Time that Python has to start, on a busy machine."""
_MOST_ANSWER_BYTES = 1 << 27

Answer: TypeAlias = dict[str, Any]


class ProcessLimitError(Exception):
    """Raised when a process takes more time or memory than it may; one line says how much that is."""


class LimitedProcess:
    """Process of a module whose `main` calls `serve`, from its first answer to `close`, or to its first failure."""

    def __init__(self, module: str, task: Mapping[str, Any], limit_s: float, memory_bytes: int) -> None:
        """Start it with its task, for whose answer see `first`. Each question may take `limit_s` seconds.

        Raises ProcessLimitError.
        """
        self.limit_s, self.memory_bytes = limit_s, memory_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=minimal_environment(),
            process_group=0,  # Ctrl-C is for the peer, which ends it
        )
        assert self._process.stdout is not None
        self._lock = threading.Lock()
        self._answers = selectors.DefaultSelector()
        """Waits for the process to answer."""
        self._answers.register(self._process.stdout, selectors.EVENT_READ)
        limits = {"memory_bytes": memory_bytes, "limit_s": 2 * limit_s}
        self.first = self.ask({**task, **limits}, _START_S + limit_s)
        """What it answers to its task."""

    def ask(self, question: Mapping[str, Any], limit_s: float | None = None) -> Answer:
        """Return the process's answer; `error` in it says what went wrong.

        Raises ProcessLimitError if the process ends instead, or is ended for its time.
        """
        limit_s = self.limit_s if limit_s is None else limit_s
        process, line = self._process, b""
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                if self._answers.select(limit_s):
                    line = process.stdout.readline(_MOST_ANSWER_BYTES)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                _log.debug("the process has ended: %r", error)
        if not line.endswith(b"\n"):
            self.close()
            most = f"{self.memory_bytes >> 20} MiB of memory"
            raise ProcessLimitError(f"it takes more than {limit_s:g} s, or more than {most}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, if it runs."""
        self._answers.close()
        self._process.kill()
        self._process.communicate()


# ---------------------------------------------------------------- in the process


def _limit_memory(most_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not a system that has limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    except (OSError, ValueError):  # macOS knows the limit and does not set it
        _log.debug("memory is not limited: it was %s", soft)


def _end_after(limit_s: float) -> None:
    """End this process in `limit_s` seconds, for a peer that is no longer there to do it; 0 takes that back."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, limit_s)


def serve(prepare: Callable[[Answer], tuple[Answer, Callable[[Answer], Answer] | None]]) -> None:
    """Read a task, then questions, and write what is answered, until the input ends.

    `prepare` takes the task, and returns its answer and the function that answers questions, if it can.
    """
    lines, out = sys.stdin.buffer, sys.stdout
    question = json.loads(lines.readline())
    _limit_memory(question["memory_bytes"])
    limit_s, respond = question["limit_s"], None
    while True:
        _end_after(limit_s + (_START_S if respond is None else 0.0))
        try:
            if respond is None:
                answer, respond = prepare(question)
            else:
                answer = respond(question)
        except MemoryError:
            return
        except BaseException as error:  # a panic of a library in Rust is no Exception
            _log.debug("no answer", exc_info=error)
            answer = {"error": one_line(str(error))[:200] or type(error).__name__}
        _end_after(0)
        out.write(json.dumps(answer) + "\n")
        out.flush()
        line = lines.readline()
        if not line:
            return
        question = json.loads(line)
