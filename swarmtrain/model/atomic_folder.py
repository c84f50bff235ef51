"""Write a folder as a whole: under a temporary name, synced, renamed.

A reader sees the old folder or the new one, and never a mixture; only between two renames, for an instant, neither.
A writer holds a lock on its temporary folder, which its death frees: the next one removes what nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarmtrain.errors import UserError
from swarmtrain.model.provenance import description_of


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces the model there once the block has filled it.

    If anything is raised, nothing is replaced or left. Raises UserError when `folder` holds something else than a
    model, and the file system's OSError.
    """
    if folder.exists() and any(folder.iterdir()) and description_of(folder) is None:
        raise UserError(f"{folder} holds other files; give an empty or new folder", code="folder-not-empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.new-"
    _remove_stale(folder.parent, prefix)
    temporary, lock = _held_folder(folder.parent, prefix)
    try:
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.chmod(0o755)
        _put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove temporary folders of writers that were killed."""
    for path in parent.iterdir():
        if path.name.startswith(prefix):
            with contextlib.suppress(OSError):  # another user's, or removed meanwhile
                lock = _locked(path)
                try:
                    shutil.rmtree(path)
                finally:
                    os.close(lock)


def _held_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Create a temporary folder; return it and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        try:
            lock = _locked(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer took it for a stale one, just before it was locked
        except OSError:  # no locks on this file system: nobody removes anything there
            return path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if path.exists():
            return path, lock
        os.close(lock)


def _locked(folder: Path) -> int:
    """Return a descriptor that holds the lock of `folder`. Raises BlockingIOError if another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename to `folder`. The old folder is removed only when the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
