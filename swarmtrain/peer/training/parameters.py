"""Named parameters that a loop trains and a session publishes, wherever they are stored.

A session sees no model. A source hands it the values of named tensors and takes back the values after a merge, so a
source may name only some of a model's tensors (adapters), or tensors on a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.outer import flatten, unflatten_into
from swarmtrain.peer.merging.updates import LentWeights
from swarmtrain.protocol.adapter_groups import groups_of_names
from swarmtrain.protocol.gossip.pulls import GroupName


class ParameterSource(ABC):
    """Named tensors, used by one thread between two steps. Legend: P numbers in all of them, Q in one fragment."""

    loans_outlast_steps: ClassVar[bool] = False
    """True if a fragment can be merged after steps that were taken since it was lent; those steps stay."""

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        rewriting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`rewriting` makes a context entered around whatever writes values that do not come from the optimizer."""
        self.named = dict(named)
        """Tensors by name, in the order in which they are flattened."""
        self.groups = groups_of_names(self.named)
        """Group of each tensor of an adapter; None if these are not an adapter's tensors."""
        self._rewriting = rewriting

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each tensor, in flattening order."""
        return [tuple(tensor.shape) for tensor in self.named.values()]

    def train_only(self, groups: Collection[int]) -> None:
        """Have backward passes and the optimizer leave all groups of an adapter as they are, except these."""
        assert self.groups is not None, "only an adapter has groups"
        for tensor, group in zip(self.named.values(), self.groups, strict=True):
            tensor.requires_grad_(group in groups)

    @abstractmethod
    def read(self) -> Tensor:
        """Return the values as a new vector (P,) fp32 in main memory."""

    def read_soon(self) -> Callable[[], Tensor]:
        """Ask for the present values without waiting for them; return a function that returns what `read` would now.

        Any thread may call that function, which waits. On a device this is also a loan of a model in one fragment.
        """
        values = self.read()
        return lambda: values

    @abstractmethod
    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """Lend a fragment's present values, from which other threads compute the pseudo-gradient: `theta` (Q,) minus
        the values.

        The loan ends with `take_back`, or with a `write` of that fragment.
        """

    @abstractmethod
    def take_back(self) -> None:
        """End all loans before the values change: compute each difference that nobody has computed yet.

        The optimizer calls this before each step.
        """

    def values(self) -> Mapping[tuple[GroupName, int], Tensor]:
        """Return the tensors that are averaged beside the named ones (see `LocalUpdate.values`). A source has none by
        default."""
        return {}

    def write_values(self, values: Mapping[tuple[GroupName, int], Tensor]) -> None:
        """Replace some of the values that `values` returned by their averages."""
        assert not values, "only a source that has some is given any"

    def change_to(self, theta: Tensor, fragment: Fragment) -> Tensor | None:
        """Return the change (Q,) that leads from a fragment's values, as they were last lent, to `theta` (Q,).

        Any thread may call it while the loan lasts. None where loans do not outlast the next step.
        """
        return None

    @abstractmethod
    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Set the values from `theta`: a fragment's (Q,), or all (P,). Loans of the tensors written end first.

        Tensors that are not a copy of `theta`, such as bf16 on a device, instead add `theta` minus the values last
        read: what was trained since that read stays.
        """

    def write_change(self, theta: Tensor, fragment: Fragment, change: Tensor | None) -> None:
        """Do what `write` does with a fragment whose `change_to` was computed before."""
        self.write(theta, fragment)


class HostParameters(ParameterSource):
    """fp32 tensors in main memory. A publication costs one copy if nobody reads it before the next step, and none
    otherwise.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        rewriting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(named, rewriting)
        self._lent: dict[tuple[int, ...], LentWeights] = {}

    @property
    def _tensors(self) -> Sequence[Tensor]:
        return list(self.named.values())

    def read(self) -> Tensor:
        """Return the values as a new vector (P,) fp32 in main memory. See `ParameterSource`."""
        return flatten(self._tensors)

    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """Lend a fragment's present values, from which other threads compute the pseudo-gradient: `theta` (Q,) minus
        the values. See `ParameterSource`."""
        if (before := self._lent.get(fragment.tensors)) is not None:  # a round that ended early publishes twice
            before.gradient()
        lent = self._lent[fragment.tensors] = LentWeights(theta, fragment.pick(self._tensors))
        return lent

    def take_back(self) -> None:
        """End all loans before the values change: compute each difference that nobody has computed yet. See
        `ParameterSource`."""
        for one in self._lent.values():
            one.gradient()
        self._lent = {}

    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Set the values from `theta`: a fragment's (Q,), or all (P,). See `ParameterSource`."""
        tensors = self._tensors
        if fragment is None:
            self.take_back()
        elif fragment.tensors in self._lent:
            self._lent[fragment.tensors].gradient()
        with self._rewriting():
            unflatten_into(theta, tensors if fragment is None else fragment.pick(tensors))
