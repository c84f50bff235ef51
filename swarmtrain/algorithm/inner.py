"""Inner loop of DiLoCo: AdamW with clipping, and a learning-rate schedule by the run's tokens.

This is what happens within a round on one peer; nothing here knows that there are others. The moments stay local, are
kept from round to round and are never sent (arXiv 2311.08105, section 2). The learning rate follows the *run's* tokens,
not the peer's own steps, so a peer that joins late starts at the right one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from swarmtrain.algorithm import memory

_FIRST_SHARE = 0.01  # the warm-up begins at this share of the peak: a learning rate of 0 would waste a step
ADAMW_EPS = 1e-8
"""Added to the root of the second moment; torch.optim.AdamW's default."""
_PIECE = 1 << 20  # numbers of lent moments that are copied at once: the optimizer waits for no more than that
_COPIED_PIECES = 16  # pieces in one copy of a device: pinned memory comes in powers of two, and so little is left over
_LENT_WAIT_S = 0.1
_SCALE_GROWS_AFTER = 2000  # good steps in a row, as torch.amp.GradScaler has it


@dataclass(frozen=True, kw_only=True)
class InnerConstants:
    """Constants of AdamW and its schedule; the same on every peer of a run."""

    learning_rate: float  # the peak
    weight_decay: float  # decoupled, per step, times the learning rate; matrices only
    beta1: float  # decay of the first moment, per step
    beta2: float  # decay of the second moment, per step
    gradient_clip: float  # the gradient's norm is clipped to this
    warmup_fraction: float  # share of the run's tokens over which the learning rate rises
    floor_fraction: float  # the cosine ends at this share of the peak

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.weight_decay >= 0 and self.gradient_clip > 0):
            raise ValueError(f"learning rate and clip must be above 0, weight decay not below: {self}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.warmup_fraction < 1):
            raise ValueError(f"betas and the warm-up's share must lie in [0, 1): {self}")
        if not 0 <= self.floor_fraction <= 1:
            raise ValueError(f"the floor's share must lie in [0, 1]: {self}")


def learning_rate_at(constants: InnerConstants, progress: float) -> float:
    """Return the learning rate when `progress`, the run's tokens so far over all its tokens, is in [0, 1].

    It rises linearly from 1 % of the peak (never 0) to the peak during the warm-up, then falls on half a cosine to the
    floor. Progress above 1 counts as 1, because peers may overshoot by a round. Raises ValueError when it is negative
    or NaN.
    """
    if not progress >= 0:
        raise ValueError(f"progress must not be negative, got {progress}")
    progress = min(progress, 1.0)
    peak, warmup = constants.learning_rate, constants.warmup_fraction
    if progress < warmup:
        return peak * (_FIRST_SHARE + (1 - _FIRST_SHARE) * progress / warmup)
    descent = (progress - warmup) / (1 - warmup)
    floor = constants.floor_fraction
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * descent)))


def moments_scale(steps_taken: int, beta2: float) -> float:
    """Return the factor on the learning rate of a late joiner's step number `steps_taken` (from 0), whose moments are
    young.

    Even with its bias corrected, a second moment of few steps is mostly the noise of those steps, and the first updates
    would be as large as the learning rate allows. The factor rises linearly to 1 over the second moment's memory, 1 /
    (1 - beta2) steps.
    """
    return min(1.0, (steps_taken + 1) * (1 - beta2))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """AdamW's moments of P numbers in N parameters, flat in the parameters' order."""

    vectors: Tensor  # (2, P) fp32: the first moments, the second moments
    steps: Tensor  # (N,) fp32: steps that each parameter has taken


class MomentsCopy(Protocol):
    """Copy of tensors of a device in main memory, flat, which the device may still be writing."""

    def ready(self) -> Tensor:
        """Return the copy once it is there."""
        ...

    @property
    def values(self) -> Tensor:
        """Memory of the copy."""
        ...


class LentMoments:
    """AdamW's moments at one moment, read once by another thread without a copy of 8 bytes a parameter.

    The next step waits briefly for the reader, then copies what is not read yet and continues. So a reader that keeps
    up costs no memory, and one that does not costs no time. Moments on a device are copied to main memory by the device
    itself, and no step waits for their reader.
    """

    def __init__(self, tensors: Sequence[Tensor], steps: Tensor, wait_copied: Callable[[], None] | None = None) -> None:
        """`tensors`: the first moments, then the second ones, contiguous fp32.

        `wait_copied` is given if these tensors and `steps` are copies, and returns once they are there.
        """
        self._steps, self._wait_copied = steps, wait_copied
        self.num_numbers = sum(tensor.numel() for tensor in tensors)
        self._left = [piece for tensor in tensors for piece in torch.split(tensor.reshape(-1), _PIECE)][::-1]
        self._is_copied = wait_copied is not None
        self._change = threading.Condition()

    @property
    def steps(self) -> Tensor:
        """Steps that each parameter has taken (N,)."""
        if self._wait_copied is not None:
            self._wait_copied()
        return self._steps

    def read(self) -> Iterator[Tensor]:
        """Yield the numbers piece by piece; each piece is valid until the next one is asked for."""
        room = torch.empty(_PIECE)
        if self._wait_copied is not None:
            self._wait_copied()
        while True:
            with self._change:
                if not self._left:
                    return
                piece, kept = self._left.pop(), self._is_copied
                if not kept:
                    piece = room[: len(piece)].copy_(piece)
                if not self._left:
                    self._change.notify_all()
            yield piece

    def give_back(self, limit_s: float = _LENT_WAIT_S) -> None:
        """Let the moments change from now on: copy what is not read within `limit_s`."""
        with self._change:
            if not self._is_copied and not self._change.wait_for(lambda: not self._left, limit_s):
                sizes = [len(piece) for piece in self._left]
                copies = torch.split(memory.empty(sum(sizes)), sizes)
                torch._foreach_copy_(copies, self._left)
                self._left = list(copies)
            self._is_copied = True

    def forget(self) -> None:
        """Drop everything, because nobody reads it."""
        with self._change:
            self._left.clear()
            self._change.notify_all()


@dataclass(frozen=True)
class _State:
    """AdamW's state of one parameter."""

    step: Tensor  # () fp32
    first: Tensor  # both shaped as the parameter
    second: Tensor


class LossScale:
    """Factor on the loss of fp16, whose gradients would otherwise vanish: as large as no gradient overflows.

    It is halved by a step whose gradients are not finite, which changes nothing else, and doubled after
    `_SCALE_GROWS_AFTER` good ones (Micikevicius et al. 2018, arXiv 1710.03740). It never leaves the device.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16) -> None:
        self.factor = torch.full((), initial, device=device)
        self._good_steps = torch.zeros((), device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients by the factor."""
        if gradients:
            torch._foreach_mul_(gradients, self.factor.reciprocal())

    def update(self, is_bad: Tensor) -> None:
        """Adapt the factor to a step that was bad (`is_bad` () is 1) or good (0)."""
        good = (self._good_steps + 1) * (1 - is_bad)
        grows = good >= _SCALE_GROWS_AFTER
        grown = torch.where(grows, 2 * self.factor, self.factor)
        # Not below 1: a model whose gradients overflow even unscaled has diverged, and a factor of 0 would be for ever.
        self.factor.copy_(torch.where(is_bad > 0, 0.5 * self.factor, grown).clamp_(min=1.0))
        self._good_steps.copy_(torch.where(grows, torch.zeros_like(good), good))


class InnerOptimizer:
    """AdamW over a model's named parameters, with gradient clipping and `learning_rate_at`.

    Tensors of two or more dimensions are decayed, others (norms) are not. The moments belong to the parameters' names
    and live as long as this object: an outer step changes the parameters and leaves the moments alone.

    It equals torch.optim.AdamW to the bit, by the function that this class calls. The class itself first imports
    torch's compiler, which takes a second of processor time and tens of megabytes, and is not used here.
    """

    steps_on_each_rank: ClassVar[bool] = True
    """True if every rank that trains the same parameters takes each step; False if only this process does."""
    targets = 0
    """Targets of the batch whose mean gradient is in `.grad`; set before each step. AdamW asks for none."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        constants: InnerConstants,
        before_step: Callable[[], None] = lambda: None,
        loss_scale: LossScale | None = None,
    ) -> None:
        """`before_step` is called before weights change; losses are multiplied by `loss_scale` if there is one."""
        self.constants, self._before_step, self.loss_scale = constants, before_step, loss_scale
        self._parameters = dict(parameters)
        if not self._parameters:
            raise ValueError("InnerOptimizer needs at least one parameter")
        matrices = [p for p in self._parameters.values() if p.dim() >= 2]
        others = [p for p in self._parameters.values() if p.dim() < 2]
        self._groups = ((matrices, constants.weight_decay), (others, 0.0))
        self._states: dict[Tensor, _State] = {}
        self._lent: LentMoments | None = None
        self.norm_of_all: Callable[[Tensor], Tensor] | None = None
        """Function from this process's gradient norm () to the one by which all ranks clip, where several train the
        same parameters and must stay equal to the bit; None: this process is the only one."""
        self.waited_s = 0.0
        """Seconds spent so far in `before_step` and waiting for readers of lent moments."""

    @torch.no_grad()
    def step(self, progress: float, scale: float = 1.0) -> Tensor:
        """Take one inner step from the gradients in `.grad`, drop them, and return their norm () before clipping.

        `progress` is the run's tokens so far over all its tokens; `scale` multiplies the learning rate. If the norm is
        not finite, weights and moments stay as they are: one bad batch must not spoil a peer, and the caller sees the
        norm. Nothing here waits for the parameters' device, whatever the norm is.
        """
        if self.loss_scale is not None:
            self.loss_scale.unscale([p.grad for p in self._parameters.values() if p.grad is not None])
        gradient_norm = self._clip()
        is_bad = gradient_norm.isfinite().logical_not_().to(torch.float32)
        began_s = time.monotonic()
        self._before_step()
        self._take_back()
        self.waited_s += time.monotonic() - began_s
        learning_rate = learning_rate_at(self.constants, progress) * scale
        for parameters, decay in self._groups:
            self._step([p for p in parameters if p.grad is not None], learning_rate, decay, is_bad)
        if self.loss_scale is not None:
            self.loss_scale.update(is_bad)
        self.drop_gradients()
        return gradient_norm

    def _clip(self) -> Tensor:
        """Clip the gradients to their greatest norm, and return their norm () before."""
        if self.norm_of_all is None:
            return nn.utils.clip_grad_norm_(self._parameters.values(), self.constants.gradient_clip)
        # The same arithmetic: torch's function has no place for another norm, and newer ones in two halves are not in
        # every torch that we allow.
        gradients = self.gradients()
        norm = self.norm_of_all(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        torch._foreach_mul_(gradients, (self.constants.gradient_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gradients(self) -> list[Tensor]:
        """Return `.grad` of each parameter; where there is none, it is made of zeros."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def _step(self, parameters: list[Tensor], learning_rate: float, decay: float, is_bad: Tensor) -> None:
        """Update these parameters, which have gradients and share one weight decay, unless `is_bad` () is 1."""
        if not parameters:
            return
        states = [self._state_of(p) for p in parameters]
        adamw(
            [*parameters],
            [p.grad for p in parameters if p.grad is not None],
            [state.first for state in states],
            [state.second for state in states],
            [],
            [state.step for state in states],
            fused=True,
            found_inf=is_bad,
            amsgrad=False,
            maximize=False,
            lr=learning_rate,
            beta1=self.constants.beta1,
            beta2=self.constants.beta2,
            weight_decay=decay,
            eps=ADAMW_EPS,
        )

    def _state_of(self, parameter: Tensor) -> _State:
        """Return a parameter's state, which begins with zeros."""
        if parameter not in self._states:
            step = torch.zeros((), device=parameter.device)
            self._states[parameter] = _State(step, torch.zeros_like(parameter), torch.zeros_like(parameter))
        return self._states[parameter]

    @property
    def has_moments(self) -> bool:
        """True if a step was taken, or moments were loaded."""
        return bool(self._states)

    @torch.no_grad()
    def moment_tensors(self) -> list[Tensor]:
        """Return the tensors themselves of all moments and step counts, in one order for the same parameters."""
        self._take_back()
        states = [self._state_of(parameter) for parameter in self._parameters.values()]
        return [tensor for state in states for tensor in (state.step, state.first, state.second)]

    @torch.no_grad()
    def lend_moments(self, copy: Callable[[Sequence[Tensor]], MomentsCopy] | None = None) -> LentMoments:
        """Return the present moments for another thread to read.

        `copy` is for a device: it asks the device for a copy (n,) of tensors with n numbers, and does not wait for it.
        What it has copied must not change before it is there, for which `before_step` cares.
        """
        self._take_back()
        states = [self._states.get(parameter) for parameter in self._parameters.values()]
        pairs = list(zip(self._parameters.values(), states, strict=True))
        first = [torch.zeros_like(parameter) if own is None else own.first for parameter, own in pairs]
        second = [torch.zeros_like(parameter) if own is None else own.second for parameter, own in pairs]
        if copy is None:
            self._lent = LentMoments([*first, *second], self._steps().cpu())
            return self._lent
        pieces = [piece for tensor in (*first, *second) for piece in torch.split(tensor.reshape(-1), _PIECE)]
        copies = [copy(pieces[at : at + _COPIED_PIECES]) for at in range(0, len(pieces), _COPIED_PIECES)]
        steps = copy([self._steps()])

        def wait() -> None:
            for each in (*copies, steps):
                each.ready()

        return LentMoments([each.values for each in copies], steps.values, wait)

    def _steps(self) -> Tensor:
        """Return the steps that each parameter has taken (N,), on the parameters' device."""
        states = (self._states.get(parameter) for parameter in self._parameters.values())
        zero = next(iter(self._parameters.values())).new_zeros((), dtype=torch.float32)
        return torch.stack([zero if own is None else own.step for own in states])

    def _take_back(self) -> None:
        if self._lent is not None:
            self._lent.give_back()
            self._lent = None

    def end(self) -> None:
        """Drop the moments, because no step follows. A reader of lent ones keeps them until it is done."""
        self._states, self._lent = {}, None
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Drop what `.grad` holds: a batch that was given up must not count in the next step."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def copy_moments(self, into: Tensor) -> Moments:
        """Copy the moments into `into` (2, P) fp32, for a checkpoint that is written while training continues."""
        sizes = self._sizes()
        if into.shape != (2, sum(sizes)):
            raise ValueError(f"room for moments (2, {sum(sizes)}) is needed, got {tuple(into.shape)}")
        for parameter, places in zip(self._parameters.values(), torch.split(into, sizes, dim=1), strict=True):
            if (own := self._states.get(parameter)) is None:
                for place in places:
                    place.zero_()
                continue
            for place, moment in zip(places, (own.first, own.second), strict=True):
                place.copy_(moment.reshape(-1))
        return Moments(vectors=into, steps=self._steps().cpu())

    @torch.no_grad()
    def load_moments(self, moments: Moments) -> None:
        """Continue from a copy of what `copy_moments` returned. Raises ValueError, changing nothing, if the copy is of
        a model with other parameters."""
        sizes = self._sizes()
        if moments.vectors.shape != (2, sum(sizes)) or moments.steps.shape != (len(sizes),):
            shapes = (tuple(moments.vectors.shape), tuple(moments.steps.shape))
            raise ValueError(f"moments (2, {sum(sizes)}) of {len(sizes)} parameters are needed, got {shapes}")
        self._take_back()
        vectors = torch.split(moments.vectors, sizes, dim=1)
        for step, parameter, own in zip(moments.steps, self._parameters.values(), vectors, strict=True):
            first, second = (vector.view_as(parameter).to(parameter, copy=True) for vector in own)
            self._states[parameter] = _State(step.to(parameter.device, torch.float32, copy=True), first, second)

    def kept_moments(
        self, room: Tensor | None, copy: Callable[[Sequence[Tensor]], MomentsCopy] | None = None
    ) -> Moments | LentMoments:
        """Return the moments for a checkpoint: copied into `room` (2, P) fp32, lent if there is none.

        With `copy`, for a device, they are lent whatever room there is; see `lend_moments`.
        """
        if room is None or copy is not None:
            return self.lend_moments(copy)
        return self.copy_moments(room)

    def forget(self) -> None:
        """Drop what was added up beside `.grad` in a round that was given up: nothing here."""

    def _sizes(self) -> list[int]:
        """Return the number of elements of each parameter, in order."""
        return [parameter.numel() for parameter in self._parameters.values()]
