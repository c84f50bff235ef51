"""List the merge methods, by their names in `merge.method`.

Each is one object, a `MergeMethod`. Code elsewhere asks that object what it must know of a method, and never compares
names. Another package can bring a method, as it can a rule (`peer/merging/rules.py`). This package imports neither
torch nor the network: parts that need them are named, and loaded when they are first used (decision 62).
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import re
from typing import Any

from swarmtrain.errors import RunFileError
from swarmtrain.methods.batch import BATCH
from swarmtrain.methods.diloco import DILOCO
from swarmtrain.methods.gossip import GOSSIP
from swarmtrain.methods.method import GradientFormat, MergeMethod
from swarmtrain.methods.server import SERVER
from swarmtrain.packages import NAME, find_external

__all__ = [
    "BATCH",
    "DILOCO",
    "GOSSIP",
    "GROUP",
    "METHODS",
    "METHOD_NAME",
    "SERVER",
    "GradientFormat",
    "MergeMethod",
    "load_object",
    "method_named",
    "methods_of_keys",
]

METHODS: dict[str, MergeMethod] = {method.name: method for method in (GOSSIP, DILOCO, SERVER, BATCH)}
"""Methods of this package."""
GROUP = "swarmtrain.merge_methods"
"""Group of entry points of other packages. Each is a `MergeMethod`, named "PACKAGE:METHOD" in a run file."""


METHOD_NAME = rf"^({'|'.join(METHODS)}|{NAME})$"
"""Pattern of the names allowed in a run file."""


@functools.cache
def method_named(name: str) -> MergeMethod:
    """Return the method that a run file names.

    Raises RunFileError, which names the package, if that is missing or has no such method, and KeyError for an unknown
    name.
    """
    if not re.fullmatch(NAME, name):
        return METHODS[name]
    method, place = find_external("method", name, "method", GROUP)
    if not isinstance(method, MergeMethod):
        raise RunFileError(
            f'merge.method = "{name}": {place} is not a MergeMethod; ask its authors', code="merge-package-broken"
        )
    return dataclasses.replace(method, name=name)


@functools.cache
def load_object(reference: str) -> Any:
    """Import and return the class or function "module:name" that does a method's work in one of the layers above."""
    return pkgutil.resolve_name(reference)


def methods_of_keys() -> dict[str, tuple[str, ...]]:
    """Return the keys of `[merge]` that not every method reads, each with the names of the methods that do."""
    keys = sorted(set[str]().union(*(method.keys for method in METHODS.values())))
    return {key: tuple(method.name for method in METHODS.values() if key in method.keys) for key in keys}
