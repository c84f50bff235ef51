"""Processes that a benchmark starts of itself and talks to by lines."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import psutil

from swarmtrain.network.daemon import owned_process_args


class Child:
    """A script that was started with these arguments, and ends with this process, or when `stack` is closed."""

    def __init__(self, script: str, arguments: list[str], stack: ExitStack) -> None:
        command = owned_process_args([sys.executable, script, *arguments])
        pipe, environment = subprocess.PIPE, {**os.environ, "HIVEMIND_LOGLEVEL": "ERROR"}
        self.process = stack.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        )
        stack.callback(self.close)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def line(self, said: str = "") -> str:
        """Send it `said`, and read its next line."""
        assert self.process.stdout is not None and self.process.stdin is not None
        if said:
            self.process.stdin.write(said + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def family(self) -> list[psutil.Process]:
        """Return the process and those it started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]
