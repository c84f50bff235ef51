"""Compute one stage: forwards and backwards of many microbatches, by weights that step in between.

A microbatch's backward uses the weights of its forward, though a step may have been taken since. So a step never writes
into weights that a kept graph refers to: it is taken on a copy, the next version. A version is kept as long as a
microbatch needs it (decision 26).

Gradients are summed per batch in the order in which they are computed, to the bits that `loss.backward()` gives. The
tail scales a microbatch's loss by its share of a batch's tokens, and thereby every stage's gradient.

The graphs of the last forwards are kept within `graph_bytes`. An older one is computed again when its backward comes,
from its input and by the same weights: to the same bits on a processor, within rounding on a card, some of whose
kernels add in another order each time. Nothing needs the same bits: what is subtracted leaves at most that rounding.

Weights, sums and graphs are on the stage's device, and so are inputs and outputs. Products are computed in the
precision of `autocast`; weights, gradients and their sums are fp32.

Shapes: B batch, T time (tokens), D width. Not thread-safe.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

_NUM_NORMS = 64  # gradients whose median norm is the usual one
_NUM_FIRST = 16  # gradients before which the usual norm is only roughly known
_MOST_TIMES, _MOST_TIMES_FIRST = 3.0, 1e4
"""Most times the usual norm that a microbatch's gradient may have; a larger one is clipped to that. Clipping each part
of a sum bounds what one hostile part adds, whatever its direction (centered clipping, arXiv 2012.10333). The median
follows norms that grow, because a clipped one counts as three times the median."""
_LEAST_NORM = 1e-6  # a usual norm counts as at least this


class BadGradientError(ValueError):
    """Raised for a microbatch's gradient that must not be added to others."""


class StageModule(Protocol):
    """Part of a model: `swarmtrain.model.stages.Stage`, or one of another family."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters as a torch module does."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the forward."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the last stage's loss, mean nats per token."""


@dataclass(frozen=True)
class TailResult:
    """Result of the last stage for a microbatch: loss, mean nats per token, and the scaled gradient of its input.

    The gradient is None if the input is tokens.
    """

    loss: float
    gradient: Tensor | None


@dataclass
class _Kept:
    x: Tensor
    version: int
    out: Tensor | None = None
    """Output with its graph; None if it must be computed again."""
    out_gradient: Tensor | None = None
    targets: Tensor | None = None
    scale: float = 1.0


class StageWork:
    """Weights of one stage by version, and its kept microbatches by key."""

    def __init__(
        self,
        stage: nn.Module,
        graph_bytes: float = float("inf"),
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`autocast` makes the context in which the stage is called."""
        self.stage, self._autocast = stage, autocast
        self.graph_bytes = graph_bytes
        self.version = 0
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._graph_size_bytes = 0
        """Bytes of the largest graph so far."""
        self.num_recomputed = 0
        self._norms: deque[float] = deque(maxlen=_NUM_NORMS)
        """Norms of the last microbatches' gradients."""
        self.replaced()

    # ------------------------------------------------------------- microbatches

    def forward(self, key: Hashable, x: Tensor) -> Tensor:
        """Compute the next stage's input, by the present weights."""
        kept = self._kept[key] = _Kept(x, self.version)
        self._run(kept)
        assert kept.out is not None
        out = kept.out.detach()
        self._keep_within_budget()
        return out

    def backward(self, key: Hashable, out_gradient: Tensor, batch: int) -> Tensor | None:
        """Add the weights' gradient of `key` to those of `batch`, and return its input's; None if that is tokens."""
        kept = self._kept[key]
        kept.out_gradient, kept.scale = out_gradient, 1.0
        if kept.out is None:
            self._run(kept)
            self.num_recomputed += 1
        return self._differentiate(kept, batch)

    def tail(self, key: Hashable, x: Tensor, targets: Tensor, scale: float, batch: int) -> TailResult:
        """Compute forward, loss and backward of the last stage at once; `scale` is the microbatch's share
        of a batch."""
        kept = self._kept[key] = _Kept(x, self.version, targets=targets, scale=scale)
        loss = self._run(kept)
        gradient = self._differentiate(kept, batch)
        return TailResult(float(loss.detach()), gradient)

    def subtract(self, key: Hashable, batch: int) -> None:
        """Subtract the gradient of `key` from `batch`; it is computed again, by the same weights."""
        kept = self._kept[key]
        self.num_recomputed += 1
        self._subtract(kept, self._weights[kept.version], self._sums[batch])

    def add(self, key: Hashable, batch: int) -> None:
        """Compute the gradient of `key` again, by the present weights, and add it to `batch`.

        Raises BadGradientError if that gradient must not be added.
        """
        kept = self._kept[key]
        kept.version = self.version
        self._run(kept)
        self.num_recomputed += 1
        self._differentiate(kept, batch)

    def forget(self, key: Hashable) -> None:
        """Forget what is kept for `key`."""
        self._kept.pop(key, None)
        self._drop_versions()

    def discard(self, batch: int) -> None:
        """Drop the sums of this batch."""
        self._sums.pop(batch, None)

    def _run(self, kept: _Kept) -> Tensor:
        """Compute a microbatch with its graph. Returns the output, or the last stage's loss."""
        x = kept.x
        if x.is_floating_point():
            x = kept.x = x.detach().requires_grad_()
        weights = self._weights[kept.version]
        with self._autocast(), _counting(self._count_graph, {weight.data_ptr() for weight in weights.values()}):
            out = cast(Tensor, torch.func.functional_call(_Called(self.stage), _named(weights), (x, kept.targets)))
        kept.out = out
        return out

    def _differentiate(self, kept: _Kept, batch: int) -> Tensor | None:
        """Add the gradient to the batch's sums, and return the input's.

        A gradient that is larger than usual is taken out again, computed once more apart, and added clipped. Raises
        BadGradientError if it is not finite. A refused gradient leaves nothing behind, except for rounding where a part
        of it had been added before it was found bad.
        """
        weights, sums = self._weights[kept.version], self._sums.setdefault(batch, {})
        times = _MOST_TIMES if len(self._norms) >= _NUM_FIRST else _MOST_TIMES_FIRST
        most = times * max(statistics.median(self._norms), _LEAST_NORM) if self._norms else math.inf
        length, before = _Length(most), set(sums)
        try:
            with self._summed(weights, sums, length):
                _backward(kept, weights)
        except BadGradientError:
            pass  # its traceback holds the graph
        else:
            if length.value > 0:
                self._norms.append(length.value)
            gradient, kept.x.grad = kept.x.grad, None
            return gradient
        for name in length.names - before:
            sums.pop(name, None)
        if added := {name: weights[name] for name in length.names & before}:
            self._subtract(kept, added, sums)
        self._run(kept)
        whole, apart = _Length(math.inf), dict[str, Tensor]()
        try:
            with self._summed(weights, apart, whole):
                _backward(kept, weights)
        except BadGradientError as error:
            refused = error.with_traceback(None)
        else:
            factor = min(1.0, most / whole.value)
            kept.scale *= factor  # of what may be subtracted later
            for name, each in apart.items():
                sums[name] = sums[name].add_(each, alpha=factor) if name in sums else each.mul_(factor)
            self._norms.append(factor * whole.value)
            gradient, kept.x.grad = kept.x.grad, None
            return None if gradient is None else gradient.mul_(factor)
        raise refused

    def _subtract(self, kept: _Kept, weights: Mapping[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Compute the gradient again and subtract it from the sums of these weights."""
        self._run(kept)
        with self._summed(weights, sums, None):
            _backward(kept, weights, -1.0)

    def _summed(
        self, weights: Mapping[str, Tensor], sums: dict[str, Tensor], length: _Length | None
    ) -> AbstractContextManager[None]:
        """Return a context that collects in `sums` the gradients that the block adds to the weights' `.grad`, unless
        `length` refuses them."""
        return _summed_one_by_one(weights, sums, _accept if length is None else length.add)

    # ------------------------------------------------------------- weights

    def gradients(self, batch: int, factor: float) -> None:
        """Set `batch`'s sums, times `factor`, as the `.grad` of the stage's parameters, ready for a step."""
        sums = self._sums.pop(batch, {})
        self.let_go()
        for name, parameter in self.stage.named_parameters():
            parameter.grad = sums.get(name)
            if parameter.grad is not None and factor != 1.0:
                parameter.grad.mul_(factor)

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Let the block write into the stage's parameters, in copies: what is under way keeps the weights that it began
        with."""
        self.let_go()
        yield
        self.replaced()

    def let_go(self) -> None:
        """Replace the stage's parameters by a copy that a step or a merge may write into."""
        for parameter in self.stage.parameters():
            parameter.data = parameter.data.clone()

    def replaced(self) -> None:
        """Make the stage's parameters the next version, which nobody writes into before `let_go`."""
        self.version += 1
        self._weights[self.version] = {
            name: parameter.data.requires_grad_() for name, parameter in self.stage.named_parameters()
        }
        self._drop_versions()

    def _drop_versions(self) -> None:
        needed = {kept.version for kept in self._kept.values()} | {self.version}
        self._weights = {version: weights for version, weights in self._weights.items() if version in needed}

    # ------------------------------------------------------------- memory

    def release(self) -> None:
        """Free everything, the weights included; nothing can be computed afterwards."""
        self._kept.clear()
        self._sums.clear()
        self._weights.clear()
        for parameter in self.stage.parameters():
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)

    def _count_graph(self, size_bytes: int) -> None:
        self._graph_size_bytes = max(self._graph_size_bytes, size_bytes)

    def _keep_within_budget(self) -> None:
        with_graph = [kept for kept in self._kept.values() if kept.out is not None]
        while with_graph and len(with_graph) * self._graph_size_bytes > self.graph_bytes:
            with_graph.pop(0).out = None


class DeviceStageWork(StageWork):
    """Stage on a device, which a microbatch's gradient makes wait once, and not weight by weight.

    All of the gradient is computed before its norm is read and it is added, which takes memory for one more gradient.
    """

    def _summed(
        self, weights: Mapping[str, Tensor], sums: dict[str, Tensor], length: _Length | None
    ) -> AbstractContextManager[None]:
        return _summed_at_once(weights, sums, _accept if length is None else length.add_all)


def _accept(*gradient: object) -> None:
    """Accept a gradient whatever it is."""


class _Length:
    """Norm of a gradient that comes weight by weight, or all at once.

    Raises BadGradientError if it is not finite, or above `most`.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.names: set[str] = set()
        """Names of the weights whose gradients were accepted, one by one."""
        self.value = 0.0

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one weight's gradient."""
        self.value = math.hypot(self.value, float(torch.linalg.vector_norm(gradient)))
        self._check()
        self.names.add(name)

    def add_all(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of all weights: one number is read."""
        # Not torch's `get_total_norm`, which does the same: torch before 2.6 has none.
        self.value = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values())))))
        self._check()

    def _check(self) -> None:
        if not math.isfinite(self.value) or self.value > self.most:
            raise BadGradientError(f"a gradient of norm {self.value:.3g}; allowed: at most {self.most:.3g}")


def _backward(kept: _Kept, weights: Mapping[str, Tensor], sign: float = 1.0) -> None:
    """Add the gradient to the `.grad` of these weights, and to the input's if it has one; -1 as `sign` subtracts it.

    The graph is used up.
    """
    out, kept.out, out_gradient = kept.out, None, kept.out_gradient
    assert out is not None
    if kept.targets is not None:
        out = out * (sign * kept.scale)
    elif out_gradient is not None and sign * kept.scale != 1.0:
        out_gradient = sign * kept.scale * out_gradient
    kept.x.grad = None
    inputs = [*weights.values(), *([kept.x] if kept.x.requires_grad else [])]
    torch.autograd.backward(out, out_gradient, inputs=inputs)


@contextmanager
def _summed_one_by_one(
    weights: Mapping[str, Tensor], sums: dict[str, Tensor], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Collect in `sums` what is added to the weights' `.grad` while the block runs; `look` sees each gradient first.

    Each gradient is added as soon as it exists, while it is in the processor's cache, and its memory is reused for the
    next one. Adding all of them at the end took up to a quarter of the time.
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


@contextmanager
def _summed_at_once(
    weights: Mapping[str, Tensor], sums: dict[str, Tensor], look: Callable[[Mapping[str, Tensor]], None]
) -> Iterator[None]:
    """Add to `sums` what is in the weights' `.grad` at the block's end, after `look` has seen all of it."""
    try:
        yield
        found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        look(found)
        if before := found.keys() & sums.keys():
            torch._foreach_add_([sums[name] for name in before], [found[name] for name in before])
        sums.update((name, gradient) for name, gradient in found.items() if name not in before)
    finally:
        for weight in weights.values():
            weight.grad = None


class _Called(nn.Module):
    """Calls a stage's forward, or with targets its loss."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        return cast(Tensor, self.stage(x) if targets is None else cast(StageModule, self.stage).loss(x, targets))


def _named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"stage.{name}": weight for name, weight in weights.items()}


@contextmanager
def _counting(told: Callable[[int], None], but: set[int]) -> Iterator[None]:
    """Tell how many bytes the graph made by the block keeps, without storages at the addresses in `but`."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph, and so itself, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    told(sum(sizes.values()))
