"""Choice of the device that a peer trains on, and of the precision that it computes in.

Everything here is pure: what the machine has, and how fast it is, are arguments (`peer/devices/machine.py` looks and
measures). A device is called as torch calls it: "cpu", "cuda:0".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from swarmtrain.errors import UserError
from swarmtrain.words import counted, size_in_words

if TYPE_CHECKING:
    from swarmtrain.run import RunFile

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
    """Device that a person asked for: a kind, and with "cuda" or "xpu" perhaps a number. Or several of one kind, on
    which one peer trains data parallel, a rank on each."""

    kind: DeviceKind = "auto"
    index: int | None = None
    others: tuple[int | None, ...] = ()
    """Numbers of the further devices, in the order asked for; None for the processor, which has none."""

    def __str__(self) -> str:
        first = self.kind if self.index is None else f"{self.kind}:{self.index}"
        return ",".join([first, *(self.kind if index is None else str(index) for index in self.others)])

    @property
    def num_ranks(self) -> int:
        """Number of devices asked for."""
        return 1 + len(self.others)

    @property
    def num_host_ranks(self) -> int:
        """Number of ranks that share the processor; 1 if the devices are cards."""
        return self.num_ranks if self.kind == "cpu" else 1

    @property
    def each(self) -> tuple[DeviceRequest, ...]:
        """Requests for a single device each, in order."""
        return (replace(self, others=()), *(DeviceRequest(self.kind, index) for index in self.others))

    def allows(self, name: str) -> bool:
        """Return whether the device of this name is of the kind, and has the number asked for first, if any."""
        kind, _, index = name.partition(":")
        return self.kind == kind and (self.index is None or int(index or 0) == self.index)


_SEVERAL = ("cpu", "cuda")
"""Kinds of which several can be asked for."""


def parse_device(text: str) -> DeviceRequest:
    """Return what `--device` asks for: one device, or several: "cuda:0,1", "cpu,cpu".

    Raises ValueError, whose message says what is allowed.
    """
    first, *rest = (part.strip() for part in text.strip().lower().split(","))
    match = re.fullmatch(r"(auto|cpu|mps|cuda|xpu)(?::(\d{1,3}))?", first)
    if match is None or (match[2] is not None and match[1] not in ("cuda", "xpu")):
        raise _not_a_device(text)
    kind, index = match[1], None if match[2] is None else int(match[2])
    indexes = [index]
    for part in rest:
        further = re.fullmatch(rf"(?:{kind}:)?(\d{{1,3}})", part)
        if kind not in _SEVERAL or (part != kind if index is None else further is None):
            raise _not_a_device(text)
        indexes.append(None if further is None else int(further[1]))
    if rest and kind == "cuda":
        if index is None:
            raise ValueError(f"{text} does not say which graphics cards; write their numbers, such as cuda:0,1")
        if len(set(indexes)) < len(indexes):
            raise ValueError(f"{text} names a graphics card twice; name each once, such as cuda:0,1")
    return DeviceRequest(kind, index, tuple(indexes[1:]))  # type: ignore[arg-type]


def _not_a_device(text: str) -> ValueError:
    return ValueError(
        f"{text} is not a device; write auto, cpu, cuda or cuda:N, or several: cuda:0,1 or cpu,cpu (untested: mps, "
        "xpu, xpu:N)"
    )


def cards_in_words(found: Sequence[FoundDevice], needed_bytes: int) -> str:
    """Say that several graphics cards can train together, those with `needed_bytes` of free memory; empty if there are
    not two of them."""
    cards = [each for each in found if each.name.startswith("cuda") and not _too_small(each, needed_bytes)]
    if len(cards) < 2:
        return ""
    numbers = ",".join(str(number) for number in sorted(int(each.name.rpartition(":")[2]) for each in cards))
    return f"{len(cards)} cards train as one peer with --device cuda:{numbers}"


def fits_no_single(request: DeviceRequest, found: Sequence[FoundDevice], whole_bytes: int) -> str:
    """Say which of several cards asked for has less memory than a whole model takes; empty if none has, or if fewer
    are asked for."""
    asked = {str(each) for each in request.each} if request.others else set()
    small = [device for device in found if device.name in asked and _too_small(device, whole_bytes)]
    return str(small[0]) if small else ""


def largest_part(num_sequences: int, num_ranks: int) -> int:
    """Return how many of a batch's sequences the rank with the most of them computes."""
    return -(-num_sequences // num_ranks)


def check_num_ranks(request: DeviceRequest, run: RunFile) -> None:
    """Raise UserError if several devices are asked for and the run's batch has fewer sequences, its model is cut into
    stages, or an adapter is trained."""
    batch_sequences = run.inner.batch_sequences
    if request.others and run.adapter.is_used:
        raise UserError(
            f"--device {request}: this run trains an adapter, which a volunteer does on one device; give one, such as "
            f"{request.each[0]}, and start another volunteer for each of the others",
            code="adapter-on-one-device",
        )
    if request.others and run.pipeline.stages > 1:
        raise UserError(
            f"--device {request}: this run is cut into stages, and a volunteer trains its stages on one device; give "
            f"one, such as {request.each[0]}, and start another volunteer for each of the others",
            code="stages-on-one-device",
        )
    if request.num_ranks > batch_sequences:
        fitting = ",".join(str(request).split(",")[:batch_sequences])
        raise UserError(
            f"--device {request}: {request.num_ranks} devices share the sequences of each batch, and a batch of this "
            f"run has {counted(batch_sequences, 'sequence')} (inner.batch_sequences); give at most as many, such as "
            f"--device {fitting}",
            code="too-many-devices",
        )


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
    others: tuple[str, ...] = ()
    """Further devices, which train data parallel with the first one."""

    @property
    def names(self) -> str:
        """Name of the device, or of all of them, as `--device` takes it."""
        return ",".join([self.device, *(name.rpartition(":")[2] for name in self.others)])

    def __str__(self) -> str:
        name = f"{self.names} ({self.title})" if self.title else self.names
        return f"training on {name} in {self.precision}: {self.why}"


def matching_devices(request: DeviceRequest, found: Sequence[FoundDevice], missing: str) -> list[FoundDevice]:
    """Return the devices to try, the best first: with "auto" the cards by their free memory, then the processor. If
    several are asked for it is these, in their order.

    `missing` says why the machine shows no card that is there, empty if none is. Raises UserError if the device asked
    for is not there.
    """
    if request.others:
        return [matching_devices(each, found, missing)[0] for each in request.each]
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
    probed if it is a card, or if there is more than one precision to choose from. Raises UserError if none works, or,
    where several are asked for, if one of them does not.
    """
    if request.others:
        return _choose_all(request, wanted, matching_devices(request, found, missing), needed_bytes, probe)
    passed_over: list[str] = []
    for device in matching_devices(request, found, missing):
        if too_small := _too_small(device, needed_bytes):
            passed_over.append(too_small)
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


def _choose_all(
    request: DeviceRequest, wanted: PrecisionRequest, devices: list[FoundDevice], needed_bytes: int, probe: Probe
) -> DeviceChoice:
    """Choose all of these devices, and the precision that is fastest on the slowest of them, for which the others
    wait."""
    different = list(dict.fromkeys(devices))
    problems = [problem for device in different if (problem := _too_small(device, needed_bytes))]
    common = [each for each in devices[0].precisions if all(each in device.precisions for device in different)]
    precisions = tuple(common) or ("fp32",) if wanted == "auto" else (wanted,)
    speeds: list[Mapping[Precision, float]] = []
    for device in different if not problems else []:
        result = probe(device, precisions) if device.is_card or precisions != ("fp32",) else _NOT_PROBED
        speeds.append(result.tokens_per_s)
        problems += [f"{device} does not work: {result.problem}"] if result.problem else []
    if problems:
        raise UserError(
            f"--device {request}: {'; '.join(problems)}; give other devices, or a single one", code="device-unusable"
        )
    slowest = {each: min(speed.get(each, 0.0) for speed in speeds) for each in precisions if all(speeds)}
    precision, how_fast = fastest_precision(slowest) if wanted == "auto" else (wanted, "")
    return DeviceChoice(
        device=devices[0].name,
        title=" and ".join(dict.fromkeys(device.title for device in devices if device.title)),
        precision=precision,
        why="; ".join(reason for reason in ("asked for", how_fast) if reason),
        others=tuple(device.name for device in devices[1:]),
    )


def _too_small(device: FoundDevice, needed_bytes: int) -> str:
    """Say that a card's memory is too little; empty if it is not."""
    if device.free_bytes is None or device.free_bytes >= needed_bytes:
        return ""
    free, needed = size_in_words(device.free_bytes), size_in_words(needed_bytes)
    return f"{device} has {free} of memory free, and this run needs at least {needed}"


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
