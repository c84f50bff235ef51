"""The ways in which peers become one model, by their names in `merge.method`.

Each is one object, a `MergeMethod`: what code elsewhere must know of a method it asks the object, and not for its name.
Here are no torch and no network: what needs them is named, and loaded where it is first wanted.
"""

from __future__ import annotations

import functools
import pkgutil
from typing import Any

from swarmtrain.methods.diloco import DILOCO
from swarmtrain.methods.gossip import GOSSIP
from swarmtrain.methods.method import GradientFormat, MergeMethod
from swarmtrain.methods.server import SERVER

__all__ = [
    "DILOCO",
    "GOSSIP",
    "METHODS",
    "SERVER",
    "GradientFormat",
    "MergeMethod",
    "load_part",
    "method_named",
    "methods_of_keys",
]

METHODS: dict[str, MergeMethod] = {method.name: method for method in (GOSSIP, DILOCO, SERVER)}


def method_named(name: str) -> MergeMethod:
    """The method that a run file names."""
    return METHODS[name]


@functools.cache
def load_part(reference: str) -> Any:
    """The class or function "module:name" that does a method's work in one of the layers above."""
    return pkgutil.resolve_name(reference)


def methods_of_keys() -> dict[str, tuple[str, ...]]:
    """Keys of `[merge]` that not every method reads: the names of those that do."""
    keys = sorted(set[str]().union(*(method.keys for method in METHODS.values())))
    return {key: tuple(method.name for method in METHODS.values() if key in method.keys) for key in keys}
