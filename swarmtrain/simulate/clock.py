"""A virtual clock and its queue of events: hours of a swarm's life in milliseconds, the same every time.

Events run in the order of their times; events of the same time run in the order in which they were scheduled. Nothing
here waits: time jumps from event to event.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, TypeAlias


class Timer:
    """Scheduled call, which can be cancelled."""

    __slots__ = ("args", "call", "when_s")

    def __init__(self, when_s: float, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when_s = when_s
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        """Cancel the call. Cancelling twice, or after it ran, does nothing."""
        self.call = None
        self.args = ()

    @property
    def pending(self) -> bool:
        """True if the call is still to run."""
        return self.call is not None


Holds: TypeAlias = Callable[[Callable[..., object], tuple[Any, ...]], bool]
"""Filter of events: returns True to keep an event from running, because it belongs to a frozen process."""


class Clock:
    """Virtual time in seconds, from 0."""

    def __init__(self, holds: Holds | None = None) -> None:
        self.now = 0.0
        self.num_events = 0
        """Events run so far."""
        self.most_events: float = math.inf
        """Limit of events. More are a mistake: time does not advance, or somebody asks without end."""
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
        """Run `call(*args)` at `when_s`, or earlier if `timer`, which was to call it, is due before."""
        if timer is not None:
            if timer.pending and timer.when_s <= when_s:
                return timer
            timer.cancel()
        return self.call_at(when_s, call, *args)

    def next_s(self) -> float | None:
        """Return the time of the next event; None if there is none."""
        while self._queue and self._queue[0][2].call is None:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

    def step(self) -> bool:
        """Run the next event; return False if there is none."""
        while self._queue:
            if self._run(heapq.heappop(self._queue)[2]):
                return True
        return False

    def _run(self, timer: Timer) -> bool:
        """Run an event; return False if it was cancelled."""
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
