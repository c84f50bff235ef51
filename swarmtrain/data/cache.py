"""Keep arrays on disk between starts: one file each, complete or absent, verified when it is read.

A file is a line of JSON (form, dtype, SHA-256 of the content, and the caller's fields), padded to 4096 bytes, then the
array. It is mapped instead of read, so that peers on one machine share its memory. A cache only saves time: an
unreadable file is made again, and an unwritable one is a warning in the log.
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

_FORM = "swarmtrain-array-1"
_HEADER_BYTES = 4096
_LOG = logging.getLogger(__name__)


def load_array(path: Path) -> tuple[npt.NDArray[Any], dict[str, Any]] | None:
    """Return (read-only array (n,), header) of the file at `path`; None if it is absent or damaged."""
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
    """Write `array` (n,) and `header` to `path`: to a temporary name, synced, then renamed."""
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
