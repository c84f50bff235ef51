"""Measure what other programs use of NVIDIA's cards, and how hot these are, by NVML (package `nvidia-ml-py`).

Other programs are told apart by process, because the use of the whole card says nothing while this peer trains on it.
The driver samples, for each process, the share of the time in which it computed; a program that only keeps memory there
has none. Peers of swarmtrain on the same card share it, and are no other programs.

That needs this peer's own process to be among those that the driver names. In a container it is not (the driver names
processes as the system outside does), nor in WSL, nor where the driver does not sample (a part of a card, MIG): there,
what others use stays unknown. Nothing that goes wrong here ends training. Not tried on a card yet.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any, TypeVar

import psutil
import torch

from swarmtrain.protocol.watches import CardMeasurement
from swarmtrain.words import one_line

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_ALL = 100
"""Percent: a sample above it is none, and the driver's buffer may hold such."""
_MAX_NAME = 40
_MISSING = "nvidia-ml-py is not installed here (pip install nvidia-ml-py)"


class CardUsage:
    """Measures cards by their names in torch, such as "cuda:0". Not thread-safe."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Any] = importlib.import_module) -> None:
        """`load` imports NVML's module."""
        self.problem = ""
        """What was the first to keep something from being measured; empty while nothing has."""
        self._names, self._load = names, load
        self._nvml: Any = None
        self._cards: dict[str, _Card] = {}
        self._slowdown: dict[str, float] = {}
        self._me = psutil.Process()

    def measure(self) -> list[CardMeasurement]:
        """Return a measurement of each card. What fails is tried again the next time."""
        return [self._measure(name) for name in self._names]

    def _measure(self, name: str) -> CardMeasurement:
        share, program, celsius = None, "", None
        if (card := self._card(name)) is not None:
            found = self._try(card, lambda: self._others(card))
            share, program = (None, "") if found is None else found
            celsius = self._try(card, lambda: float(self._nvml.nvmlDeviceGetTemperature(card.handle, 0)))
        return CardMeasurement(
            name=name,
            others_share=share,
            program=program,
            celsius=celsius,
            slowdown_celsius=self._slowdown.get(name),
        )

    def _card(self, name: str) -> _Card | None:
        """Return the card, found anew after an error; None if it cannot be found."""
        if name in self._cards:
            return self._cards[name]
        if not name.startswith("cuda") or torch.version.hip is not None:
            self._note("only cards of NVIDIA can be watched")
            return None
        try:
            self._nvml = self._nvml or self._load("pynvml")
        except ImportError:
            self._note(_MISSING)
            return None
        try:
            self._nvml.nvmlInit()
            card = self._cards[name] = _Card(name, _handle(self._nvml, name))
        except (self._nvml.NVMLError, AttributeError, RuntimeError, AssertionError, OSError) as error:
            self._note(f"its driver does not answer: {_first_line(error)}")
            return None
        slowdown = self._nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        with suppress(self._nvml.NVMLError):  # not all drivers tell
            if celsius := float(self._nvml.nvmlDeviceGetTemperatureThreshold(card.handle, slowdown)):
                self._slowdown[name] = celsius
        return card

    def _try(self, card: _Card, measured: Callable[[], _T]) -> _T | None:
        """Return what is measured; None if the driver does not tell, for which the card is looked for again."""
        not_supported = self._nvml.NVML_ERROR_NOT_SUPPORTED
        try:
            return measured()
        except self._nvml.NVMLError as error:
            if getattr(error, "value", not_supported) != not_supported:
                self._cards.pop(card.name, None)
            self._note(f"its driver says: {_first_line(error)}")
        except Exception as error:
            # NVML's Python part has errors of its own, such as NVMLLibraryMismatchError for a driver older than 510.
            # They too must not end training.
            _log.debug("asking %s failed: %r", card.name, error)
            self._note(f"its driver and the installed nvidia-ml-py do not fit together ({type(error).__name__})")
        return None

    def _others(self, card: _Card) -> tuple[float, str] | None:
        """Return the share of the time since the last call in which other programs computed on a card, and the name of
        the one that did most; None if that cannot be told."""
        nvml, own = self._nvml, self._own_pids()
        if not own & {each.pid for each in nvml.nvmlDeviceGetComputeRunningProcesses(card.handle)}:
            self._note("its driver does not name this peer among the processes there, as in a container or in WSL")
            return None
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(card.handle, card.last_sample)
        except nvml.NVMLError as error:
            if getattr(error, "value", None) != nvml.NVML_ERROR_NOT_FOUND:
                raise
            samples = []  # nothing has used the card since
        fresh = [each for each in samples if each.timeStamp > card.last_sample and each.smUtil <= _ALL]
        is_first, card.last_sample = not card.last_sample, max([card.last_sample, *(each.timeStamp for each in fresh)])
        if is_first and fresh:  # these are of an unknown time
            return 0.0, ""
        busy: dict[int, int] = {}
        for each in fresh:
            if each.smUtil and each.pid not in own and not _is_swarmtrain(each.pid):
                busy[each.pid] = max(busy.get(each.pid, 0), each.smUtil)
        most = max(busy, key=lambda pid: busy[pid], default=None)
        return min(_ALL, sum(busy.values())) / _ALL, "" if most is None else _program(most)

    def _own_pids(self) -> set[int]:
        """Return the numbers of this process and of those that it has started."""
        try:
            return {self._me.pid, *(child.pid for child in self._me.children(recursive=True))}
        except psutil.Error:
            return {self._me.pid}

    def _note(self, problem: str) -> None:
        if not self.problem:
            self.problem = problem
            _log.info("watching %s: %s", ", ".join(self._names), problem)


class _Card:
    """Card as NVML knows it."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self.handle = name, handle
        self.last_sample = 0
        """Time of the newest sample that was read, as the driver counts it; 0 before the first."""


def _handle(nvml: Any, name: str) -> Any:
    """Return NVML's handle of a card. NVML numbers all cards of the machine; torch numbers those that
    CUDA_VISIBLE_DEVICES leaves, perhaps in another order.

    Raises what NVML and torch raise if it is not found.
    """
    index = int(name.partition(":")[2] or 0)
    properties: Any = torch.cuda.get_device_properties(index)
    with suppress(AttributeError, nvml.NVMLError):  # older versions of torch tell no UUID
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    with suppress(AttributeError, nvml.NVMLError):
        place = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
        return nvml.nvmlDeviceGetHandleByPciBusId(place)
    return nvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(index))


def _is_swarmtrain(pid: int) -> bool:
    """Return whether a process is a peer of swarmtrain, or was started by one."""
    try:
        process = psutil.Process(pid)
        return any(_runs_swarmtrain(each.cmdline()) for each in (process, *process.parents()))
    except psutil.Error:
        return False


def _runs_swarmtrain(words: Sequence[str]) -> bool:
    """Return whether a command line runs this package, by its command or as a module."""
    if not words or not PurePath(words[0]).name.startswith("python"):
        return False
    program = next((word for word in words[1:] if not word.startswith("-")), "")
    return PurePath(program).name == "swarmtrain" or program.startswith("swarmtrain.")


def _program(pid: int) -> str:
    try:
        return one_line(psutil.Process(pid).name())[:_MAX_NAME]
    except psutil.Error:
        return f"process {pid}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def card_problem(name: str, load: Callable[[str], Any] = importlib.import_module) -> str:
    """Return what keeps a card, which this process has used, from being measured; empty if nothing does."""
    usage = CardUsage([name], load)
    usage.measure()
    return usage.problem
