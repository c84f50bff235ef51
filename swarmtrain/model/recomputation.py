"""Forward passes that keep nothing but their input: the rest is computed again when the backward pass asks for it.

This is activation checkpointing (Chen et al. 2016, arXiv 1604.06174). `torch.utils.checkpoint` does the same; but its
first call imports torch's compiler, which took 1.2 s of processor time and 88 MB: too much for a machine that is short
of memory. While torch's compiler compiles, it is used, because the compiler knows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["recomputed"]


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), keeping only `x` until the backward pass.

    `function` is called once more then, up to the last tensor that its gradient needs, and must compute the same again:
    gradients are the same to the bit. It must not draw random numbers.
    """
    if torch.compiler.is_compiling():
        from torch.utils.checkpoint import checkpoint

        return cast(Tensor, checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))
    kept = _SavedTensors(function, x)
    with saved_tensors_hooks(kept.number, kept.take):
        return function(x)


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Raised when everything has been computed again that the backward pass needs."""


class _SavedTensors:
    """Tensors that the backward pass of one call needs, by their number in the order of saving."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._function, self._x = function, x
        self._autocast_type = _autocast_type(x.device.type)
        self._num = 0
        self._tensors: dict[int, Tensor] = {}

    def number(self, tensor: Tensor) -> int:
        """Return the tensor's number instead of keeping it."""
        self._num += 1
        return self._num - 1

    def take(self, number: int) -> Tensor:
        """Return the tensor of that number and let go of it."""
        if number not in self._tensors:
            self._tensors = self._compute()
        return self._tensors.pop(number)

    def _compute(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def find(tensor: Tensor) -> None:
            found[len(found)] = tensor.detach()  # the tensor itself would hold the new graph
            if len(found) == self._num:
                raise _Enough

        x = self._x.detach().requires_grad_(self._x.requires_grad)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(_Enough))
            stack.enter_context(torch.enable_grad())
            if self._autocast_type is not None:
                kind, dtype = x.device.type, self._autocast_type
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            stack.enter_context(saved_tensors_hooks(find, _never))
            self._function(x)
        return found


def _never(kept: None) -> Tensor:
    raise AssertionError("what was computed again is taken from the first graph")


def _autocast_type(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
