"""Pass of a batch through a model that is cut into stages, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def there_and_back(stages: Sequence[Any], batch: Tensor) -> float:
    """Run a forward and a backward as peers do, with detached tensors between stages; returns the loss."""
    x = batch[:, :-1]
    between: list[tuple[Tensor, Tensor]] = []  # (output of a stage, detached input of the next)
    for stage in stages[:-1]:
        left = stage(x)
        x = left.detach().requires_grad_()
        between.append((left, x))
    loss = stages[-1].loss(x, batch[:, 1:])
    loss.backward()
    for left, taken in reversed(between):
        left.backward(taken.grad)
    return float(loss.detach())
