"""Child process that serves a peer's page, for `--web` of a command that runs peers.

The command binds the socket before anything else, so that a port that is taken is known at once, and starts the process
when the peer holds its folder. A pipe tells the process that the peer is gone, however it ended.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from swarmtrain.cli.background import say
from swarmtrain.cli.page_address import PageAddress, bound, keep_page, kept_page, new_code, page_lines
from swarmtrain.environment import minimal_environment

if TYPE_CHECKING:
    from swarmtrain.v1.control_pb2 import PeerStatus

LookAt = Callable[[Callable[[], "PeerStatus"]], None]
"""Function that is given a peer's status to look at whenever it wants."""


class PageProcess:
    """Page of the peer in `folder`, from `start` to the end of this process or the block.

    As a context manager it listens at `address` while inside; without an address it does nothing.
    """

    def __init__(self, address: PageAddress | None, folder: Path) -> None:
        self._folder = folder
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._key = ""
        self._address = address

    def __enter__(self) -> PageProcess:
        if self._address is not None:
            port, self._key = kept_page(self._folder)
            self._socket, self._address = bound(self._address, port)
        return self

    def __exit__(self, *error: object) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            process, self._process = self._process, None
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.returncode = 0  # no warning about a child that outlives this one by a few seconds

    def start(self) -> None:
        """Serve the page from now on, and say where. Call it when the peer holds its folder."""
        if self._socket is None or self._process is not None or self._address is None:
            return
        keep_page(self._folder, self._address.port, self._key)
        words = [sys.executable, "-m", "swarmtrain.cli", "watch", "--dir", str(self._folder)]
        words += ["--page-socket", str(self._socket.fileno())]
        with (self._folder / "page.log").open("wb") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=minimal_environment(),
                pass_fds=(self._socket.fileno(),),
                start_new_session=True,  # Ctrl-C ends the peer, whose page then says so
            )
        self._socket.close()
        self._socket = None
        threading.Thread(target=self._watch, args=(self._process,), name="page", daemon=True).start()
        code = new_code()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{code}\n".encode())
            self._process.stdin.flush()
        for line in page_lines(self._address, code):
            say(line)

    def started_by(self, look_at: LookAt) -> LookAt:
        """Return a function that starts the page and then calls `look_at`, for `PeerSettings.show_status`."""

        def show_status(status: Callable[[], PeerStatus]) -> None:
            self.start()
            look_at(status)

        return show_status

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() and self._process is process:
            say(f"its page has ended by an error, which is in {self._folder / 'page.log'}; the peer runs on without it")
