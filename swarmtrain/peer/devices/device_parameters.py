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

    loans_outlast_steps = True

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        rewriting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(named, rewriting)
        self._tensors = list(self.named.values())
        self.copier = HostCopier(self._tensors[0].device)
        """Copies from and to the device. What it was asked for before a step is copied before that step."""
        self._lent: dict[tuple[int, ...], _LentCopy] = {}
        """Each fragment as it was last lent, by its tensors."""

    def read(self) -> Tensor:
        """Return the values as a new vector (P,) fp32 in main memory. See `ParameterSource`."""
        return self.copier.copy(self._tensors).ready()

    def read_soon(self) -> Callable[[], Tensor]:
        """Ask for a copy of all values; return a function that waits for it and returns it. See `ParameterSource`."""
        copy = self.copier.copy(self._tensors)
        self._lent[tuple(range(len(self._tensors)))] = _LentCopy(copy)
        return copy.ready

    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """Ask for a copy of a fragment's present values, from which other threads compute the pseudo-gradient. See
        `ParameterSource`."""
        copy = self.copier.copy(fragment.pick(self._tensors))
        self._lent[fragment.tensors] = _LentCopy(copy)
        return LentWeights(theta, [copy.values], copy.wait_ready)

    def take_back(self) -> None:
        """Let the next step wait, on the device, for copies under way. See `ParameterSource`."""
        self.copier.wait_on_device()
        for lent in self._lent.values():
            lent.is_behind = True

    @torch.no_grad()
    def change_to(self, theta: Tensor, fragment: Fragment) -> Tensor | None:
        """Return `theta` (Q,) minus the fragment's values when they were last lent. See `ParameterSource`."""
        lent = self._lent.get(fragment.tensors)
        return None if lent is None else torch.sub(theta, lent.copy.ready(), out=self.copier.empty(len(theta)))

    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Set the values from `theta`: a fragment's (Q,), or all (P,). See `ParameterSource`.

        If steps were taken since the fragment was lent, they stay: `theta` minus the lent values is added.
        """
        if fragment is not None:
            self._merge(theta, fragment, self.change_to(theta, fragment) if self._is_behind(fragment) else None)
            return
        self._lent = {}
        self.copier.wait_on_device()
        with self._rewriting():
            unflatten_into(theta, self._tensors)

    def write_change(self, theta: Tensor, fragment: Fragment, change: Tensor | None) -> None:
        """Set a fragment's values from `theta` (Q,), or add `change` if steps were taken. See `ParameterSource`."""
        self._merge(theta, fragment, change if self._is_behind(fragment) else None)

    def _is_behind(self, fragment: Fragment) -> bool:
        """Return whether steps were taken since the fragment was lent."""
        lent = self._lent.get(fragment.tensors)
        return lent is not None and lent.is_behind

    @torch.no_grad()
    def _merge(self, theta: Tensor, fragment: Fragment, change: Tensor | None) -> None:
        """Add `change` (Q,) to a fragment's values, or set them to `theta` (Q,) if it is None."""
        tensors = fragment.pick(self._tensors)
        self._lent.pop(fragment.tensors, None)
        self.copier.wait_on_device()
        with self._rewriting():
            if change is None:
                unflatten_into(theta, tensors)
                return
            parts = torch.split(self.copier.send(change), [tensor.numel() for tensor in tensors])
            torch._foreach_add_(tensors, [part.view_as(each) for part, each in zip(parts, tensors, strict=True)])
