"""Memory for the long vectors of merges, returned to the system as soon as nobody holds them.

glibc's heap keeps what it has given out when it is freed. Vectors of some megabytes that come and go in several threads
leave holes there that other sizes do not fit into, and a peer's memory grows to twice of what it holds. What training
itself allocates stays with the heap, which is faster for sizes that are the same in each step.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import cast

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 20
"""Vectors below this size come from the heap."""
_HUGE_BYTES = 1 << 24
"""Vectors from this size on ask for huge pages: filling fresh memory page by page takes longer than the arithmetic."""


def empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised vector of `size` numbers."""
    size_bytes = size * dtype.itemsize
    return torch.empty(size, dtype=dtype) if size_bytes < _LEAST_BYTES else _mapped(size_bytes, dtype)


def empty_like(vector: Tensor) -> Tensor:
    """Return an uninitialised vector of this one's length and type."""
    return empty(len(vector), vector.dtype) if vector.device.type == "cpu" else torch.empty_like(vector)


def zeros(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a vector of `size` zeros, which take memory only once they are written to."""
    size_bytes = size * dtype.itemsize
    return torch.zeros(size, dtype=dtype) if size_bytes < _LEAST_BYTES else _mapped(size_bytes, dtype)


def zeros_like(vector: Tensor) -> Tensor:
    """Return zeros of this vector's length and type, which take memory only once they are written to."""
    return zeros(len(vector), vector.dtype) if vector.device.type == "cpu" else torch.zeros_like(vector)


def _mapped(size_bytes: int, dtype: torch.dtype) -> Tensor:
    length = math.ceil(size_bytes / mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(cast(bytearray, pages), dtype=dtype, count=size_bytes // dtype.itemsize)
