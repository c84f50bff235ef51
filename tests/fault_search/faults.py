"""Faults that every kind of swarm has: of machines, links and messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from fault_search.schedule import ScheduledFault
from swarmtrain.simulate.pipeline.world import PipelineWorld
from swarmtrain.simulate.systems.network import SimulatedNetwork

World: TypeAlias = "SimulatedNetwork[Any] | PipelineWorld"
Come: TypeAlias = Callable[[str, int], object]
"""Function that starts a peer: a newcomer, or one that has died, from a checkpoint (-1 is the newest)."""

_LOST, _TWICE, _LATE = 0.2, 0.5, 0.2


def declare_span(world: World, fault: ScheduledFault, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """Schedule `begin` for when the fault strikes, and `end` for when it is over."""
    world.at(fault.at_s, begin)
    world.at(fault.end_s, end)


def declare(world: World, fault: ScheduledFault, name: str, index: int, come: Come) -> None:
    """Schedule a fault of any kind that all worlds have; `index` tells newcomers apart."""
    match fault.kind:
        case "kill" | "leave":
            world.at(fault.at_s, getattr(world, fault.kind), name)
        case "restart":

            def again() -> None:
                if (peer := world.peers.get(name)) is None or not peer.alive:
                    come(name, -1 - fault.detail % 4)

            declare_span(world, fault, lambda: world.kill(name), again)
        case "join":
            world.at(fault.at_s, come, f"{'az'[fault.detail % 2]}{index}", -1)
        case "freeze":
            declare_span(world, fault, lambda: world.freeze(name), lambda: world.thaw(name))
        case "partition":  # a side by the bits of `detail`
            side = [one for i, one in enumerate(sorted(world.peers)) if fault.detail >> i & 1]
            declare_span(world, fault, lambda: world.partition(side), world.heal)
        case "cut":
            declare_span(world, fault, lambda: world.cut_off(name), world.heal)
        case "delay":
            slow_s = 0.1 * (1 + fault.detail % 10)
            declare_span(world, fault, lambda: world.delay(name, slow_s), lambda: world.delay(name))
        case "loss":
            declare_span(world, fault, lambda: world.lose_messages(_LOST), lambda: world.lose_messages(0.0))
        case "twice":
            declare_span(world, fault, lambda: world.repeat_messages(_TWICE), lambda: world.repeat_messages(0.0))
        case "late":
            declare_span(world, fault, lambda: world.hold_up_messages(_LATE), lambda: world.hold_up_messages(0.0))
        case kind if kind.startswith("lie: "):
            declare_span(world, fault, lambda: _lie(world, name, kind.removeprefix("lie: ")), lambda: _lie(world, name))
        case _:
            raise ValueError(f"no such fault: {fault.kind}")


def _lie(world: World, name: str, *lies: str) -> None:
    peer: Any = world.peers.get(name)
    if peer is not None:
        peer.lies = frozenset(lies)


def end_faults(world: World, liars: frozenset[str]) -> None:
    """Repair everything that is broken, and kill the liars."""
    world.heal()
    world.lose_messages(0.0)
    world.repeat_messages(0.0)
    world.hold_up_messages(0.0)
    for name in sorted(world.peers):
        world.delay(name)
        world.thaw(name)
        if name in liars:
            world.kill(name)
