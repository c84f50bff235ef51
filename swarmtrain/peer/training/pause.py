"""Pausing: who wants this peer to rest, and why. It rests while anybody does.

A pause is an ordinary leave and return for the others: the peer says goodbye, the process stays, and when it comes
back it takes the swarm's present state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["ASKED", "PauseSwitch"]

ASKED = "asked"
"""The source of a pause that the person asked for."""


class PauseSwitch:
    """Held by any number of sources, each with a sentence for a person; usable from any thread."""

    def __init__(self) -> None:
        self._holds: dict[str, str] = {}
        self._lock = threading.Lock()

    def hold(self, source: str, sentence: str) -> bool:
        """`source` wants a rest; `sentence` says why, such as "outside the hours 22-7". Whether that is news."""
        with self._lock:
            is_new = source not in self._holds
            self._holds[source] = sentence
        return is_new

    def release(self, source: str) -> bool:
        """`source` wants it no longer; whether it did."""
        with self._lock:
            return self._holds.pop(source, None) is not None

    @property
    def held(self) -> bool:
        """Whether anybody wants a rest; cheap enough for each inner step."""
        return bool(self._holds)

    @property
    def reason(self) -> str:
        """Why it rests, one sentence; empty when it does not."""
        with self._lock:
            return "; ".join(self._holds.values())

    def wait_released(self, sleep: Callable[[float], None], look_s: float = 0.25) -> float:
        """Return when nobody holds it any more; the seconds that took. `sleep` may raise to end the wait."""
        began_s = time.monotonic()
        while self.held:
            sleep(look_s)
        return time.monotonic() - began_s
