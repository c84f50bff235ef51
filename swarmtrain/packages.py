"""What other packages bring to a run, "PACKAGE:NAME": entry points of what pip has installed here.

A run file only names it, and only the group of its kind is looked at: nothing that is run ever comes from another peer.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

from swarmtrain.errors import RunFileError

__all__ = ["NAME", "brought", "entry_of", "file_sha256"]

NAME = r"[a-z0-9][a-z0-9-]{0,63}:[a-z0-9][a-z0-9_-]{0,63}"
"""A pattern of such names."""


def entry_of(key: str, name: str, kind: str, group: str) -> metadata.EntryPoint:
    """What `merge.KEY = NAME` is, a `kind` of thing. Raises `RunFileError`, which names the package, if that is not
    here or has no such thing."""
    package, _, short = name.partition(":")
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise RunFileError(
            f'merge.{key} = "{name}" is a {kind} of the package {package}, which is not installed here; ask who '
            "invited you where it comes from, and install it from there if you trust them",
            code="merge-package-missing",
        ) from None
    entries = {entry.name: entry for entry in found.entry_points if entry.group == group}
    if short not in entries:
        there = f"it has {', '.join(sorted(entries))}" if entries else "it has none"
        raise RunFileError(
            f'merge.{key} = "{name}": there is no {kind} {short} in {package} {found.version}; {there}; install the '
            "version that the run was made with",
            code="merge-package-version",
        )
    return entries[short]


def brought(key: str, name: str, kind: str, group: str) -> tuple[Any, str]:
    """The thing itself, and where it is. Errors are those of `entry_of`, and if it cannot be loaded."""
    entry = entry_of(key, name, kind, group)
    try:
        return entry.load(), entry.value
    except Exception as error:  # it is somebody's module, which runs as it is imported
        raise RunFileError(
            f'merge.{key} = "{name}": {entry.value} cannot be loaded: {error!r}; ask those who made it',
            code="merge-package-broken",
        ) from None


def file_sha256(key: str, name: str, module: str) -> str:
    """Of the file of a module that `merge.KEY = NAME` is made of."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RunFileError(
            f'merge.{key} = "{name}": {module} has no file; install it from a wheel or a clone',
            code="merge-package-broken",
        )
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
