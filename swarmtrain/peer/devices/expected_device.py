"""Device that this machine would train a run on, by its memory alone: nothing is computed on it."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain.peer.devices.choice import fitting_microbatch
from swarmtrain.peer.devices.machine import find_devices, least_bytes, missing_card, num_trained
from swarmtrain.protocol.devices import DeviceRequest, FoundDevice, cards_in_words, matching_devices
from swarmtrain.run import RunFile
from swarmtrain.words import counted, device_in_words, size_in_words


@dataclass(frozen=True, kw_only=True)
class ExpectedDevice:
    """Device that `auto` takes if it works, and why."""

    device: FoundDevice
    microbatch_sequences: int
    """Sequences that would be computed at once."""
    recomputes: bool
    """Whether blocks would be computed again in the backward pass, because memory is short."""
    least_card_bytes: int
    """Least memory that training takes on a card."""
    why: str
    """Why it is not a card, or not a better one; empty for the best card."""
    several: str = ""
    """What to ask for to train on several cards, in words; empty if there are not two that fit."""

    def __str__(self) -> str:
        sequences = f"{counted(self.microbatch_sequences, 'sequence')} at once"
        if self.recomputes:
            sequences = f"{sequences}, blocks computed again in the backward pass"
        if self.device.is_card:
            sequences = f"{sequences}, if it works"
        why = f" ({self.why})" if self.why else ""
        return (
            f"{found_in_words(self.device)}: {sequences}{why}; on a graphics card it takes at least "
            f"{size_in_words(self.least_card_bytes)} of memory besides its driver"
            + (f"; {self.several}" if self.several else "")
        )


def expected_device(run: RunFile) -> ExpectedDevice:
    """Return the device on which this machine would train the whole model, or a stage of one that is cut."""
    found, missing, needed = find_devices(num_trained(run)), missing_card(), least_bytes(run)
    passed_over = []
    for device in matching_devices(DeviceRequest(), found, missing):
        if device.free_bytes is None or device.free_bytes >= needed:
            break
        passed_over.append(f"{device} has only {size_in_words(device.free_bytes)} free")
    nothing_better = "" if device.is_card else missing or "no graphics card was found"
    fitting = fitting_microbatch(run, device, 0)
    return ExpectedDevice(
        device=device,
        microbatch_sequences=fitting.sequences,
        recomputes=fitting.recomputes,
        least_card_bytes=needed,
        why="; ".join(passed_over) or nothing_better,
        several=cards_in_words(found, needed) if run.pipeline.stages == 1 else "",
    )


def found_in_words(device: FoundDevice) -> str:
    """Name a device with its free memory, such as `cuda:0 (NVIDIA H100), 79 GB free`."""
    free = "" if device.free_bytes is None else f", {size_in_words(device.free_bytes)} free"
    return device_in_words(device.name, device.title) + free
