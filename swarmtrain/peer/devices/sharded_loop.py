"""Loop of a model that fits no single card: each rank holds a part of it (`sharded_model.py`).

The whole model stays in main memory of rank 0, where its session publishes and merges it and where its loss is
measured. It is behind while steps are taken; the parts are gathered when somebody reads it, and what was written there
is scattered before the next step. So a publication costs a copy of all weights between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.inner import InnerOptimizer, Moments
from swarmtrain.errors import RunTimeError
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.data_parallel import DataParallelRanks
from swarmtrain.peer.devices.rank_group import RankGroup, RankLostError
from swarmtrain.peer.merging.updates import LentWeights
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.parameters import HostParameters
from swarmtrain.peer.training.session import LoopCheckpoint

if TYPE_CHECKING:
    from swarmtrain.peer.devices.sharded_model import ShardedModel


@dataclass(eq=False)
class ShardedRanks(DataParallelRanks):
    """Ranks that hold a part of the model each; `model`, whole and in main memory, is a copy of what they hold."""

    _doing: ClassVar[str] = "training a part of the model"
    is_behind: bool = field(default=False, init=False)
    """True if steps were taken that the copy does not have."""

    _model_in_parts: ShardedModel | None = field(default=None, init=False)

    @property
    def _sharded(self) -> ShardedModel:
        assert self._model_in_parts is not None, "made before the first step"
        return self._model_in_parts

    def _begin(self, group: RankGroup) -> None:
        from swarmtrain.peer.devices.sharded_model import ShardedModel

        self._model_in_parts = ShardedModel(self.model.spec, group, self.inner.constants, self.compute)
        if self.inner.has_moments:
            self.send_moments(self.inner)
            self.inner.end()

    def send_moments(self, inner: InnerOptimizer) -> None:
        """Give all ranks their parts of an optimizer's moments, which are whole and in main memory."""
        self._tell("moments")
        self._sharded.scatter_moments(inner.moment_tensors())

    def _send_weights(self, group: RankGroup, which: list[int], tensors: list[Tensor]) -> None:
        self._sharded.scatter(which, tensors)

    def _gradient(
        self,
        group: RankGroup,
        batch: Tensor,
        loss_of: Callable[[Tensor], Tensor],
        compute: ComputeDevice,
        should_stop: Callable[[], bool],
    ) -> Tensor | None:
        return self._sharded.gradient(batch, compute, should_stop)

    def _step(self, progress: float, scale: float) -> Tensor:
        self.is_behind = True
        return self._sharded.optimize(progress, scale)

    def refresh(self) -> None:
        """Bring the copy in main memory up to date with the steps taken."""
        if not self.is_behind or self._group is None or self._is_closed.is_set():
            return
        try:
            self._send_state(self._group)
            self._tell("gather")
            self._sharded.gather([parameter.detach() for parameter in self.model.parameters()])
        except RankLostError as error:
            raise RunTimeError(self._problem(error)) from error
        self._versions, self.is_behind = self._present_versions(), False

    def moments(self, vectors: Tensor) -> Moments | None:
        """Copy all moments into `vectors` (2, P), and return them; None before the first step."""
        if self._group is None:
            return None
        shapes = [parameter.shape for parameter in self.model.parameters()]
        places = [
            place.view(shape)
            for vector in vectors
            for place, shape in zip(vector.split([shape.numel() for shape in shapes]), shapes, strict=True)
        ]
        try:
            self._tell("gather-moments")
            return Moments(vectors=vectors, steps=self._sharded.gather_moments(places))
        except RankLostError as error:
            raise RunTimeError(self._problem(error)) from error

    def _end(self) -> None:
        if self._model_in_parts is not None:
            self._model_in_parts.close()


class _MirroredParameters(HostParameters):
    """Weights in main memory that are a copy of what ranks hold in parts."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], ranks: ShardedRanks) -> None:
        super().__init__(named)
        self._ranks = ranks

    def read(self) -> Tensor:
        """Return the values as a new vector (P,) fp32. See `ParameterSource`."""
        self.refresh()
        return super().read()

    def lend(self, fragment: Fragment, theta: Tensor) -> LentWeights:
        """Lend a fragment's present values. See `ParameterSource`."""
        self.refresh()
        return super().lend(fragment, theta)

    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """Set the values, which the ranks get before the next step. See `ParameterSource`."""
        self.refresh()
        super().write(theta, fragment)

    def refresh(self) -> None:
        """Take the values that the ranks have now."""
        if self._ranks.is_behind:
            self.take_back()
            self._ranks.refresh()


class ShardedLoop(ModelLoop):
    """Loop that trains a model of which each of several devices holds a part. `model` is in main memory."""

    def _make_ranks(self) -> ShardedRanks:
        ranks = self._sharded_ranks = ShardedRanks(self.model, self.inner, self.compute)
        self.parameters = self._copy = _MirroredParameters(self.model.named_parameters(), ranks)
        return ranks

    def whole_model(self) -> LanguageModel:
        """Return the model with its present weights, in main memory."""
        self._copy.refresh()
        return self.model

    def kept(self, room: Tensor | None) -> LoopCheckpoint:
        """Return the part of the loop's state that a checkpoint keeps. See `LoopState`."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        moments = self._sharded_ranks.moments(torch.empty(2, size) if room is None else room)
        if moments is None:
            return super().kept(room)
        return LoopCheckpoint(batches=self.batches.position, young_steps=self.young_steps, moments=moments)
