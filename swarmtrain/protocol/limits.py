"""Limits on what a peer may take of its machine, how people write them, and the hours in which it may train.

Everything here is pure: the time is an argument. `protocol/watches.py` decides on what is measured. Hours are this
machine's wall clock, whatever its time zone does: 22-7 is night on the day the clocks change, too.

Limits that a considerate guest keeps without being asked are on by default: a peer pauses while another program uses
the graphics card that it trains on, on battery, and shortly before the card would slow itself down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
from dataclasses import dataclass, field

from swarmtrain.words import size_in_words

_MAX_NICE = 19
_MAX_THREADS = 4096
_MAX_MBIT = 100_000
_MAX_SLOWDOWN = 1000
_LEAST_CELSIUS, _MOST_CELSIUS = 30, 120

AUTO_TEMPERATURE = -1.0
"""Highest temperature `auto`: what the card says."""
BELOW_SLOWDOWN = 5.0
"""Degrees by which `auto` is below the temperature at which a card slows itself down."""
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
    gpu_share: int = 100  # of a graphics card's time, in percent
    gpu_any_time: bool = False  # also while other programs use the card
    on_battery: bool = False
    max_temperature: float = AUTO_TEMPERATURE  # of the card, else of the processor, in degrees Celsius; 0: no limit

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
        if not 1 <= self.gpu_share <= 100:
            raise ValueError(f"gpu-share: {self.gpu_share} % is refused; allowed: 1 to 100 (all of the card's time)")
        celsius = self.max_temperature
        if celsius not in (0, AUTO_TEMPERATURE) and not _LEAST_CELSIUS <= celsius <= _MOST_CELSIUS:
            raise ValueError(
                f"max-temperature: {celsius:g} °C is refused; allowed: {_LEAST_CELSIUS} to {_MOST_CELSIUS}, none, auto"
            )

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


def parse_temperature(text: str) -> float:
    """Parse a highest temperature in degrees Celsius, such as `80`; `none` is 0, and `auto` is `AUTO_TEMPERATURE`.

    Raises ValueError, which says what is allowed.
    """
    word = text.strip().lower()
    if word in ("none", "0", "auto"):
        return AUTO_TEMPERATURE if word == "auto" else 0.0
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,2})?)\s*(?:°?\s*c)?", word)
    if match is None or not _LEAST_CELSIUS <= float(match[1]) <= _MOST_CELSIUS:
        raise ValueError(
            f"{text!r} is not a temperature; write degrees Celsius from {_LEAST_CELSIUS} to {_MOST_CELSIUS}, such as "
            "80, or none, or auto"
        )
    return float(match[1])


def temperature_of_limit(celsius: float) -> str:
    """Return a highest temperature as `parse_temperature` reads it."""
    return {0.0: "none", AUTO_TEMPERATURE: "auto"}.get(celsius, f"{celsius:g}")


def highest_celsius(limit: float, slowdown_celsius: float | None) -> float:
    """Return the highest temperature that a limit allows, 0 for any; `slowdown_celsius` is where the card slows itself
    down, None if that is not known, or for a processor."""
    if limit != AUTO_TEMPERATURE:
        return limit
    return 0.0 if slowdown_celsius is None else slowdown_celsius - BELOW_SLOWDOWN


def _minute(hours: str, minutes: str | None) -> int:
    minute = int(hours) * 60 + int(minutes or 0)
    if minute > _DAY_MINUTES or int(minutes or 0) > 59:
        raise ValueError(f"{hours}{':' + minutes if minutes else ''} is not a time of day; allowed: 0:00 to 24:00")
    return minute
