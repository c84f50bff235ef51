"""Decide what a volunteer computes on: which device works, in which precision, and how many sequences at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from swarmtrain.errors import UserError
from swarmtrain.model.gpt import num_parameters
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.machine import BYTES_PER_PARAMETER, find_devices, least_bytes, missing_card, probe_device
from swarmtrain.peer.estimate import activation_bytes, estimate
from swarmtrain.protocol.devices import (
    DeviceChoice,
    DeviceRequest,
    FoundDevice,
    PrecisionRequest,
    choose_device,
    matching_devices,
)
from swarmtrain.run import RunFile

__all__ = ["ChosenCompute", "check_device", "check_stage_device", "choose_compute", "fitting_microbatch"]

_SHARE_OF_CARD = 0.9
"""Share of a card's free memory that is planned for: estimates err, and the allocator wastes some."""


@dataclass(frozen=True)
class ChosenCompute:
    """What a loop computes on, and why."""

    compute: ComputeDevice
    choice: DeviceChoice
    microbatch_why: str
    """Why microbatches have as many sequences as they have; empty if as the run file says."""


def check_device(request: DeviceRequest) -> None:
    """Raise UserError at once, before anything is fetched, if the device asked for is not there."""
    if request.kind not in ("auto", "cpu"):
        matching_devices(request, find_devices(0), missing_card())


def check_stage_device(request: DeviceRequest, wanted: PrecisionRequest) -> None:
    """Raise UserError if stages were to be trained otherwise than on the processor and in fp32, as they are."""
    for option, asked, allowed in (
        ("--device", str(request), ("auto", "cpu")),
        ("--precision", wanted, ("auto", "fp32")),
    ):
        if asked not in allowed:
            raise UserError(
                f"{option} {asked}: this run is cut into stages, which train on the processor in fp32; give {option} "
                f"{allowed[0]}, or leave the option out",
                code="stages-on-processor",
            )


def choose_compute(
    run: RunFile, request: DeviceRequest, wanted: PrecisionRequest, memory_bytes: int = 0, vram_bytes: int = 0
) -> ChosenCompute:
    """Choose device, precision and microbatch for a run.

    `memory_bytes` limits main memory and `vram_bytes` a card's; 0: no limit. Raises UserError if the device asked for
    does not work, or the run demands another precision than was asked for.
    """
    demanded = run.inner.precision
    if demanded != "any" and wanted not in ("auto", demanded):
        raise UserError(
            f"--precision {wanted}: this run demands {demanded} (inner.precision); leave the option out",
            code="precision-demanded",
        )
    wanted = wanted if demanded == "any" else demanded
    found = [_within(vram_bytes, each) for each in find_devices(num_parameters(run.model))]
    choice = choose_device(request, wanted, found, least_bytes(run), partial(probe_device, run), missing=missing_card())
    device = next(each for each in found if each.name == choice.device)
    microbatch, why = fitting_microbatch(run, device, memory_bytes)
    if vram_bytes and choice.device.startswith("cuda"):
        share = vram_bytes / torch.cuda.get_device_properties(choice.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), choice.device)
    return ChosenCompute(ComputeDevice(torch.device(choice.device), choice.precision, microbatch), choice, why)


def _within(vram_bytes: int, device: FoundDevice) -> FoundDevice:
    """Return the device with no more memory than `vram_bytes`, if it has memory of its own and that is not 0."""
    if not vram_bytes or device.free_bytes is None:
        return device
    return replace(device, free_bytes=min(device.free_bytes, vram_bytes))


def fitting_microbatch(run: RunFile, device: FoundDevice, memory_bytes: int) -> tuple[int, str]:
    """Return how many sequences to compute at once, by the estimate, and why; an empty reason if as the run file says.

    On a card they are as many as fit, up to the batch. In main memory they are as many as the run file says, and fewer
    if the peer's limit asks for it.
    """
    wanted, context = run.microbatch_sequences, run.model.context_tokens
    if device.free_bytes is not None:
        free = _SHARE_OF_CARD * device.free_bytes - BYTES_PER_PARAMETER * num_parameters(run.model)
        one = activation_bytes(run, 1, run.model.num_layers, has_head=True)
        fitting = max(1, min(run.inner.batch_sequences, int(free / one)))
        return fitting, f"as many sequences of {context} tokens as fit the card" if fitting != wanted else ""
    if not memory_bytes:
        return wanted, ""
    cost = estimate(run, num_parameters(run.model), 2)
    free = memory_bytes - (cost.memory_bytes - cost.memory_activations_bytes)
    fitting = max(1, min(wanted, int(free / activation_bytes(run, 1, run.model.num_layers, has_head=True))))
    return fitting, "as many as fit --memory" if fitting != wanted else ""
