"""Keep a volunteer within what it may take of its machine: pause it, slow it, and accept changes while it runs.

A thread of its own measures and decides every few seconds (decisions: `protocol/limits.py`, `protocol/watches.py`).
Only the number of threads is set by the trainers, between two steps: torch keeps it for each thread by itself, and a
volunteer of a pipeline trains each of its stages on a thread of its own. The share of a graphics card's time is kept by
the trainer, which rests after each step (`peer/devices/step_rests.py`).
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import psutil
import torch

from swarmtrain.errors import UserError
from swarmtrain.events import Event, WarningEvent
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.network.node import TrafficCount
from swarmtrain.peer.control.usage import Usage, set_niceness
from swarmtrain.peer.devices.card_usage import CardUsage
from swarmtrain.peer.estimate import Estimate, estimate
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.protocol.limits import (
    ALWAYS,
    AUTO_TEMPERATURE,
    Limits,
    exact_size,
    highest_celsius,
    parse_hours,
    size_of_limit,
    temperature_of_limit,
)
from swarmtrain.protocol.watches import (
    BatteryWatch,
    CardMeasurement,
    CardWatch,
    HeatWatch,
    IdleWatch,
    MemoryWatch,
)
from swarmtrain.run import NetworkSection, RunFile
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import counted, size_in_words

LOOK_EVERY_S = 3.0
_LAST_LOOK_S = 5.0
"""Seconds that the end waits for a look at the machine: a driver that hangs must not keep a peer from ending."""

_log = logging.getLogger(__name__)


class Measured(Protocol):
    """Measurements on which the limits are decided; see `Usage`."""

    @property
    def num_processors(self) -> int: ...

    def others_s(self) -> float: ...

    def memory_bytes(self) -> int: ...

    def on_battery(self) -> bool | None: ...

    def processor_celsius(self) -> float | None: ...


class MeasuredCards(Protocol):
    """Measurements of the graphics cards that a peer trains on; see `CardUsage`."""

    @property
    def problem(self) -> str: ...

    def measure(self) -> Sequence[CardMeasurement]: ...


def local_time() -> datetime.datetime:
    """Return this machine's wall clock, in the time zone it is in now: laptops travel."""
    time.tzset()
    return datetime.datetime.now()


class LimitEnforcer:
    """Holds a `PauseSwitch` as the limits require. Thread-safe; each thread that trains calls `between_steps`."""

    def __init__(
        self,
        limits: Limits,
        pause: PauseSwitch,
        emit: Callable[[Event], None],
        measured: Measured | None = None,
        local_now: Callable[[], datetime.datetime] = local_time,
        *,
        expected: Callable[[], Estimate | None] = lambda: None,
    ) -> None:
        """`expected` returns what the run costs this peer, as far as it is known."""
        self._limits, self._pause, self._emit = limits, pause, emit
        self._measured = measured or Usage()
        self._local_now = local_now
        self._idle = IdleWatch(self._measured.num_processors)
        self._memory = MemoryWatch()
        self._battery, self._on_battery = BatteryWatch(), self._measured.on_battery()
        self._devices: Sequence[str] | None = None
        """Names of the devices that this peer trains on; None before it has chosen them."""
        self._cards: MeasuredCards | None = None
        self._card_watches: dict[str, CardWatch] = {}
        self._heat: dict[str, HeatWatch] = {}
        self._celsius: float | None = None
        """Highest temperature in force; None while it is not known."""
        self._told: set[str] = set()
        """Codes of warnings that are shown once."""
        self._held: dict[str, str] = {}
        self._lock, self._measuring = threading.Lock(), threading.Lock()
        self._traffic: TrafficCount | None = None
        self._network = NetworkSection()
        self._expected = expected
        self._all_threads = torch.get_num_threads()
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)

    # ------------------------------------------------------------- what is in force

    def limits(self) -> pb.Limits:
        """Return the limits in force."""
        with self._lock:
            limits, traffic, has_card = self._limits, self._traffic, self._cards is not None
        told = pb.Limits(
            threads=limits.threads,
            memory_bytes=limits.memory_bytes,
            nice=self._nice,
            only_when_idle=limits.only_when_idle,
            hours=limits.hours.text,
            up_mbit=None if traffic is None else traffic.up.bytes_per_s / BYTES_PER_S_OF_MBIT,
            down_mbit=None if traffic is None else traffic.down.bytes_per_s / BYTES_PER_S_OF_MBIT,
            slowdown=limits.slowdown if limits.slowdown != 1 else None,
            max_temperature=self._celsius,
        )
        if has_card:
            told.gpu_share, told.gpu_any_time = limits.gpu_share, limits.gpu_any_time
        if limits.on_battery or self._on_battery is not None:
            told.on_battery = limits.on_battery
        return told

    @property
    def card_share(self) -> float:
        """Share of a graphics card's time that the peer may use, above 0 and at most 1."""
        return self._limits.gpu_share / 100

    def change(self, wanted: pb.Limits) -> str:
        """Change the limits that `wanted` names; return a sentence on what happens now. Raises UserError for a value
        not allowed.
        """
        try:
            given: dict[str, Any] = {name: getattr(wanted, name) for name in _FIELDS if wanted.HasField(name)}
            if "hours" in given:
                given["hours"] = parse_hours(given["hours"])
            with self._lock:  # whatever may be refused comes first, so that a refusal changes nothing
                changed = self._limits.with_changes(**given)
                if self._traffic is not None:
                    _check_link(changed, self._network)
                if "nice" in given:
                    self._set_nice(changed.nice)
                if self._traffic is not None:
                    limit_link(self._traffic, changed, self._network)
                self._limits = changed
        except ValueError as error:
            raise UserError(str(error), code="bad-limit") from None
        self.tick()
        return self._in_words(given)

    def _in_words(self, given: dict[str, object]) -> str:
        limits, said = self._limits, []
        if "threads" in given:
            threads = f"{counted(limits.threads or self._all_threads, 'thread')} from the next inner step on"
            too_many = self._too_many(limits.threads)
            said.append(threads + (f", {too_many}" if too_many else ""))
        if "memory_bytes" in given:
            said.append(f"memory {size_of_limit(limits.memory_bytes)}{self._too_little(limits.memory_bytes)}")
        if "nice" in given:
            said.append(f"niceness {limits.nice}")
        if "only_when_idle" in given:
            said.append("trains only while other programs are idle" if limits.only_when_idle else "trains at any load")
        if "hours" in given:
            said.append("trains at any hour" if limits.hours == ALWAYS else f"trains in the hours {limits.hours.text}")
        for name, verb in (("up_mbit", "sends"), ("down_mbit", "receives")):
            if name in given:
                mbit = getattr(limits, name)
                said.append(f"{verb} at most {mbit:g} Mbit/s" if mbit else f"{verb} as fast as the link")
        if "gpu_share" in given:
            is_card = self._cards is not None or self._devices is None
            here = "" if is_card else ", which does nothing on the processor (--threads and --nice do)"
            said.append(f"uses a graphics card for {limits.gpu_share}% of its time{here}")
        if "gpu_any_time" in given:
            said.append(
                "trains whatever other programs do on the graphics card"
                if limits.gpu_any_time
                else "pauses while other programs use the graphics card"
            )
        if "on_battery" in given:
            said.append("trains on battery, too" if limits.on_battery else "pauses on battery")
        if "max_temperature" in given:
            said.append(_highest_in_words(limits.max_temperature))
        reason = self._pause.reason
        said.append(f"it is paused: {reason}" if reason else "it trains")
        return "; ".join(said)

    def _too_many(self, threads: int) -> str:
        """Return a remark if `threads` are more than the processors; else empty."""
        cores = self._measured.num_processors
        return f"more than the {counted(cores, 'core')} here: that only slows it down" if threads > cores else ""

    def _too_little(self, limit_bytes: int) -> str:
        """Return a remark if the run is expected to need more memory than `limit_bytes`; else empty."""
        expected = self._expected() if limit_bytes else None
        if expected is None or expected.memory_bytes <= limit_bytes:
            return ""
        return f", and {_needs_in_words(expected)}: training pauses once it uses more than allowed"

    # ------------------------------------------------------------- keeping them

    def start(self) -> None:
        """Apply the limits for the first time, in the trainer's thread. Raises UserError if one cannot be applied."""
        self._set_nice(self._limits.nice)
        self.between_steps()
        if too_many := self._too_many(self._limits.threads):
            warning = f"--threads {self._limits.threads}: {too_many}"
            self._emit(WarningEvent(message=warning, code="too-many-threads"))
        self.tick()

    def trains_on(self, devices: Sequence[str], cards: MeasuredCards | None = None) -> None:
        """Learn which devices this peer trains on, as torch calls them; `cards` measures those that are graphics
        cards (default: by NVML)."""
        names = [name for name in devices if name != "cpu"]
        cards = (cards or CardUsage(names)) if names else None
        with self._lock:
            self._devices, self._cards = devices, cards
        if not names and self._limits.gpu_share != 100:
            message = (
                f"--gpu-share {self._limits.gpu_share}: this peer trains on the processor, where that does nothing; "
                "use --threads or --nice"
            )
            self._warn_once(WarningEvent(message=message, code="gpu-share-on-processor"))
        self.tick()

    def limit_link(self, traffic: TrafficCount, network: NetworkSection) -> None:
        """Limit this peer's link as its own limits say, or as the run does where these say nothing; see the function
        `limit_link`."""
        with self._lock:
            limit_link(traffic, self._limits, network)
            self._traffic, self._network = traffic, network

    def between_steps(self, num_ranks: int = 1) -> None:
        """Set the number of torch's threads for the calling thread if it has changed; costs nothing otherwise.

        It is the share of one of `num_ranks` that train on the processor, at least one thread.
        """
        wanted = max(1, (self._limits.threads or self._all_threads) // num_ranks)
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    def _set_nice(self, nice: int | None) -> None:
        if nice is None:
            return
        try:
            set_niceness(nice)
        except PermissionError:
            raise UserError(
                f"nice: only an administrator may lower it from {self._nice} to {nice}; end this peer, and join again "
                f"with --nice {nice}",
                code="nice-not-lowered",
            ) from None
        self._nice = nice

    def tick(self) -> None:
        """Measure, decide, and hold or release the switch."""
        measured = self._measure_cards()
        with self._lock:
            limits, now_s = self._limits, time.monotonic()
            self._apply("hours", limits.hours.rest(self._local_now()))
            self._apply("idle", self._idle_rest(now_s, limits))
            self._apply("card", self._card_rest(now_s, limits, measured))
            self._apply("battery", self._battery_rest(now_s, limits))
            self._apply("heat", self._heat_rest(now_s, limits, measured))
            used_bytes = self._measured.memory_bytes() if limits.memory_bytes else 0
            rest, warning = self._memory.rest(now_s, used_bytes, limits.memory_bytes)
            self._apply("memory", rest)
        if warning:
            expected = self._expected()  # reads the limits too: not under the lock
            self._emit(
                WarningEvent(
                    message=warning + (f"; {_needs_in_words(expected)}" if expected else ""), code="too-little-memory"
                )
            )
        self._warn_of_unknown(limits, measured)

    def _measure_cards(self) -> Sequence[CardMeasurement]:
        """Measure the cards, if there are any. A driver that hangs must not keep a status from being shown: this holds
        another lock."""
        with self._measuring:
            return () if self._cards is None else self._cards.measure()

    def _warn_of_unknown(self, limits: Limits, measured: Sequence[CardMeasurement]) -> None:
        """Warn once of what the limits require to be measured and cannot be."""
        cards = self._cards
        for card in measured:
            use = "" if limits.gpu_any_time or card.others_share is not None else "what other programs use of it"
            heat = "its temperature" if limits.max_temperature and card.celsius is None else ""
            if cards is not None and cards.problem and (use or heat):
                unknown = " and ".join(filter(None, (use, heat)))
                message = f"{card.name}: this peer does not see {unknown}, and does not pause for it: {cards.problem}"
                self._warn_once(WarningEvent(message=message, code="card-not-watched"))
        if limits.max_temperature > 0 and cards is None and self._devices is not None and self._celsius is None:
            message = (
                f"--max-temperature {limits.max_temperature:g}: this machine does not tell its processor's "
                "temperature, so this limit does nothing"
            )
            self._warn_once(WarningEvent(message=message, code="heat-not-measured"))

    def _warn_once(self, warning: WarningEvent) -> None:
        if warning.code not in self._told:
            self._told.add(warning.code)
            self._emit(warning)

    def _idle_rest(self, now_s: float, limits: Limits) -> str:
        if not limits.only_when_idle:
            self._idle = IdleWatch(self._measured.num_processors)
            return ""
        return self._idle.rest(now_s, self._measured.others_s())

    def _card_rest(self, now_s: float, limits: Limits, measured: Sequence[CardMeasurement]) -> str:
        if limits.gpu_any_time:
            self._card_watches.clear()
            return ""
        rests = [self._card_watches.setdefault(card.name, CardWatch()).rest(now_s, card) for card in measured]
        return next(filter(None, rests), "")

    def _battery_rest(self, now_s: float, limits: Limits) -> str:
        self._on_battery = self._measured.on_battery()
        if limits.on_battery:
            self._battery = BatteryWatch()
            return ""
        return self._battery.rest(now_s, bool(self._on_battery))

    def _heat_rest(self, now_s: float, limits: Limits, measured: Sequence[CardMeasurement]) -> str:
        """Return the reason of a pause by the hottest card, or without cards by the processor."""
        found = [(card.name, card.celsius, card.slowdown_celsius) for card in measured]
        if self._cards is None and limits.max_temperature > 0:
            found = [("the processor", self._measured.processor_celsius(), None)]
        if not found:
            self._heat.clear()
        rests, limits_here = list[str](), list[float]()
        for what, celsius, slowdown_celsius in found:
            limit = highest_celsius(limits.max_temperature, slowdown_celsius)
            rests.append(self._heat.setdefault(what, HeatWatch()).rest(now_s, what, celsius, limit))
            if limit and celsius is not None:
                limits_here.append(limit)
        self._celsius = min(limits_here, default=None)
        return next(filter(None, rests), "")

    def _apply(self, source: str, reason: str) -> None:
        if reason == self._held.get(source, ""):
            return
        self._held[source] = reason
        if reason:
            _log.info("paused: %s", reason)
            self._pause.hold(source, reason)
        else:
            _log.info("no longer paused by %s", source)
            self._pause.release(source)


_FIELDS = (
    *("threads", "memory_bytes", "nice", "only_when_idle", "hours", "up_mbit", "down_mbit"),
    *("gpu_share", "gpu_any_time", "on_battery", "max_temperature"),
)


def _highest_in_words(celsius: float) -> str:
    if celsius == AUTO_TEMPERATURE:
        return "pauses shortly before the graphics card would slow itself down for heat"
    return f"pauses at {celsius:g} °C" if celsius else "trains at any temperature"


def options_of(wanted: pb.Limits) -> dict[str, tuple[str, ...] | None]:
    """Return changed limits as options of `join`; None for a limit that was removed."""
    numbers = {"--threads": "threads", "--nice": "nice", "--up": "up_mbit", "--down": "down_mbit"}
    found: dict[str, tuple[str, ...] | None] = {
        option: (f"{getattr(wanted, name):.15g}",) for option, name in numbers.items() if wanted.HasField(name)
    }
    if wanted.HasField("threads") and not wanted.threads:
        found["--threads"] = None
    if wanted.HasField("memory_bytes"):
        found["--memory"] = (exact_size(wanted.memory_bytes),) if wanted.memory_bytes else None
    if wanted.HasField("only_when_idle"):
        found["--only-when-idle"] = () if wanted.only_when_idle else None
    if wanted.HasField("hours"):
        found["--hours"] = None if parse_hours(wanted.hours) == ALWAYS else (wanted.hours,)
    if wanted.HasField("gpu_share"):
        found["--gpu-share"] = (str(wanted.gpu_share),) if wanted.gpu_share != 100 else None
    if wanted.HasField("gpu_any_time"):
        found["--gpu-any-time"] = () if wanted.gpu_any_time else None
    if wanted.HasField("on_battery"):
        found["--on-battery"] = () if wanted.on_battery else None
    if wanted.HasField("max_temperature"):
        celsius = temperature_of_limit(wanted.max_temperature)
        found["--max-temperature"] = (celsius,) if celsius != "auto" else None
    return found


@contextmanager
def kept_limits(enforcer: LimitEnforcer) -> Iterator[LimitEnforcer]:
    """Keep the limits, by a thread, while inside the context."""
    enforcer.start()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            try:
                enforcer.tick()
            except (psutil.Error, OSError) as error:
                _log.warning("this machine could not be measured: %s", error)
            except Exception:
                # The boundary of this thread: a look at the peer's status may fail, and limits must still be kept.
                _log.exception("checking the limits failed")

    thread = threading.Thread(target=look, name="limits", daemon=True)
    thread.start()
    try:
        yield enforcer
    finally:
        ended.set()
        thread.join(_LAST_LOOK_S)


def _needs_in_words(cost: Estimate) -> str:
    return f"this run needs about {size_in_words(cost.memory_bytes)} of memory with {counted(cost.num_peers, 'peer')}"


def least_cost(run: RunFile, num_parameters: int, num_ranks: int = 1) -> Estimate:
    """Return the cost of the run for a peer with one partner, with the least memory."""
    # With more partners it may have to pause later; what does not fit with a single one, one sequence at a time, even
    # if blocks are computed again in the backward pass, could never train, so it is refused before anything is built
    # (decision 13).
    costs = (
        estimate(run, num_parameters, num_peers=2, microbatch_sequences=1, recomputes=recomputes, num_ranks=num_ranks)
        for recomputes in (False, True)
    )
    return min(costs, key=lambda each: each.memory_bytes)


def check_memory(run: RunFile, num_parameters: int, limit_bytes: int, num_ranks: int = 1) -> None:
    """Raise UserError if this run cannot keep to the limit even with a single partner; `num_ranks` of this peer train
    on the processor."""
    if not limit_bytes:
        return
    cost = least_cost(run, num_parameters, num_ranks)
    if cost.memory_bytes > limit_bytes:
        raise UserError(
            f"this run needs about {size_in_words(cost.memory_bytes)} of memory with {counted(cost.num_peers, 'peer')} "
            f"({size_in_words(cost.memory_program_bytes)} program, {size_in_words(cost.memory_parameters_bytes)} "
            f"parameters, {size_in_words(cost.memory_activations_bytes)} activations), and --memory allows "
            f"{size_in_words(limit_bytes)}: allow more, or join a run with a smaller model",
            code="too-little-memory",
        )


def limit_link(traffic: TrafficCount, limits: Limits, network: NetworkSection) -> None:
    """Limit what is sent and received by `limits`, or by the run file where they say nothing.

    Raises UserError if that is too little for the run, in which every transfer would be given up as too slow.
    """
    _check_link(limits, network)
    up_mbit = network.up_mbit if limits.up_mbit is None else limits.up_mbit
    down_mbit = network.down_mbit if limits.down_mbit is None else limits.down_mbit
    traffic.up.bytes_per_s = BYTES_PER_S_OF_MBIT * up_mbit
    traffic.down.bytes_per_s = BYTES_PER_S_OF_MBIT * down_mbit


def _check_link(limits: Limits, network: NetworkSection) -> None:
    for name, mbit in (("up", limits.up_mbit), ("down", limits.down_mbit)):
        if mbit is not None and 0 < mbit < network.least_mbit:
            raise UserError(
                f"{name}: {mbit:g} Mbit/s is too little for this run, in which transfers slower than "
                f"{size_in_words(network.least_bytes_per_s)}/s are given up; allowed: 0 (no limit), or at least "
                f"{network.least_mbit:g}",
                code="too-little-bandwidth",
            )
