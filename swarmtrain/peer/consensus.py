"""The run's weights where each peer has its own: the consensus of several peers' states.

The variance-corrected mean of their weights; momentum and round are those of the first, the counts the greatest that
any of them tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import Layout, layout_of, variance_corrected_mean
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.consensus import PeerState
from swarmtrain.network.identity import peer_id_from_bytes_untrusted
from swarmtrain.network.snapshots import TensorSpec

__all__ = ["consensus_of", "counts_in", "layout_of_specs", "mean_of", "theta_of"]


def layout_of_specs(specs: Sequence[TensorSpec]) -> Layout:
    """Where each tensor of the model lies in the flat vector."""
    return layout_of([spec.shape for spec in specs])


def consensus_of(states: Sequence[PeerState], layout: Layout) -> OuterState:
    """The consensus of states that were checked when they were pulled; the first one is whole."""
    momentum = _numbers(states[0])[layout.size :].clone()
    return OuterState(mean_of([theta_of(state, layout.size) for state in states], layout), momentum)


def mean_of(thetas: Sequence[Tensor], layout: Layout) -> Tensor:
    """The variance-corrected mean of weights (P,)."""
    return variance_corrected_mean(thetas, layout).mean


def theta_of(state: PeerState, size: int) -> Tensor:
    """The weights (P,) of a state, over its own bytes; P is `size`."""
    return _numbers(state)[:size]


def counts_in(states: Sequence[PeerState]) -> Mapping[str, int]:
    """Each peer's tokens, as the one that knows most of it tells."""
    counts: dict[str, int] = {}
    for state in states:
        for item in state.held.snapshot.manifest.peer_tokens:
            peer = peer_id_from_bytes_untrusted(item.peer)
            counts[peer] = max(counts.get(peer, 0), item.tokens)
    return counts


def _numbers(state: PeerState) -> Tensor:
    assert state.held.buffer is not None
    return torch.frombuffer(state.held.buffer, dtype=torch.float32)
