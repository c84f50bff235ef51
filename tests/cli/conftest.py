"""Fixtures of the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_peer import FakePeer, living


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[FakePeer]:
    """Start a fake peer in this process that can be watched and asked."""
    with living(FakePeer(tmp_path / "anna").start()) as peer:
        yield peer
