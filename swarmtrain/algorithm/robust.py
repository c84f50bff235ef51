"""Bounds on what one bad peer can do to a merge: clips by running medians, and two means that outvote outliers.

`GradientClip` and `DisplacementClip` bound by what was usual so far how far a partner can move the merge; they are
`merge.robust = "clip"`. A clip cannot see a sign: a peer that sends -g at the usual size passes both, and costs what a
wrong vote costs. `DirectionTrust` sees it, and is `merge.robust = "direction"` together with both clips. `trimmed_mean`
and `flag_mean` replace the mean of four or more gradients.

Everything works on flat fp32 vectors (P,), norms in fp64, so that no finite vector overflows or vanishes. Vectors that
are not finite are refused with ValueError before anything is remembered. All rules are deterministic; nothing is
written into an argument, and what needs no change is returned as it is.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Group = tuple[tuple[int, int], ...]  # (start, end) slices of the flat vector that are clipped as one

_TOLERANCE = 3.0  # times the running median
_HISTORY = 64  # values remembered; half of them must change before the median follows
_MIN_HISTORY = 3  # nothing is clipped before: a median of three outvotes one value, two values none
_OWN_HISTORY = 40  # publications: two long rounds, five short ones
_MIN_VECTORS = 4  # for trimmed_mean and flag_mean: of three, trimming leaves one
_CHUNK = 1 << 16  # numbers worked on at once: fp64 copies stay small and in the processor's cache
_LEAST_COSINE = 0.05
"""Usual cosine below which directions are mostly noise and are not judged."""
_FLAG_ITERATIONS = 10
_FLAG_EPSILON = 1e-7
_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue; below, a direction is rounding
_NOT_FINITE = "a vector that is not finite: leave its peer out"
_CANCELLED = 1e-6  # of K: a sum of unit vectors this short has no direction but fp32's rounding


@dataclass(frozen=True)
class ClipIncident:
    """Report that a rule cut what a peer sent, and by how much, in words; the caller adds which peer."""

    rule: str
    detail: str


@dataclass(frozen=True)
class Clipped:
    """Vector that may enter the merge; the argument itself if nothing was cut."""

    vector: Tensor
    factors: tuple[float, ...]  # what each group was multiplied by, 1.0 where it was not cut
    incident: ClipIncident | None  # None: nothing was cut


@dataclass(frozen=True)
class Norms:
    """Norms of a gradient (P,) that is finite."""

    whole: float
    groups: tuple[float, ...]  # of each group


def per_tensor(sizes: Sequence[int]) -> tuple[Group, ...]:
    """Return one group for each tensor, for tensors of these sizes one after the other; an empty tensor has none."""
    groups, start = [], 0
    for size in sizes:
        if size > 0:
            groups.append(((start, start + size),))
        start += size
    return tuple(groups)


class GradientClip:
    """Cuts a pseudo-gradient's norm, group by group, to 3 times what the running median predicts.

    Peers take different numbers of steps, so a remembered norm n of h steps is scaled to the h' steps of the gradient
    at hand: n max(h'/h, sqrt(h'/h)). A sum of h updates grows between sqrt(h) (they are noise) and h (they agree), and
    the larger bound is taken both ways. With equal steps that is the norm per step, which alone would cut honest peers:
    in a small GPT the norm per step after 6 steps was 2.3 to 3.2 times that after 100 (median tensor), while none
    exceeded 1.2 times the prediction (docs/decisions/0015). Claiming few steps gains nothing: the fewer, the lower the
    limit. Steps are counted by their tokens, a unit of work that all peers count alike.

    What is remembered is what was let in: a cut norm at the size it was cut to. So when all gradients grow, the median
    follows, and a minority cannot move it. Call `learn` with the own gradient at every publication: own values then are
    most of the history, and even the first partners meet a limit. Norms of zero (a tensor that nobody moves) say
    nothing and do not count.
    """

    def __init__(self, groups: Sequence[Group], history: Sequence[Sequence[float]] = ()) -> None:
        """`history` is an earlier value of the property, from a checkpoint. ValueError if it does not fit the
        groups."""
        self._groups = tuple(groups)
        slices = sorted(piece for group in self._groups for piece in group)
        ends = [0, *(end for _, end in slices)]
        if not all(before <= start < end for before, (start, end) in zip(ends, slices, strict=False)):
            raise ValueError("groups must be made of slices (start, end) that are not empty and do not overlap")
        self._size = ends[-1]
        for row in history:
            if len(row) != 1 + len(self._groups) or not all(math.isfinite(x) and x >= 0 for x in row) or not row[0]:
                raise ValueError(f"a row of tokens and {len(self._groups)} norms is needed: start without a history")
        self._rows = deque((list(row) for row in history), maxlen=_HISTORY)
        self._own = deque[list[float]](maxlen=_MIN_HISTORY)

    @property
    def history(self) -> list[list[float]]:
        """Rows for a checkpoint: at most 64 of tokens and each group's norm, oldest first."""
        return [list(row) for row in tuple(self._rows)]

    @torch.no_grad()
    def norms(self, gradient: Tensor) -> Norms:
        """Return the norms of a gradient (P,), which all rules can learn from without reading it again."""
        return Norms(groups=tuple(self._norms(gradient)), whole=_norm(gradient))

    @torch.no_grad()
    def learn(self, gradient: Tensor, tokens: float, norms: Norms | None = None) -> None:
        """Remember this peer's own gradient (P,) of that many tokens, which is never cut; `norms` if they are known."""
        row = [_positive(tokens), *(self._norms(gradient) if norms is None else norms.groups)]
        self._rows.append(row)
        self._own.append(row)

    @torch.no_grad()
    def clip(self, gradient: Tensor, tokens: float) -> Clipped:
        """Return a partner's gradient (P,) of that many tokens, cut where a group's norm exceeds its limit."""
        _positive(tokens)
        norms = self._norms(gradient)
        limits = self._limits(tokens)
        self._rows.append([tokens, *map(min, norms, limits)])
        factors = tuple(limit / norm if norm > limit else 1.0 for norm, limit in zip(norms, limits, strict=True))
        cut = [index for index, factor in enumerate(factors) if factor < 1]
        if not cut:
            return Clipped(gradient, factors, None)
        vector = gradient.clone()
        for index in cut:
            for start, end in self._groups[index]:
                for piece in torch.split(vector[start:end], _CHUNK):
                    piece.copy_(piece.double() * factors[index])  # in fp64: a factor may be too small for fp32
        worst = min(cut, key=factors.__getitem__)
        detail = (
            f"gradient cut in {len(cut)} of {len(factors)} groups; group {worst} most, its norm {norms[worst]:.3g} "
            f"in {tokens:g} tokens to {limits[worst]:.3g}"
        )
        return Clipped(vector, factors, ClipIncident("gradient", detail))

    def _norms(self, gradient: Tensor) -> list[float]:
        _check_form([gradient], at_least=1)
        if len(gradient) < self._size:
            raise ValueError(f"a vector of at least {self._size} numbers is needed, got {len(gradient)}")
        squares = [sum(_square(gradient[a:b]) for a, b in group) for group in self._groups]
        if self._covers(len(gradient)):
            _check_sums(squares)
        else:
            _check_finite([gradient])
        return [math.sqrt(square) for square in squares]

    def _covers(self, size: int) -> bool:
        """Return whether each number of a vector of this size is in a group."""
        return sum(end - start for group in self._groups for start, end in group) == size

    def _limits(self, tokens: float) -> list[float]:
        """Return each group's largest norm after that many tokens; infinite where too little is known.

        Before there is history, the largest norm that an own gradient predicts takes the median's place.
        """
        limits = []
        for index in range(1, 1 + len(self._groups)):
            expected = _expected(self._rows, index, tokens)
            limit = _limit(expected)
            if math.isinf(limit) and (own := _expected(self._own, index, tokens)):
                limit = _TOLERANCE * max(own)
            limits.append(limit)
        return limits


class DisplacementClip:
    """Limits how far a partner's weights pull: theta_j <- theta_i + clip(theta_j - theta_i, tau).

    tau is 2^k times 3 times the running median of the displacements let through whole, or the largest of the own last
    pseudo-gradients (`learn`) if that is more. The own ones say how far a round carries anybody: from a cold start
    displacements grow for some rounds, and all but the first would be clipped; no partner can move them. k rises by one
    with each clip, so that the other side of a healed partition comes back within a few merges, however far it went. It
    falls by one with each displacement let through, though not below what that one needed: one bad peer among several
    good ones gains a doubling now and then, no more.

    While `enabled` is False nothing is cut or remembered: with own initial weights, distances mean nothing until the
    peers have met.
    """

    def __init__(self, *, enabled: bool = True, history: Sequence[float] = ()) -> None:
        """`history` is an earlier value of the property, from a checkpoint. ValueError if it is none."""
        self.enabled = enabled
        doublings, *norms = history if history else (0.0,)
        if not all(math.isfinite(x) and x >= 0 for x in history) or doublings not in range(512):
            raise ValueError("doublings and norms, finite and not negative, are needed: start without a history")
        self._doublings = int(doublings)
        self._norms = deque(norms, maxlen=_HISTORY)
        self._own = deque[float](maxlen=_OWN_HISTORY)

    @property
    def history(self) -> list[float]:
        """Numbers for a checkpoint: k, then at most 64 norms, oldest first."""
        return [float(self._doublings), *tuple(self._norms)]

    @torch.no_grad()
    def learn(self, gradient: Tensor, norms: Norms | None = None) -> None:
        """Remember how far this peer's own pseudo-gradient (P,) goes; `norms` if they are known."""
        self._own.append(_norm(gradient) if norms is None else norms.whole)

    @torch.no_grad()
    def clip(self, own: Tensor, theirs: Tensor) -> Clipped:
        """Return a partner's weights (P,), or the point at distance tau from the own ones (P,) on the way to them."""
        _check_form([own, theirs], at_least=2)
        if not self.enabled:
            _check_finite([own, theirs])
            return Clipped(theirs, (1.0,), None)
        square = _square(theirs, own)
        _check_sums([square])
        norm = math.sqrt(square)
        plain = self._plain_limit()
        limit = math.ldexp(plain, self._doublings) if math.isfinite(plain) else plain
        if norm <= limit:
            needed = max(0, math.ceil(math.log2(norm / plain))) if norm > plain else 0
            self._doublings = max(self._doublings - 1, needed, 0)
            if norm > 0:  # the very same weights say nothing about what is usual
                self._norms.append(norm)
            return Clipped(theirs, (1.0,), None)
        self._doublings += 1
        factor = limit / norm
        vector = torch.empty_like(theirs)
        for a, b, place in zip(*_chunks(own, theirs, vector), strict=True):
            place.copy_(a.double() + (b.double() - a.double()) * factor)
        detail = f"weights {norm:.3g} away from the own ones, drawn in to {limit:.3g}"
        return Clipped(vector, (factor,), ClipIncident("displacement", detail))

    def _plain_limit(self) -> float:
        own = _TOLERANCE * max(self._own, default=0.0)
        if len(self._norms) < _MIN_HISTORY:
            return own or math.inf
        return max(own, _limit(self._norms))


@dataclass(frozen=True)
class Trusted:
    """Trust in a partner's gradient: it counts `factor` times as long, with `weight` times its tokens.

    `refusal`: it must not be taken. `incident`: it may be taken, but is to be reported.
    """

    factor: float = 1.0
    weight: float = 1.0
    incident: ClipIncident | None = None
    refusal: ClipIncident | None = None


class DirectionTrust:
    """Trusts a gradient as far as it points in the direction of the own one: after FLTrust (arXiv 2012.13995).

    There a server with some data of its own weights a gradient by ReLU(cos(g_j, g_0)) and gives it the length of g_0.
    Here the root of trust is a peer's own last gradient, and two things differ. Cosines are compared with what is
    usual, the median of every peer's last one and of the own with itself: taken as they are, the own gradient would
    count several times as much as each other one, and averaging would gain nothing. From half the usual on a gradient
    counts whole, below that in proportion, at zero not at all; below minus half the usual, where a flipped sign puts
    it, it is refused. And a length is only raised, to the least that the own one predicts for as many steps, so that
    nobody dilutes the mean with steps that it did not take; too long gradients are left to `GradientClip`.

    Each peer has one vote, however often it comes, so that a minority cannot move the median. Where the usual is below
    0.05 the own gradient is no guide, and everything counts as it is: of gradients that are mostly noise half point the
    other way. The very first gradient enters, whatever it is. A peer whose data differ from most others' may be refused
    for that: near the end what helps it harms the others.
    """

    def __init__(self) -> None:
        self._own: Tensor | None = None
        self._own_norm = self._own_tokens = 0.0
        self._cosines: dict[str, float] = {}

    def learn(self, gradient: Tensor, tokens: float, norms: Norms | None = None) -> None:
        """Compare with this own gradient (P,) of that many tokens from now on; nobody writes into it any more.

        `norms` if they are known.
        """
        norm = _norm(gradient) if norms is None else norms.whole
        self._own, self._own_norm, self._own_tokens = gradient, norm, _positive(tokens)

    def forget(self) -> None:
        """Compare with nothing until the next own gradient: the last one is of long ago."""
        self._own, self._own_norm, self._own_tokens = None, 0.0, 0.0

    @torch.no_grad()
    def judge(self, peer: str, gradient: Tensor, tokens: float) -> Trusted:
        """Return how far to trust the gradient (P,) of `peer`, of that many tokens."""
        own, ratio = self._own, _positive(tokens) / (self._own_tokens or tokens)
        if own is None:
            return Trusted()
        _check_form([own, gradient], at_least=2)
        square = product = 0.0
        for a, b in zip(*_chunks(own, gradient), strict=True):
            wide = b.double()
            square += float(wide @ wide)
            product += float(a.double() @ wide)
        _check_sums([square])  # the own one was checked when it was learnt
        norm = math.sqrt(square)
        if norm == 0 or self._own_norm == 0:
            return Trusted()
        cosine = product / (norm * self._own_norm)
        usual = self._usual_with(peer, cosine)
        if usual < _LEAST_COSINE:
            return Trusted()
        if cosine < -usual / 2:
            detail = f"a gradient against the own one: cosine {cosine:.3f}, usual are {usual:.3f}"
            return Trusted(refusal=ClipIncident("direction", detail))
        least = self._own_norm * min(ratio, math.sqrt(ratio))
        factor = max(1.0, least / norm)
        incident = None
        if factor > _TOLERANCE:
            incident = ClipIncident(
                "length", f"gradient of norm {norm:.3g} lengthened to {least:.3g}, usual for its tokens"
            )
        return Trusted(factor, min(1.0, max(0.0, 2 * cosine / usual)), incident)

    def _usual_with(self, peer: str, cosine: float) -> float:
        self._cosines.pop(peer, None)  # the last one heard of stands last
        self._cosines[peer] = cosine
        while len(self._cosines) > _HISTORY:
            del self._cosines[next(iter(self._cosines))]
        return statistics.median_low([1.0, *self._cosines.values()])


@torch.no_grad()
def trimmed_mean(vectors: Sequence[Tensor], factors: Sequence[float] | None = None) -> Tensor:
    """Return each coordinate's mean without its largest and smallest value, of four or more vectors (P,) times their
    factors.

    The own vector is among them. This bounds one bad vector, however bad, and no more: of K, two that agree get one
    through. The order of the vectors does not matter, to the bit. It is not weighted: tokens are a claim, and a trimmed
    value would take its weight along.
    """
    _check(vectors, at_least=_MIN_VECTORS)
    factors = [1.0] * len(vectors) if factors is None else factors
    mean = torch.empty_like(vectors[0])
    for place, *unscaled in zip(*_chunks(mean, *vectors), strict=True):
        pieces = [piece * factor for piece, factor in zip(unscaled, factors, strict=True)]
        for end in range(len(pieces) - 1, 0, -1):  # sorted by exchanges: many times faster than torch's sort here
            for i in range(end):
                low, high = torch.minimum(pieces[i], pieces[i + 1]), torch.maximum(pieces[i], pieces[i + 1])
                pieces[i], pieces[i + 1] = low, high
        total = pieces[1].double()
        for piece in pieces[2:-1]:
            total += piece
        place.copy_(total / (len(pieces) - 2))
    return mean


@torch.no_grad()
def flag_mean(vectors: Sequence[Tensor], factors: Sequence[float] | None = None, *, rank: int | None = None) -> Tensor:
    """Return the Flag aggregate (arXiv 2302.05865) of four or more vectors g_i (P,), own included, each times its
    factor.

    x_i = g_i / |g_i|; Y: the r leading left singular vectors of [w_i x_i], w_i = (|1 - |Y'x_i|^2| + 1e-7)^(-1/4), ten
    times over from w = 1; r is ceil((K + 1) / 2) unless given. The paper's result, (1 / r) sum Y Y'x_i, has lost the
    magnitude; only its direction d is used, times the median of g_i'd, how far the g_i go that way. For the plain
    mean's direction the *mean* of g_i'd is the plain mean's length, and the median is that without outliers. (The
    median of |g_i| would count noise as progress: K orthogonal gradients cancel to 1 / sqrt(K).) It is at most the
    median of |g_i|, and zero where most disagree with d.

    Y is never computed: it lies in the span of the g_i, so their (K, K) Gram matrix is enough, and the result is a
    combination of the g_i. A g_i of zero has no direction, and counts only in the median. The order of the vectors
    matters by rounding only, unless two directions are equally strong at rank r. The directions Y cannot tell x from
    -x: a flipped sign is outvoted in the sum and in the median, not removed.
    """
    _check(vectors, at_least=_MIN_VECTORS)
    if rank is not None and not 1 <= rank <= len(vectors):
        raise ValueError(f"the rank must lie in 1 .. {len(vectors)}, got {rank}")
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)  # g_i'g_j
    for columns in zip(*_chunks(*vectors), strict=True):
        wide = torch.stack(columns).double()
        products += wide @ wide.T
    scale = torch.tensor([1.0] * len(vectors) if factors is None else list(factors), dtype=torch.float64)
    shares = scale * _flag_shares(scale[:, None] * products * scale, rank or len(vectors) // 2 + 1)
    result = torch.empty_like(vectors[0])
    for place, *pieces in zip(*_chunks(result, *vectors), strict=True):
        place.copy_(shares @ torch.stack(pieces).double())
    return result


def _flag_shares(products: Tensor, rank: int) -> Tensor:
    """Return c (K,) such that sum_i c_i g_i is the Flag mean, from the products g_i'g_j (K, K).

    With unit vectors X, weights W on a diagonal and X W = Y S V': W X'X W = V S^2 V' gives V and S, and Y = X W V / S.
    """
    norms = products.diagonal().sqrt()
    present = norms > 0
    shares = torch.zeros_like(norms)
    if not present.any():
        return shares
    lengths = norms[present]
    gram = products[present][:, present] / (lengths[:, None] * lengths)
    weights = torch.ones_like(lengths)
    for _ in range(_FLAG_ITERATIONS):
        squares, basis = torch.linalg.eigh(weights[:, None] * gram * weights)  # ascending
        kept = squares > squares[-1] * _RANK_TOLERANCE
        kept[: max(0, len(gram) - rank)] = False
        basis = weights[:, None] * basis[:, kept] / squares[kept].sqrt()  # Y = X basis
        seen = basis.T @ gram  # Y'X
        weights = ((1 - seen.square().sum(dim=0)).abs() + _FLAG_EPSILON) ** -0.25
    total = seen.sum(dim=1)  # sum Y'x_i; |Y total| = |total|
    length = float(total.norm())
    if length <= _CANCELLED * len(lengths):
        return shares
    along = torch.zeros_like(norms)  # g_i'd
    along[present] = lengths * (total @ seen) / length
    magnitude = max(0.0, statistics.median(along.tolist()))
    shares[present] = basis @ total / (length * lengths) * magnitude
    return shares


def _expected(rows: Iterable[Sequence[float]], index: int, tokens: float) -> list[float]:
    """Return what a group's norms in `rows` predict for that many tokens; norms of zero say nothing."""
    return [row[index] * max(tokens / row[0], math.sqrt(tokens / row[0])) for row in rows if row[index] > 0]


def _limit(norms: Collection[float]) -> float:
    """Return 3 times the lower median, which a bad half cannot set; infinite with too few norms."""
    return _TOLERANCE * statistics.median_low(norms) if len(norms) >= _MIN_HISTORY else math.inf


def _positive(tokens: float) -> float:
    if not (math.isfinite(tokens) and tokens > 0):
        raise ValueError(f"tokens must be above 0, got {tokens}")
    return tokens


def _check(vectors: Sequence[Tensor], at_least: int) -> None:
    _check_form(vectors, at_least)
    _check_finite(vectors)


def _check_form(vectors: Sequence[Tensor], at_least: int) -> None:
    if len(vectors) < at_least:
        raise ValueError(f"at least {at_least} vectors are needed, got {len(vectors)}")
    if any(vector.dim() != 1 or vector.shape != vectors[0].shape for vector in vectors):
        raise ValueError(f"vectors of one size are needed, got {[tuple(vector.shape) for vector in vectors]}")
    if any(vector.dtype is not torch.float32 for vector in vectors):
        raise ValueError(f"vectors of fp32 are needed, got {[vector.dtype for vector in vectors]}")


def _check_finite(vectors: Iterable[Tensor]) -> None:
    for vector in vectors:
        if len(vector) and not all(torch.isfinite(piece.abs().amax()) for piece in torch.split(vector, _CHUNK)):
            raise ValueError(_NOT_FINITE)


def _check_sums(squares: Iterable[float]) -> None:
    """Check sums of squares of all numbers, and so the numbers: in fp64 no sum of fp32's finite ones overflows."""
    if not all(map(math.isfinite, squares)):
        raise ValueError(_NOT_FINITE)


def _norm(vector: Tensor) -> float:
    """Return |vector|. Raises ValueError if it is not finite, or not a vector in fp32."""
    _check_form([vector], at_least=1)
    square = _square(vector)
    _check_sums([square])
    return math.sqrt(square)


def _square(vector: Tensor, other: Tensor | None = None) -> float:
    """Return |vector|^2, or |vector - other|^2."""
    total = 0.0
    others = torch.split(other, _CHUNK) if other is not None else None
    for index, piece in enumerate(torch.split(vector, _CHUNK)):
        wide = piece.double()
        if others is not None:
            wide = wide.sub_(others[index].double())
        total += float(wide @ wide)
    return total


def _chunks(*vectors: Tensor) -> list[tuple[Tensor, ...]]:
    return [torch.split(vector, _CHUNK) for vector in vectors]
