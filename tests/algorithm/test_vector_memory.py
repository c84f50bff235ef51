"""Vectors whose memory goes back to the system."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from swarmtrain.algorithm import memory

SIZE = 8_000_000


def test_what_they_are() -> None:
    for size in (0, 5, 300_000, SIZE):
        assert memory.empty(size).shape == (size,)
        assert not memory.zeros(size).any()
    assert memory.empty(300_001, torch.uint8).dtype is torch.uint8
    like = torch.zeros(7, dtype=torch.float64)
    assert memory.empty_like(like).dtype is memory.zeros_like(like).dtype is torch.float64


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_their_memory_comes_when_it_is_written_to_and_goes_with_them() -> None:
    before = resident_bytes()
    vector = memory.zeros(SIZE)
    assert resident_bytes() - before < SIZE
    vector.fill_(1.0)
    assert resident_bytes() - before > 3 * SIZE
    del vector
    gc.collect()
    assert resident_bytes() - before < SIZE
