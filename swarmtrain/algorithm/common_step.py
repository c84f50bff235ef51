"""Optimizer step that all peers take together on the mean gradient of one large batch: AdamW or LAMB.

It works on flat fp32 vectors, and the rule of `outer.py` holds: *everyone computes the same bits*. Norms are therefore
sums in fp64 in one fixed order, whatever the number of threads. Everything else works number by number: AdamW is
torch.optim.AdamW's arithmetic to the bit, which torch fuses where the processor can, as in `outer_step`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.inner import ADAMW_EPS, InnerConstants, learning_rate_at
from swarmtrain.algorithm.outer import OuterState

NUM_MOMENTS = 2
"""Vectors of P numbers that both optimizers keep: the first and the second moments."""

_WIDTH = 1 << 16  # numbers that are squared at once


def norm_of(vector: Tensor) -> float:
    """Return the Euclidean norm of `vector` (N,) fp32, the same bits on every processor and with any threads.

    Squares of fp32 numbers are exact in fp64, and the additions are made in an order that depends on N alone.
    """
    sums = torch.zeros(min(_WIDTH, max(1, vector.numel())), dtype=torch.float64)
    for piece in torch.split(vector, len(sums)):
        sums[: len(piece)].add_(piece.to(torch.float64).square_())
    while len(sums) > 1:
        half = (len(sums) + 1) // 2
        sums[: len(sums) - half].add_(sums[half:])
        sums = sums[:half]
    return math.sqrt(float(sums[0]))


@dataclass(frozen=True)
class CommonStep:
    """Position of a step in its run: `number` counts from 1, `progress` is the share of the run's tokens before it."""

    number: int
    progress: float


@dataclass(frozen=True)
class CommonOptimizer:
    """AdamW (arXiv 1711.05101) or LAMB (arXiv 1904.00962) over tensors of these shapes, flattened one after the other.

    With the clipped gradient g, lambda the weight decay (of tensors with two or more dimensions), eta the learning rate
    of `learning_rate_at`, and t the step's number:
        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        AdamW:  theta <- theta (1 - eta lambda) - eta r
        LAMB:   u = r + lambda theta;  theta <- theta - eta |theta| / |u| u, tensor by tensor
    LAMB's ratio |theta| / |u| is 1 where a norm is 0, and for tensors without weight decay: biases, and the scales of
    norms. So has its authors' code (`exclude_from_layer_adaptation` of google-research/albert), and so have apex and
    timm. Otherwise a bias, which begins at zero, would after its first step grow by a learning rate's share with each.
    """

    shapes: Sequence[tuple[int, ...]]
    constants: InnerConstants
    name: Literal["adamw", "lamb"] = "adamw"

    @cached_property
    def _places(self) -> list[tuple[slice, bool]]:
        """Place of each tensor in the vector, and whether it is one of a weight decay, even if that is 0."""
        ends = itertools.accumulate((math.prod(shape) for shape in self.shapes), initial=0)
        decays = (len(shape) >= 2 for shape in self.shapes)
        return list(zip(itertools.starmap(slice, itertools.pairwise(ends)), decays, strict=True))

    @torch.no_grad()
    def step(self, state: OuterState, gradient: Tensor, at: CommonStep) -> OuterState:
        """Return the state after one step with `gradient` (P,) fp32; `state` has both moments, (2 P,).

        If the gradient's norm is not finite the state stays as it is: one bad batch must not spoil the run. Tensors of
        a new state are new. Raises ValueError when a size differs.
        """
        size = self._places[-1][0].stop
        if not state.theta.numel() == gradient.numel() == size or state.momentum.numel() != NUM_MOMENTS * size:
            raise ValueError(
                f"{size} numbers with {NUM_MOMENTS} moments each are needed, got {state.theta.numel()} with "
                f"{state.momentum.numel()}, and a gradient of {gradient.numel()}"
            )
        c, norm = self.constants, norm_of(gradient)
        if not math.isfinite(norm):
            return state
        factor = c.gradient_clip / (norm + 1e-6)
        clipped = torch.mul(gradient, factor, out=memory.empty_like(gradient)) if factor < 1 else gradient
        moments = memory.empty(NUM_MOMENTS * size).copy_(state.momentum)
        first, second = moments[:size], moments[size:]
        first.lerp_(clipped, 1 - c.beta1)
        second.mul_(c.beta2).addcmul_(clipped, clipped, value=1 - c.beta2)
        correction, root = 1 - c.beta1**at.number, math.sqrt(1 - c.beta2**at.number)
        ahead = torch.sqrt(second, out=memory.empty(size)).div_(root).add_(ADAMW_EPS)
        learning_rate, theta = learning_rate_at(c, at.progress), memory.empty(size).copy_(state.theta)
        if self.name == "adamw":
            for place, decays in self._places:
                if decays:
                    theta[place].mul_(1 - learning_rate * c.weight_decay)
            theta.addcdiv_(first, ahead, value=-learning_rate / correction)
        else:
            torch.div(first, ahead, out=ahead).div_(correction)
            for place, decays in self._places:
                update, weights, ratio = ahead[place], theta[place], 1.0
                if decays:
                    update.add_(weights * c.weight_decay)
                    of_weights, of_update = norm_of(weights), norm_of(update)
                    ratio = of_weights / of_update if of_weights > 0 and 0 < of_update < math.inf else 1.0
                weights.sub_(update.mul_(learning_rate * ratio))
        return OuterState(theta=theta, momentum=moments)
