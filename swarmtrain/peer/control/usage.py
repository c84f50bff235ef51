"""Measure what this process and its daemon use of the machine, what all other programs use, battery and heat."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_MOST_NICE = 19
_SUPPLIES = Path("/sys/class/power_supply")
_PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz")
"""Names of the sensors of processors, the best first: of Intel and AMD, of boards with ARM, and of the mainboard."""


class Usage:
    """Measures this process together with the processes it has started."""

    def __init__(self) -> None:
        self._me = psutil.Process()

    @property
    def num_processors(self) -> int:
        """Processors of the machine."""
        return psutil.cpu_count() or 1

    def others_s(self) -> float:
        """Return the processor seconds that all other programs of the machine have used so far."""
        times = psutil.cpu_times()
        names = ("user", "nice", "system", "irq", "softirq")  # not idle, nor stolen by another virtual machine
        busy_s = sum(float(getattr(times, name, 0.0)) for name in names)
        return busy_s - self._own_s()

    def _own_s(self) -> float:
        mine = self._me.cpu_times()
        own_s = float(mine.user + mine.system + mine.children_user + mine.children_system)
        for child in self._children():
            with contextlib.suppress(psutil.Error):
                times = child.cpu_times()
                own_s += times.user + times.system
        return own_s

    def memory_bytes(self) -> int:
        """Return the memory of this process and its daemon; memory shared with other programs counts in proportion."""
        total = 0
        for process in (self._me, *self._children()):
            with contextlib.suppress(psutil.Error):
                total += _memory_of(process)
        return total

    def on_battery(self) -> bool | None:
        """Return whether the machine runs on battery; None if it has none, or does not tell."""
        try:
            battery = psutil.sensors_battery()
        except (AttributeError, OSError, RuntimeError, ValueError):  # not on every system, nor in every container
            return None
        if battery is None or battery.power_plugged is None or not _has_battery_of_its_own():
            return None
        return not battery.power_plugged

    def processor_celsius(self) -> float | None:
        """Return the temperature of the hottest part of the processor; None if the machine does not tell."""
        try:
            sensors = psutil.sensors_temperatures()
        except (AttributeError, OSError, RuntimeError, ValueError):
            return None
        found = next((sensors[name] for name in _PROCESSOR_SENSORS if sensors.get(name)), ())
        return max((float(each.current) for each in found if each.current), default=None)

    def _children(self) -> list[psutil.Process]:
        try:
            return self._me.children(recursive=True)
        except psutil.Error:
            return []


def _has_battery_of_its_own() -> bool:
    """Return whether a battery is the machine's: psutil also takes a wireless mouse's for one, which runs down."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        return any(
            _line(supply / "type") == "Battery" and _line(supply / "scope") != "Device"
            for supply in _SUPPLIES.iterdir()
        )
    except OSError:
        return False


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _memory_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (AttributeError, psutil.AccessDenied):
        return int(process.memory_info().rss)


def set_niceness(nice: int) -> None:
    """Set the niceness of this process and its daemon, with all their threads. Raises PermissionError if it is too low.

    A thread that was nicer than the process, such as the one that writes checkpoints, stays so.
    """
    me = psutil.Process()
    more = nice - os.getpriority(os.PRIO_PROCESS, me.pid)
    for process in (me, *me.children(recursive=True)):
        for thread in _threads_of(process.pid):
            with contextlib.suppress(ProcessLookupError):
                now = os.getpriority(os.PRIO_PROCESS, thread)
                os.setpriority(os.PRIO_PROCESS, thread, min(max(nice, now + more), _MOST_NICE))


def _threads_of(pid: int) -> Iterator[int]:
    """Yield the threads of a process: on Linux each has a niceness of its own, which a new thread inherits."""
    if not sys.platform.startswith("linux"):
        yield pid
        return
    with contextlib.suppress(OSError):
        yield from [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
