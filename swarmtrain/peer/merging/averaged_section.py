"""A section that is averaged beside the weights, such as a model's buffers: own values, and their mean with partners'.

A merge takes this peer's values as they are then, where of weights it takes those of the round's start: no gradient
carries what has come since.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate, variance_corrected_mean
from swarmtrain.network.codec import VectorCodec
from swarmtrain.peer.merging.consensus import layout_of_specs
from swarmtrain.peer.merging.robustness import Naming, Robustness

__all__ = ["AveragedSection"]


class AveragedSection:
    """One of them, of a fragment. Legend: S numbers of it."""

    def __init__(self, codec: VectorCodec, rule: str, naming: Naming) -> None:
        """`rule` is `merge.robust`: partners' values may pull by three times the usual distance."""
        self._own: Tensor | None = None
        self._layout = layout_of_specs(codec.section.tensors)
        self._robustness = Robustness(rule, self._layout, naming)

    def published(self, values: Tensor) -> None:
        """This peer's values (S,) are these by now; they are not written into."""
        self._own = values

    def accept_untrusted(self, author: str, arrival: PartnerUpdate, round: int) -> PartnerUpdate:
        """What of a partner's values, of its `round`, may enter the mean. BadBytesError if nothing may. Before this
        peer has values of its own nothing is usual, and all may."""
        return arrival if self._own is None else self._robustness.accept(author, arrival, self._own, round)

    def mean(self, theirs: Sequence[Tensor]) -> Tensor:
        """Of this peer's values and partners' (S,), as of weights: see `variance_corrected_mean`."""
        assert self._own is not None, "a round is published before it is merged"
        return variance_corrected_mean([self._own, *theirs], self._layout).mean
