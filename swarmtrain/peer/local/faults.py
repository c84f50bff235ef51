"""Inject faults into a rehearsal: at their times they strike processes and links of a local swarm, and end again.

A volunteer can also be slower than its machine (`slowdown`), so that unequal peers are rehearsed on one computer.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from swarmtrain.network.links.impairments import Narrowing, Outage
from swarmtrain.peer.training.pause import wait_until
from swarmtrain.rehearsal import Deed, FaultEvent


class Processes(Protocol):
    """Processes of a rehearsal, as faults strike them."""

    def end(self, name: str, cleanly: bool) -> None:
        """End a process, by a signal to leave or by a kill."""

    def begin_again(self, name: str) -> None:
        """Start a process again in its folder."""

    def end_restarts(self) -> None:
        """Learn that no process that has ended is started again any more."""

    def hang(self, name: str) -> None:
        """Suspend a process and its daemon."""

    def go_on(self, name: str) -> None:
        """Let a process that hangs continue."""

    def tell(self, message: str) -> None:
        """Show a message to the person."""


class Connections(Protocol):
    """Links of a rehearsal, as faults strike them."""

    def part(self, sides: list[list[str]]) -> Outage:
        """Cut these peers off from all others."""

    def mend(self, outage: Outage) -> None:
        """End an outage."""

    def narrow(self, names: Sequence[str], share: float) -> Narrowing:
        """Let the links of these peers carry only this share of their bandwidth."""

    def widen(self, narrowing: Narrowing) -> None:
        """End a narrowing."""

    def reset(self, name: str) -> None:
        """Cut a peer's connections; both ends learn of it."""

    def forget(self, name: str) -> None:
        """Leave a peer's connections half open: neither end learns of it."""


_WORDS = {
    "kill": "killed; started again after {for_s:g} s",
    "leave": "told to leave; started again after {for_s:g} s",
    "hang": "made to hang for {for_s:g} s",
    "stall": "cut off from everybody for {for_s:g} s",
    "partition": "parted from the others for {for_s:g} s",
    "reset": "all connections are reset",
    "half-open": "all connections are forgotten, and nobody is told",
    "narrow": "given {bandwidth_percent:g} % of the bandwidth for {for_s:g} s",
}


@dataclass
class FaultInjection:
    """Injects faults in time. After `begin`, call `tick` often."""

    swarm: Processes
    links: Connections | None
    """None if no fault strikes links."""
    faults: Iterator[FaultEvent]
    clock: Callable[[], float] = time.monotonic
    _began_s: float | None = None
    _next: FaultEvent | None = None
    _ends: list[tuple[float, int, Deed, Callable[[], None]]] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=itertools.count)

    def begin(self) -> None:
        """Start the clock of the faults."""
        self._began_s, self._next = self.clock(), next(self.faults, None)

    def stop(self) -> None:
        """Inject no more faults. Resume suspended peers and mend links; killed peers are not started again."""
        self._began_s = self._next = None
        for _, _, do, end in self._ends:
            if do not in ("kill", "leave"):
                end()
        self._ends.clear()
        self.swarm.end_restarts()

    def tick(self) -> None:
        """Inject the faults that are due, and end those that are over."""
        if self._began_s is None:
            return
        now_s = self.clock() - self._began_s
        while self._ends and self._ends[0][0] <= now_s:
            heapq.heappop(self._ends)[3]()
        while self._next is not None and self._next.at_s <= now_s:
            fault, self._next = self._next, next(self.faults, None)
            self._strike(fault, now_s)

    def _strike(self, fault: FaultEvent, now_s: float) -> None:
        words = _WORDS[fault.do].format(for_s=fault.for_s, bandwidth_percent=fault.bandwidth_percent)
        self.swarm.tell(f"rehearsal: {' and '.join(fault.who)}: {words}")
        for end in self._do(fault):
            heapq.heappush(self._ends, (now_s + fault.for_s, next(self._number), fault.do, end))

    def _do(self, fault: FaultEvent) -> list[Callable[[], None]]:
        """Inject a fault; return the functions that end it."""
        swarm, who = self.swarm, fault.who
        match fault.do:
            case "kill" | "leave":
                for name in who:
                    swarm.end(name, cleanly=fault.do == "leave")
                return [lambda name=name: swarm.begin_again(name) for name in who]  # type: ignore[misc]
            case "hang":
                for name in who:
                    swarm.hang(name)
                return [lambda name=name: swarm.go_on(name) for name in who]  # type: ignore[misc]
            case "stall" | "partition":
                links = self._links
                outage = links.part([[name] for name in who] if fault.do == "stall" else [list(who)])
                return [lambda: links.mend(outage)]
            case "narrow":
                links = self._links
                narrowing = links.narrow(who, fault.bandwidth_percent / 100)
                return [lambda: links.widen(narrowing)]
            case "reset" | "half-open":
                for name in who:
                    (self._links.reset if fault.do == "reset" else self._links.forget)(name)
                return []

    @property
    def _links(self) -> Connections:
        assert self.links is not None, "there are no links to break"
        return self.links


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
