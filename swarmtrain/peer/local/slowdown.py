"""Make a volunteer slower than its machine, so that a swarm of unequal peers can be rehearsed on one computer.

After each inner step the trainer sleeps until the step has lasted `factor` times its time alone. That time is the
processor time of the training thread, which other programs on the same cores hardly change (measured in
docs/decisions/0016-slowdown-by-processor-time.md), so the machine need not be idle. With more than one training thread
the others' time is missing from it, and the factor holds only as far as this thread works all the time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swarmtrain.peer.training.pause import wait_until

RECENT_STEPS = 21
"""Number of last steps whose median is the time alone: a page fault or a cold cache does not change it."""
MOST_STEPS_BEHIND = 10
"""Steps that a peer may be behind its schedule (a busy machine, a laptop that slept); further delay is given up."""
TOO_BUSY_STEPS = 40
"""Number of last steps. If more than half of them gave something up, the machine is too busy for the factor."""


@dataclass
class Slowdown:
    """Schedule of the waits after inner steps. Times are arguments, in seconds."""

    factor: float
    late_s: float = 0.0
    """Seconds behind the schedule; a delay by a busy machine shortens the next waits."""
    too_busy: bool = False
    """True if this peer has long been slower than it should be, because other programs leave it too little time."""
    _alone_s: deque[float] | None = None  # None before the first step
    _gave_up: deque[bool] = field(default_factory=lambda: deque(maxlen=TOO_BUSY_STEPS))

    def hold_s(self, took_s: float, alone_s: float) -> float:
        """Return how long to wait, in seconds, after a step that took `took_s` seconds and `alone_s` seconds of
        processor time.

        The first step is neither slowed nor measured: it allocates what later ones use again.
        """
        if self._alone_s is None:
            self._alone_s = deque(maxlen=RECENT_STEPS)
            return 0.0
        self._alone_s.append(alone_s)
        step_s = self.factor * statistics.median(self._alone_s)
        late_s, most_s = self.late_s + took_s - step_s, MOST_STEPS_BEHIND * step_s
        self.late_s = min(late_s, most_s)
        self._gave_up.append(late_s > most_s)
        self.too_busy = self.too_busy or 2 * sum(self._gave_up) > TOO_BUSY_STEPS
        return max(0.0, -self.late_s)

    def held(self, held_s: float) -> None:
        """Record that the wait lasted `held_s` seconds. A longer wait than planned shortens later ones; a wait cut
        short by a pause is not made up for."""
        self.late_s = max(0.0, self.late_s + held_s)


@dataclass
class SlowedSteps:
    """Slows the training thread: each inner step runs inside `with slowed():`."""

    factor: float
    sleep: Callable[[float], None]
    """Function that sleeps; may raise to end training."""
    ends_early: Callable[[], bool]
    """Returns whether to end the wait early, for a pause."""
    too_busy: Callable[[], None] = lambda: None
    """Called once, when the machine has long been too busy for the factor."""
    clock: Callable[[], float] = time.monotonic
    processor_clock: Callable[[], float] = time.thread_time

    def __post_init__(self) -> None:
        self.slowdown = Slowdown(self.factor)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Surround one step. A step that ends with an exception is not slowed."""
        began_s, began_processor_s = self.clock(), self.processor_clock()
        yield
        ended_s = self.clock()
        was_too_busy = self.slowdown.too_busy
        hold_s = self.slowdown.hold_s(ended_s - began_s, self.processor_clock() - began_processor_s)
        if self.slowdown.too_busy and not was_too_busy:
            self.too_busy()
        if hold_s > 0:
            wait_until(ended_s + hold_s, self.sleep, self.ends_early, self.clock)
            self.slowdown.held(self.clock() - ended_s)
