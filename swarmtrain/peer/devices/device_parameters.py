"""Parameters on a device: what a session publishes and merges is their copy in main memory, fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.outer import unflatten_into
from swarmtrain.peer.merging.updates import LentWeights
from swarmtrain.peer.training.parameters import ParameterSource

__all__ = ["DeviceParameters"]


@dataclass
class _Copy:
    """Copy (Q,) of a fragment's values in main memory."""

    values: Tensor
    wait_ready: Callable[[], None]
    """Returns once the device has written all of them."""
    is_behind: bool = False
    """True if a step was taken since."""


class DeviceParameters(ParameterSource):
    """fp32 tensors on a device, of which publications are copies in main memory.

    The trainer only asks for a copy, in order with its steps. The device copies on a stream of its own while it
    computes the next step, whose optimizer waits for the copy there; in main memory whoever computes the
    pseudo-gradient waits for it, and not the trainer. Legend: P numbers in all tensors, Q in one fragment.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__(named)
        self._tensors = list(self.named.values())
        self._device = self._tensors[0].device
        self._copying: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._lent: dict[tuple[int, ...], _Copy] = {}
        """Each fragment as it was last lent, by its tensors."""

    def read(self) -> Tensor:
        """Return the values as a new vector (P,) fp32 in main memory. See `ParameterSource`."""
        copy = self._copy(self._tensors)
        copy.wait_ready()
        return copy.values

    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """Ask for a copy of a fragment's present values, from which other threads compute the pseudo-gradient. See
        `ParameterSource`."""
        copy = self._lent[fragment.tensors] = self._copy(fragment.pick(self._tensors))
        return LentWeights(theta, [copy.values], copy.wait_ready)

    def take_back(self) -> None:
        """Let the next step wait, on the device, for copies under way. See `ParameterSource`."""
        self._wait_for_copies()
        for copy in self._lent.values():
            copy.is_behind = True

    @torch.no_grad()
    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Set the values from `theta`: a fragment's (Q,), or all (P,). See `ParameterSource`.

        If steps were taken since the fragment was lent, they stay: `theta` minus the lent values is added.
        """
        self._wait_for_copies()
        if fragment is None:
            self._lent = {}
            unflatten_into(theta, self._tensors)
            return
        tensors, copy = fragment.pick(self._tensors), self._lent.pop(fragment.tensors, None)
        if copy is None or not copy.is_behind:
            unflatten_into(theta, tensors)
            return
        copy.wait_ready()
        changes = torch.split(theta - copy.values, [tensor.numel() for tensor in tensors])
        for tensor, change in zip(tensors, changes, strict=True):
            tensor.add_(change.view_as(tensor).to(self._device))

    def _wait_for_copies(self) -> None:
        """Let what the device does next wait for copies under way."""
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copying)

    @torch.no_grad()
    def _copy(self, tensors: Sequence[Tensor]) -> _Copy:
        """Begin to copy the tensors to main memory."""
        sizes = [tensor.numel() for tensor in tensors]
        values = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=self._copying is not None)
        pairs = zip(torch.split(values, sizes), tensors, strict=True)
        if self._copying is None:
            for place, tensor in pairs:
                place.copy_(tensor.reshape(-1))
            return _Copy(values, lambda: None)
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            for place, tensor in pairs:
                place.copy_(tensor.reshape(-1), non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._copying)
        return _Copy(values, done.synchronize)
