"""A virtual clock and its queue of events: hours of a swarm's life in milliseconds, the same every time.

Events run in the order of their time, those of one time in the order in which they were asked for. Nothing here
waits; time jumps from event to event.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Clock", "Holds", "Timer"]


class Timer:
    """A call that is to come; `cancel` it, or let it be."""

    __slots__ = ("args", "call", "when_s")

    def __init__(self, when_s: float, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when_s = when_s
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        """It will not run. Cancelling twice, or after it ran, does nothing."""
        self.call = None
        self.args = ()

    @property
    def pending(self) -> bool:
        """Whether it is still to run."""
        return self.call is not None


Holds: TypeAlias = Callable[[Callable[..., object], tuple[Any, ...]], bool]
"""Asked of each event: True keeps it from running, since it belongs to a process that stands still."""


class Clock:
    """Virtual time in seconds, from 0."""

    def __init__(self, holds: Holds | None = None) -> None:
        self.now = 0.0
        self.num_events = 0
        """Events run so far."""
        self.most_events: float = math.inf
        """More of them are a mistake: time stands still, or somebody asks without an end."""
        self._holds = holds
        self._queue: list[tuple[float, int, Timer]] = []
        self._seq = 0

    def call_at(self, when_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run `call(*args)` at `when_s`; at once after the present event if that time has passed."""
        if when_s < self.now:
            when_s = self.now
        timer, self._seq = Timer(when_s, call, args), self._seq + 1
        heapq.heappush(self._queue, (when_s, self._seq, timer))
        return timer

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run `call(*args)` in `delay_s` seconds."""
        return self.call_at(self.now + delay_s, call, *args)

    def call_by(self, timer: Timer | None, when_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run `call(*args)` at `when_s`, or earlier where `timer`, which was to call it, comes before."""
        if timer is not None:
            if timer.pending and timer.when_s <= when_s:
                return timer
            timer.cancel()
        return self.call_at(when_s, call, *args)

    def next_s(self) -> float | None:
        """When the next event is; None if there is none."""
        while self._queue and self._queue[0][2].call is None:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

    def step(self) -> bool:
        """Run the next event. False if there is none."""
        while self._queue:
            if self._run(heapq.heappop(self._queue)[2]):
                return True
        return False

    def _run(self, timer: Timer) -> bool:
        """Whether it ran: it may have been cancelled."""
        call, args = timer.call, timer.args
        if call is None:
            return False
        timer.call, timer.args = None, ()  # `cancel` written out: this is done for each event
        self.now = timer.when_s
        self.num_events += 1
        if self.num_events > self.most_events:
            raise RuntimeError(f"more than {self.most_events:g} events by {self.now:.1f} s")
        if self._holds is None or not self._holds(call, args):
            call(*args)
        return True

    def run_until(self, end_s: float) -> None:
        """Run all events up to and at `end_s`; the clock then stands at `end_s`."""
        queue = self._queue
        while queue and queue[0][0] <= end_s:
            self._run(heapq.heappop(queue)[2])
        self.now = max(self.now, end_s)
