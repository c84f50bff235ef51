"""Pause switch of a volunteer: several sources can hold it, each with a reason, and the peer rests while any does.

For the others a pause is an ordinary leave and return: the peer says goodbye, its process stays, and on its return it
takes the swarm's present state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

ASKED = "asked"
"""Source name of a pause that the person asked for."""
LONGEST_SLEEP_S = 0.05
"""Longest single sleep of a wait between two steps, so that a pause need not wait for it."""


class PauseSwitch:
    """Pause state, held by any number of named sources, each with a sentence for a person. Thread-safe."""

    def __init__(self) -> None:
        self._holds: dict[str, str] = {}
        self._lock = threading.Lock()

    def hold(self, source: str, sentence: str) -> bool:
        """Pause on behalf of `source`; `sentence` gives the reason, such as "outside the hours 22-7". Return True if it
        is new.
        """
        with self._lock:
            is_new = source not in self._holds
            self._holds[source] = sentence
        return is_new

    def release(self, source: str) -> bool:
        """End the pause of `source`; return True if it held one."""
        with self._lock:
            return self._holds.pop(source, None) is not None

    @property
    def held(self) -> bool:
        """True while any source holds the pause. Reads no lock: it is asked before each inner step."""
        return bool(self._holds)

    @property
    def reason(self) -> str:
        """Reasons of all sources in one sentence; empty if not paused."""
        with self._lock:
            return "; ".join(self._holds.values())

    def wait_released(self, sleep: Callable[[float], None], look_s: float = 0.25) -> float:
        """Wait until no source holds the pause; return the seconds waited. `sleep` may raise to end the wait."""
        began_s = time.monotonic()
        while self.held:
            sleep(look_s)
        return time.monotonic() - began_s


def wait_until(
    until_s: float, sleep: Callable[[float], None], ends_early: Callable[[], bool], clock: Callable[[], float]
) -> bool:
    """Wait until `clock` shows `until_s`; return False, at once, if `ends_early` does. `sleep` may raise to end the
    wait."""
    while (left_s := until_s - clock()) > 0:
        if ends_early():
            return False
        sleep(min(left_s, LONGEST_SLEEP_S))
    return True
