"""Terminal: what is written on it, and the screen of `watch`, which listens for the key q and is restored at the end.

Uses the alternate screen, so that a change of size leaves no debris and the earlier content comes back.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.text import Text

from swarmtrain.cli.follow import Signal
from swarmtrain.words import printable

Redraw = Callable[[int, int, bool], list[Text]]
"""Map (width, height, whether only ASCII can be shown) to lines."""

_QUIT = frozenset(b"qQ\x03\x04")


class TerminalConsole(Console):
    """Console on which no text can control the terminal, whoever wrote it; our own styles are added afterwards."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


@contextmanager
def drawing(console: Console) -> Iterator[Callable[[Redraw], None]]:
    """Yield a function that redraws the whole screen at its current size."""
    from rich.live import Live

    with Live(Text(""), console=console, screen=True, auto_refresh=False) as live:

        def draw(picture: Redraw) -> None:
            width, height = console.size
            live.update(Group(*picture(width, height, console.options.ascii_only)), refresh=True)

        yield draw


@contextmanager
def listening(news: SimpleQueue[Any]) -> Iterator[None]:
    """Put `Signal.DETACH` into `news` for q and for every signal that ends a program, `Signal.REDRAW` for a new size.

    `SimpleQueue`, since a signal handler may fill it while the same thread reads it.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        news.put(Signal.REDRAW if number == signal.SIGWINCH else Signal.DETACH)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        with _keys(news):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keys(news: SimpleQueue[Any]) -> Iterator[None]:
    """Read keys one by one, if standard input and output are terminals."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    modes = termios.tcgetattr(terminal)
    ours = termios.tcgetattr(terminal)
    ours[tty.LFLAG] &= ~(termios.ECHO | termios.ICANON)
    ours[tty.CC][termios.VSUSP] = b"\0"  # no Ctrl-Z: it would leave a shell on our screen
    ended, end = os.pipe()
    thread = threading.Thread(target=_receive, args=(terminal, ended, news), name="keys", daemon=True)
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, ours)
        thread.start()
        yield
    finally:
        os.close(end)
        thread.join(1.0)
        os.close(ended)
        termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)


def _receive(terminal: int, ended: int, news: SimpleQueue[Any]) -> None:
    while True:
        ready, _, _ = select.select([terminal, ended], [], [])
        if ended in ready:
            return
        try:
            keys = os.read(terminal, 64)
        except OSError:
            keys = b""
        if not keys or _QUIT & set(keys):  # b"": the terminal is gone
            news.put(Signal.DETACH)
            return
