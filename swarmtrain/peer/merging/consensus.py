"""The run's weights where each peer has its own: the consensus of several peers' states.

The variance-corrected mean of their weights, without those that are far from most or many rounds behind. Momentum is
outvoted among those that gave theirs, their round the median.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import Layout, layout_of, variance_corrected_mean
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.asynchronous.place_rows import places_untrusted
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.identity import peer_id_from_bytes_untrusted
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.run import MergeSection
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = [
    "ARCHIVED",
    "SAMPLE",
    "consensus_of",
    "consensus_of_vectors",
    "counts_in_untrusted",
    "layout_of_specs",
    "mean_of_near",
    "not_far_behind",
    "outvoted",
    "places_of_untrusted",
    "round_of",
    "theta_of",
]

ARCHIVED = 16
"""So many volunteers' weights are averaged for the archive."""
SAMPLE = 4
"""In gossip so many others' weights are averaged: more would only cost everybody's link and memory."""
_FAR = 10.0
"""Weights farther off than so many times the usual distance are left out. Of three honest peers two may be much closer
to each other than to the third."""
_MAX_COUNTS = 4096
_PIECE = 1 << 20
_MOST_MOMENTUM = 0.25
"""Of the length of the weights. Measured at an outer momentum of 0.5: 0.06 in the second round, 0.01 in the tenth."""


def layout_of_specs(specs: Sequence[TensorSpec]) -> Layout:
    """Where each tensor of the model lies in the flat vector."""
    return layout_of([spec.shape for spec in specs])


class _HasRound(Protocol):
    @property
    def round(self) -> int: ...


_S = TypeVar("_S", bound=_HasRound)


def not_far_behind(states: Sequence[_S], most_behind: int) -> list[_S]:
    """Those at most so many rounds behind the (upper) median: of two the one that is far ahead counts, since one that
    got hardly any work, in a pipeline say, must not make half of the model. Whoever is half of them can lie about it,
    as they can about their weights."""
    least = statistics.median_high(state.round for state in states) - most_behind
    return [state for state in states if state.round >= least]


def consensus_of(states: Sequence[FetchedState], layout: Layout) -> OuterState:
    """The consensus of states that were checked when they were pulled, with the momentum of those that are whole. The
    mean takes the place of the first one's weights, which nobody may read any more: a joiner holds several states, and
    the archive many."""
    momenta = {number: _numbers(state)[layout.size :] for number, state in enumerate(states) if state.whole}
    return consensus_of_vectors([theta_of(state, layout.size) for state in states], momenta, layout, in_place=True)


def consensus_of_vectors(
    thetas: Sequence[Tensor], momenta: Mapping[int, Tensor], layout: Layout, *, in_place: bool = False
) -> OuterState:
    """Of weights (P,) and the momentum (P,) of some of them, by their index. Of those whose weights are in the mean it
    is outvoted, number by number, and it is cut where it is longer than any is, beside the weights: that is all that
    bounds it where one alone gave some, whose weights are then as unproved. With
    `in_place` the mean is written over the first weights."""
    mean, kept = mean_of_near(thetas, layout, thetas[0] if in_place else None)
    momentum = outvoted([momenta[number] for number in sorted(momenta) if number in kept])
    if momentum is None:
        return OuterState(mean, torch.zeros_like(mean))
    length, most = float(momentum.double().norm()), _MOST_MOMENTUM * float(mean.double().norm())
    if not math.isfinite(length):
        return OuterState(mean, torch.zeros_like(mean))
    return OuterState(mean, momentum.mul_(min(1.0, most / length) if length else 1.0))


@torch.no_grad()
def outvoted(vectors: Sequence[Tensor]) -> Tensor | None:
    """The (lower) median of each number, in a new tensor; None without any. Of two the one nearer to 0, and 0 where
    their signs differ: what one of them makes up is never farther off than what the other says."""
    if len(vectors) < 2:
        return vectors[0].clone() if vectors else None
    given = [*vectors, torch.zeros(1).expand_as(vectors[0])] if len(vectors) == 2 else list(vectors)
    out = torch.empty_like(vectors[0])
    for into, *pieces in zip(*(torch.split(vector, _PIECE) for vector in (out, *given)), strict=True):
        into.copy_(torch.stack(pieces).median(dim=0).values)
    return out


def mean_of_near(thetas: Sequence[Tensor], layout: Layout, out: Tensor | None = None) -> tuple[Tensor, frozenset[int]]:
    """(the variance-corrected mean of weights (P,), the indices of those that are in it). It is written into `out`,
    which may be one of them, if that is given.

    Of three or more, those are left out that are more than 10 times the median distance from the one in the middle:
    whoever has the smallest median distance to the others.
    """
    kept = frozenset(range(len(thetas)))
    if len(thetas) >= 3:
        distances = _distances(thetas)
        others = [[row[j] for j in range(len(row)) if j != i] for i, row in enumerate(distances)]
        middle = min(range(len(thetas)), key=lambda i: (statistics.median(others[i]), i))
        limit = _FAR * statistics.median_low(others[middle])
        kept = frozenset(i for i in kept if i == middle or distances[middle][i] <= limit)
    return variance_corrected_mean([thetas[i] for i in sorted(kept)], layout, out=out).mean, kept


def _distances(thetas: Sequence[Tensor]) -> list[list[float]]:
    """|theta_i - theta_j|, in fp64, piece by piece."""
    squares = torch.zeros(len(thetas), len(thetas), dtype=torch.float64)
    for pieces in zip(*(torch.split(theta, _PIECE) for theta in thetas), strict=True):
        for i, piece in enumerate(pieces):
            for j in range(i):
                squares[i, j] += (piece.double() - pieces[j].double()).square().sum()
    found: list[list[float]] = (squares + squares.T).sqrt().tolist()
    return found


def round_of(states: Sequence[_HasRound]) -> int:
    """The round of a consensus: the lower median of its states'."""
    return statistics.median_low(state.round for state in states)


def counts_in_untrusted(manifest: pb.Manifest) -> dict[str, int]:
    """Each peer's tokens as the author of a state tells with it, the greatest counts of very many; BadBytesError if
    something else is there. Whoever takes them lets several states vote (`protocol.tokens.tally.agreed_counts`)."""
    told = ((item.tokens, item.peer) for item in manifest.peer_tokens)
    return {peer_id_from_bytes_untrusted(peer): tokens for tokens, peer in heapq.nlargest(_MAX_COUNTS, told)}


def places_of_untrusted(manifest: pb.Manifest, section: MergeSection) -> list[dict[str, Place]]:
    """Up to where each peer is in a state's weights, of each fragment, as its author tells; BadBytesError if it is
    nonsense. Whoever takes them bounds them by what each peer tells of itself
    (`protocol.gossip.partners.agreed_places`)."""
    return places_untrusted(manifest, section.num_fragments, section.publications_per_round)


def theta_of(state: FetchedState, size: int) -> Tensor:
    """The weights (P,) of a state, over its own bytes; P is `size`."""
    return _numbers(state)[:size]


def _numbers(state: FetchedState) -> Tensor:
    assert state.held.buffer is not None
    return torch.frombuffer(state.held.buffer, dtype=torch.float32)
