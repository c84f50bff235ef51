"""Run and end tasks of the event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

_log = logging.getLogger(__name__)
_AGAIN_S = 0.05  # until a task that has not ended is cancelled again
_LEAST_LOOK_S, _MOST_LOOK_S = 0.01, 1.0  # between two looks whether time is left
_T = TypeVar("_T")


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended.

    Once is not enough: in Python 3.11 `asyncio.wait_for` swallows a cancellation that arrives together with the result,
    and a task that loops then runs for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)


def logged(task: asyncio.Task[_T], what: str) -> asyncio.Task[_T]:
    """Log the failure of a task that nobody awaits, and return the task."""

    def look(ended: asyncio.Task[_T]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            _log.error("%s: a task failed", what, exc_info=error)

    task.add_done_callback(look)
    return task


async def run_together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side. On the first failure cancel the rest and raise that failure alone."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end_tasks(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # retrieve it, or the loop reports it


async def run_until(work: Coroutine[Any, Any, None], left_s: Callable[[], float]) -> bool:
    """Run `work` while `left_s()`, the seconds that are left, is above 0. Return whether it ended; if not, it is
    cancelled."""
    task = asyncio.create_task(work)
    # Retrieve its failure, or the loop reports it: also when this is cancelled while the work is being ended.
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        while not task.done() and (left := left_s()) > 0:
            await asyncio.wait([task], timeout=max(_LEAST_LOOK_S, min(left, _MOST_LOOK_S)))
        if task.done():
            task.result()
        return task.done()
    finally:
        await end_tasks([task])


class Awaited(Generic[_T]):
    """Results of events passed to an engine, delivered to the tasks that wait for them."""

    def __init__(self, tell: Callable[[_T], None]) -> None:
        self._tell = tell
        self._numbers = itertools.count()
        self._futures: dict[int, asyncio.Future[Any]] = {}

    def next_number(self) -> int:
        """Return a number for an event that will have a result."""
        return next(self._numbers)

    async def result(self, number: int, event: _T, given_up: _T) -> Any:
        """Pass `event`, which has this number, to the engine and return its result. Afterwards, also if the wait is
        cancelled, pass `given_up`."""
        future = self._futures[number] = asyncio.get_running_loop().create_future()
        try:
            self._tell(event)
            return await future
        finally:
            del self._futures[number]
            self._tell(given_up)

    def found(self, number: int, result: object) -> None:
        """Set the result of this number, if a task still waits for it."""
        if (future := self._futures.get(number)) is not None and not future.done():
            future.set_result(result)

    def fail(self, error: BaseException) -> bool:
        """Raise an error in all waiting tasks. Returns False if there are none."""
        waiting = [future for future in self._futures.values() if not future.done()]
        for future in waiting:
            future.set_exception(error)
        return bool(waiting)


class SingleFlight(Generic[_T]):
    """Long work in a thread, started once for all that ask for it, and finished even if they give up.

    Callers must hold a lock of their own: two works never run at once.
    """

    def __init__(self) -> None:
        self._token: object = None
        self._task: asyncio.Task[_T] | None = None

    async def made(self, token: object, make: Callable[[], _T]) -> _T:
        """Return what `make` returns; if it already runs for the same `token`, wait for that run instead."""
        task = self._task
        if task is not None and self._token is not token:
            await asyncio.wait([task])
        if task is None or self._token is not token or _has_failed(task):
            task = asyncio.create_task(asyncio.to_thread(make))
            self._token, self._task = token, task
        made = await asyncio.shield(task)
        self._task = None
        return made


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
