"""The computing of one stage: forwards and backwards of many microbatches, by weights that step in between.

A microbatch's backward is computed by the weights of its forward, though a step may have been taken since. So a step
never writes into weights that a kept graph refers to: it is taken on a copy, which is the next version; a version is
kept as long as a microbatch needs it.

Gradients are summed in the order in which they are computed, by batch, to the bits that `loss.backward()` gives. A
microbatch's loss is scaled by its share of a batch's tokens in the tail, so that every stage's gradient is.

The graphs of the last forwards are kept within `graph_bytes`. An older one is computed again when its backward comes,
from its input and by the same weights, to the same bits.

Shapes: B batch, T time (tokens), D width. Not for several threads at once.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

__all__ = ["BadGradientError", "StageModule", "StageWork", "TailResult"]

_NUM_NORMS = 64
_MOST_TIMES = 1e4
"""A microbatch's gradient may be so many times as long as is usual."""
_LEAST_NORM = 1e-6


class BadGradientError(ValueError):
    """A microbatch's gradient that must not be added to others."""


class StageModule(Protocol):
    """A part of a model: `swarmtrain.model.stages.Stage`, or one of another family."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of a torch module."""

    def __call__(self, x: Tensor) -> Tensor:
        """Forward."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Of the last stage: mean nats per token."""


@dataclass(frozen=True)
class TailResult:
    """What the last stage says of a microbatch: its loss, mean nats per token, and the scaled gradient of its input
    (None if the input is tokens)."""

    loss: float
    gradient: Tensor | None


@dataclass
class _Kept:
    x: Tensor
    version: int
    out: Tensor | None = None
    """With its graph; None: to be computed again."""
    out_gradient: Tensor | None = None
    targets: Tensor | None = None
    scale: float = 1.0


class StageWork:
    """One stage's weights by version, and what is kept of its microbatches by key."""

    def __init__(self, stage: nn.Module, graph_bytes: float = float("inf")) -> None:
        self.stage = stage
        self.graph_bytes = graph_bytes
        self.version = 0
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._graph_size_bytes = 0
        """Of the largest graph so far."""
        self.num_recomputed = 0
        self._norms: deque[float] = deque(maxlen=_NUM_NORMS)
        """Of the last microbatches' gradients."""
        self.replaced()

    # ------------------------------------------------------------- microbatches

    def forward(self, key: Hashable, x: Tensor) -> Tensor:
        """What the next stage takes; by the present weights."""
        kept = self._kept[key] = _Kept(x, self.version)
        self._run(kept)
        assert kept.out is not None
        out = kept.out.detach()
        self._keep_within_budget()
        return out

    def backward(self, key: Hashable, out_gradient: Tensor, batch: int) -> Tensor | None:
        """The gradient of the input of `key`, None if that is tokens; the weights' is added to those of `batch`."""
        kept = self._kept[key]
        kept.out_gradient = out_gradient
        if kept.out is None:
            self._run(kept)
            self.num_recomputed += 1
        return self._differentiate(kept, batch)

    def tail(self, key: Hashable, x: Tensor, targets: Tensor, scale: float, batch: int) -> TailResult:
        """Forward, loss and backward of the last stage at once; `scale` is the microbatch's share of a batch."""
        kept = self._kept[key] = _Kept(x, self.version, targets=targets, scale=scale)
        loss = self._run(kept)
        return TailResult(float(loss.detach()), self._differentiate(kept, batch))

    def subtract(self, key: Hashable, batch: int) -> None:
        """Take the gradient of `key` out of `batch`: computed again, by the same weights."""
        kept = self._kept[key]
        self.num_recomputed += 1
        self._subtract(kept, self._weights[kept.version], self._sums[batch])

    def add(self, key: Hashable, batch: int) -> None:
        """Compute the gradient of `key` once more, by the present weights, and put it into `batch`. BadGradientError if
        by these it must not be there."""
        kept = self._kept[key]
        kept.version = self.version
        self._run(kept)
        self.num_recomputed += 1
        self._differentiate(kept, batch)

    def forget(self, key: Hashable) -> None:
        """What is kept for `key` is needed no more."""
        self._kept.pop(key, None)
        self._drop_versions()

    def discard(self, batch: int) -> None:
        """Nothing of this batch counts."""
        self._sums.pop(batch, None)

    def _run(self, kept: _Kept) -> Tensor:
        """Compute it, with its graph; returns the output, of the last stage the loss."""
        x = kept.x
        if x.is_floating_point():
            x = kept.x = x.detach().requires_grad_()
        weights = self._weights[kept.version]
        with _counting(self._count_graph, {weight.data_ptr() for weight in weights.values()}):
            out = cast(Tensor, torch.func.functional_call(_Called(self.stage), _named(weights), (x, kept.targets)))
        kept.out = out
        return out

    def _differentiate(self, kept: _Kept, batch: int) -> Tensor | None:
        """Add to the batch's sums; the input's gradient. BadGradientError if it would spoil them: what is not finite,
        or so large that the others would vanish in its rounding, could not be taken out again. Of what is refused
        nothing is added, but for the rounding where a part of it had been before that was found.
        """
        weights, sums = self._weights[kept.version], self._sums.setdefault(batch, {})
        length, before = _Length(statistics.median(self._norms) if self._norms else math.inf), set(sums)
        try:
            with _summed(weights, sums, length.add):
                _backward(kept, weights)
        except BadGradientError as error:
            refused = error.with_traceback(None)  # which has the graph
        else:
            if length.value > 0:
                self._norms.append(length.value)
            gradient, kept.x.grad = kept.x.grad, None
            return gradient
        for name in length.names - before:
            sums.pop(name, None)
        if added := {name: weights[name] for name in length.names & before}:
            self._subtract(kept, added, sums)
        raise refused

    def _subtract(self, kept: _Kept, weights: Mapping[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Compute it again, and take it out of the sums of these weights."""
        self._run(kept)
        with _summed(weights, sums, lambda name, gradient: None):
            _backward(kept, weights, -1.0)

    # ------------------------------------------------------------- weights

    def gradients(self, batch: int, factor: float) -> None:
        """Make `batch`'s sums, times `factor`, the `.grad` of the stage's parameters, ready for a step."""
        sums = self._sums.pop(batch, {})
        self.let_go()
        for name, parameter in self.stage.named_parameters():
            parameter.grad = sums.get(name)
            if parameter.grad is not None and factor != 1.0:
                parameter.grad.mul_(factor)

    def let_go(self) -> None:
        """Make the stage's parameters a copy that may be written into: by a step, by a merge."""
        for parameter in self.stage.parameters():
            parameter.data = parameter.data.clone()

    def replaced(self) -> None:
        """The stage's parameters are the next version, which nobody writes into before `let_go`."""
        self.version += 1
        self._weights[self.version] = {
            name: parameter.data.requires_grad_() for name, parameter in self.stage.named_parameters()
        }
        self._drop_versions()

    def _drop_versions(self) -> None:
        needed = {kept.version for kept in self._kept.values()} | {self.version}
        self._weights = {version: weights for version, weights in self._weights.items() if version in needed}

    # ------------------------------------------------------------- memory

    def _count_graph(self, size_bytes: int) -> None:
        self._graph_size_bytes = max(self._graph_size_bytes, size_bytes)

    def _keep_within_budget(self) -> None:
        with_graph = [kept for kept in self._kept.values() if kept.out is not None]
        while with_graph and len(with_graph) * self._graph_size_bytes > self.graph_bytes:
            with_graph.pop(0).out = None


class _Length:
    """The norm of a gradient that comes weight by weight. `add` raises BadGradientError if it is not finite, or much
    larger than is usual (infinite: not known)."""

    def __init__(self, usual: float) -> None:
        self.usual = usual
        self.names: set[str] = set()
        """Of the weights of which it was not refused."""
        self.value = 0.0

    def add(self, name: str, gradient: Tensor) -> None:
        """That of one more weight."""
        self.value = math.hypot(self.value, float(torch.linalg.vector_norm(gradient)))
        if not math.isfinite(self.value) or self.value > _MOST_TIMES * max(self.usual, _LEAST_NORM):
            raise BadGradientError(f"a gradient of norm {self.value:.3g}, where {self.usual:.3g} is usual")
        self.names.add(name)


def _backward(kept: _Kept, weights: Mapping[str, Tensor], sign: float = 1.0) -> None:
    """Add to the `.grad` of these weights, with -1 take away from it, and that of the input if it has one. The graph is
    used up."""
    out, kept.out, out_gradient = kept.out, None, kept.out_gradient
    assert out is not None
    if kept.targets is not None:
        out = out * (sign * kept.scale)
    elif out_gradient is not None and sign != 1.0:
        out_gradient = sign * out_gradient
    kept.x.grad = None
    inputs = [*weights.values(), *([kept.x] if kept.x.requires_grad else [])]
    torch.autograd.backward(out, out_gradient, inputs=inputs)


@contextmanager
def _summed(
    weights: Mapping[str, Tensor], sums: dict[str, Tensor], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """What is added to the weights' `.grad` meanwhile is added to `sums`, after a look at it.

    Each gradient is added as soon as there is one, while it is in the processor's cache, and its memory is the next
    one's: adding all of them in the end took up to a quarter of the time.
    """
    hooks = []
    for name, weight in weights.items():
        weight.grad = sums.get(name)
        hooks.append(weight.register_hook(partial(look, name)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] = weight.grad
            weight.grad = None


class _Called(nn.Module):
    """A stage's forward, or with targets its loss, as one call."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        return cast(Tensor, self.stage(x) if targets is None else cast(StageModule, self.stage).loss(x, targets))


def _named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"stage.{name}": weight for name, weight in weights.items()}


@contextmanager
def _counting(told: Callable[[int], None], but: set[int]) -> Iterator[None]:
    """Tell how many bytes the graph that is made meanwhile keeps, but those at these addresses."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold its own graph, and so itself, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    told(sum(sizes.values()))
