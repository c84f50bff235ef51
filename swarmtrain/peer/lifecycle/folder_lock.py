"""Find out who holds a peer's folder. Imports nothing of swarmtrain: commands that only look use it, and must be
quick.
"""

from __future__ import annotations

import enum
import fcntl
import os
from pathlib import Path


class Holder(enum.Enum):
    """Holder of a folder, as its lock says."""

    NOBODY = "nobody"
    RUNNING = "a running peer"
    FOREIGN = "another user: it cannot be seen whether it runs"


def holder(path: Path) -> Holder:
    """Return who holds the folder at `path`."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY)
    except PermissionError:
        return Holder.FOREIGN
    except OSError:
        return Holder.NOBODY
    try:
        # A shared lock: two commands that look at the same moment must not take each other for a peer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return Holder.RUNNING
    finally:
        os.close(descriptor)
    return Holder.NOBODY


def is_lock_of(path: Path, descriptor: int) -> bool:
    """Return whether the open file is the lock of the folder at `path`, not one that has been removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), (path / "lock").stat())
    except FileNotFoundError:
        return False


def is_in_use(path: Path) -> bool:
    """Return whether a running peer holds the folder."""
    return holder(path) is Holder.RUNNING


def holder_pid(path: Path) -> int:
    """Return the id of the process that holds the folder; 0 if none does or it has not written it yet."""
    try:
        return int((path / "lock").read_text()) if is_in_use(path) else 0
    except (OSError, ValueError):
        return 0
