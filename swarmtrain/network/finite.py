"""Check that all of many fp32 numbers are finite, without copying them."""

from __future__ import annotations

import numpy as np

__all__ = ["all_finite"]

_PIECE_BYTES = 1024 * 1024
"""Bytes checked together: the check takes a fraction of that as memory, however long the data is."""


def all_finite(data: bytes | bytearray | memoryview) -> bool:
    """Return whether these bytes, as fp32 numbers, are all finite."""
    view = memoryview(data).cast("B")
    pieces = (view[start : start + _PIECE_BYTES] for start in range(0, len(view), _PIECE_BYTES))
    return all(bool(np.isfinite(np.frombuffer(piece, dtype="<f4")).all()) for piece in pieces)
