"""Plug-ins of other packages, named "PACKAGE:NAME" in a run file: entry points of packages that pip has installed here.

A run file only names a plug-in, and only the entry-point group of its kind is searched: code that runs here never comes
from another peer.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

from swarmtrain.errors import RunFileError

NAME = r"[a-z0-9][a-z0-9-]{0,63}:[a-z0-9][a-z0-9_-]{0,63}"
"""Pattern of such names."""


def entry_of(key: str, name: str, kind: str, group: str) -> metadata.EntryPoint:
    """Find the entry point that `merge.KEY = NAME` names, a `kind` of thing.

    Raises `RunFileError`, which names the package, if the package is missing or has no such entry point.
    """
    package, _, short = name.partition(":")
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise RunFileError(
            f'merge.{key} = "{name}" is a {kind} of the package {package}, which is not installed here; ask the person '
            "who invited you where it comes from, and install it from there if you trust them",
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


def find_external(key: str, name: str, kind: str, group: str) -> tuple[Any, str]:
    """Load the object that `merge.KEY = NAME` names; returns it and its place, "module:attribute".

    Raises as `entry_of` does, and `RunFileError` if it cannot be loaded.
    """
    entry = entry_of(key, name, kind, group)
    try:
        return entry.load(), entry.value
    except Exception as error:  # importing runs the package's own code, which may raise anything
        raise RunFileError(
            f'merge.{key} = "{name}": {entry.value} cannot be loaded: {error!r}; ask its authors',
            code="merge-package-broken",
        ) from None


def file_sha256(key: str, name: str, module: str) -> str:
    """Return the SHA-256 of the file of `module`, which implements `merge.KEY = NAME`."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RunFileError(
            f'merge.{key} = "{name}": {module} has no file; install it from a wheel or a clone',
            code="merge-package-broken",
        )
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
