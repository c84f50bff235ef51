"""Outer loop of DiLoCo: many peers' pseudo-gradients become one Nesterov step.

Everything works on one flat fp32 vector of P numbers, the parameters in the model's own order, so that what is sent,
averaged and hashed is a single thing. The rule of this file: *everyone computes the same bits*. Each peer of a roster
averages for itself, or averages one slice and pulls the others, and the results must agree. So the order is the
roster's, and `weighted_mean` rounds multiplication and addition separately, which is the same on every processor.
`outer_step` is torch.optim.SGD's arithmetic to the bit, which torch fuses where the processor can (x86 since 2013,
ARM64): a processor that cannot may differ from the others in the last bit of theta, never in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from swarmtrain.algorithm import memory


@dataclass(frozen=True, kw_only=True)
class OuterConstants:
    """Constants of one outer step; `momentum` is this round's (see `momentum_at`)."""

    learning_rate: float
    momentum: float

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and 0 <= self.momentum < 1):
            raise ValueError(f"the learning rate must be above 0 and the momentum in [0, 1): {self}")


@dataclass(frozen=True)
class OuterState:
    """Outer parameters and their momentum, fp32. Nobody writes into the tensors of a state."""

    theta: Tensor
    """Outer parameters (P,)."""
    momentum: Tensor
    """Momentum (P,); where all peers take a step of AdamW or LAMB (`common_step.py`), both moments, (2 P,)."""

    def __post_init__(self) -> None:
        size = self.theta.numel()
        if self.theta.dim() != 1 or self.momentum.dim() != 1 or self.momentum.numel() not in (size, 2 * size):
            raise ValueError(
                f"theta and momentum must be vectors of one size, or momentum of two moments, got "
                f"{tuple(self.theta.shape)} and {tuple(self.momentum.shape)}"
            )

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.theta.numel()

    def pieces(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return theta and momentum, each as a list of consecutive vectors; nothing is copied."""
        return [self.theta], [self.momentum]

    def frozen(self) -> OuterState:
        """Return this state as it is now, whatever follows."""
        return self

    def spent(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return `pieces` of a state that nobody else uses any more; it may then drop them."""
        return self.pieces()


@torch.no_grad()
def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return the tensors one after the other as a new vector (P,) fp32 on the first one's device.

    A single call, because the trainer waits meanwhile, and each call releases Python's lock and waits to get it back.
    """
    tensors = list(tensors)
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat.to(torch.float32, copy=len(tensors) == 1)  # of one it is a view


@torch.no_grad()
def unflatten_into(flat: Tensor, tensors: Iterable[Tensor]) -> None:
    """Copy `flat` (P,) into the tensors, in the order and shapes `flatten` read them.

    Raises ValueError, changing nothing, when their sizes do not add up to P.
    """
    tensors = list(tensors)
    size = sum(tensor.numel() for tensor in tensors)
    if flat.shape != (size,):
        raise ValueError(f"a vector of {size} numbers is needed, got shape {tuple(flat.shape)}")
    torch._foreach_copy_(tensors, _unflatten_dense_tensors(flat, tensors))  # type: ignore[no-untyped-call]


@torch.no_grad()
def weighted_mean(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_i (weights[i] / sum(weights)) gradients[i], a new tensor; weights are tokens (DiLoCo, line 12).

    `gradients` are (P,) fp32, or the same slice [a:b] of each: the mean of slices is the slice of the mean, to the bit.
    A single gradient comes back unchanged. Raises ValueError when there is none, their shapes or number differ from
    each other or from the weights', or the weights are negative, not finite or all zero.
    """
    if not gradients or len(gradients) != len(weights):
        raise ValueError(f"as many weights as gradients, at least one: got {len(weights)} and {len(gradients)}")
    if any(gradient.shape != gradients[0].shape for gradient in gradients):
        raise ValueError(f"gradients of one shape are needed, got {[tuple(g.shape) for g in gradients]}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights must be finite and not negative, got {list(weights)}")
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("all weights are zero")
    mean = gradients[0] * (weights[0] / total)
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        mean.add_(gradient * (weight / total))  # not add_(gradient, alpha=...): that is fused on some processors
    return mean


@torch.no_grad()
def outer_step(state: OuterState, gradient: Tensor, constants: OuterConstants) -> OuterState:
    """Take one outer Nesterov step with `gradient` (P,), the mean of theta at the round's start minus what peers
    reached.

    m <- beta m + G;  theta <- theta - eps (G + beta m): DiLoCo's rule (arXiv 2311.08105, algorithm 1), and to the bit
    what torch.optim.SGD(nesterov=True) computes. Momentum 0 is plain SGD, and with eps = 1 plain averaging. Both
    tensors of the result are new, because another thread may still read the old ones. Raises ValueError when the
    gradient's size differs.
    """
    if gradient.shape != state.theta.shape:
        raise ValueError(f"a gradient of {state.theta.numel()} numbers is needed, got {tuple(gradient.shape)}")
    momentum = torch.mul(state.momentum, constants.momentum, out=memory.empty_like(gradient)).add_(gradient)
    ahead = torch.add(gradient, momentum, alpha=constants.momentum, out=memory.empty_like(gradient))
    theta = torch.add(state.theta, ahead, alpha=-constants.learning_rate, out=ahead)
    return OuterState(theta=theta, momentum=momentum)


def kept_where(state: OuterState, before: OuterState, places: Iterable[slice]) -> OuterState:
    """Return `state`, whose tensors nobody else has yet, with the numbers of `before` at these places."""
    size = state.size
    for place in places:
        state.theta[place] = before.theta[place]
        for new, old in zip(torch.split(state.momentum, size), torch.split(before.momentum, size), strict=True):
            new[place] = old[place]
    return state


def momentum_at(round: int, momentum: float, ramp_rounds: int) -> float:
    """Return the outer momentum in a round (counted from 0): linear from 0 to `momentum` in `ramp_rounds` rounds.

    From a cold start the first pseudo-gradients are large and point away from the later ones; momentum would carry them
    along. With `ramp_rounds` 0 it is `momentum` from the first round. Raises ValueError when `round` or `ramp_rounds`
    is negative.
    """
    if round < 0 or ramp_rounds < 0:
        raise ValueError(f"rounds must not be negative, got {round} and {ramp_rounds}")
    return momentum if round >= ramp_rounds else momentum * round / ramp_rounds


@dataclass(frozen=True)
class Buffer:
    """Gradients that have arrived since the momentum was last refreshed; a checkpoint keeps them beside the state."""

    delta: Tensor
    """Weighted sum of these gradients, (P,) fp32; zero without any."""
    arrivals: int


class DelayedNesterov:
    """Outer steps on gradients that arrive one by one; the momentum is refreshed at each N-th (arXiv 2401.09135).

    Each arrival, w its weight (1/N unless given) and c the share in [0, 1/N] of the momentum it applies:
        Delta <- Delta + w g
        the N-th:   m <- beta m + Delta;  theta <- theta - eps [(1 - cN + c) beta m + w g];  Delta <- 0
        the others: theta <- theta - eps [c beta m + w g]
    With c = 0 a buffer of N moves theta as one `outer_step` on its weighted mean does, when the weights add up to 1.
    That is a gossip merge (N = 1 + partners, weighted by tokens) and a server (N = its workers).

    `constants` may be replaced at any time, best between two buffers (`buffer.arrivals` is 0): they count from the
    next arrival on. So does `num_arrivals`: a buffer that already holds as many or more ends with the next arrival,
    what came in keeps the weight it came with, and the weights 1/N of that one buffer then need not add up to 1. The
    momentum is applied once in a buffer in any case: the last arrival applies what the earlier ones left.
    """

    def __init__(
        self,
        state: OuterState,
        constants: OuterConstants,
        num_arrivals: int,
        share: float = 0.0,
        buffer: Buffer | None = None,
    ) -> None:
        self.constants = constants
        self._state = state
        self._share = share
        self.num_arrivals = num_arrivals
        """N, the number of arrivals in a buffer."""
        self._buffer = Buffer(torch.zeros_like(state.theta), 0) if buffer is None else buffer
        if self._buffer.delta.shape != state.theta.shape or self._buffer.arrivals < 0:
            raise ValueError(
                f"this buffer does not fit {state.theta.numel()} numbers: {tuple(self._buffer.delta.shape)}"
            )

    @property
    def state(self) -> OuterState:
        """State after the last arrival; its tensors are never written into."""
        return self._state

    @property
    def buffer(self) -> Buffer:
        """Arrivals since the last refresh; never written into either."""
        return self._buffer

    @property
    def num_arrivals(self) -> int:
        """N, how many arrivals make a buffer."""
        return self._num_arrivals

    @num_arrivals.setter
    def num_arrivals(self, num_arrivals: int) -> None:
        if num_arrivals < 1 or not 0 <= self._share * num_arrivals <= 1:
            raise ValueError(f"N must be at least 1 and the share in [0, 1/N], got {num_arrivals} and {self._share}")
        self._num_arrivals = num_arrivals

    @torch.no_grad()
    def arrive(self, gradient: Tensor, weight: float | None = None) -> OuterState:
        """Apply one gradient (P,) with its weight (None: 1/N), and return the new state, in new tensors.

        Raises ValueError, changing nothing, when the shape or the weight makes no sense.
        """
        state, buffer, constants = self._state, self._buffer, self.constants
        if gradient.shape != state.theta.shape:
            raise ValueError(f"a gradient of {state.theta.numel()} numbers is needed, got {tuple(gradient.shape)}")
        weight = 1 / self._num_arrivals if weight is None else weight
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight must be finite and not negative, got {weight}")
        weighted = gradient * weight
        delta = buffer.delta + weighted if buffer.arrivals else weighted
        momentum, part = state.momentum, self._share
        refreshes = buffer.arrivals + 1 >= self._num_arrivals
        if refreshes:
            momentum = (momentum * constants.momentum).add_(delta)
            part = max(0.0, 1 - self._share * buffer.arrivals)
        ahead = weighted.add(momentum, alpha=part * constants.momentum) if part else weighted
        self._state = OuterState(theta=state.theta.add(ahead, alpha=-constants.learning_rate), momentum=momentum)
        self._buffer = Buffer(torch.zeros_like(delta), 0) if refreshes else Buffer(delta, buffer.arrivals + 1)
        return self._state
