"""The ways in which peers become one model, by their names in `merge.method`.

Each is one object, a `MergeMethod`: what code elsewhere must know of a method it asks the object, and not for its name.
Another package can bring one, as it can a rule (`peer/merging/rules.py`).
Here are no torch and no network: what needs them is named, and loaded where it is first wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import re
from typing import Any

from swarmtrain.errors import RunFileError
from swarmtrain.methods.diloco import DILOCO
from swarmtrain.methods.gossip import GOSSIP
from swarmtrain.methods.method import GradientFormat, MergeMethod
from swarmtrain.methods.server import SERVER
from swarmtrain.packages import NAME, brought

__all__ = [
    "DILOCO",
    "GOSSIP",
    "GROUP",
    "METHODS",
    "METHOD_NAME",
    "SERVER",
    "GradientFormat",
    "MergeMethod",
    "load_part",
    "method_named",
    "methods_of_keys",
]

METHODS: dict[str, MergeMethod] = {method.name: method for method in (GOSSIP, DILOCO, SERVER)}
"""Ours."""
GROUP = "swarmtrain.merge_methods"
"""Entry points of other packages; each is a `MergeMethod`, whose name in a run file is "PACKAGE:METHOD"."""


METHOD_NAME = rf"^({'|'.join(METHODS)}|{NAME})$"
"""A pattern of what a run file can name."""


@functools.cache
def method_named(name: str) -> MergeMethod:
    """The method that a run file names. Raises `RunFileError`, which names the package, if that is not here or has no
    such method; `KeyError` if the name is none."""
    if not re.fullmatch(NAME, name):
        return METHODS[name]
    method, place = brought("method", name, "method", GROUP)
    if not isinstance(method, MergeMethod):
        raise RunFileError(
            f'merge.method = "{name}": {place} is no MergeMethod; ask those who made it', code="merge-package-broken"
        )
    return dataclasses.replace(method, name=name)


@functools.cache
def load_part(reference: str) -> Any:
    """The class or function "module:name" that does a method's work in one of the layers above."""
    return pkgutil.resolve_name(reference)


def methods_of_keys() -> dict[str, tuple[str, ...]]:
    """Keys of `[merge]` that not every method reads: the names of those that do."""
    keys = sorted(set[str]().union(*(method.keys for method in METHODS.values())))
    return {key: tuple(method.name for method in METHODS.values() if key in method.keys) for key in keys}
