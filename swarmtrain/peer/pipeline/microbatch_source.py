"""Data of a driver: batches cut into microbatches. The network thread draws them, the trainer thread chooses shards."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from swarmtrain.data.batches import BatchSource


class MicrobatchSource:
    """Batches of a peer, handed out by microbatch. Thread-safe. Shapes: B sequences, T context tokens."""

    def __init__(self, batches: BatchSource, num_sequences: int) -> None:
        self._batches, self._num_sequences = batches, num_sequences
        self._left: deque[Tensor] = deque()
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """Number of batches drawn since the peer's first one in this run. See `BatchSource`."""
        return self._batches.position

    @property
    def num_shards(self) -> int:
        """Number of shards that `use_shard` can choose from; 0 if there are none. See `BatchSource`."""
        return self._batches.num_shards

    def use_shard(self, shard: int) -> None:
        """Draw from this shard from now on. See `BatchSource`."""
        with self._lock:
            self._batches.use_shard(shard)

    def next_batch(self) -> Tensor:
        """Return the next batch, int64 (B, T + 1). See `BatchSource`."""
        with self._lock:
            return self._batches.next_batch()

    def next_microbatch(self) -> tuple[Tensor, Tensor]:
        """Return the input of the first stage and the targets of the last, int64 (B, T) each."""
        with self._lock:
            if not self._left:
                self._left.extend(torch.split(self._batches.next_batch(), self._num_sequences))
            sequences = self._left.popleft()
        return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


class NoBatches:
    """Batches of stages after the first, which draw none: drivers send them their work."""

    position = num_shards = 0

    def use_shard(self, shard: int) -> None:
        """Do nothing, since this source has no batches. See `BatchSource`."""

    def next_batch(self) -> Tensor:
        """Raise AssertionError, since this source has no batches. See `BatchSource`."""
        raise AssertionError("only the first stage draws batches")
