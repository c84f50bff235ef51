"""Consensus of several peers' states: the run's weights when each peer has its own.

Weights: the variance-corrected mean, without states that are far from most others or many rounds behind. Momentum: the
median of those that were given, number by number. Round: the median.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import Layout, layout_of, variance_corrected_mean
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.asynchronous.place_rows import places_untrusted
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.identity import peer_id_from_bytes_untrusted
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.protocol.adapter_groups import groups_of_names
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.run import MergeSection
from swarmtrain.v1 import snapshot_pb2 as pb

ARCHIVED = 16
"""Number of volunteers whose weights are averaged for the archive."""
SAMPLE = 4
"""Number of others whose weights a gossiping peer averages: more would cost everybody's link and memory and gain
little.
"""
_FAR = 10.0
"""Weights farther away than this multiple of the usual distance are left out. It is large because of three honest peers
two may be much closer to each other than to the third.
"""
_MAX_COUNTS = 4096
_PIECE = 1 << 20
_MOST_MOMENTUM = 0.25
"""Longest momentum accepted, relative to the length of the weights. Measured at an outer momentum of 0.5: 0.06 in the
second round, 0.01 in the tenth.
"""
_MOST_MOMENTUM_OF_ADAPTER = 1.0
"""The same of an adapter: half of its weights begin with zeros. Measured: 0.73 in the first round (learning rate 0.03),
0.61 at 0.01, 0.25 at 0.001.
"""


def layout_of_specs(specs: Sequence[TensorSpec]) -> Layout:
    """Return the layout of the model's flat vector: the place of each tensor.

    An adapter's tensors are not variance-corrected: B begins with zeros, and the correction would stretch its noise.
    """
    layout = layout_of([spec.shape for spec in specs])
    if groups_of_names(spec.name for spec in specs) is None:
        return layout
    return replace(layout, corrected=(False,) * len(layout.corrected))


def fragments_of_specs(specs: Sequence[TensorSpec], number: int) -> tuple[Fragment, ...]:
    """Divide the model into `number` fragments, or an adapter into its groups."""
    return fragments_of(layout_of_specs(specs), number, groups_of_names(spec.name for spec in specs))


class _HasRound(Protocol):
    @property
    def round(self) -> int: ...


_S = TypeVar("_S", bound=_HasRound)


def not_far_behind(states: Sequence[_S], most_behind: int) -> list[_S]:
    """Return the states at most `most_behind` rounds behind the upper median.

    Of two states the one ahead sets the measure: a peer that got hardly any work, in a pipeline say, must not make up
    half of the model. Peers that are half of all can lie about their round, as they can about their weights.
    """
    least = statistics.median_high(state.round for state in states) - most_behind
    return [state for state in states if state.round >= least]


def consensus_of(states: Sequence[FetchedState], layout: Layout) -> OuterState:
    """Return the consensus of states that were checked when they were pulled; momentum comes from those that are whole.

    The mean overwrites the first state's weights, which must not be read afterwards: a joiner holds several states and
    the archive many, so a further vector would cost memory.
    """
    momenta = {number: _numbers(state)[layout.size :] for number, state in enumerate(states) if state.whole}
    return consensus_of_vectors([theta_of(state, layout.size) for state in states], momenta, layout, in_place=True)


def consensus_of_vectors(
    thetas: Sequence[Tensor], momenta: Mapping[int, Tensor], layout: Layout, *, in_place: bool = False
) -> OuterState:
    """Return the consensus of weights (P,) and of the momenta (P,) that some peers gave, keyed by index.

    Momentum is the median over those whose weights are in the mean. Its length is limited relative to the weights
    (an adapter's are those of which nothing is variance-corrected): nothing else bounds it when a single peer gave one.
    With `in_place` the mean is written over the first weights.
    """
    mean, kept = mean_of_near(thetas, layout, thetas[0] if in_place else None)
    momentum = outvoted([momenta[number] for number in sorted(momenta) if number in kept])
    if momentum is None:
        return OuterState(mean, torch.zeros_like(mean))
    share = _MOST_MOMENTUM if any(layout.corrected) else _MOST_MOMENTUM_OF_ADAPTER
    length, most = float(momentum.double().norm()), share * float(mean.double().norm())
    if not math.isfinite(length):
        return OuterState(mean, torch.zeros_like(mean))
    return OuterState(mean, momentum.mul_(min(1.0, most / length) if length else 1.0))


@torch.no_grad()
def outvoted(vectors: Sequence[Tensor]) -> Tensor | None:
    """Return the lower median of each number, in a new tensor; None without vectors.

    Of two vectors take the number nearer to 0, and 0 where the signs differ: then an invented value is never farther
    off than what the honest peer says.
    """
    if len(vectors) < 2:
        return vectors[0].clone() if vectors else None
    # The median of two and zero is the one nearer to 0, or 0 if the signs differ.
    given = [*vectors, torch.zeros(1).expand_as(vectors[0])] if len(vectors) == 2 else list(vectors)
    out = torch.empty_like(vectors[0])
    for into, *pieces in zip(*(torch.split(vector, _PIECE) for vector in (out, *given)), strict=True):
        into.copy_(torch.stack(pieces).median(dim=0).values)
    return out


def mean_of_near(thetas: Sequence[Tensor], layout: Layout, out: Tensor | None = None) -> tuple[Tensor, frozenset[int]]:
    """Return (variance-corrected mean (P,), indices of the weights in it). The mean is written into `out`, which may be
    one of the inputs, if given.

    Of three or more weights, those farther from the middle one than 10 times the median distance are left out. The
    middle one has the smallest median distance to the others.
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
    """Return the matrix of |theta_i - theta_j|, summed in fp64 piece by piece."""
    squares = torch.zeros(len(thetas), len(thetas), dtype=torch.float64)
    for pieces in zip(*(torch.split(theta, _PIECE) for theta in thetas), strict=True):
        for i, piece in enumerate(pieces):
            for j in range(i):
                squares[i, j] += (piece.double() - pieces[j].double()).square().sum()
    found: list[list[float]] = (squares + squares.T).sqrt().tolist()
    return found


def round_of(states: Sequence[_HasRound]) -> int:
    """Return the round of a consensus: the lower median of the states' rounds."""
    return statistics.median_low(state.round for state in states)


def counts_in_untrusted(manifest: pb.Manifest) -> dict[str, int]:
    """Return each peer's tokens as the author of a state claims them, at most the 4,096 greatest counts.

    Raises BadBytesError for anything malformed. A caller that adopts counts lets several states vote
    (`protocol.tokens.tally.agreed_counts`).
    """
    told = ((item.tokens, item.peer) for item in manifest.peer_tokens)
    return {peer_id_from_bytes_untrusted(peer): tokens for tokens, peer in heapq.nlargest(_MAX_COUNTS, told)}


def places_of_untrusted(manifest: pb.Manifest, section: MergeSection) -> list[dict[str, Place]]:
    """For each fragment, map each peer to the place up to which a state's weights contain its publications, as the
    state's author claims.

    Raises BadBytesError if the claim is malformed. A caller that adopts the places limits each by what the peer
    advertises of itself (`protocol.gossip.partners.agreed_places`).
    """
    return places_untrusted(manifest, section.num_fragments, section.publications_per_round)


def theta_of(state: FetchedState, size: int) -> Tensor:
    """Return the weights (P,) of a state as a view of its bytes; P is `size`."""
    return _numbers(state)[:size]


def _numbers(state: FetchedState) -> Tensor:
    assert state.held.buffer is not None
    return torch.frombuffer(state.held.buffer, dtype=torch.float32)
