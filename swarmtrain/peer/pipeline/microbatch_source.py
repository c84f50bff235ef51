"""A driver's data: batches cut into microbatches, drawn in the network's thread while the trainer's chooses shards."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from swarmtrain.data.batches import BatchSource

__all__ = ["MicrobatchSource", "NoBatches"]


class MicrobatchSource:
    """A peer's batches, microbatch by microbatch; usable from any thread. Shapes: B sequences, T context tokens."""

    def __init__(self, batches: BatchSource, num_sequences: int) -> None:
        self._batches, self._num_sequences = batches, num_sequences
        self._left: deque[Tensor] = deque()
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """See `BatchSource`."""
        return self._batches.position

    @property
    def num_shards(self) -> int:
        """See `BatchSource`."""
        return self._batches.num_shards

    def use_shard(self, shard: int) -> None:
        """See `BatchSource`."""
        with self._lock:
            self._batches.use_shard(shard)

    def next_batch(self) -> Tensor:
        """See `BatchSource`."""
        with self._lock:
            return self._batches.next_batch()

    def next_microbatch(self) -> tuple[Tensor, Tensor]:
        """What goes into the first stage and what the last one compares with, int64 (B, T) each."""
        with self._lock:
            if not self._left:
                self._left.extend(torch.split(self._batches.next_batch(), self._num_sequences))
            sequences = self._left.popleft()
        return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


class NoBatches:
    """Of stages after the first, which are sent what they compute."""

    position = num_shards = 0

    def use_shard(self, shard: int) -> None:
        """See `BatchSource`."""

    def next_batch(self) -> Tensor:
        """See `BatchSource`."""
        raise AssertionError("only the first stage draws batches")
