"""Rest after each inner step, so that a graphics card is free for other programs for a share of the time.

A step is over when the device has computed it, not when it was asked for; while the peer may use all of the device's
time nothing waits for that. Several threads of a peer (its stages) take turns on a device: one that computed while
another rests would use the time that the other leaves free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swarmtrain.peer.training.pause import LONGEST_SLEEP_S, wait_until
from swarmtrain.protocol.duty_cycle import DutyCycle


@dataclass
class StepRests:
    """Makes the device rest: each inner step runs inside `with rests():`."""

    share: Callable[[], float]
    """Returns the share of the time in which the device may be busy, above 0, at most 1; may change between steps."""
    finish: Callable[[], None]
    """Waits until the device has computed everything asked of it."""
    sleep: Callable[[float], None]
    """Function that sleeps; may raise to end training."""
    ends_early: Callable[[], bool]
    """Returns whether to end the rest early, for a pause."""
    clock: Callable[[], float] = time.monotonic
    cycle: DutyCycle = field(default_factory=DutyCycle)
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held during a step and its rest; the same for all threads that use the device."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Surround one step. After a step that ends with an exception there is no rest."""
        share = self.share()
        if share >= 1:
            self.cycle.forget()
            yield
            return
        with self._own_turn():
            began_s = self.clock()
            yield
            self.finish()
            ended_s = self.clock()
            rest_s = self.cycle.rest_s(ended_s - began_s, share)
            if rest_s and wait_until(ended_s + rest_s, self.sleep, self.ends_early, self.clock):
                self.cycle.rested(self.clock() - ended_s)
            elif rest_s:
                self.cycle.forget()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Surround what this thread does on the device and its rest. If it must end soon, it does not wait for its
        turn."""
        while not (has_turn := self.turn.acquire(timeout=LONGEST_SLEEP_S)) and not self.ends_early():
            pass
        try:
            yield
        finally:
            if has_turn:
                self.turn.release()
