"""Running and ending tasks of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

__all__ = ["end_tasks", "run_together"]

_AGAIN_S = 0.05


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended.

    Once is not enough: in Python 3.11 `asyncio.wait_for` swallows a cancellation that arrives together with the
    result, and a task that loops then goes on for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)


async def run_together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run them side by side; on the first failure cancel the rest and raise that failure alone."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end_tasks(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # seen, so that the loop does not complain of it
