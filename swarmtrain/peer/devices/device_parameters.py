"""Parameters on a device: what a session publishes and merges is their copy in main memory, fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.outer import unflatten_into
from swarmtrain.peer.devices.host_copies import HostCopier, HostCopy
from swarmtrain.peer.merging.updates import LentWeights
from swarmtrain.peer.training.parameters import ParameterSource

__all__ = ["DeviceParameters"]


@dataclass
class _LentCopy:
    """Copy (Q,) of a fragment's values in main memory."""

    copy: HostCopy
    is_behind: bool = False
    """True if a step was taken since."""


class DeviceParameters(ParameterSource):
    """fp32 tensors on a device, of which publications are copies in main memory.

    The trainer only asks for a copy, in order with its steps. The device copies on a stream of its own while it
    computes the next step, whose optimizer waits for the copy there; in main memory whoever computes the
    pseudo-gradient waits for it, and not the trainer. Legend: P numbers in all tensors, Q in one fragment.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        rewriting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(named, rewriting)
        self._tensors = list(self.named.values())
        self._device = self._tensors[0].device
        self._copier = HostCopier(self._device)
        self._lent: dict[tuple[int, ...], _LentCopy] = {}
        """Each fragment as it was last lent, by its tensors."""

    def read(self) -> Tensor:
        """Return the values as a new vector (P,) fp32 in main memory. See `ParameterSource`."""
        copy = self._copier.copy(self._tensors)
        copy.wait_ready()
        return copy.values

    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """Ask for a copy of a fragment's present values, from which other threads compute the pseudo-gradient. See
        `ParameterSource`."""
        copy = self._copier.copy(fragment.pick(self._tensors))
        self._lent[fragment.tensors] = _LentCopy(copy)
        return LentWeights(theta, [copy.values], copy.wait_ready)

    def take_back(self) -> None:
        """Let the next step wait, on the device, for copies under way. See `ParameterSource`."""
        self._copier.wait_on_device()
        for lent in self._lent.values():
            lent.is_behind = True

    @torch.no_grad()
    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Set the values from `theta`: a fragment's (Q,), or all (P,). See `ParameterSource`.

        If steps were taken since the fragment was lent, they stay: `theta` minus the lent values is added.
        """
        self._copier.wait_on_device()
        tensors = self._tensors if fragment is None else fragment.pick(self._tensors)
        lent = None if fragment is None else self._lent.pop(fragment.tensors, None)
        if fragment is None:
            self._lent = {}
        with self._rewriting():
            if lent is None or not lent.is_behind:
                unflatten_into(theta, tensors)
                return
            lent.copy.wait_ready()
            changes = torch.split(theta - lent.copy.values, [tensor.numel() for tensor in tensors])
            for tensor, change in zip(tensors, changes, strict=True):
                tensor.add_(change.view_as(tensor).to(self._device))
