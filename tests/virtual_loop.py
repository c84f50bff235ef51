"""An event loop whose time is virtual: seconds pass as soon as there is nothing else to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time jumps to the next timer whenever there is nothing else to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            self.now_s += timeout or 0.0
            return select(0 if timeout is not None else None)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now_s


def virtually(body: Callable[[Callable[[], float]], Coroutine[Any, Any, _T]]) -> _T:
    """Run `body`, which is given the clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body(runner.get_loop().time))
