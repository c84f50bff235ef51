"""Virtual event loop of the simulator, with the product's clocks set to its time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from swarmtrain.network import daemon
from swarmtrain.simulate.virtual_loop import virtually

__all__ = ["virtual_swarm", "virtually"]

_T = TypeVar("_T")


def virtual_swarm(body: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run `body` with the loop's time as `swarm_time`."""

    async def in_swarm_time(now: Callable[[], float]) -> _T:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(daemon, "own_time", now)
            return await body()

    return virtually(in_swarm_time)
