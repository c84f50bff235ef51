"""An event loop with virtual time: seconds pass as soon as there is nothing else to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from swarmtrain.network import daemon

_T = TypeVar("_T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Event loop whose time jumps to the next timer when it is idle. While a thread works, time is real."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._num_working = 0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            if self._num_working and timeout:
                began_s = time.monotonic()
                ready = select(timeout)
                self.now_s += time.monotonic() - began_s
                return ready
            # Without a timer only another thread can wake the loop, and that takes real time.
            self.now_s += timeout or 0.0
            return select(0 if timeout is not None else None)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run in a thread, as usual. While it works, time is real."""
        future = super().run_in_executor(executor, func, *args)
        self._num_working += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, future: object) -> None:
        self._num_working -= 1


def virtually(body: Callable[[Callable[[], float]], Coroutine[Any, Any, _T]]) -> _T:
    """Run `body`, which receives the clock, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body(runner.get_loop().time))


def virtual_swarm(body: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run `body` in virtual time, with the loop's time as `swarm_time`."""

    async def in_swarm_time(now: Callable[[], float]) -> _T:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(daemon, "own_time", now)
            return await body()

    return virtually(in_swarm_time)
