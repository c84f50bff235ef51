"""Fixtures of the tests with real processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm import Swarm


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """A shell starts what runs in the background deaf to Ctrl-C, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """Processes below the test's folder; all have ended when the test has."""
    with Swarm(tmp_path) as swarm:
        yield swarm
