"""Choice of the device that a peer trains on, and of the precision that it computes in.

Everything here is pure: what the machine has, and how fast it is, are arguments (`peer/devices/machine.py` looks and
measures). A device is called as torch calls it: "cpu", "cuda:0".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from swarmtrain.errors import UserError
from swarmtrain.words import size_in_words

__all__ = [
    "PRECISIONS",
    "CompileRequest",
    "DeviceChoice",
    "DeviceRequest",
    "FoundDevice",
    "Precision",
    "PrecisionRequest",
    "Probe",
    "ProbeResult",
    "choose_device",
    "fastest_precision",
    "matching_devices",
    "parse_device",
]

DeviceKind = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Precision = Literal["fp32", "bf16", "fp16"]
PrecisionRequest = Literal["auto", "fp32", "bf16", "fp16"]
CompileRequest = Literal["auto", "on", "off"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_UNTESTED = ("mps", "xpu")
_LEAST_GAIN = 1.1
"""Factor by which a lower precision must be faster than fp32 to be chosen: it rounds more, and a probe is short."""


@dataclass(frozen=True)
class DeviceRequest:
    """Device that a person asked for: a kind, and with "cuda" or "xpu" perhaps a number."""

    kind: DeviceKind = "auto"
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    def allows(self, name: str) -> bool:
        """Return whether the device of this name is of the kind and number asked for."""
        kind, _, index = name.partition(":")
        return self.kind == kind and (self.index is None or int(index or 0) == self.index)


def parse_device(text: str) -> DeviceRequest:
    """Return what `--device` asks for. Raises ValueError, whose message says what is allowed."""
    match = re.fullmatch(r"(auto|cpu|mps|cuda|xpu)(?::(\d{1,3}))?", text.strip().lower())
    if match is None or (match[2] is not None and match[1] not in ("cuda", "xpu")):
        raise ValueError(f"{text} is not a device; write auto, cpu, cuda or cuda:N (untested: mps, xpu, xpu:N)")
    return DeviceRequest(match[1], None if match[2] is None else int(match[2]))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FoundDevice:
    """Device of this machine."""

    name: str
    title: str
    """Its model, for a person; empty if the name says all."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """Precisions that it has instructions for, so that trying them is worth the time."""
    free_bytes: int | None = None
    """Memory free for training; None if the machine's memory is checked elsewhere."""

    @property
    def is_card(self) -> bool:
        """True if it has memory of its own."""
        return self.name != "cpu"

    def __str__(self) -> str:
        return f"{self.name} ({self.title})" if self.title else self.name


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Result of a few inner steps of a small model on a device."""

    tokens_per_s: Mapping[Precision, float]
    problem: str = ""
    """Why the device cannot be used; empty if it works."""


Probe = Callable[[FoundDevice, tuple[Precision, ...]], ProbeResult]
"""Function of a device and of the precisions to try there."""


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """Device and precision to train with, and why."""

    device: str
    title: str
    precision: Precision
    why: str
    """Reason, for a person; it begins with a small letter and has no full stop."""

    def __str__(self) -> str:
        name = f"{self.device} ({self.title})" if self.title else self.device
        return f"training on {name} in {self.precision}: {self.why}"


def matching_devices(request: DeviceRequest, found: Sequence[FoundDevice], missing: str) -> list[FoundDevice]:
    """Return the devices to try, the best first: with "auto" the cards by their free memory, then the processor.

    `missing` says why the machine shows no card that is there, empty if none is. Raises UserError if the device asked
    for is not there.
    """
    if request.kind == "auto":
        cards = [each for each in found if each.is_card and each.name.partition(":")[0] not in _UNTESTED]
        cards.sort(key=lambda each: -(each.free_bytes or 0))
        return [*cards, *(each for each in found if not each.is_card)]
    matching = [each for each in found if request.allows(each.name)]
    if not matching:
        here = ", ".join(str(each) for each in found)
        why = f"; {missing}" if missing and request.kind == "cuda" else ""
        raise UserError(
            f"--device {request}: this machine has only {here}{why}; give one of these, or auto",
            code="device-not-there",
        )
    return sorted(matching, key=lambda each: -(each.free_bytes or 0))


def choose_device(
    request: DeviceRequest,
    wanted: PrecisionRequest,
    found: Sequence[FoundDevice],
    needed_bytes: int,
    probe: Probe,
    *,
    missing: str = "",
) -> DeviceChoice:
    """Return the first device asked for that works, and the precision to compute in there.

    `needed_bytes` is the least memory that training takes on a card; `missing` is as in `matching_devices`. A device is
    probed if it is a card, or if there is more than one precision to choose from. Raises UserError if none works.
    """
    passed_over: list[str] = []
    for device in matching_devices(request, found, missing):
        if device.free_bytes is not None and device.free_bytes < needed_bytes:
            free, needed = size_in_words(device.free_bytes), size_in_words(needed_bytes)
            passed_over.append(f"{device} has {free} of memory free, and this run needs at least {needed}")
            continue
        precisions = device.precisions if wanted == "auto" else (wanted,)
        result = probe(device, precisions) if device.is_card or precisions != ("fp32",) else _NOT_PROBED
        if result.problem:
            passed_over.append(f"{device} does not work: {result.problem}")
            continue
        as_asked = "" if request.kind != "auto" else f"{wanted} as asked for"
        precision, how_fast = fastest_precision(result.tokens_per_s) if wanted == "auto" else (wanted, as_asked)
        from_where = "" if passed_over and request.kind == "auto" else _where_from(request, device, missing)
        reasons = [from_where, *passed_over, how_fast]
        if device.name.partition(":")[0] in _UNTESTED:
            reasons.append("nobody has tested this kind of device")
        why = "; ".join(reason for reason in reasons if reason)
        return DeviceChoice(device=device.name, title=device.title, precision=precision, why=why)
    other = "" if request.kind == "auto" else ", or auto"
    raise UserError(f"--device {request}: {'; '.join(passed_over)}; give another device{other}", code="device-unusable")


_NOT_PROBED = ProbeResult(tokens_per_s={})


def _where_from(request: DeviceRequest, device: FoundDevice, missing: str) -> str:
    if request.kind != "auto":
        return "asked for"
    if device.is_card:
        return "it works"
    return missing or "no graphics card was found"


def fastest_precision(tokens_per_s: Mapping[Precision, float]) -> tuple[Precision, str]:
    """Return the fastest of the precisions, fp32 unless another is faster by a tenth, and what was measured."""
    full = tokens_per_s.get("fp32")
    others = {name: speed for name, speed in tokens_per_s.items() if name != "fp32"}
    if full is None or not others:
        return next(iter(others), "fp32"), ""
    fastest = max(others, key=lambda name: others[name])
    gain = others[fastest] / full
    if gain < _LEAST_GAIN:
        return "fp32", f"in a probe {fastest} was {gain:.2f} times as fast as fp32"
    return fastest, f"in a probe {gain:.1f} times as fast as fp32"
