"""What a run file may name on a disk: something below one folder, symbolic links resolved, and nothing else.

The run file comes from a stranger. Whatever is opened because of it goes through here first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from swarmtrain.errors import RunFileError

__all__ = ["NOWHERE", "below", "is_plain_name"]

NOWHERE = Path(os.devnull)
"""A folder for a run that reads none: nothing is below it."""


def is_plain_name(name: str) -> bool:
    """Says that `name` is a relative path without `..`, and nothing that a library could take for a URL or a home."""
    return not (
        re.search(r"://|::|[\\\x00-\x1f\x7f]", name)
        or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
        or name.startswith(("/", "~"))
        or ".." in name.split("/")
    )


def below(base: Path, path: Path, key: str) -> Path:
    """`path` with its links resolved. Raises RunFileError, which names `key`, if that is not below `base`."""
    try:
        resolved = path.resolve()
        if resolved.is_relative_to(base.resolve()):
            return resolved
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a name with a zero byte
        raise RunFileError(f"{key}: {path} cannot be read: {error}; correct the path", code="file-unreadable") from None
    raise RunFileError(
        f"{key}: {path} leads to {resolved}, outside {base}; it is not read: move it below, or leave it out",
        code="path-outside",
    )
