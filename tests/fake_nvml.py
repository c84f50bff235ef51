"""Stand-in for the module `pynvml`: two cards of a machine, their processes, and a driver that may fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """Error with NVML's number."""

    def __init__(self, value: int) -> None:
        super().__init__({3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded", 15: "GPU is lost"}[value])
        self.value = value


class NVMLLibraryMismatchError(Exception):
    """Error of NVML's Python part, which is none of NVML's."""


@dataclass
class FakeCard:
    """Card: who computes there and how hot it is."""

    uuid: str
    bus: str
    running: list[int] = field(default_factory=lambda: [os.getpid()])
    """Numbers of the processes that the driver names."""
    busy: dict[int, int] = field(default_factory=dict)
    """Percent of the time that processes compute."""
    celsius: int = 60
    slowdown: int | None = 93
    samples: int | None = None
    """Error of the samples of processes; None: there are some."""


@dataclass
class FakeNvml:
    """Module `pynvml`, as far as it is used. A second passes with each reading of samples."""

    cards: list[FakeCard]
    broken: int | None = None
    """Error of every call; None: the driver answers."""
    has_uuids: bool = True
    is_old: bool = False
    """True if the driver lacks the newest form of some functions."""
    num_inits: int = 0
    now_us: int = 1_000_000
    asked_since: list[int] = field(default_factory=list)
    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NOT_FOUND = 6
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1

    def load(self, name: str) -> Any:
        """Import it."""
        assert name == "pynvml"
        return self

    def _check(self) -> None:
        if self.broken is not None:
            raise NVMLError(self.broken)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        self._check()
        self.num_inits += 1

    def _find(self, fits: Callable[[FakeCard], bool]) -> FakeCard:
        self._check()
        for card in self.cards:
            if fits(card):
                return card
        raise NVMLError(6)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:  # noqa: N802
        if not self.has_uuids:
            raise NVMLError(6)
        return self._find(lambda card: uuid == f"GPU-{card.uuid}")

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> FakeCard:  # noqa: N802
        return self._find(lambda card: bus == card.bus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:  # noqa: N802
        self._check()
        return self.cards[index]

    def nvmlDeviceGetTemperature(self, card: FakeCard, sensor: int) -> int:  # noqa: N802
        self._check()
        assert sensor == 0
        return card.celsius

    def nvmlDeviceGetTemperatureThreshold(self, card: FakeCard, threshold: int) -> int:  # noqa: N802
        self._check()
        assert threshold == 1
        if card.slowdown is None:
            raise NVMLError(3)
        return card.slowdown

    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[Any]:  # noqa: N802
        self._check()
        if self.is_old:
            raise NVMLLibraryMismatchError("Unversioned function called")
        return [SimpleNamespace(pid=pid) for pid in card.running]

    def nvmlDeviceGetProcessUtilization(self, card: FakeCard, since_us: int) -> list[Any]:  # noqa: N802
        self._check()
        if card.samples is not None:
            raise NVMLError(card.samples)
        self.now_us += 1_000_000
        self.asked_since.append(since_us)
        stale = SimpleNamespace(pid=0, timeStamp=0, smUtil=77)  # what the driver's buffer holds besides
        broken = SimpleNamespace(pid=1, timeStamp=self.now_us, smUtil=4_000_000_000)
        fresh = [SimpleNamespace(pid=pid, timeStamp=self.now_us, smUtil=busy) for pid, busy in card.busy.items()]
        if not fresh:
            raise NVMLError(6)
        return [stale, *fresh, broken]
