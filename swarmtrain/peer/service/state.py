"""What a service does, as the system that starts it tells; and the commands by which systems are asked."""

from __future__ import annotations

import enum
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Answer", "Ask", "InstalledService", "ServicePhase", "ServiceState", "run_command"]


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def reason(self) -> str:
        """What it complained about, in one line."""
        return " ".join((self.err or self.out).split())[:300] or f"it ended with code {self.code}"


Ask = Callable[[Sequence[str]], Answer]
"""Runs a command and waits for it."""


def run_command(words: Sequence[str]) -> Answer:
    """Run a command, and return what it said; code 127 if it is not there."""
    environment = dict(os.environ, LC_ALL="C", SYSTEMD_PAGER="", SYSTEMD_COLORS="0")
    runtime = Path(f"/run/user/{os.getuid()}")
    if "XDG_RUNTIME_DIR" not in environment and runtime.is_dir():  # after `su`, and in jobs of cron
        environment["XDG_RUNTIME_DIR"] = str(runtime)
    try:
        done = subprocess.run(
            list(words), capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, check=False
        )
    except OSError as error:
        return Answer(127, err=f"{words[0]}: {error.strerror}")
    return Answer(done.returncode, done.stdout, done.stderr)


class ServicePhase(enum.Enum):
    """What a service does now."""

    RUNNING = "running"
    STARTING = "starting"
    WAITING = "waiting to be started again"
    STOPPING = "stopping"
    ENDED = "ended"
    FAILED = "failed"
    NOT_STARTED = "not started"


@dataclass(frozen=True, kw_only=True)
class ServiceState:
    """State of a service, as the system tells it."""

    phase: ServicePhase
    is_enabled: bool
    """True if the system starts it by itself."""
    starts_at_boot: bool
    """True if that is when the machine starts, False if it is when the user logs in."""
    pid: int = 0
    since: float | None = None
    """Unix time of its last change; None if it is not known."""
    restarts: int = 0
    """Times that it was started again after a failure."""
    last_exit: str = ""
    """How its last process ended, in a few words; empty if none has."""
    exit_code: int | None = None
    """Exit code of that process; None if it was killed, or none has ended."""


@dataclass(frozen=True, kw_only=True)
class InstalledService:
    """Service of swarmtrain that is installed for this user."""

    name: str
    path: Path
    """Its file."""
    folder: Path
    """Folder of the peer that it starts."""
