"""Limits on what a peer may take of its machine, and when it pauses because of them.

Everything here is pure: the time and the measurements are arguments. The answer is a sentence that says why the peer
pauses, "" while it may train.

- Hours are this machine's wall clock, whatever its time zone does: 22-7 is night on the day the clocks change, too.
- Other programs are measured by the processor time that they use, without this peer's own: a peer that uses all cores
  must not take itself for another program. It pauses quickly, because a person waits for their machine, and comes back
  slowly, because each return costs the others a pull of the state.
- Memory above the limit causes a warning at first. If it lasts, the peer pauses until it is allowed more. It does not
  return by itself: it would need as much memory again, and come and go for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
from collections import deque
from dataclasses import dataclass, field

from swarmtrain.words import size_in_words

__all__ = [
    "ALWAYS",
    "Hours",
    "IdleWatch",
    "Limits",
    "MemoryWatch",
    "exact_size",
    "parse_hours",
    "parse_size",
    "parse_slowdown",
    "size_of_limit",
]

_MAX_NICE = 19
_MAX_THREADS = 4096
_MAX_MBIT = 100_000
_MAX_SLOWDOWN = 1000

BUSY_SHARE = 0.25
"""Share of all processors, averaged over `AVERAGE_S`, above which other programs count as using the machine."""
QUIET_SHARE = 0.15
"""Share below which they must stay for `QUIET_S` before the peer comes back."""
AVERAGE_S = 15.0
"""Seconds over which the use by other programs is averaged."""
QUIET_S = 60.0
"""Seconds of quiet before the peer comes back."""
ASLEEP_S = 60.0
"""If two measurements are further apart than this, the machine or the process was suspended in between."""

MEMORY_PATIENCE_S = 30.0
"""Seconds above the memory limit after which the peer pauses."""
MEMORY_AGAIN = 0.9
"""A warning is repeated only after the use was below this share of the limit."""

_DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Hours:
    """Parts of the day in which the peer may train, as (from, to) in minutes from midnight; over midnight if to <=
    from."""

    text: str
    ranges: tuple[tuple[int, int], ...]

    def rest(self, now: datetime.datetime) -> str:
        """Return the reason why the peer pauses at `now`, local time; "" if it may train."""
        minute = now.hour * 60 + now.minute
        if not self.ranges or any((minute - start) % _DAY_MINUTES < _length(start, end) for start, end in self.ranges):
            return ""
        back = min((start for start, _ in self.ranges), key=lambda start: (start - minute) % _DAY_MINUTES)
        return f"outside the hours {self.text}; training resumes at {back // 60}:{back % 60:02d}"


def _length(start: int, end: int) -> int:
    return (end - start - 1) % _DAY_MINUTES + 1


ALWAYS = Hours("any", ())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what a peer may take of its machine."""

    threads: int = 0  # of the training; 0: all
    memory_bytes: int = 0  # its daemon included; 0: no limit
    nice: int | None = None  # None: as it was started
    only_when_idle: bool = False
    hours: Hours = field(default=ALWAYS)
    up_mbit: float | None = None  # sent to others at most, in Mbit/s; 0: no limit; None: what the run says
    down_mbit: float | None = None
    slowdown: float = 1.0  # times slower than it could be, for a rehearsal; not changed while it runs

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= _MAX_THREADS:
            raise ValueError(f"threads: {self.threads} is refused; allowed: 0 (all) to {_MAX_THREADS}")
        if self.nice is not None and not 0 <= self.nice <= _MAX_NICE:
            raise ValueError(
                f"nice: {self.nice} is refused; allowed: 0 (as other programs) to {_MAX_NICE} (only idle time)"
            )
        if self.memory_bytes < 0:
            raise ValueError(f"memory: {self.memory_bytes} bytes is refused; allowed: 0 (no limit) and more")
        for name, mbit in (("up", self.up_mbit), ("down", self.down_mbit)):
            if mbit is not None and not 0 <= mbit <= _MAX_MBIT:
                raise ValueError(f"{name}: {mbit:g} Mbit/s is refused; allowed: 0 (no limit) to {_MAX_MBIT}")

    def with_changes(self, **changes: object) -> Limits:
        """Return these limits with some changed. Raises ValueError, which says what is allowed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what people write


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `4GB`, `500 MB` or `1.5GiB`; `none` and `0` are 0. Raises ValueError, which
    says what is allowed."""
    if text.strip().lower() in ("none", "0"):
        return 0
    match = re.fullmatch(r"(\d{1,9})(?:\.(\d{1,12}))?\s*([kMGT])(i?)B?", text.strip(), re.IGNORECASE)
    num_bytes = 0
    if match is not None:
        decimals = match[2] or ""
        unit = (1024 if match[4] else 1000) ** ("kmgt".index(match[3].lower()) + 1)
        # In integers: by a float's product every hundredth size would lose a byte.
        num_bytes = int(match[1] + decimals) * unit // 10 ** len(decimals)
    if not num_bytes:
        raise ValueError(f"{text!r} is not a size; write it like 4GB, 500MB or 1.5GiB, or none")
    return num_bytes


def size_of_limit(num_bytes: int) -> str:
    """Return a limit as a person may write it, such as `4GB`."""
    return size_in_words(num_bytes).replace(" ", "") if num_bytes else "none"


def exact_size(num_bytes: int) -> str:
    """Return a limit that `parse_size` reads back to the byte."""
    short = size_of_limit(num_bytes)
    with contextlib.suppress(ValueError):  # "500B", "2PB"
        if parse_size(short) == num_bytes:
            return short
    unit, name, decimals = (10**3, "kB", 3) if num_bytes < 10**12 else (10**12, "TB", 12)
    return f"{num_bytes // unit}.{num_bytes % unit:0{decimals}}{name}"


def parse_hours(text: str) -> Hours:
    """Parse hours such as `22-7`, `22:30-7:15` or `12-13,18-8`; `any` is always. Raises ValueError, which says what is
    allowed."""
    if text.strip().lower() == "any":
        return ALWAYS
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,2})(?::(\d\d))?\s*-\s*(\d{1,2})(?::(\d\d))?\s*", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is not a range of hours; write 22-7, 22:30-7:15, 12-13,18-8, or any")
        start, end = _minute(match[1], match[2]), _minute(match[3], match[4])
        if start % _DAY_MINUTES == end % _DAY_MINUTES and (start, end) != (0, _DAY_MINUTES):
            raise ValueError(f"{part.strip()!r} begins when it ends; write any for the whole day")
        ranges.append((start % _DAY_MINUTES, end))
    return Hours(",".join(part.strip() for part in text.split(",")), tuple(ranges))


def parse_slowdown(text: str) -> float:
    """Parse a slowdown, such as `2.6`: how many times slower to be. Raises ValueError, which says what is allowed."""
    try:
        factor = float(text)
    except ValueError:
        raise ValueError(f"{text.strip()!r} is not a factor; write how many times slower, such as 2.6") from None
    if not 1 <= factor <= _MAX_SLOWDOWN:
        raise ValueError(f"{text.strip()} is refused; allowed: 1 (as fast as it can) to {_MAX_SLOWDOWN} times slower")
    return factor


def _minute(hours: str, minutes: str | None) -> int:
    minute = int(hours) * 60 + int(minutes or 0)
    if minute > _DAY_MINUTES or int(minutes or 0) > 59:
        raise ValueError(f"{hours}{':' + minutes if minutes else ''} is not a time of day; allowed: 0:00 to 24:00")
    return minute


# ---------------------------------------------------------------- other programs


@dataclass
class IdleWatch:
    """Watches whether other programs use the processors, from the processor time that they have used in total."""

    num_processors: int
    resting: str = ""
    _seen: deque[tuple[float, float]] = field(default_factory=deque)  # (now, processor seconds of others)
    _quiet_since_s: float | None = None

    def rest(self, now_s: float, others_s: float) -> str:
        """Return the reason why the peer pauses; "" if it may train. `others_s` is the processor time of other programs
        since any fixed moment, in seconds."""
        if self._seen and not 0 <= now_s - self._seen[-1][0] <= ASLEEP_S:
            self._seen.clear()
            self._quiet_since_s = None
        self._seen.append((now_s, others_s))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - AVERAGE_S:
            self._seen.popleft()
        share = self._share()
        if share is None:
            return self.resting
        if share > QUIET_SHARE:
            self._quiet_since_s = None
        elif self._quiet_since_s is None:
            self._quiet_since_s = now_s
        if self.resting:
            if self._quiet_since_s is not None and now_s - self._quiet_since_s >= QUIET_S:
                self.resting = ""
        elif share > BUSY_SHARE:
            self.resting = f"other programs use {share:.0%} of the processors; training resumes after a quiet minute"
        return self.resting

    def _share(self) -> float | None:
        """Return the other programs' share of all processors over the window; None before it is full."""
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        if last_s - first_s < AVERAGE_S:
            return None
        return max(0.0, last - first) / ((last_s - first_s) * self.num_processors)


# ---------------------------------------------------------------- memory


@dataclass
class MemoryWatch:
    """Watches whether the peer stays below its memory limit."""

    resting: str = ""
    _warned: bool = False
    _above_since_s: float | None = None
    _most_bytes: int = 0  # when it had to rest

    def rest(self, now_s: float, used_bytes: int, limit_bytes: int) -> tuple[str, str]:
        """Return (the reason why the peer pauses, a warning to show now); each is "" if there is none."""
        if not limit_bytes or (self.resting and limit_bytes > self._most_bytes):
            self.resting, self._warned, self._above_since_s = "", False, None
        if self.resting or not limit_bytes:
            return self.resting, ""
        if used_bytes <= limit_bytes:
            self._above_since_s = None
            self._warned = self._warned and used_bytes > MEMORY_AGAIN * limit_bytes
            return "", ""
        if self._above_since_s is None:
            self._above_since_s = now_s
        fact = f"it uses {size_in_words(used_bytes)} of memory, and may use {size_in_words(limit_bytes)}"
        if now_s - self._above_since_s >= MEMORY_PATIENCE_S:
            self._most_bytes = used_bytes
            self.resting = f"{fact}; training resumes when `swarmtrain limits --memory` allows more"
            return self.resting, ""
        warning = "" if self._warned else f"{fact}; if that lasts for {MEMORY_PATIENCE_S:.0f} s, training pauses"
        self._warned = True
        return "", warning
