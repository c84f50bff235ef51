"""Devices of this machine as torch shows them, and a probe: a few inner steps of a small model on one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import (
    block_parameters,
    frozen_bytes,
    num_parameters,
    num_trained_parameters,
    similar_built_in,
)
from swarmtrain.model.run_stages import RunStageShape
from swarmtrain.model.stages import StageShape, expected_boundaries, stage_shapes
from swarmtrain.peer.devices.compute import autocast, finish, is_out_of_memory
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.protocol.devices import FoundDevice, Precision, ProbeResult
from swarmtrain.run import RunFile
from swarmtrain.run_model import ModelSection

_PROCESSOR_PARAMETERS = 10_000_000
"""Below this size a processor's lower precision is not tried: converting numbers takes what multiplying saves."""
_PROBE_LAYERS = 2
_PROBE_STEPS = 4
_PROBE_S = 10.0
"""Seconds after which a probe ends with the steps that it has."""
_TOLERANCE: Mapping[Precision, float] = {"fp32": 2e-3, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference from the processor's loss from which on a device counts as broken."""
BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two moments, fp32."""
_STAGE_BYTES_PER_PARAMETER = BYTES_PER_PARAMETER + 4 * 4
"""Besides those a stage has two older versions of its weights, the sums of the next batch's gradients, and a
microbatch's gradient before it is added."""
_LOW_PRECISION_BYTES = 2
"""Bytes of a weight converted for products, which each graph of a microbatch keeps."""
_WHOLE_BYTES_PER_PARAMETER = 8
"""Weights and gradients, fp32, of what is put together while it computes."""
_DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Files that a driver for graphics cards makes, of NVIDIA and of AMD."""


def find_devices(parameters: int) -> list[FoundDevice]:
    """Return this machine's devices for training `parameters` parameters, the processor last."""
    found = [_card(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [_intel_card(index) for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append(FoundDevice(name="mps", title="", free_bytes=_free_on_mps()))
    is_large = parameters >= _PROCESSOR_PARAMETERS
    tried: tuple[Precision, ...] = ("fp32", "bf16") if is_large and _processor_has_bf16() else ("fp32",)
    return [*found, FoundDevice(name="cpu", title="", precisions=tried)]


def _card(index: int) -> FoundDevice:
    """Return a card as torch describes it; one that torch cannot describe is left to its probe, which says why."""
    name = f"cuda:{index}"
    try:
        has_bf16 = torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip is not None
        return FoundDevice(
            name=name,
            title=torch.cuda.get_device_name(index),
            precisions=("fp32", "bf16" if has_bf16 else "fp16"),
            free_bytes=torch.cuda.mem_get_info(index)[0],
        )
    except (RuntimeError, AssertionError):
        return FoundDevice(name=name, title="")


def _intel_card(index: int) -> FoundDevice:
    """Return a card of Intel, as far as torch describes it: older versions tell no free memory, and some drivers never
    do."""
    name, title, free_bytes = f"xpu:{index}", "", None
    with suppress(RuntimeError, AssertionError, AttributeError):
        title = torch.xpu.get_device_name(index)
        free_bytes = torch.xpu.mem_get_info(index)[0]
    return FoundDevice(name=name, title=title, free_bytes=free_bytes)


def _free_on_mps() -> int | None:
    """Return how much more of the memory that Metal recommends to use this process may take; None if torch does not
    tell. What other programs use is not subtracted: Metal does not tell that."""
    try:
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    except (RuntimeError, AttributeError):
        return None


def _processor_has_bf16() -> bool:
    """Return whether this processor multiplies bf16 by instructions of its own."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def missing_card(files: tuple[Path, ...] = _DEVICE_FILES) -> str:
    """Return why torch shows no card although the system has a driver for one; empty if it shows one, or has none."""
    if torch.cuda.is_available() or not any(path.exists() for path in files):
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return "a graphics card is here, but this torch is built for processors only (install one from pytorch.org)"
    return "a graphics card is here, but torch cannot use it: its driver may be too old"


def num_trained(run: RunFile) -> int:
    """Return the number of parameters of the whole model, or of the largest stage of a model that is cut."""
    return max(shape.num_parameters for shape in _shapes(run))


def _shapes(run: RunFile) -> list[StageShape]:
    """Return the run's stages, as published or as the run file says, else as they are expected; one if it is not
    cut."""
    published, stages = run.published, run.pipeline.stages
    boundaries = run.pipeline.boundaries if published is None else published.boundaries or ()
    if not boundaries and stages > 1:
        boundaries = expected_boundaries(run.model, stages)
    return stage_shapes(run.model, boundaries)


def card_bytes_of_stage(shape: RunStageShape) -> int:
    """Return the bytes that a stage takes on a card, without graphs of microbatches."""
    return _STAGE_BYTES_PER_PARAMETER * shape.num_parameters


def card_bytes_of_graph(run: RunFile, shape: RunStageShape) -> int:
    """Return the bytes that a card keeps from a microbatch's forward until its backward."""
    from swarmtrain.peer.estimate import activation_bytes

    blocks = shape.last_block - shape.first_block
    activations = activation_bytes(run, run.microbatch_sequences, blocks, has_head=shape.has_head, on_card=True)
    return activations + _LOW_PRECISION_BYTES * shape.num_parameters


def least_bytes(run: RunFile, base_bits: int = 32) -> int:
    """Return the least memory that training takes on a card; frozen weights in blocks have so many bits.

    A whole model's microbatches are then of one sequence, and its blocks computed again in the backward pass. Of a
    model that is cut it is what the largest stage takes with one microbatch: peers move, so any stage must fit.
    """
    if run.pipeline.stages > 1:
        return max(card_bytes_of_stage(shape) + card_bytes_of_graph(run, shape) for shape in _shapes(run))
    from swarmtrain.peer.estimate import activation_bytes

    activations = activation_bytes(run, 1, run.model.num_layers, has_head=True, recomputes=True, on_card=True)
    return parameters_bytes(run, base_bits) + activations


def parameters_bytes(run: RunFile, base_bits: int = 32) -> int:
    """Return the memory on a card of weights, gradients and moments; of a frozen weight there is nothing else."""
    return BYTES_PER_PARAMETER * num_trained_parameters(run) + frozen_bytes(run, base_bits)


def part_bytes(run: RunFile, num_ranks: int) -> int:
    """Return the memory on each of several cards that hold a part of the model each, without activations.

    Besides its part of weights, gradients and moments, a card has the whole weights and gradients of two blocks, the
    one that computes and the next one, and of the embedding and the head.
    """
    total, num_layers = num_parameters(run.model), run.model.num_layers
    block = block_parameters(run.model)
    whole = total - num_layers * block + min(2, num_layers) * block
    return BYTES_PER_PARAMETER * -(-total // num_ranks) + _WHOLE_BYTES_PER_PARAMETER * whole


def least_part_bytes(run: RunFile, num_ranks: int) -> int:
    """Return the least memory that training takes on each of several cards that hold a part of the model each."""
    from swarmtrain.peer.estimate import activation_bytes

    activations = activation_bytes(run, 1, run.model.num_layers, has_head=True, recomputes=True, on_card=True)
    return part_bytes(run, num_ranks) + activations


def probe_device(
    run: RunFile,
    device: FoundDevice,
    precisions: tuple[Precision, ...],
    clock: Callable[[], float] = time.perf_counter,
) -> ProbeResult:
    """Take a few inner steps on `device`, of a model as wide as the run's and at most two layers deep.

    A device whose loss is not the processor's, within rounding, is reported as broken.
    """
    section = _small_section(run)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(section.vocabulary_size, (1, section.context_tokens + 1), generator=generator)
    expected: float | None = None
    speeds: dict[Precision, float] = {}
    for precision in precisions:
        try:
            if device.is_card and expected is None:
                with torch.no_grad():
                    expected = float(build_model(section, 0).loss(batch))
            loss, speeds[precision] = _timed_steps(run, batch, device, precision, clock)
        except (RuntimeError, AssertionError, MemoryError) as error:
            text = "out of memory" if is_out_of_memory(error) else (str(error).strip().splitlines() or ["no reason"])[0]
            return ProbeResult(tokens_per_s={}, problem=f"{precision}: {text[:200]}")
        is_wrong = expected is not None and abs(loss - expected) > _TOLERANCE[precision] * expected
        if is_wrong or not math.isfinite(loss):
            right = "" if expected is None else f", the processor {expected:.4g}"
            return ProbeResult(tokens_per_s={}, problem=f"{precision}: it computes a loss of {loss:.4g}{right}")
    return ProbeResult(tokens_per_s=speeds)


def _small_section(run: RunFile) -> ModelSection:
    """Return the shape that a device is tried with; for a model of Hugging Face, that of a similar built-in one."""
    section = similar_built_in(run.model)
    return section.model_copy(update={"num_layers": min(_PROBE_LAYERS, section.num_layers)})


def _timed_steps(
    run: RunFile, batch: Tensor, device: FoundDevice, precision: Precision, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the first step's loss and the tokens per second of the fastest step."""
    section = _small_section(run)
    place = torch.device(device.name)
    model = build_model(section, 0).to(place)
    optimizer = InnerOptimizer(model.named_parameters(), inner_constants(run))
    batch, first, best_s, gives_up_s = batch.to(place), math.nan, math.inf, clock() + _PROBE_S
    for number in range(_PROBE_STEPS):
        began_s = clock()
        with autocast(place, precision):
            loss = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(0.0)
        finish(place)
        if number == 0:
            first = float(loss.detach())
        else:  # the first one also loads the device's code
            best_s = min(best_s, clock() - began_s)
        if number > 0 and clock() > gives_up_s:
            break
    return first, batch[:, 1:].numel() / best_s
