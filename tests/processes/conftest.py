"""Fixtures of the tests with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm import Swarm


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """Processes below the test's folder; all have ended when the test has."""
    with Swarm(tmp_path) as swarm:
        yield swarm
