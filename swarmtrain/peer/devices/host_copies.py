"""Copies between a device's memory and main memory, made while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopy:
    """Copy of tensors in main memory, fp32."""

    values: Tensor
    wait_ready: Callable[[], None]
    """Returns once the device has written all of them."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the values."""
        return self.values.shape

    def ready(self) -> Tensor:
        """Return the values once they are there."""
        self.wait_ready()
        return self.values


class HostCopier:
    """Copies from a device to pinned memory and back, on a stream of its own; with another device than CUDA's, at once.

    torch frees pinned memory only after the copies that use it. Any thread may call `empty`; the other methods are for
    the thread that computes on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream: torch.cuda.Stream | None = None
        """Stream that copies; None if copies are there at once."""
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, size: int) -> Tensor:
        """Return an uninitialised vector (size,) fp32 in main memory, pinned if that lets the device copy by itself."""
        return torch.empty(size, dtype=torch.float32, pin_memory=self.stream is not None)

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Ask for a copy (Q,) of the tensors, Q numbers in all, as they are after what the device was asked so far.

        They may be freed at once, but not written into before `wait_on_device`.
        """
        sizes = [tensor.numel() for tensor in tensors]
        values = self.empty(sum(sizes))
        pairs = zip(torch.split(values, sizes), tensors, strict=True)
        if self.stream is None:
            for place, tensor in pairs:
                place.copy_(tensor.reshape(-1))
            return HostCopy(values, lambda: None)
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            for place, tensor in pairs:
                place.copy_(tensor.reshape(-1), non_blocking=True)
                tensor.record_stream(self.stream)  # its memory is not given to others before it is copied
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self.stream)
        return HostCopy(values, done.synchronize)

    def send(self, vector: Tensor) -> Tensor:
        """Return a copy on the device of a vector that `empty` made; what the device does next waits for it there."""
        if self.stream is None:
            return vector.to(self._device)
        with torch.cuda.stream(self.stream):
            there = vector.to(self._device, non_blocking=True)
        self.wait_on_device()
        there.record_stream(torch.cuda.current_stream(self._device))
        return there

    def wait_on_device(self) -> None:
        """Let what the device does next wait for copies under way."""
        if self.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self.stream)
