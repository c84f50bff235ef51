"""Draw batches from one or several sources: of which source each sequence is, as a function of run, peer and batch.

A peer resumes exactly where it stopped from the number of batches alone. Shapes: B sequences, T context tokens; a batch
is (B, T + 1), of which `[:, :-1]` is the input and `[:, 1:]` the targets.

The first sequence of a batch is of a source drawn by weight: a random 64-bit number, and each source has its share of
these numbers. The others follow at steps of 2**64 / golden ratio, which spread over the shares as evenly as can be,
however many there are (a Weyl sequence): any part of a batch, such as a microbatch or what a slow peer takes of it, has
the sources nearly by their weights, and on average exactly.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_COUNTED_AT_ONCE = 1 << 20
"""Sequences whose sources are found at once when a stream's place is counted: 8 MiB of numbers."""

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class PeerPlace:
    """Identity of the peer that draws batches, and how many it has drawn."""

    run_sha256: str
    peer_id: str
    position: int = 0  # batches drawn before


class SequenceSource(Protocol):
    """Source of a batch's sequences: a corpus, or a stream."""

    @property
    def is_stream(self) -> bool:
        """True if sequences are cut one after the other from what is read while training."""
        ...

    @property
    def num_shards(self) -> int:
        """Number of shards; 0 if there are none."""
        ...

    def use_shard(self, shard: int) -> None:
        """Draw from this shard of the data from now on, if there are shards. May be larger than `num_shards`."""
        ...

    def sequences(self, first: int, numbers: Numbers) -> torch.Tensor:
        """Return as many sequences as there are `numbers` (n,), int64 (n, T + 1).

        A stream returns the peer's sequences from number `first` on, counted from its first one in the run; of a corpus
        the random `numbers` say which.
        """
        ...


def peer_seed(run_sha256: str, peer_id: str) -> int:
    """Return 128 bits that seed a peer's random choices in a run."""
    return int.from_bytes(hashlib.sha256(f"batches {run_sha256} {peer_id}".encode()).digest()[:16], "little")


class MixedBatches:
    """Batches whose sequences come from one or several sources by weight."""

    def __init__(
        self, sources: Sequence[SequenceSource], weights: Sequence[float], batch_sequences: int, place: PeerPlace
    ) -> None:
        """Take a weight above 0 for each source; only their proportions matter."""
        self._sources, self._batch_sequences = tuple(sources), batch_sequences
        self._key = peer_seed(place.run_sha256, place.peer_id)
        self._mixture_key = peer_seed(f"mixture {place.run_sha256}", place.peer_id)
        sums = list(itertools.accumulate(map(Fraction, weights)))
        self._ends = np.array([int(end / sums[-1] * 2**64) for end in sums[:-1]], np.uint64)
        self._position = place.position
        self._has_streams = any(source.is_stream for source in sources)
        self._drawn = self._num_drawn(0, place.position)

    @property
    def position(self) -> int:
        """Number of batches drawn so far."""
        return self._position

    @property
    def is_in_memory(self) -> bool:
        """True if drawing a batch takes no longer than copying it."""
        return not self._has_streams

    @property
    def num_shards(self) -> int:
        """Number of shards that `use_shard` can choose from; 0 if there are none. See `BatchSource`."""
        return max(source.num_shards for source in self._sources)

    def use_shard(self, shard: int) -> None:
        """Draw from this shard of each source from now on. See `BatchSource`."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of data in {self.num_shards} shards")
        for source in self._sources:
            source.use_shard(shard)

    def rewind(self, position: int) -> None:
        """Draw the batch of this number next, again: one of the last that were drawn."""
        self._drawn -= self._num_drawn(position, self._position)
        self._position = position

    def next_batch(self) -> torch.Tensor:
        """Return the next batch, int64 (B, T + 1). Raises RunFileError if a stream is unreadable or has no text."""
        # Each batch has 2**64 counts of its own.
        numbers = np.random.Philox(key=self._key, counter=self._position << 64).random_raw(self._batch_sequences)
        chosen = self._chosen(self._position, 1)[0]
        parts = []
        for source, each in enumerate(self._sources):
            if len(places := np.flatnonzero(chosen == source)):
                parts.append((places, each.sequences(int(self._drawn[source]), numbers[places])))
        self._drawn += self._num_drawn(self._position, self._position + 1)
        self._position += 1
        if len(parts) == 1:
            return parts[0][1]
        batch = torch.empty((self._batch_sequences, *parts[0][1].shape[1:]), dtype=torch.int64)
        for places, sequences in parts:
            batch[torch.from_numpy(places)] = sequences
        return batch

    def _chosen(self, first: int, num_batches: int) -> npt.NDArray[np.int64]:
        """Return the source of each sequence (num_batches, B), of the batches from number `first` on."""
        if not len(self._ends):
            return np.zeros((num_batches, self._batch_sequences), np.int64)
        # Philox makes four numbers at each count, and a batch has a count.
        begins = np.random.Philox(key=self._mixture_key, counter=first).random_raw(4 * num_batches)[::4]
        steps = np.arange(self._batch_sequences, dtype=np.uint64) * _GOLDEN
        return np.searchsorted(self._ends, begins[:, None] + steps, side="right")

    def _num_drawn(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return how many sequences the batches `begin` to `end` take of each source.

        Zeros if no source is a stream: only a stream asks.
        """
        num_sources = len(self._sources)
        drawn = np.zeros(num_sources, np.int64)
        if not self._has_streams:
            return drawn
        if num_sources == 1:
            return drawn + (end - begin) * self._batch_sequences
        at_once = max(1, _COUNTED_AT_ONCE // self._batch_sequences)
        for first in range(begin, end, at_once):
            chosen = self._chosen(first, min(at_once, end - first))
            drawn += np.bincount(chosen.ravel(), minlength=num_sources)
        return drawn
