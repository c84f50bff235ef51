"""Limit how fast this peer sends and receives: a token bucket per direction, turns, and recent transfer times.

Small calls are counted and never wait. Chunks and files wait for their turn, one piece of at most 256 KiB at a time,
first come first served. A transfer that has had a piece queues behind all others, so open transfers share the link
piece by piece. A transfer whose reader is slow does not wait here, and holds nobody up. Downloads are limited by not
reading on: the streams pass that back to the sender. Traffic of the DHT and the transport, a few per cent, is not
counted. See decision 18.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

BYTES_PER_S_OF_MBIT = 125_000
"""Bytes per second in a megabit per second."""

_BURST_BYTES = 256 * 1024
_BURST_S = 0.1
"""Seconds of a link's rate that may pass at once after a silence, at least one chunk: a timer that fires late then
costs nothing."""

_MAX_DEBT_S = 1.0
"""Longest delay that small calls cause to chunks, however many came before."""

_POLL_INTERVAL_S = 0.25
"""Seconds after which a changed limit takes effect, at most."""

_NAP_S = 0.001
"""Shortest wait: without it the last bytes would be waited for in ever smaller steps."""

_NEWEST = 0.25
"""Weight of the newest transfer in the mean of their pace."""

_MARGIN = 2.0
"""Each transfer on a limited link gets this many times the rate below which it would be given up."""


@dataclass
class TokenBucket:
    """Token bucket as arithmetic: `now_s` is an argument. 0 bytes per second is no limit."""

    bytes_per_s: float = 0.0
    _level_bytes: float = math.inf
    _at_s: float = 0.0

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Return the seconds until `size_bytes` may pass, provided that nothing else passes before; 0 if they may
        now."""
        if self.bytes_per_s <= 0:
            return 0.0
        self._fill(now_s)
        lacking_bytes = min(size_bytes, self.burst_bytes) - self._level_bytes
        return max(0.0, lacking_bytes / self.bytes_per_s)

    def take(self, size_bytes: int, now_s: float) -> None:
        """Let bytes pass, whether or not there is room for them."""
        if self.bytes_per_s <= 0:
            return
        self._fill(now_s)
        self._level_bytes = max(self._level_bytes - size_bytes, -self.bytes_per_s * _MAX_DEBT_S - self.burst_bytes)

    @property
    def burst_bytes(self) -> float:
        """Bytes that may pass at once after a silence."""
        return max(_BURST_BYTES, self.bytes_per_s * _BURST_S)

    def _fill(self, now_s: float) -> None:
        gained_bytes = max(0.0, now_s - self._at_s) * self.bytes_per_s
        self._level_bytes = min(self.burst_bytes, self._level_bytes + gained_bytes)
        self._at_s = now_s


class Throttle:
    """Limit of one direction of this peer's link. `bytes_per_s` may be set at any time, from any thread; 0
    is no limit."""

    def __init__(
        self,
        bytes_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bucket = TokenBucket(bytes_per_s)
        self._clock, self._sleep = clock, sleep
        self._turn = asyncio.Lock()  # first come, first served

    @property
    def bytes_per_s(self) -> float:
        """Limit in bytes per second; 0 is none."""
        return self._bucket.bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, bytes_per_s: float) -> None:
        self._bucket.bytes_per_s = bytes_per_s

    @property
    def at_once_bytes(self) -> float:
        """Most bytes that may pass together; more would be waited for piece by piece."""
        return self._bucket.burst_bytes if self.bytes_per_s > 0 else math.inf

    def count(self, size_bytes: int) -> None:
        """Count a small message, which does not wait."""
        self._bucket.take(size_bytes, self._clock())

    async def turn(self, size_bytes: int) -> None:
        """Wait until these bytes may pass, after all transfers that wait already, and count them."""
        if self.bytes_per_s <= 0 and not self._turn.locked():
            return
        async with self._turn:
            while (wait_s := self._bucket.wait_s(size_bytes, self._clock())) > 0:
                await self._sleep(min(max(wait_s, _NAP_S), _POLL_INTERVAL_S))
            self.count(size_bytes)


def num_at_once(most: int, bytes_per_s: float, min_bytes_per_s: float) -> int:
    """Return how many transfers may share a link.

    That is `most`, or fewer on a limited link, so that each gets twice the rate below which it would be given up; at
    least one.
    """
    if bytes_per_s <= 0 or min_bytes_per_s <= 0:
        return most
    return max(1, min(most, int(bytes_per_s / (_MARGIN * min_bytes_per_s))))


class Places:
    """Semaphore whose size `most()` is asked each time, as an asynchronous context manager."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._num_inside = 0
        self._left = asyncio.Event()

    async def __aenter__(self) -> None:
        while self._num_inside >= self._most():
            await self._left.wait()
        self._num_inside += 1

    async def __aexit__(self, *error: object) -> None:
        self._num_inside -= 1
        self._left.set()  # wake all: one that is woken alone may be cancelled at that moment
        self._left = asyncio.Event()


@dataclass
class TransferTimes:
    """Durations of recent transfers in one direction, as a moving mean per byte. `link` is the throttle of that
    direction."""

    link: Throttle = field(default_factory=Throttle)
    _s_per_byte: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """Rate that one transfer gets while others share the link; None before the first."""
        return None if self._s_per_byte is None else 1.0 / self._s_per_byte

    def finished(self, size_bytes: int, seconds: float) -> None:
        """Record a completed transfer."""
        if size_bytes <= 0 or seconds <= 0:
            return
        newest = seconds / size_bytes
        before = newest if self._s_per_byte is None else self._s_per_byte
        self._s_per_byte = before + _NEWEST * (newest - before)

    def expected_s(self, size_bytes: int) -> float | None:
        """Return the seconds that `size_bytes` will take, at least what the limit allows; None while
        nothing is known."""
        known = [] if self._s_per_byte is None else [size_bytes * self._s_per_byte]
        if self.link.bytes_per_s > 0:
            known.append(size_bytes / self.link.bytes_per_s)
        return max(known, default=None)
