"""Group of a peer's ranks: the collectives by which data-parallel training on several devices stays in step.

Each rank holds the whole model and computes the gradient of its part of a batch. The gradients are summed when all
ranks have theirs, so that a rank whose memory ran out, or that was told to stop, is known before: then all ranks drop
the step together. For this reason gradients are not averaged by torch's DistributedDataParallel, which does so within
the backward pass: the others would wait there for a rank that cannot finish its own. What that costs is the overlap of
sending with the last microbatch's backward pass.

Tensors in main memory are sent by gloo, tensors on CUDA cards by nccl; nothing leaves the machine: see `connect`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _take_tensors
from torch.distributed import FileStore  # type: ignore[attr-defined]

from swarmtrain.algorithm.batch import num_targets
from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.algorithm.outer import flatten, unflatten_into
from swarmtrain.peer.devices.compute import ComputeDevice, is_out_of_memory
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training.gradients import add_gradient

_BUCKET_BYTES = 25_000_000
"""Bytes of gradients that are summed at once, as DistributedDataParallel does."""


class RankLostError(Exception):
    """Raised when a collective cannot be completed: another rank has ended, or does not answer in time."""


class _Outcome(IntEnum):
    """Result of a rank's part of a step; the largest of all ranks' is the step's."""

    COMPUTED = 0
    OUT_OF_MEMORY = 1
    STOPPED = 2


@dataclass(frozen=True)
class RankGroup:
    """Collectives of one rank with the others. All ranks call the same methods in the same order."""

    rank: int
    num_ranks: int
    device: torch.device

    @classmethod
    def connect(cls, store: FileStore, rank: int, num_ranks: int, device: torch.device, limit_s: float) -> RankGroup:
        """Meet the other ranks at `store`, a file. Any collective may take `limit_s` seconds.

        A file has no port. gloo's and nccl's own connections are made over the loopback interface, which two variables
        set: they listen at its address and at no other. Raises RankLostError if the others do not come.
        """
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback_interface()
        if device.type == "cuda":
            # An abort is ours (see `abort`): torch's watchdog would end the process, and the peer could not leave.
            os.environ.update({"NCCL_IB_DISABLE": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"})
            torch.cuda.set_device(device)
        with lost_if_it_fails():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=limit_s),
            )
        return cls(rank, num_ranks, device)

    def gradient(
        self,
        batch: Tensor,
        loss_of: Callable[[Tensor], Tensor],
        compute: ComputeDevice,
        inner: InnerOptimizer,
        should_stop: Callable[[], bool],
    ) -> Tensor | None:
        """Set `.grad` on every rank to the gradient of the mean loss of `batch`, and return that loss ().

        Each rank computes the part of the sequences that is its own; with fewer sequences than ranks some have none.
        All multiply their losses by rank 0's loss scale: where all peers take the optimizer's step together, the other
        ranks take none that would adapt their own.
        Returns None, without gradients, if memory ran out on any rank. Raises StopTraining, without gradients, if
        `should_stop` returned True on any rank.
        """
        inner.drop_gradients()
        if inner.loss_scale is not None:
            self.broadcast([inner.loss_scale.factor])
        part, outcome, loss = torch.tensor_split(batch, self.num_ranks)[self.rank], _Outcome.COMPUTED, None
        try:
            loss = add_gradient(loss_of, part, num_targets(batch), compute, inner.loss_scale, should_stop)
            outcome = _Outcome.OUT_OF_MEMORY if loss is None else outcome
        except StopTraining:
            outcome = _Outcome.STOPPED
        outcome = self._worst(outcome)
        if outcome != _Outcome.COMPUTED or loss is None:
            inner.drop_gradients()
            if outcome == _Outcome.STOPPED:
                raise StopTraining
            return None
        for bucket in _take_tensors(inner.gradients(), _BUCKET_BYTES):  # type: ignore[no-untyped-call]
            flat = flatten(bucket)
            self.sum_of([flat])
            unflatten_into(flat, bucket)
        self.sum_of([loss])
        return loss

    def stop_together(self, is_stopped: bool, give_up: Callable[[], None]) -> None:
        """Call `give_up` and raise StopTraining on every rank if any is stopped."""
        if self._worst(_Outcome.STOPPED if is_stopped else _Outcome.COMPUTED) == _Outcome.STOPPED:
            give_up()
            raise StopTraining

    def _worst(self, outcome: _Outcome) -> _Outcome:
        """Return the worst outcome of all ranks. It travels in main memory: no device is waited for."""
        worst = torch.tensor(int(outcome))
        with lost_if_it_fails():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        return _Outcome(int(worst))

    def sum_of(self, tensors: Sequence[Tensor]) -> None:
        """Set the tensors to their sums over all ranks: the same bits everywhere."""
        with lost_if_it_fails():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace the other ranks' values of the tensors by those of rank 0."""
        with lost_if_it_fails():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def norm_of_all(self, norm: Tensor) -> Tensor:
        """Return rank 0's norm () of the summed gradients; infinite if they were not summed over all ranks.

        Equal gradients have norms that may differ in the last bit, since they are summed in another order by another
        number of threads, or by another card. After `abort` a card holds unfinished sums, which no step must be taken
        from: the count of ranks was not finished either.
        """
        norm = self._unless_unfinished(norm)
        self.broadcast([norm])
        return norm

    def norm_of_parts(self, norm: Tensor) -> Tensor:
        """Return the norm () of gradients of which each rank has a part, given that of this rank's part; infinite as in
        `norm_of_all`."""
        square = norm.square()
        self.sum_of([square])
        return self._unless_unfinished(square.sqrt())

    def _unless_unfinished(self, norm: Tensor) -> Tensor:
        count = torch.ones_like(norm)
        self.sum_of([count])
        return torch.where(count == self.num_ranks, norm, torch.inf)

    def abort(self) -> None:
        """End collectives under way on a card, which do not notice that a rank has ended; from any thread."""
        if self.device.type == "cuda" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        """End the group on this rank."""
        if self.device.type == "cuda":
            self.abort()
        elif dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def lost_if_it_fails() -> Iterator[None]:
    """Raise RankLostError for what a collective raises when another rank is not there, and not for a lack of memory."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RankLostError((str(error).strip().splitlines() or ["no reason"])[0]) from error


def loopback_interface() -> str:
    """Return the name of the network interface that leads to this machine alone: "lo" on Linux."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address.startswith("127.") for each in addresses):
            return name
    return "lo"
