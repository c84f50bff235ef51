"""Forward passes that keep nothing but their input: the rest is computed again when the backward pass asks for it.

This is activation checkpointing (Chen et al. 2016, arXiv 1604.06174), by torch.utils.checkpoint. Its first call imports
torch's compiler, about a second of processor time and 80 MB, so it is imported where memory is short and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), keeping only `x` until the backward pass.

    `function` is called once more then and must compute the same again: gradients are the same to the bit. It must not
    draw random numbers.
    """
    from torch.utils.checkpoint import checkpoint

    return cast(Tensor, checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))
