"""Fragments of the model, each merged once a round, one after the other (Streaming DiLoCo, arXiv 2501.18512).

A *fragment* is some of the model's tensors, with a flat vector of their own. `protocol.gossip.fragments` says when each
is merged, and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.gossip import Layout
from swarmtrain.algorithm.outer import OuterState

__all__ = ["Fragment", "FragmentedState", "fragments_of", "whole_of"]

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
        if self.is_whole:
            return vector
        return torch.cat([vector[place] for place in self.places], out=memory.empty_like(vector[: self.layout.size]))


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
    whole = memory.empty(sum(vector.numel() for vector in vectors), vectors[0].dtype)
    for fragment, vector in zip(fragments, vectors, strict=True):
        for place, own in zip(fragment.places, fragment.layout.slices, strict=True):
            whole[place] = vector[own]
    return whole


class FragmentedState(OuterState):
    """The state of a model over its fragments' states, each as of its last merge.

    Nothing is copied until theta or momentum is asked for, which are joined anew each time: whoever reads `pieces`
    needs no second state of 8 bytes a parameter. It follows `states`, a list that its owner changes; `settled` gives
    one that stays.
    """

    def __init__(self, fragments: Sequence[Fragment], states: Sequence[OuterState]) -> None:
        object.__setattr__(self, "_fragments", tuple(fragments))
        object.__setattr__(self, "_states", states)

    _fragments: tuple[Fragment, ...]
    _states: Sequence[OuterState]

    @property
    def theta(self) -> Tensor:
        """(P,): new, or the only fragment's."""
        return whole_of(self._fragments, [state.theta for state in self._states])

    @property
    def momentum(self) -> Tensor:
        """(P,): new, or the only fragment's."""
        return whole_of(self._fragments, [state.momentum for state in self._states])

    @property
    def size(self) -> int:
        """P."""
        return sum(fragment.layout.size for fragment in self._fragments)

    def pieces(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `OuterState`: the model's tensors in its order."""
        states, places = tuple(self._states), dict[int, tuple[int, slice]]()
        for number, fragment in enumerate(self._fragments):
            for tensor, place in zip(fragment.tensors, fragment.layout.slices, strict=True):
                places[tensor] = number, place
        found = [places[tensor] for tensor in sorted(places)]
        return (
            [states[number].theta[place] for number, place in found],
            [states[number].momentum[place] for number, place in found],
        )

    def settled(self) -> OuterState:
        """See `OuterState`."""
        return FragmentedState(self._fragments, tuple(self._states))

    def spent(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `OuterState`."""
        pieces = self.pieces()
        object.__setattr__(self, "_states", ())
        return pieces
