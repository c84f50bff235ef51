"""Gradients of many batches at the same weights, added up: the inner loop of a collaboration that takes one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import InnerOptimizer, Moments, MomentsCopy
from swarmtrain.algorithm.outer import flatten


class GradientSum(InnerOptimizer):
    """Stands where an inner optimizer does, and leaves the weights as they are: a step adds the batch's gradient.

    The sum is kept beside `.grad`, so a batch that is given up costs nothing but itself. It has no moments: those are
    of the step that all peers take together (`common_step.py`).
    """

    steps_on_each_rank = False  # each has the whole batch's gradient
    _sums: list[Tensor] | None = None
    """Sum of the gradients of all targets so far, as one tensor for each parameter; None without any."""
    _num_targets: Tensor | None = None
    """Number of these targets () int64, on the parameters' device."""

    @torch.no_grad()
    def step(self, progress: float, scale: float = 1.0) -> Tensor:
        """Add the gradients in `.grad`, drop them, and return their norm ().

        A gradient that is not finite adds nothing, and its targets do not count. `progress` and `scale` have no meaning
        here. Nothing waits for the parameters' device.
        """
        gradients = self.gradients()
        if self.loss_scale is not None:
            self.loss_scale.unscale(gradients)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        is_bad = norm.isfinite().logical_not_()
        if self._sums is None or self._num_targets is None:
            self._sums = [torch.zeros_like(gradient) for gradient in gradients]
            self._num_targets = torch.zeros((), dtype=torch.int64, device=norm.device)
        for total, gradient in zip(self._sums, gradients, strict=True):
            total.add_(gradient.masked_fill_(is_bad, 0.0), alpha=self.targets)
        self._num_targets.add_(is_bad.logical_not(), alpha=self.targets)
        if self.loss_scale is not None:
            self.loss_scale.update(is_bad.to(torch.float32))
        self.drop_gradients()
        return norm

    @torch.no_grad()
    def take_mean(self) -> tuple[Tensor, int]:
        """Return the mean gradient (P,), in main memory, of all targets that counted since the last call, and their
        number.

        Without any it is zeros, of one target: peers accept no gradient of none.
        """
        sums = self._sums or [torch.zeros_like(parameter) for parameter in self._parameters.values()]
        num_targets = 1 if self._num_targets is None else max(1, int(self._num_targets))
        mean = flatten(sums).cpu().div_(num_targets)
        self.forget()
        return mean, num_targets

    def forget(self) -> None:
        """Drop the sum. See `InnerOptimizer`."""
        self._sums = self._num_targets = None

    def end(self) -> None:
        """Drop everything, because no step follows."""
        self.forget()
        super().end()

    def kept_moments(
        self, room: Tensor | None, copy: Callable[[Sequence[Tensor]], MomentsCopy] | None = None
    ) -> Moments:
        """Return moments without vectors, (0, P), for a checkpoint, whatever `room` there is."""
        sizes = self._sizes()
        return Moments(vectors=torch.empty(0, sum(sizes)), steps=torch.zeros(len(sizes)))

    def load_moments(self, moments: Moments) -> None:
        """Continue from what `kept_moments` returned: there is nothing to load."""
