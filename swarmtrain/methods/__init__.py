"""The ways in which peers become one model, by their names in `merge.method`.

Each is one object, a `MergeMethod`: what code elsewhere must know of a method it asks the object, and not for its name.
Here are no torch and no network: what needs them is named, and loaded where it is first wanted.
"""

from __future__ import annotations

from swarmtrain.methods.diloco import DILOCO
from swarmtrain.methods.gossip import GOSSIP
from swarmtrain.methods.method import GradientFormat, MergeMethod
from swarmtrain.methods.server import SERVER

__all__ = ["DILOCO", "GOSSIP", "METHODS", "SERVER", "GradientFormat", "MergeMethod", "method_named", "methods_of_keys"]

METHODS: dict[str, MergeMethod] = {method.name: method for method in (GOSSIP, DILOCO, SERVER)}


def method_named(name: str) -> MergeMethod:
    """The method that a run file names."""
    return METHODS[name]


def methods_of_keys() -> dict[str, tuple[str, ...]]:
    """Keys of `[merge]` that not every method reads: the names of those that do."""
    keys = sorted(set[str]().union(*(method.keys for method in METHODS.values())))
    return {key: tuple(method.name for method in METHODS.values() if key in method.keys) for key in keys}
