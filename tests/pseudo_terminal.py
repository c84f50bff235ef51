"""Command in its own pseudo-terminal: its screen, key presses, and how it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import pyte

LIMIT_S = 60.0


class PseudoTerminal:
    """Command in a terminal of `columns` by `lines`; a context manager that kills what is left of it."""

    def __init__(
        self, command: Sequence[str], *, columns: int = 80, lines: int = 24, environment: Mapping[str, str]
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self._news = threading.Condition()
        self._master, slave = pty.openpty()
        self._set_size(columns, lines)
        own = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
        self.modes = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**own, "TERM": environment.get("TERM", "xterm-256color")},
            start_new_session=True,
        )
        self._slave = slave  # kept open, so that the last output can be read after the command has ended
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)
        self._reader.start()

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._slave)
        self._reader.join(10)
        os.close(self._master)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Change the window's size, as a person does with the mouse."""
        with self._news:
            self.screen.resize(lines, columns)
        self._set_size(columns, lines)
        os.kill(self.process.pid, 28)  # SIGWINCH, which the kernel does not send: it is not the controlling terminal

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                return
            if not data:
                return
            with self._news:
                self.raw += data
                self._stream.feed(data)
                self._news.notify_all()

    def press(self, keys: bytes) -> None:
        """Type keys."""
        os.write(self._master, keys)

    def lines(self) -> list[str]:
        """Return the lines of the screen, without trailing blanks."""
        with self._news:
            return [line.rstrip() for line in self.screen.display]

    def text(self) -> str:
        """Return the screen as one text; wrapped lines stay wrapped."""
        return "\n".join(self.lines())

    def wait_for(self, condition: Callable[[str], object], what: str) -> str:
        """Wait until `condition` holds for the screen; returns the screen."""
        give_up_s = time.monotonic() + LIMIT_S
        while True:
            text = self.text()
            if condition(text):
                return text
            assert time.monotonic() < give_up_s, f"no {what}; exit code {self.process.poll()}:\n{text}"
            if self.process.poll() is not None:
                give_up_s = min(give_up_s, time.monotonic() + 2)
            with self._news:
                self._news.wait(0.1)

    def wait_text(self, expected: str) -> str:
        """Wait until the screen has `expected`; returns the screen."""
        return self.wait_for(lambda text: expected in text, repr(expected))

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(LIMIT_S)

    def modes_now(self) -> list[object]:
        """Return the terminal's modes."""
        return termios.tcgetattr(self._slave)
