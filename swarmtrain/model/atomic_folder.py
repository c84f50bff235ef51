"""Write a folder as a whole: under a temporary name, synced, renamed.

A reader sees the old folder or the new one, and never a mixture; only between two renames, for an instant, neither.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarmtrain.errors import UserError

__all__ = ["atomic_folder"]


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces the model there once the block has filled it.

    If anything is raised, nothing is replaced or left. Raises UserError when `folder` holds something else than a
    model, and the file system's OSError.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"{folder} holds other files; give an empty or new folder", code="folder-not-empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
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
