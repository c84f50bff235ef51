"""Model that fits no single card: each rank holds a part of every tensor (torch's fully_shard, FSDP2).

A block's tensors are put together while the block computes, and dropped afterwards; gradients are summed and cut the
same way. So weights, gradients and moments are divided by the number of ranks, and every forward and backward pass is
a series of collectives: a rank whose memory runs out cannot be mended. All ranks compute equally many microbatches.
Its imports take seconds of processor time, so it is imported only where a model is sharded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from swarmtrain.algorithm.batch import compacted, num_targets
from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer, LossScale
from swarmtrain.model.language_model import LanguageModel, ModelSpec
from swarmtrain.model.run_model import empty_model
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.rank_group import RankGroup, lost_if_it_fails
from swarmtrain.protocol.devices import largest_part


class ShardedModel:
    """This rank's part of a model, and its optimizer. All ranks call the same methods in the same order."""

    def __init__(self, spec: ModelSpec, group: RankGroup, constants: InnerConstants, compute: ComputeDevice) -> None:
        """The weights are those in memory until `scatter` has set them."""
        mesh = init_device_mesh(compute.device.type, (group.num_ranks,))
        self._model: LanguageModel | None = empty_model(spec)
        for block in self._model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        register_fsdp_forward_method(self._model, "loss")  # the entry of training is not `forward`
        self._group = group
        self._whole: list[DTensor] = list(self._model.parameters())  # type: ignore[arg-type]
        names = [name for name, _ in self._model.named_parameters()]
        self._parts = [parameter.to_local().detach() for parameter in self._whole]
        loss_scale = LossScale(compute.device) if compute.precision == "fp16" else None
        self.inner = InnerOptimizer(zip(names, self._parts, strict=True), constants, loss_scale=loss_scale)
        self.inner.norm_of_all = group.norm_of_parts

    @lost_if_it_fails()
    def gradient(self, batch: Tensor, compute: ComputeDevice, should_stop: Callable[[], bool]) -> Tensor:
        """Set `.grad` of each part to its gradient of the mean loss of `batch`, and return that loss ().

        Raises StopTraining, without gradients, if `should_stop` returned True on any rank.
        """
        assert self._model is not None
        self.drop_gradients()
        self._model.recomputes_blocks = compute.recomputes
        group, size, loss_scale = self._group, compute.microbatch_sequences, self.inner.loss_scale
        part = torch.tensor_split(batch, group.num_ranks)[group.rank]
        loss_sum = torch.zeros((), dtype=torch.float64, device=compute.device)
        targets = max(1, num_targets(batch))
        for start in range(0, largest_part(len(batch), group.num_ranks), size):
            group.stop_together(should_stop(), self.drop_gradients)
            own = part[start : start + size]
            weight = num_targets(own) / targets
            microbatch = compacted(own if len(own) else batch[:1])  # without own, of no weight: for its collectives
            with compute.autocast():
                loss = self._model.loss(microbatch.to(compute.device, non_blocking=True))
            # fully_shard takes the mean over the ranks where the sum is wanted.
            scaled = loss * (weight * group.num_ranks)
            (scaled if loss_scale is None else scaled * loss_scale.factor).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach() * weight
        for whole, own in zip(self._whole, self._parts, strict=True):
            assert isinstance(whole.grad, DTensor)
            own.grad = whole.grad.to_local()
        group.sum_of([loss_sum])
        return loss_sum

    def drop_gradients(self) -> None:
        """Drop what `.grad` holds."""
        self.inner.drop_gradients()
        for whole in self._whole:
            whole.grad = None

    @lost_if_it_fails()
    def optimize(self, progress: float, scale: float) -> Tensor:
        """Take the optimizer's step, and return the gradient's norm ()."""
        norm = self.inner.step(progress, scale)
        self.drop_gradients()
        return norm

    @lost_if_it_fails()
    @torch.no_grad()
    def scatter(self, which: Sequence[int], values: Sequence[Tensor] | None) -> None:
        """Set some parameters, by their numbers, from whole `values`, which rank 0 has."""
        for number, index in enumerate(which):
            self._scatter_one(self._parts[index], self._whole[index], None if values is None else values[number])

    @lost_if_it_fails()
    @torch.no_grad()
    def gather(self, into: Sequence[Tensor] | None) -> None:
        """Copy all parameters, put together one after the other, into tensors of rank 0."""
        self._gather_each(iter(self._parts), self._whole, into)

    @lost_if_it_fails()
    @torch.no_grad()
    def scatter_moments(self, values: Sequence[Tensor] | None) -> None:
        """Set the moments from whole ones, which rank 0 has, in the order of `InnerOptimizer.moment_tensors`."""
        for number, own in enumerate(self.inner.moment_tensors()):
            value = None if values is None else values[number]
            index, is_step = number // 3, number % 3 == 0
            if not is_step:
                self._scatter_one(own, self._whole[index], value)
                continue
            if value is not None:
                own.copy_(value)
            self._group.broadcast([own])

    @lost_if_it_fails()
    @torch.no_grad()
    def gather_moments(self, into: Sequence[Tensor] | None) -> Tensor:
        """Copy the moments, put together, into tensors of rank 0: the first moment of each parameter, then the second
        ones. Return the step counts (N,) of the N parameters."""
        tensors = self.inner.moment_tensors()
        for number in (1, 2):
            places = None if into is None else into[(number - 1) * len(self._whole) :]
            self._gather_each(iter(tensors[number::3]), self._whole, places)
        return torch.stack(tensors[::3]).cpu()

    def _scatter_one(self, own: Tensor, whole: DTensor, value: Tensor | None) -> None:
        full = torch.empty(whole.shape, device=own.device) if value is None else value.to(own.device)
        own.copy_(distribute_tensor(full, whole.device_mesh, whole.placements).to_local())

    def _gather_each(self, parts: Iterator[Tensor], wholes: Sequence[DTensor], into: Sequence[Tensor] | None) -> None:
        for number, (own, whole) in enumerate(zip(parts, wholes, strict=True)):
            mesh, placements = whole.device_mesh, whole.placements
            full = DTensor.from_local(own, mesh, placements, shape=whole.shape, stride=whole.stride()).full_tensor()
            if into is not None:
                into[number].copy_(full.view_as(into[number]))

    def close(self) -> None:
        """Drop everything that refers to the group, which would otherwise end after what its threads need."""
        self._model = None
        self._whole, self._parts = [], []
        self.inner.end()
        gc.collect()
