"""Transfers of microbatches between main memory, in which they travel, and the device of a stage.

Nothing of the network knows a device: what arrives and what is answered is fp32, or tokens, in main memory. No thread
waits for a copy but whoever needs what is copied: not the stage's thread, and not the network's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from torch import Tensor

from swarmtrain.peer.devices.host_copies import HostCopier, HostCopy
from swarmtrain.peer.pipeline.driver import Tail


class StageTransfer:
    """Copies of one stage's inputs and answers, to its device and back.

    A payload is a tensor, or a tuple of them; an answer is a tensor, a `Tail`, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copier = HostCopier(device)

    # ------------------------------------------------------------- the network's side

    async def pinned(self, payload: Any) -> Any:
        """Return a payload in memory from which the device copies without a thread that waits."""
        return await asyncio.to_thread(_pinned, payload) if self.device.type == "cuda" else payload

    async def arrived(self, answer: Any) -> Any:
        """Return an answer that `to_host` gave, once all of it is in main memory."""
        copy = answer.gradient if isinstance(answer, Tail) else answer
        if copy is None:
            return answer
        await asyncio.to_thread(copy.wait_ready)
        return Tail(answer.loss, copy.values) if isinstance(answer, Tail) else copy.values

    # ------------------------------------------------------------- the stage's side

    def to_device(self, payload: Any) -> Any:
        """Return a payload on the device, which copies it in order with what it computes."""
        if isinstance(payload, Tensor):
            return payload.to(self.device, non_blocking=True)
        return tuple(self.to_device(each) for each in payload)

    def to_host(self, answer: Any) -> Any:
        """Ask for a copy of an answer; its tensor is replaced by that."""
        if isinstance(answer, Tail):
            return Tail(answer.loss, self.to_host(answer.gradient))
        if answer is None:
            return None
        copy = self._copier.copy([answer])
        return HostCopy(copy.values.view(answer.shape), copy.wait_ready)


def _pinned(payload: Any) -> Any:
    if isinstance(payload, Tensor):
        return payload if payload.is_pinned() else payload.pin_memory()
    return tuple(_pinned(each) for each in payload)
