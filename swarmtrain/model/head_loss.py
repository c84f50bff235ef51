"""Loss of a model's head, without all logits at once.

The logits of a microbatch are its largest tensor: 4 N V bytes, three times (logits, probabilities, gradient). Above a
size (`loss_chunks.py`) they are computed chunk by chunk, and so are the gradients by input and head, in the forward
pass, while a chunk's probabilities are at hand. So nothing is computed twice, and the backward pass only scales. This
is what Liger Kernel's fused linear cross-entropy does (Hsu et al. 2024, arXiv 2410.10989), in plain torch.

Tokens that are no targets have no logits at all (`only_targets`).

Shapes: B batch, T time (tokens), N targets, at most B T, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swarmtrain.algorithm.batch import IGNORED
from swarmtrain.model.loss_chunks import CARD_BYTES, LOW_PRECISION_BYTES, SMALL_BYTES, chunk_tokens


def only_targets(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (N, D) and targets (N,) of those that are not `IGNORED` among x (B, T, D) and targets (B, T).

    N is read from the device.
    """
    places = (targets != IGNORED).flatten().nonzero().squeeze(1)
    return x.flatten(0, 1).index_select(0, places), targets.flatten().index_select(0, places)


def mean_loss(head: nn.Linear, x: Tensor, targets: Tensor, *, is_memory_short: bool = False) -> Tensor:
    """Return mean nats per target, a scalar, of predicting targets (B, T) or (N,), int64, by `head`, which has no bias,
    from x (B, T, D) or (N, D); 0 if there is none.

    With few logits it is `F.cross_entropy` of them all. With many it equals that within rounding, and its backward pass
    can be taken only once.
    """
    size = _chunk_tokens(head, targets, is_memory_short)
    if size >= targets.numel():
        # The mean of nothing is not a number, its sum is 0.
        reduction = "mean" if targets.numel() else "sum"
        return F.cross_entropy(head(x).flatten(0, -2).float(), targets.flatten(), reduction=reduction)
    if not torch.is_grad_enabled():
        return sum_of_losses(head, x, targets) / targets.numel()
    return cast(Tensor, _ChunkedLoss.apply(x.flatten(0, -2), head.weight, targets.flatten(), size))  # type: ignore[no-untyped-call]


@torch.no_grad()
def sum_of_losses(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of nats, a scalar without a gradient, of predicting targets (B, T) or (N,), int64, from x
    (B, T, D) or (N, D)."""
    size = _chunk_tokens(head, targets, is_memory_short=False)
    sums = [
        F.cross_entropy(head(part).float(), wanted, reduction="sum")
        for part, wanted in _chunks(x.flatten(0, -2), targets.flatten(), size)
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _chunk_tokens(head: nn.Linear, targets: Tensor, is_memory_short: bool) -> int:
    """Return how many tokens have logits at once."""
    weight = head.weight
    if is_memory_short or (weight.device.type == "cpu" and product_type(weight) == torch.float32):
        most_bytes = SMALL_BYTES
    else:
        most_bytes = LOW_PRECISION_BYTES if weight.device.type == "cpu" else CARD_BYTES
    return chunk_tokens(targets.numel(), head.out_features, most_bytes)


def _chunks(x: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x, size), torch.split(targets, size), strict=True)


class _ChunkedLoss(torch.autograd.Function):
    """Mean nats per token of targets (N,) by x (N, D) and a head's weight (V, D), in chunks of C tokens.

    Products are computed in autocast's type. The gradient by the logits is p - 1 at the target and p elsewhere, before
    it is divided by N: those numbers fit fp16, and the scale of its loss comes in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
        dtype = product_type(weight)
        # Not by autocast, which would keep this copy, made without a gradient, for others.
        low = weight.to(dtype)
        losses = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        x_gradient = torch.empty_like(x)
        # A head that is frozen, beside an adapter, has none.
        shape = weight.shape if ctx.needs_input_grad[1] else (0,)
        weight_gradient = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        begin = 0
        for part, wanted in _chunks(x.to(dtype), targets[:, None], size):
            end = begin + len(part)
            logits = part @ low.t()  # (C, V)
            largest, where = logits.max(1, keepdim=True)  # (C, 1)
            chances = torch.softmax(logits, 1, dtype=torch.float32)  # (C, V)
            # log(sum(exp)), by the likeliest token, whose chance is never too small for a logarithm
            log_sum = largest.float() - chances.gather(1, where).log()
            losses[begin:end] = (log_sum - logits.gather(1, wanted).float()).squeeze(1)
            del logits
            chances.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))
            errors = chances.to(dtype)
            x_gradient[begin:end] = errors @ low
            if not len(weight_gradient):
                pass
            elif dtype == torch.float32:
                weight_gradient.addmm_(errors.t(), part)
            else:
                weight_gradient.add_(errors.t() @ part)
            del chances, errors
            begin = end
        ctx.save_for_backward(x_gradient, weight_gradient)
        ctx.weight_type = weight.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_gradient, weight_gradient = ctx.saved_tensors
        factor = loss_gradient / len(x_gradient)
        of_weight = weight_gradient.mul_(factor).to(ctx.weight_type) if ctx.needs_input_grad[1] else None
        return x_gradient.mul_(factor), of_weight, None, None


def product_type(weight: Tensor) -> torch.dtype:
    """Return the type in which a product with `weight` is computed here."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
