"""Gradient of a batch, or of a rank's part of it, in microbatches that fit the memory of a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swarmtrain.algorithm.batch import compacted, num_targets
from swarmtrain.algorithm.inner import LossScale
from swarmtrain.peer.devices.compute import ComputeDevice, is_out_of_memory
from swarmtrain.peer.lifecycle.stop import StopTraining


def add_gradient(
    loss_of: Callable[[Tensor], Tensor],
    part: Tensor,
    batch_targets: int,
    compute: ComputeDevice,
    loss_scale: LossScale | None,
    should_stop: Callable[[], bool],
) -> Tensor | None:
    """Add the gradient of a part's share in the mean loss of a batch to `.grad`, and return that share ().

    `part` are some or all sequences of the batch (`algorithm/batch.py`), which has `batch_targets` targets; the mean is
    over these, so microbatches count by their own. Returns None if memory ran out; raises StopTraining if `should_stop`
    returns True. In both cases `.grad` holds the gradient of something. The sum of losses is kept in fp64 where the
    device has it.
    """
    dtype = torch.float32 if compute.device.type == "mps" else torch.float64
    loss_sum = torch.zeros((), dtype=dtype, device=compute.device)
    for start in range(0, len(part), compute.microbatch_sequences):
        # Asked between microbatches: a batch of a large model takes minutes, and Ctrl-C must not wait for it.
        if should_stop():
            raise StopTraining
        microbatch = compacted(part[start : start + compute.microbatch_sequences])
        if not (targets := num_targets(microbatch)):
            continue
        try:
            with compute.autocast():
                loss = loss_of(microbatch.to(compute.device, non_blocking=True))
            loss = loss * (targets / batch_targets)
            scaled = loss if loss_scale is None else loss * loss_scale.factor
            scaled.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        loss_sum += loss.detach()
    return loss_sum
