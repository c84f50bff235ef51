"""The faults that happen alike in a synchronous swarm and in one that gossips: to machines, links and messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmtrain.simulate.messages import Link
from swarmtrain.simulate.network import Network
from swarmtrain.simulate.search.schedule import Fault

__all__ = ["declare", "declare_span", "end_faults"]

_LOST, _TWICE = 0.2, 0.5


def declare_span(world: Network[Any], fault: Fault, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """`begin` when the fault strikes, `end` when it is over."""
    world.at(fault.at_s, begin)
    world.at(fault.end_s, end)


def declare(world: Network[Any], fault: Fault, name: str, come_back: Callable[[str, int], object]) -> None:
    """A fault of any kind that both have; `come_back` starts one that died again, from a checkpoint."""
    match fault.kind:
        case "kill" | "leave":
            world.at(fault.at_s, getattr(world, fault.kind), name)
        case "restart":

            def again() -> None:
                if not world.peers[name].alive:
                    come_back(name, -1 - fault.detail % 4)

            declare_span(world, fault, lambda: world.kill(name), again)
        case "freeze":
            declare_span(world, fault, lambda: world.freeze(name), lambda: world.thaw(name))
        case "partition":  # a side by the bits of `detail`
            side = [one for i, one in enumerate(sorted(world.peers)) if fault.detail >> i & 1]
            declare_span(world, fault, lambda: world.partition(side), world.heal)
        case "cut":
            declare_span(world, fault, lambda: world.cut_off(name), world.heal)
        case "delay":
            slow_s = 0.1 * (1 + fault.detail % 10)
            declare_span(world, fault, lambda: world.delay(name, slow_s), lambda: world.delay(name, Link().latency_s))
        case "loss":
            declare_span(world, fault, lambda: world.lose_messages(_LOST), lambda: world.lose_messages(0.0))
        case "twice":
            declare_span(world, fault, lambda: world.repeat_messages(_TWICE), lambda: world.repeat_messages(0.0))
        case _:
            raise ValueError(f"no such fault: {fault.kind}")


def end_faults(world: Network[Any], liars: frozenset[str]) -> None:
    """All that is broken works again; who lied is gone."""
    world.heal()
    world.lose_messages(0.0)
    world.repeat_messages(0.0)
    for name in sorted(world.peers):
        world.delay(name, Link().latency_s)
        world.thaw(name)
        if name in liars:
            world.kill(name)
