"""Fragments of the model, each merged once a round, one after the other (Streaming DiLoCo, arXiv 2501.18512).

A *fragment* is a group of the model's tensors, with a flat vector of its own. `protocol.gossip.fragments` says when
each is merged, and why.
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
from swarmtrain.algorithm.outer import OuterState, weighted_mean

_T = TypeVar("_T")
_LEAST_SHARE = 0.25
"""Size of the smallest fragment, at least, as a share of the mean."""


@dataclass(frozen=True)
class Fragment:
    """Group of the model's tensors, in its order. Legend: P numbers of the whole model, Q of the fragment."""

    tensors: tuple[int, ...]
    """Indices of its tensors."""
    places: tuple[slice, ...]
    """Slice of each tensor in the whole model's flat vector."""
    layout: Layout
    """Slice of each tensor in the fragment's own flat vector."""
    is_whole: bool
    """True if it is all of the model."""

    def pick(self, of_tensors: Sequence[_T]) -> list[_T]:
        """Return the fragment's items of a list with one item for each tensor of the model."""
        return [of_tensors[tensor] for tensor in self.tensors]

    def of(self, vector: Tensor) -> Tensor:
        """Return the fragment's numbers (Q,) of the whole model's (P,): a copy, or `vector` itself if it is the whole
        model."""
        if self.is_whole:
            return vector
        return torch.cat([vector[place] for place in self.places], out=memory.empty_like(vector[: self.layout.size]))


def fragments_of(layout: Layout, number: int, groups: Sequence[int] | None = None) -> tuple[Fragment, ...]:
    """Divide the model into `number` fragments: each tensor in turn goes into the smallest fragment so far.

    Of four ways to divide this one had the lowest loss (decision 45). There are fewer fragments where one would be much
    smaller than the others: statistics of a few numbers do not say what is usual. With `groups`, the group of each
    tensor, each group is a fragment, in ascending order.
    """
    if groups is not None:
        by_group = ([t for t, of in enumerate(groups) if of == group] for group in sorted(set(groups)))
        return tuple(_fragment(layout, tensors) for tensors in by_group)
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
    """Return the whole model's numbers (P,) from the fragments' (Q,): a new vector, or the only one itself."""
    if len(vectors) == 1:
        return vectors[0]
    whole = memory.empty(sum(vector.numel() for vector in vectors), vectors[0].dtype)
    for fragment, vector in zip(fragments, vectors, strict=True):
        for place, own in zip(fragment.places, fragment.layout.slices, strict=True):
            whole[place] = vector[own]
    return whole


@torch.no_grad()
def mean_by_fragment(
    fragments: Sequence[Fragment],
    gradients: Sequence[Tensor],
    weights: Sequence[float],
    trained: Sequence[Sequence[int]],
) -> tuple[Tensor, tuple[slice, ...]]:
    """Return the weighted mean (P,) of gradients (P,), in each fragment of those that have trained it, and the places
    that nobody has trained, where it is zero.

    `trained` are the numbers of the fragments that each of the gradients has.
    """
    mean, untrained = torch.zeros_like(gradients[0]), list[slice]()
    for number, fragment in enumerate(fragments):
        who = [index for index, its in enumerate(trained) if number in its]
        for place in fragment.places:
            if who:
                mean[place] = weighted_mean([gradients[i][place] for i in who], [weights[i] for i in who])
            else:
                untrained.append(place)
    return mean, tuple(untrained)


class FragmentedState(OuterState):
    """State of a model as the states of its fragments, each as of its last merge.

    Nothing is copied until `theta` or `momentum` is read; each read joins the fragments anew. A reader of `pieces`
    needs no second state of 8 bytes a parameter. The object follows `states`, a list that its owner changes; `frozen`
    returns one that stays.
    """

    def __init__(self, fragments: Sequence[Fragment], states: Sequence[OuterState]) -> None:
        object.__setattr__(self, "_fragments", tuple(fragments))
        object.__setattr__(self, "_states", states)

    _fragments: tuple[Fragment, ...]
    _states: Sequence[OuterState]

    @property
    def theta(self) -> Tensor:
        """Outer parameters (P,): a new vector, or the only fragment's."""
        return whole_of(self._fragments, [state.theta for state in self._states])

    @property
    def momentum(self) -> Tensor:
        """Outer momentum (P,): a new vector, or the only fragment's."""
        return whole_of(self._fragments, [state.momentum for state in self._states])

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(fragment.layout.size for fragment in self._fragments)

    def pieces(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return theta and momentum as the model's tensors in its order; see `OuterState`."""
        states, places = tuple(self._states), dict[int, tuple[int, slice]]()
        for number, fragment in enumerate(self._fragments):
            for tensor, place in zip(fragment.tensors, fragment.layout.slices, strict=True):
                places[tensor] = number, place
        found = [places[tensor] for tensor in sorted(places)]
        return (
            [states[number].theta[place] for number, place in found],
            [states[number].momentum[place] for number, place in found],
        )

    def frozen(self) -> OuterState:
        """Return this state as it is now; see `OuterState`."""
        return FragmentedState(self._fragments, tuple(self._states))

    def spent(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return `pieces`, and hold them no longer; see `OuterState`."""
        pieces = self.pieces()
        object.__setattr__(self, "_states", ())
        return pieces
