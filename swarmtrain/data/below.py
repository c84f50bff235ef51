"""Restrict which files a run file may name: only those below one folder, with symbolic links resolved.

The run file comes from a stranger. Every file that is opened because of it is checked here first (decision 5).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from swarmtrain.errors import RunFileError

NOWHERE = Path(os.devnull)
"""Folder for a run that reads no files: nothing is below it."""


def is_plain_name(name: str) -> bool:
    """Return whether `name` is a relative path without `..`, which no library could take for a URL or a home folder."""
    return not (
        re.search(r"://|::|[\\\x00-\x1f\x7f]", name)
        or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
        or name.startswith(("/", "~"))
        or ".." in name.split("/")
    )


def below(base: Path, path: Path, key: str) -> Path:
    """Return `path` with its links resolved. Raises RunFileError, which names `key`, if the result is not below
    `base`."""
    try:
        resolved = path.resolve()
        if resolved.is_relative_to(base.resolve()):
            return resolved
    except (OSError, RuntimeError, ValueError) as error:  # a cycle of links; a name with a zero byte
        raise RunFileError(f"{key}: {path} cannot be read: {error}; correct the path", code="file-unreadable") from None
    raise RunFileError(
        f"{key}: {path} leads to {resolved}, outside {base}; it is not read: move it below, or leave it out",
        code="path-outside",
    )
