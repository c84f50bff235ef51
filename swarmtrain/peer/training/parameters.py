"""The parameters that a loop trains and a session publishes: by name, wherever they lie.

A session sees no model: a source gives it the values of named tensors, and takes those that a merge leads to. So a
source may name some of a model's tensors only (adapters), or tensors on a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.outer import flatten, unflatten_into
from swarmtrain.peer.merging.updates import LentWeights
from swarmtrain.protocol.gossip.pulls import Section

__all__ = ["HostParameters", "ParameterSource"]


class ParameterSource(ABC):
    """Named tensors. Called by one thread, between two steps. Legend: P numbers of all of them, Q of a fragment's."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self.named = dict(named)
        """In the order in which they are flattened."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each tensor."""
        return [tuple(tensor.shape) for tensor in self.named.values()]

    @abstractmethod
    def read(self) -> Tensor:
        """The values as a new vector (P,) fp32 in main memory."""

    @abstractmethod
    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """The values of a fragment as they are now, of which other threads make the difference `theta` (Q,) less them.
        They are lent until `take_back`, or a `write` of that fragment."""

    @abstractmethod
    def take_back(self) -> None:
        """The values change from now on: each difference that was not made yet is made. The optimizer calls it before
        it steps."""

    def values(self) -> Mapping[tuple[Section, int], Tensor]:
        """What is averaged beside the named tensors, see `LocalUpdate.values`: none of those in here."""
        return {}

    def write_values(self, values: Mapping[tuple[Section, int], Tensor]) -> None:
        """Go on from some of these."""
        assert not values, "only a source that has some is given any"

    @abstractmethod
    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Go on from `theta`: a fragment's (Q,), or all of them (P,). What is lent of them is taken back first.

        Tensors that are no copy of `theta`, such as bf16 on a device, add `theta` less what was read of them last: what
        was trained since then stays.
        """


class HostParameters(ParameterSource):
    """fp32 tensors in main memory: a publication that nobody begins to read before the next step costs one copy, and
    any other none."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__(named)
        self._lent: dict[tuple[int, ...], LentWeights] = {}

    @property
    def _tensors(self) -> Sequence[Tensor]:
        return list(self.named.values())

    def read(self) -> Tensor:
        """See `ParameterSource`."""
        return flatten(self._tensors)

    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """See `ParameterSource`."""
        lent = self._lent[fragment.tensors] = LentWeights(theta, fragment.pick(self._tensors))
        return lent

    def take_back(self) -> None:
        """See `ParameterSource`."""
        for one in self._lent.values():
            one.gradient()
        self._lent = {}

    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """See `ParameterSource`."""
        tensors = self._tensors
        if fragment is None:
            self.take_back()
        elif fragment.tensors in self._lent:
            self._lent[fragment.tensors].gradient()
        unflatten_into(theta, tensors if fragment is None else fragment.pick(tensors))
