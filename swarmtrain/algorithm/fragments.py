"""Fragments of the model, each merged once a round, one after the other (Streaming DiLoCo, arXiv 2501.18512).

A *fragment* is some of the model's tensors, with a flat vector of their own. `membership.fragments` says when each is
merged, and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import Layout

__all__ = ["Fragment", "fragments_of", "whole_of"]

_T = TypeVar("_T")
_LEAST_SHARE = 0.25
"""The smallest fragment has at least so much of the mean."""


@dataclass(frozen=True)
class Fragment:
    """Some tensors of the model, in its order. Legend: P numbers of the whole model, Q of the fragment."""

    tensors: tuple[int, ...]
    """Which."""
    places: tuple[slice, ...]
    """Where each lies in the whole model's flat vector."""
    layout: Layout
    """Where each lies in the fragment's."""
    is_whole: bool
    """Whether it is all of the model."""

    def pick(self, of_tensors: Sequence[_T]) -> list[_T]:
        """Of what there is one of for each tensor of the model, the fragment's."""
        return [of_tensors[tensor] for tensor in self.tensors]

    def of(self, vector: Tensor) -> Tensor:
        """The fragment's numbers (Q,) of the whole model's (P,): a copy, or `vector` itself where that is the same."""
        return vector if self.is_whole else torch.cat([vector[place] for place in self.places])


def fragments_of(layout: Layout, number: int) -> tuple[Fragment, ...]:
    """The model in so many fragments: each tensor, one after the other, goes into the smallest so far. Fewer where one
    would be much smaller than the others: what is usual of a few numbers says little of what a partner sends."""
    for fewer in range(min(number, len(layout.slices)), 1, -1):
        fragments = _grouped(layout, fewer)
        if min(fragment.layout.size for fragment in fragments) * fewer >= _LEAST_SHARE * layout.size:
            return fragments
    return _grouped(layout, 1)


def _grouped(layout: Layout, number: int) -> tuple[Fragment, ...]:
    sizes = [place.stop - place.start for place in layout.slices]
    groups: list[list[int]] = [[] for _ in range(number)]
    for tensor in range(len(sizes)):
        min(groups, key=lambda group: (sum(sizes[one] for one in group), len(group))).append(tensor)
    return tuple(_fragment(layout, group) for group in groups)


def _fragment(layout: Layout, group: Sequence[int]) -> Fragment:
    places = tuple(layout.slices[tensor] for tensor in group)
    ends = itertools.accumulate((place.stop - place.start for place in places), initial=0)
    own = Layout(tuple(itertools.starmap(slice, itertools.pairwise(ends))), tuple(layout.corrected[t] for t in group))
    return Fragment(tuple(group), places, own, is_whole=len(group) == len(layout.slices))


def whole_of(fragments: Sequence[Fragment], vectors: Sequence[Tensor]) -> Tensor:
    """The whole model's numbers (P,) of the fragments' (Q,): new, or the only one of them itself."""
    if len(vectors) == 1:
        return vectors[0]
    whole = vectors[0].new_empty(sum(vector.numel() for vector in vectors))
    for fragment, vector in zip(fragments, vectors, strict=True):
        for place, own in zip(fragment.places, fragment.layout.slices, strict=True):
            whole[place] = vector[own]
    return whole
