"""Decide what a volunteer computes on: which device works, in which precision, and how many sequences at once."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial

import torch

from swarmtrain.errors import UserError
from swarmtrain.model.four_bits import check_card_for_four_bits, check_four_bits
from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.machine import (
    find_devices,
    least_bytes,
    least_part_bytes,
    missing_card,
    num_trained,
    parameters_bytes,
    part_bytes,
    probe_device,
)
from swarmtrain.peer.estimate import RECOMPUTING_BYTES, activation_bytes, estimate
from swarmtrain.protocol.devices import (
    DeviceChoice,
    DeviceRequest,
    FoundDevice,
    Precision,
    PrecisionRequest,
    check_num_ranks,
    choose_device,
    fits_no_single,
    largest_part,
    matching_devices,
)
from swarmtrain.run import RunFile

_SHARE_OF_CARD = 0.9
"""Share of a card's free memory that is planned for: estimates err, and the allocator wastes some."""


@dataclass(frozen=True)
class ChosenCompute:
    """What a loop computes on, and why."""

    compute: ComputeDevice
    choice: DeviceChoice
    microbatch_why: str
    """Why a batch is computed as it is; empty if as the run file says."""
    card_bytes: int | None = None
    """Memory of the card that is planned for; None if the device's memory is the machine's."""


def check_device(request: DeviceRequest) -> None:
    """Raise UserError at once, before anything is fetched, if the device asked for is not there."""
    if request.kind not in ("auto", "cpu"):
        matching_devices(request, find_devices(0), missing_card())


def choose_compute(
    run: RunFile,
    request: DeviceRequest,
    wanted: PrecisionRequest,
    memory_bytes: int = 0,
    vram_bytes: int = 0,
    base_bits: int = 32,
) -> ChosenCompute:
    """Choose device, precision and microbatch for a run, whose model may be cut into stages.

    `memory_bytes` limits main memory and `vram_bytes` a card's; 0: no limit. The weights of an adapter's frozen model
    have `base_bits`. Raises UserError if the device asked for does not work, or if the precision asked for is not the
    one that the run demands, or none for stages.
    """
    wanted = _checked_precision(run, wanted)
    if base_bits == 4:
        check_four_bits(run)
    check_num_ranks(request, run)
    found = [_within(vram_bytes, each) for each in find_devices(num_trained(run))]
    found = [replace(each, precisions=precisions_of(run, each)) for each in found]
    needed = least_bytes(run, base_bits)
    if small := fits_no_single(request, found, needed):
        _check_sharding(run, request, small)
        needed = least_part_bytes(run, request.num_ranks)
    choice = choose_device(request, wanted, found, needed, partial(probe_device, run), missing=missing_card())
    if base_bits == 4:
        check_card_for_four_bits(choice.device)
    if small:
        why = f"{choice.why}; each card holds a part of the model (fully_shard), since {small} does not hold all of it"
        choice = replace(choice, why=why)
    names = (choice.device, *choice.others)
    devices = [each for each in found if each.name in names]
    fittings = [
        fitting_microbatch(run, each, memory_bytes, len(names), shards=bool(small), base_bits=base_bits)
        for each in devices
    ]
    fitting = min(fittings, key=lambda each: (not each.recomputes, each.sequences))
    shares = [_memory_share(vram_bytes, name) for name in names]
    if choice.device.startswith("cuda") and vram_bytes:
        torch.cuda.set_per_process_memory_fraction(shares[0], choice.device)
    compute = ComputeDevice(
        device=torch.device(choice.device),
        precision=choice.precision,
        microbatch_sequences=fitting.sequences,
        recomputes=fitting.recomputes,
        others=tuple(torch.device(name) for name in choice.others),
        shards=bool(small),
        base_bits=base_bits,
        memory_share=min(shares),
    )
    card_bytes = [int(_SHARE_OF_CARD * each.free_bytes) for each in devices if each.free_bytes is not None]
    return ChosenCompute(compute, choice, fitting.why, min(card_bytes, default=None))


def _check_sharding(run: RunFile, request: DeviceRequest, small: str) -> None:
    """Raise UserError if a model cannot be cut between cards, by this torch or in this run."""
    if run.merge.kind.common_step:  # its gradients would have to be added up in parts
        raise UserError(
            f"--device {request}: {small} does not hold the whole model, which with merge.method = "
            f'"{run.merge.method}" is not cut between cards; give another device',
            code="device-unusable",
        )
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401 - takes seconds, only where it is needed
    except ImportError:
        raise UserError(
            f"--device {request}: {small} does not hold the whole model, and to cut it between cards takes torch 2.6 "
            f"or newer (this is {torch.__version__}); give cards with more memory, or install a newer torch",
            code="device-unusable",
        ) from None


def _checked_precision(run: RunFile, wanted: PrecisionRequest) -> PrecisionRequest:
    """Return the precision that the run demands, or else the one asked for. Raises UserError if they differ, or for
    stages in fp16: each loss needs a scale, and what travels between peers would have to carry it."""
    demanded = run.inner.precision
    if demanded != "any" and wanted not in ("auto", demanded):
        raise UserError(
            f"--precision {wanted}: this run demands {demanded} (inner.precision); leave the option out",
            code="precision-demanded",
        )
    if wanted == "fp16" and run.pipeline.stages > 1:
        raise UserError(
            "--precision fp16: this run is cut into stages, which are trained in fp32 or bf16; give --precision auto, "
            "or leave the option out",
            code="stages-in-fp16",
        )
    return wanted if demanded == "any" else demanded


def precisions_of(run: RunFile, device: FoundDevice) -> tuple[Precision, ...]:
    """Return the precisions to try on a device for a run: fp16 for whole models only."""
    return tuple(each for each in device.precisions if each != "fp16" or run.pipeline.stages == 1)


def _memory_share(vram_bytes: int, name: str) -> float:
    """Return the share of a card's memory that `vram_bytes` are, at most 1; 1 if that is 0."""
    if not vram_bytes or not name.startswith("cuda"):
        return 1.0
    return min(1.0, vram_bytes / torch.cuda.get_device_properties(name).total_memory)


def _within(vram_bytes: int, device: FoundDevice) -> FoundDevice:
    """Return the device with no more memory than `vram_bytes`, if it has memory of its own and that is not 0."""
    if not vram_bytes or device.free_bytes is None:
        return device
    return replace(device, free_bytes=min(device.free_bytes, vram_bytes))


@dataclass(frozen=True)
class FittingMicrobatch:
    """How a batch is computed so that it fits a memory."""

    sequences: int
    """Sequences computed at once."""
    recomputes: bool = False
    """Whether blocks are computed again in the backward pass, because not one sequence fits without."""
    why: str = ""
    """Reason, for a person; empty if as the run file says."""


def fitting_microbatch(
    run: RunFile,
    device: FoundDevice,
    memory_bytes: int,
    num_ranks: int = 1,
    *,
    shards: bool = False,
    base_bits: int = 32,
) -> FittingMicrobatch:
    """Return how many sequences to compute at once, by the estimate, on each of `num_ranks` such devices, each of which
    holds the whole model, or with `shards` a part of it.

    On a card they are as many as fit, up to a rank's part of the batch. In main memory, which ranks share, they are as
    many as the run file says, and fewer if the peer's limit asks for it. Where not even one fits, blocks are computed
    again in the backward pass. In a pipeline they are as many as drivers send, which is what the run file says.
    """
    part = largest_part(run.inner.batch_sequences, num_ranks)
    wanted, on_card = min(run.microbatch_sequences, part), device.free_bytes is not None
    if run.pipeline.stages > 1:
        return FittingMicrobatch(wanted)
    if device.free_bytes is not None:
        most, place = part, "the card"
        fixed = part_bytes(run, num_ranks) if shards else parameters_bytes(run, base_bits)
        free = int(_SHARE_OF_CARD * device.free_bytes) - fixed
    elif memory_bytes:
        most, place = wanted, "--memory"
        cost = estimate(run, num_trained_parameters(run), 2, num_ranks=num_ranks)
        free = (memory_bytes - (cost.memory_bytes - cost.memory_activations_bytes)) // num_ranks
    else:
        return FittingMicrobatch(wanted)

    def needed(sequences: int, recomputes: bool) -> int:
        layers, program = run.model.num_layers, RECOMPUTING_BYTES if recomputes and not on_card else 0
        return program + activation_bytes(run, sequences, layers, has_head=True, recomputes=recomputes, on_card=on_card)

    recomputes = needed(1, False) > free and needed(1, True) < needed(1, False)
    fitting = max(1, bisect_right(range(1, most + 1), free, key=partial(needed, recomputes=recomputes)))
    if recomputes:
        again = f"blocks are computed again in the backward pass, since otherwise not one sequence fits {place}"
        return FittingMicrobatch(fitting, True, again)
    many = f"as many sequences of {run.model.context_tokens} tokens as fit {place}"
    return FittingMicrobatch(fitting, False, many if fitting != wanted else "")
