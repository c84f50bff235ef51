"""Tensor groups averaged beside the weights, such as a model's buffers: the mean of this peer's values and its
partners'.

A merge uses this peer's present values. For weights it uses those of the round's start, since a pseudo-gradient carries
what came later; here no gradient does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate, variance_corrected_mean
from swarmtrain.network.codec import VectorCodec
from swarmtrain.peer.merging.consensus import layout_of_specs
from swarmtrain.peer.merging.robustness import Naming, Robustness


class AveragedGroup:
    """One such tensor group of one fragment. Legend: S numbers in it."""

    def __init__(self, codec: VectorCodec, rule: str, naming: Naming) -> None:
        """`rule` is `merge.robust`; with clipping, partners' values may pull by three times the usual distance."""
        self._own: Tensor | None = None
        self._layout = layout_of_specs(codec.group.tensors)
        self._robustness = Robustness(rule, self._layout, naming)

    def published(self, values: Tensor) -> None:
        """Remember the values (S,) that this peer has published; they are not written into."""
        self._own = values

    def accept_untrusted(self, author: str, arrival: PartnerUpdate, round: int) -> PartnerUpdate:
        """Return the part of a partner's values, published in `round`, that may enter the mean.

        Raises BadBytesError if nothing may. Before this peer has published values there is nothing to compare with, and
        all may.
        """
        return arrival if self._own is None else self._robustness.accept(author, arrival, self._own, round)

    def mean(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return the variance-corrected mean of this peer's values and the partners' (S,)."""
        assert self._own is not None, "a round is published before it is merged"
        return variance_corrected_mean([self._own, *theirs], self._layout).mean
