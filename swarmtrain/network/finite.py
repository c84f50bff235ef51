"""Check that all of many fp32 numbers are finite, or not negative, without copying them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_PIECE_BYTES = 1024 * 1024
"""Bytes checked together: the check takes a fraction of that as memory, however long the data is."""


def all_finite(data: bytes | bytearray | memoryview) -> bool:
    """Return whether these bytes, as fp32 numbers, are all finite."""
    return all(bool(np.isfinite(piece).all()) for piece in _pieces(data))


def none_negative(data: bytes | bytearray | memoryview) -> bool:
    """Return whether none of these bytes, as fp32 numbers, is below 0 or no number."""
    return all(bool((piece >= 0).all()) for piece in _pieces(data))


def _pieces(data: bytes | bytearray | memoryview) -> Iterator[np.ndarray]:
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _PIECE_BYTES):
        yield np.frombuffer(view[start : start + _PIECE_BYTES], dtype="<f4")
