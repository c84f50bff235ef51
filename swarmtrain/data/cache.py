"""Arrays kept on disk between starts: one file each, whole or absent, checked when it is read.

A file is a line of JSON (form, dtype, SHA-256 of the content, and what the caller adds), padded to 4096 bytes,
then the array. It is mapped rather than read, so that peers on one machine share its memory. A cache is an
economy: what cannot be read is made again, and what cannot be written is a warning in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["load_array", "store_array"]

_FORM = "swarmtrain-array-1"
_HEADER_BYTES = 4096
_LOG = logging.getLogger(__name__)


def load_array(path: Path) -> tuple[npt.NDArray[Any], dict[str, Any]] | None:
    """(a read-only array (n,), the header) of the file at `path`; None if it is absent or not intact."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
        if not isinstance(header, dict) or header.get("form") != _FORM:
            return None
        array = np.memmap(path, dtype=np.dtype(header["dtype"]), mode="r", offset=_HEADER_BYTES)
        if hashlib.sha256(array.data).hexdigest() != header["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return array.view(np.ndarray), header


def store_array(path: Path, array: npt.NDArray[Any], header: Mapping[str, str | int]) -> None:
    """Write `array` (n,) and `header` to `path`: under a temporary name, synced, then renamed."""
    digest = hashlib.sha256(array.data).hexdigest()
    line = json.dumps({**header, "form": _FORM, "dtype": array.dtype.str, "sha256": digest}).encode()
    assert len(line) < _HEADER_BYTES, "a cache header is small"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(line.ljust(_HEADER_BYTES - 1) + b"\n")
                file.write(array.data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        _LOG.warning("cannot keep %s for the next start: %s", path, error)
