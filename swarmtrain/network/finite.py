"""Looking whether all of many numbers are finite, without a copy of them."""

from __future__ import annotations

import numpy as np

__all__ = ["all_finite"]

_PIECE_BYTES = 1024 * 1024
"""Bytes looked at together: what that takes of memory is a fraction of it, whatever the whole has."""


def all_finite(data: bytes | bytearray | memoryview) -> bool:
    """Whether these bytes, as fp32 numbers, are all finite; looked at piece by piece, without a copy of them."""
    view = memoryview(data).cast("B")
    pieces = (view[start : start + _PIECE_BYTES] for start in range(0, len(view), _PIECE_BYTES))
    return all(bool(np.isfinite(np.frombuffer(piece, dtype="<f4")).all()) for piece in pieces)
