"""Device for a model that is only used: measured by `eval`, or sampled from by `generate`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from swarmtrain.errors import UserError, with_code
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.peer.devices.compute import is_out_of_memory, release_cached
from swarmtrain.peer.devices.machine import find_devices, missing_card
from swarmtrain.protocol.devices import DeviceRequest, FoundDevice, matching_devices


def move_model(model: LanguageModel, request: DeviceRequest, num_sequences: int, tell: Callable[[str], None]) -> str:
    """Move `model` to the best device asked for that works, and return the device's name.

    A card is tried with `num_sequences` sequences at once. With "auto", one that does not take them is passed over, and
    `tell` is called with the reason. Raises UserError if the device asked for is not there or does not work.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    passed_over: list[str] = []
    for device in matching_devices(request, find_devices(parameters), missing_card()):
        if not (problem := _problem(model, device, num_sequences)):
            if passed_over:
                computed_on = "the processor" if not device.is_card else str(device)
                words = f"warning: {'; '.join(passed_over)}; computing on {computed_on}"
                tell(with_code(words, "device-unusable"))
            return device.name
        passed_over.append(f"{device} does not work: {problem}")
    raise UserError(
        f"--device {request}: {'; '.join(passed_over)}; give another device, or auto", code="device-unusable"
    )


def _problem(model: LanguageModel, device: FoundDevice, num_sequences: int) -> str:
    """Move the model to `device` and compute one batch there; return what goes wrong, empty if nothing does."""
    place = torch.device(device.name)
    try:
        model.to(place)
        if device.is_card:
            shape = (num_sequences, model.context_tokens + 1)
            evaluate(model, [torch.zeros(shape, dtype=torch.int64)])
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            release_cached(place)
            return f"its memory is too little for this model and {num_sequences} x {model.context_tokens} tokens"
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""
