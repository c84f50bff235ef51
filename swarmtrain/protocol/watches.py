"""Watches of a peer's machine: other programs, battery, heat and memory, and when the peer pauses because of them.

Everything here is pure: the time and the measurements are arguments. The answer is a sentence that says why the peer
pauses, "" while it may train. Each return costs the others a pull of the state, so a peer pauses for what lasts, and
comes back once the cause has been gone for a while. Something that cannot be measured is no reason to pause.

- Other programs on the processors are measured by the processor time that they use, without this peer's own: a peer
  that uses all cores must not take itself for another program. On a graphics card they are measured by the time in
  which they compute there. A program that only shows its window there counts for little, and memory not at all.
- A peer pauses quickly for other programs, because a person waits for their machine, and comes back slowly.
- Memory above the limit causes a warning at first. If it lasts, the peer pauses until it is allowed more. It does not
  return by itself: it would need as much memory again, and come and go for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from swarmtrain.words import size_in_words

BUSY_SHARE = 0.25
"""Share of all processors, averaged over `AVERAGE_S`, above which other programs count as using the machine."""
QUIET_SHARE = 0.15
"""Share below which they must stay for `QUIET_S` before the peer comes back."""
CARD_BUSY_SHARE = 0.15
"""Share of a graphics card's time, averaged over `AVERAGE_S`, above which other programs count as using it. It is less
than of the processors: while this peer keeps the card busy, a program gets only a part of the time that it wants."""
CARD_QUIET_SHARE = 0.1
"""Share below which they must stay for `QUIET_S` before the peer comes back; a desktop's windows take less."""
AVERAGE_S = 15.0
"""Seconds over which the use by other programs is averaged."""
QUIET_S = 60.0
"""Seconds of quiet before the peer comes back."""
ASLEEP_S = 60.0
"""If two measurements are further apart than this, the machine or the process was suspended in between."""

UNPLUGGED_S = 10.0
"""Seconds on battery after which the peer pauses: a laptop that is carried to another socket need not pause."""
PLUGGED_S = 60.0
"""Seconds on mains power before the peer comes back."""

HOT_S = 6.0
"""Seconds at the highest temperature or above it after which the peer pauses."""
COOLER = 10.0
"""Degrees below the highest temperature to which it must have cooled."""
COOL_S = 300.0
"""Seconds for which it must have been so cool before the peer comes back. What is too hot under load would be too hot
again within a minute: longer pauses mean fewer of them."""

MEMORY_PATIENCE_S = 30.0
"""Seconds above the memory limit after which the peer pauses."""
MEMORY_AGAIN = 0.9
"""A warning is repeated only after the use was below this share of the limit."""


# ---------------------------------------------------------------- what lasts


@dataclass
class SteadySwitch:
    """Switch that turns on, and off again, only once the condition to do so has lasted."""

    on_after_s: float
    off_after_s: float
    is_on: bool = False
    _since_s: float | None = None
    """Time since which the condition to turn has held; None if it does not hold."""
    _last_s: float | None = None

    def update(self, now_s: float, *, turns_on: bool, turns_off: bool) -> bool:
        """Return whether it is on. With neither condition it stays as it is, and the waiting begins anew."""
        if self._last_s is not None and not 0 <= now_s - self._last_s <= ASLEEP_S:
            self._since_s = None
        self._last_s = now_s
        if not (turns_off if self.is_on else turns_on):
            self._since_s = None
            return self.is_on
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= (self.off_after_s if self.is_on else self.on_after_s):
            self.is_on, self._since_s = not self.is_on, None
        return self.is_on


@dataclass
class _AverageUse:
    """Share of something that others use, averaged over `AVERAGE_S`."""

    _seen: deque[tuple[float, float]] = field(default_factory=deque)  # (now, seconds used in total)

    def share(self, now_s: float, used_s: float) -> float | None:
        """Return the share of the last seconds that was used; None before `AVERAGE_S` seconds were seen. `used_s` are
        the seconds used since any fixed moment."""
        if self._seen and not 0 <= now_s - self._seen[-1][0] <= ASLEEP_S:
            self._seen.clear()
        self._seen.append((now_s, used_s))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - AVERAGE_S:
            self._seen.popleft()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return None if last_s - first_s < AVERAGE_S else max(0.0, last - first) / (last_s - first_s)


# ---------------------------------------------------------------- other programs


@dataclass
class IdleWatch:
    """Watches whether other programs use the processors, from the processor time that they have used in total."""

    num_processors: int
    resting: str = ""
    _use: _AverageUse = field(default_factory=_AverageUse)
    _busy: SteadySwitch = field(default_factory=lambda: SteadySwitch(on_after_s=0.0, off_after_s=QUIET_S))

    def rest(self, now_s: float, others_s: float) -> str:
        """Return the reason why the peer pauses; "" if it may train. `others_s` is the processor time of other programs
        since any fixed moment, in seconds."""
        share = self._use.share(now_s, others_s / self.num_processors)
        if share is None:
            return self.resting
        was_busy = self._busy.is_on
        if not self._busy.update(now_s, turns_on=share > BUSY_SHARE, turns_off=share <= QUIET_SHARE):
            self.resting = ""
        elif not was_busy:
            self.resting = f"other programs use {share:.0%} of the processors; training resumes after a quiet minute"
        return self.resting


@dataclass(frozen=True, kw_only=True)
class CardMeasurement:
    """Measurement of a graphics card; None for what could not be measured."""

    name: str
    """The card as torch calls it, such as "cuda:0"."""
    others_share: float | None = None
    """Share of the time, since the last measurement, in which other programs computed on it."""
    program: str = ""
    """Name of the program that used it most; empty if none did."""
    celsius: float | None = None
    slowdown_celsius: float | None = None
    """Temperature at which the card slows itself down."""


@dataclass
class CardWatch:
    """Watches whether other programs use one graphics card."""

    resting: str = ""
    _used_s: float = 0.0
    _last_s: float | None = None
    """Time of the last measurement of their use."""
    _use: _AverageUse = field(default_factory=_AverageUse)
    _busy: SteadySwitch = field(default_factory=lambda: SteadySwitch(on_after_s=0.0, off_after_s=QUIET_S))

    def rest(self, now_s: float, card: CardMeasurement) -> str:
        """Return the reason why the peer pauses; "" if it may train."""
        since_s = None if self._last_s is None else now_s - self._last_s
        if card.others_share is None:
            if since_s is not None and since_s > ASLEEP_S:
                self.resting, self._last_s, self._use = "", None, _AverageUse()
                self._busy.is_on = False
            return self.resting
        self._last_s = now_s
        if since_s is not None and 0 <= since_s <= ASLEEP_S:
            self._used_s += card.others_share * since_s
        share = self._use.share(now_s, self._used_s)
        if share is None:
            return self.resting
        was_busy = self._busy.is_on
        if not self._busy.update(now_s, turns_on=share > CARD_BUSY_SHARE, turns_off=share <= CARD_QUIET_SHARE):
            self.resting = ""
        elif not was_busy:
            program = f" ({card.program})" if card.program else ""
            self.resting = f"another program uses {card.name}{program}; training resumes after a quiet minute"
        return self.resting


# ---------------------------------------------------------------- battery and heat


@dataclass
class BatteryWatch:
    """Watches whether the machine runs on battery. The first measurement counts at once, changes once they last."""

    _unplugged: SteadySwitch | None = None

    def rest(self, now_s: float, on_battery: bool) -> str:
        """Return the reason why the peer pauses; "" if it may train."""
        if self._unplugged is None:
            self._unplugged = SteadySwitch(on_after_s=UNPLUGGED_S, off_after_s=PLUGGED_S, is_on=on_battery)
        if not self._unplugged.update(now_s, turns_on=on_battery, turns_off=not on_battery):
            return ""
        return "this machine runs on battery; training resumes on mains power, or with `swarmtrain limits --on-battery`"


def _heat_switch() -> SteadySwitch:
    return SteadySwitch(on_after_s=HOT_S, off_after_s=COOL_S)


@dataclass
class HeatWatch:
    """Watches whether the card, or the processor, is too hot."""

    resting: str = ""
    _limit: float = 0.0
    _last_s: float | None = None
    """Time of the last measurement."""
    _hot: SteadySwitch = field(default_factory=_heat_switch)

    def rest(self, now_s: float, what: str, celsius: float | None, limit: float) -> str:
        """Return the reason why the peer pauses; "" if it may train. `what` has a temperature of `celsius`, and
        `limit`, 0 for none, is the highest one allowed, both in degrees Celsius."""
        is_lost = celsius is None and self._last_s is not None and now_s - self._last_s > ASLEEP_S
        if limit != self._limit or is_lost:
            self.resting, self._limit, self._last_s, self._hot = "", limit, None, _heat_switch()
        if not limit or celsius is None:
            return self.resting
        self._last_s, was_hot = now_s, self._hot.is_on
        if not self._hot.update(now_s, turns_on=celsius >= limit, turns_off=celsius <= limit - COOLER):
            self.resting = ""
        elif not was_hot:
            self.resting = (
                f"{what} has {celsius:.0f} °C, and may have {limit:.0f}; training resumes once it has stayed below "
                f"{limit - COOLER:.0f} for {COOL_S / 60:.0f} minutes"
            )
        return self.resting


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
