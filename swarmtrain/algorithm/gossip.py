"""Gossip merge: a peer's own round and what it pulled from its partners become its next outer state.

theta is averaged with the partners' theta, with variance correction (arXiv 2404.04616); the pseudo-gradients are
averaged by tokens and taken as one Nesterov step, which is delayed Nesterov with one arrival for oneself and one for
each partner (see `DelayedNesterov`). Everything works on the flat fp32 vector of P numbers of `outer`.

The rule of this file: *what can be done before the round ends is done before*. `prepare` needs no gradient of this
peer, so it runs in the background while the trainer trains; `gossip_merge` is all the trainer waits for. Legend: N
vectors, T tensors of the model, B blocks of tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.outer import OuterConstants, OuterState, outer_step

_BLOCK = 1 << 15
"""Numbers of each vector that are processed at once: four vectors' in fp64 are 1 MiB, a second-level cache."""
_MERGED_AT_ONCE = 1 << 16
"""Numbers of each vector that the last part of a merge processes at once, so that all it touches stays in the cache."""
_ROUNDING = 2.0**-46
"""Square of fp32's resolution: a variance below this, relative to the inputs' mean square, is rounding."""


@dataclass(frozen=True)
class Layout:
    """Place of each tensor of the model in the flat vector, and which of them are variance-corrected."""

    slices: tuple[slice, ...]
    corrected: tuple[bool, ...]

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return self.slices[-1].stop if self.slices else 0


def layout_of(shapes: Sequence[tuple[int, ...]]) -> Layout:
    """Return the layout of tensors of these shapes, as `flatten` puts them; two or more dimensions are corrected."""
    ends = list(itertools.accumulate((math.prod(shape) for shape in shapes), initial=0))
    return Layout(
        slices=tuple(slice(start, end) for start, end in itertools.pairwise(ends)),
        corrected=tuple(len(shape) >= 2 for shape in shapes),
    )


@dataclass(frozen=True, kw_only=True)
class CorrectedMean:
    """Variance-corrected mean (P,) fp32, and statistics of its inputs."""

    mean: Tensor
    factor: float
    """Largest ratio by which a tensor's deviations were stretched; 1 when none was."""
    spread: float
    """sqrt(sum_i w_i |x_i - x|^2 / sum_i w_i |x_i|^2), x the plain mean: 0 for equal vectors, at most 1."""
    displacement: float
    """Largest |x_i - x_0| / |x_0|: how far the others are from the first. Infinite if only the first is zero."""


def _weighted(
    vectors: Sequence[Tensor], layout: Layout, weights: Sequence[float] | None
) -> tuple[list[Tensor], list[float]]:
    """Return the vectors that have a weight, and their weights with sum 1."""
    weights = [1.0] * len(vectors) if weights is None else weights
    if not vectors or len(vectors) != len(weights):
        raise ValueError(f"as many weights as vectors, at least one: got {len(weights)} and {len(vectors)}")
    if any(vector.shape != (layout.size,) for vector in vectors):
        raise ValueError(f"vectors of {layout.size} numbers are needed, got {[tuple(v.shape) for v in vectors]}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights must be finite and not negative, got {list(weights)}")
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("all weights are zero")
    kept = [(vector, weight / total) for vector, weight in zip(vectors, weights, strict=True) if weight]
    return [vector for vector, _ in kept], [weight for _, weight in kept]


@dataclass(frozen=True)
class _Moments:
    """First and second moments of x_0, x_1 - x_0, ..., x_N-1 - x_0 in each tensor, fp64: equal inputs give zeros."""

    counts: Tensor  # (T,)
    means: Tensor  # (T, N)
    covariances: Tensor  # (T, N, N), population


def _mean_and_moments(vectors: Sequence[Tensor], combination: Tensor, layout: Layout, mean: Tensor) -> _Moments:
    """Write x_0 + sum_i w_i (x_i - x_0) into `mean` (P,), rounded once, and return the moments.

    Each block is centred before it is squared, and the blocks of a tensor are put together by their means (Chan):
    a large common offset costs no digits.
    """
    blocks = [
        (tensor, min(_BLOCK, place.stop - start))
        for tensor, place in enumerate(layout.slices)
        for start in range(place.start, place.stop, _BLOCK)
    ]
    sizes = [size for _, size in blocks]
    N, device = len(vectors), mean.device
    room = torch.empty(N * max(sizes, default=0), dtype=torch.float64, device=device)
    means = torch.empty(len(blocks), N, dtype=torch.float64, device=device)
    squares = torch.empty(len(blocks), N, N, dtype=torch.float64, device=device)
    inputs_of = (torch.split(vector, sizes) for vector in vectors)
    pieces = zip(torch.split(mean, sizes), means, squares, *inputs_of, strict=True)
    for mean_piece, block_means, block_squares, *inputs in pieces:
        x = room[: N * len(mean_piece)].view(N, -1)
        for row, piece in zip(x, inputs, strict=True):
            row.copy_(piece)
        x[1:].sub_(x[0])
        mean_piece.copy_(combination @ x)
        torch.mean(x, 1, out=block_means)
        x.sub_(block_means.unsqueeze(1))
        torch.mm(x, x.T, out=block_squares)
    return _merged(means, squares, blocks, len(layout.slices))


def _merged(means: Tensor, squares: Tensor, blocks: list[tuple[int, int]], num_tensors: int) -> _Moments:
    """Return the moments of whole tensors from their blocks' means (B, N) and centred sums of products (B, N, N)."""
    which = torch.tensor([tensor for tensor, _ in blocks], dtype=torch.int64, device=means.device)
    sizes = torch.tensor([float(size) for _, size in blocks], dtype=torch.float64, device=means.device)

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(num_tensors, *values.shape[1:]).index_add_(0, which, values)

    counts = summed(sizes)
    divisors = counts.clamp(min=1)  # a tensor without numbers
    tensor_means = summed(means * sizes[:, None]) / divisors[:, None]
    off = means - tensor_means[which]
    squares = squares + sizes[:, None, None] * off[:, :, None] * off[:, None, :]
    return _Moments(counts, tensor_means, summed(squares) / divisors[:, None, None])


def _mean_square(products: Tensor, combination: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean square of the mean, excess of the inputs' average over it), from products (..., N, N) of x_0, x_1 -
    x_0, ...

    sum_i w_i x_i^2 = x^2 + sum_i w_i (x_i - x)^2, so the excess is never negative; it is exactly zero for equal inputs.
    """
    shares = combination[1:]
    of_mean = (products @ combination) @ combination
    apart = products[..., 1:, 1:]
    excess = apart.diagonal(dim1=-2, dim2=-1) @ shares - (apart @ shares) @ shares
    return of_mean.clamp(min=0), excess.clamp(min=0)


@torch.no_grad()
def variance_corrected_mean(
    vectors: Sequence[Tensor], layout: Layout, weights: Sequence[float] | None = None, out: Tensor | None = None
) -> CorrectedMean:
    """Return the mean of vectors (P,) fp32, with each tensor's variance as the inputs' on average (arXiv 2404.04616).

    In each tensor of two or more dimensions w <- (w - mean(w)) sqrt(v* / Var(w)) + mean(w), w the mean and v* the mean
    of the inputs' variances, all population variances in fp64. The ratio is 1 where Var(w) is zero or no more than
    fp32's rounding, and exactly 1 for equal inputs, which come back as they are. Never NaN for finite inputs. The
    statistics are those of the mean before it is rounded, so there is no bias to grow over the rounds. Vectors of
    weight zero are left out. The result is new, or `out`, which may be one of the vectors. Raises ValueError when
    shapes or weights make no sense.
    """
    vectors, shares = _weighted(vectors, layout, weights)
    mean = memory.empty_like(vectors[0]) if out is None else out
    combination = torch.tensor([1.0, *shares[1:]], dtype=torch.float64, device=mean.device)
    moments = _mean_and_moments(vectors, combination, layout, mean)
    products = moments.covariances + moments.means[:, :, None] * moments.means[:, None, :]
    both = torch.stack([moments.covariances, products])
    (variance, square), (lost, between) = _mean_square(both, combination)
    varies = (variance > _ROUNDING * (square + between)) & torch.tensor(layout.corrected, device=mean.device)
    ratios = torch.where(varies, (1 + lost / variance).sqrt(), 1).tolist()
    centres = (moments.means @ combination).tolist()
    for place, ratio, centre in zip(layout.slices, ratios, centres, strict=True):
        if ratio != 1:
            mean[place].sub_(centre).mul_(ratio).add_(centre)
    all_square, all_between = float(moments.counts @ square), float(moments.counts @ between)
    distances = (moments.counts @ products.diagonal(dim1=1, dim2=2)).tolist()
    farthest = max(distances[1:], default=0.0)
    return CorrectedMean(
        mean=mean,
        factor=max(ratios, default=1.0),
        spread=math.sqrt(all_between / (all_square + all_between)) if all_between else 0.0,
        displacement=math.sqrt(farthest / distances[0]) if distances[0] else math.inf if farthest else 0.0,
    )


@dataclass(frozen=True)
class PartnerUpdate:
    """Values pulled from a partner: its theta (P,) at its round's start, its g (P,) so far and the tokens of g.

    Either may be missing: theta (or other values that are averaged) without tokens, or g without theta. If an earlier
    part of the same round was merged, g and tokens are the differences since then; theta is whole.
    """

    theta: Tensor | None
    gradient: Tensor
    """Ignored without tokens."""
    tokens: float
    ahead_rounds: float = 0.0
    """Delay of the start of theta's round after this peer's own, in rounds, from 0 to 1."""
    lengthened: float | None = 1.0
    """Factor by which its author's gradient was multiplied; None if it was changed otherwise."""


@dataclass(kw_only=True)
class PreparedMerge:
    """Merge prepared as far as possible without this peer's own gradient; good for one merge."""

    theta_mean: Tensor
    """(P,) fp32, variance-corrected, of this peer's theta at the round's start and its partners', as of that moment."""
    gradient_sum: Tensor
    """sum_j tokens_j g_j over the partners, (P,) fp32."""
    tokens: float
    """sum_j tokens_j over the partners."""
    num_arrivals: int
    """Number of updates, each with a theta, a gradient or both."""
    variance_factor: float
    """See `CorrectedMean.factor`."""
    consensus_spread: float | None
    """See `CorrectedMean.spread`, own theta included: 0 when all agree, at most 1. None when no theta came."""
    displacement: float | None
    """Largest |theta_j - theta| / |theta|, theta this peer's own. None when no theta came."""
    spent: bool = False
    """True once it has been merged: its vectors then belong to the new state."""


@torch.no_grad()
def prepare(
    state: OuterState,
    arrivals: Iterable[PartnerUpdate],
    layout: Layout,
    learning_rate: float,
    *,
    may_write: bool = False,
) -> PreparedMerge:
    """Average theta (P,), this peer's at its round's start, with the partners', and add up their gradients.

    Each theta weighs the same, and each g as many as its tokens, whether they come from the same partners or not. A
    theta that is ahead already contains part of the outer step that this peer is about to take. That part of a step,
    one as `state` would take by its momentum with `learning_rate`, is taken back (decision 41). Without arrivals the
    mean is theta itself, not a copy. If arrivals are made lazily, each gradient is released before the next is made.
    Nothing that is passed in is written into, except the arrivals with `may_write`. Raises ValueError when shapes
    differ, tokens are negative or not finite, or `ahead_rounds` is outside [0, 1].
    """
    theta, tokens, ahead_rounds, thetas = state.theta, list[float](), list[float](), list[Tensor]()
    gradient_sum: Tensor | None = None
    for arrival in arrivals:
        if arrival.gradient.shape != theta.shape:
            raise ValueError(f"gradients of {theta.numel()} numbers are needed")
        if not (math.isfinite(arrival.tokens) and arrival.tokens >= 0):
            raise ValueError(f"tokens must be finite and not negative, got {arrival.tokens}")
        if not 0 <= arrival.ahead_rounds <= 1:
            raise ValueError(f"from 0 to 1 rounds ahead, got {arrival.ahead_rounds}")
        if arrival.tokens and gradient_sum is None and may_write:
            gradient_sum = arrival.gradient.mul_(arrival.tokens)
        elif arrival.tokens:
            gradient_sum = memory.zeros_like(theta) if gradient_sum is None else gradient_sum
            gradient_sum.add_(arrival.gradient, alpha=arrival.tokens)
        if arrival.theta is not None:
            thetas.append(arrival.theta)
            ahead_rounds.append(arrival.ahead_rounds)
        tokens.append(arrival.tokens)
        del arrival  # or its vectors would be held while the next one is made
    found = None
    if thetas:
        found = variance_corrected_mean([theta, *thetas], layout, out=thetas[0] if may_write else None)
        mean = found.mean
    else:
        mean = memory.empty_like(theta).copy_(theta) if tokens else theta
    if ahead := math.fsum(ahead_rounds):
        mean.add_(state.momentum, alpha=learning_rate * ahead / (1 + len(thetas)))
    return PreparedMerge(
        theta_mean=mean,
        gradient_sum=memory.zeros_like(theta) if gradient_sum is None else gradient_sum,
        tokens=math.fsum(tokens),
        num_arrivals=len(tokens),
        variance_factor=1.0 if found is None else found.factor,
        consensus_spread=None if found is None else found.spread,
        displacement=None if found is None else found.displacement,
    )


@torch.no_grad()
def gossip_merge(
    state: OuterState, prepared: PreparedMerge, gradient: Tensor, tokens: float, constants: OuterConstants
) -> OuterState:
    """Take the outer step at a round's end; `gradient` (P,) is this peer's own g of the round, `tokens` what it trained
    on.

    G = token-weighted mean of own and partners' g;  m <- beta m + G;  theta <- theta_mean - eps (G + beta m). Without
    partners this is `outer_step`, to the bit. The trainer waits meanwhile, and fresh memory costs more than the
    arithmetic; so the new state's tensors are those of `prepared`, which is spent by it (never the old state's). If
    nobody has tokens, as of a fragment that nobody trained, `state` itself is returned. Raises ValueError, changing
    nothing, when `prepared` is spent, shapes differ, or tokens are negative or not finite.
    """
    if prepared.spent:
        raise ValueError("this was merged before: prepare the next merge anew")
    if not gradient.shape == state.momentum.shape == prepared.theta_mean.shape:
        raise ValueError(f"a gradient of {state.momentum.numel()} numbers is needed, got {tuple(gradient.shape)}")
    if not (math.isfinite(tokens) and tokens >= 0):
        raise ValueError(f"tokens must be finite and not negative, got {tokens}")
    total = prepared.tokens + tokens
    prepared.spent = True
    if total == 0:
        return state
    if not prepared.num_arrivals:
        return outer_step(OuterState(prepared.theta_mean, state.momentum), gradient, constants)
    momentum, theta = prepared.gradient_sum, prepared.theta_mean
    vectors = (momentum, theta, gradient, state.momentum)
    for m, w, own, before in zip(*(torch.split(vector, _MERGED_AT_ONCE) for vector in vectors), strict=True):
        m.add_(own, alpha=tokens).mul_(1 / total)  # G
        w.add_(m, alpha=-constants.learning_rate)
        m.add_(before, alpha=constants.momentum)
        w.add_(m, alpha=-constants.learning_rate * constants.momentum)
    return OuterState(theta=theta, momentum=momentum)
