"""Draw batches: which tokens a peer trains on, as a function of run, peer, number of the batch and shard.

A peer resumes exactly where it stopped from the number of batches alone; the shard is chosen anew at each round's
start. Shapes: B sequences, T context tokens; a batch is (B, T + 1), of which `[:, :-1]` is the input and `[:, 1:]` the
targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from swarmtrain.data.tokens import Tokenizer, Tokens
from swarmtrain.errors import RunFileError

__all__ = ["BatchSource", "Batches", "Shards", "StreamingBatches", "held_out_batches", "peer_seed"]

START_TOKEN = ord("\n")  # the same byte in every tokenizer
_BLOCKS_A_SHARD = 8
"""Least number of blocks in a shard, however small the corpus."""


class BatchSource(Protocol):
    """Source of the trainer's batches."""

    @property
    def position(self) -> int:
        """Number of batches drawn since the peer's first one in this run."""
        ...

    @property
    def num_shards(self) -> int:
        """Number of shards that `use_shard` can choose from; 0 if there are none."""
        ...

    def use_shard(self, shard: int) -> None:
        """Draw from this shard from now on."""
        ...

    def next_batch(self) -> torch.Tensor:
        """Return the next batch, int64 (B, T + 1)."""
        ...


def peer_seed(run_sha256: str, peer_id: str) -> int:
    """Return 128 bits that seed a peer's random choices in a run."""
    return int.from_bytes(hashlib.sha256(f"batches {run_sha256} {peer_id}".encode()).digest()[:16], "little")


class Shards:
    """Corpus cut into similar shards: it is dealt out block by block, so that each shard has something of all of it.

    Training on one neighbourhood of the text for a whole round would pull a peer towards it (decision 21). A block is
    as long as a sequence, shorter in a small corpus. A window drawn from a shard begins in one of its blocks.
    """

    def __init__(self, num_tokens: int, num_shards: int, context_tokens: int) -> None:
        """Cut `num_tokens` into `num_shards`. Raises ValueError if one would have no token."""
        if not 1 <= num_shards <= num_tokens:
            raise ValueError(f"{num_tokens} tokens in {num_shards} shards; allowed: 1 to {num_tokens} shards")
        self.num_shards, self._num_tokens = num_shards, num_tokens
        whole = num_tokens // num_shards
        self._block = max(1, min(context_tokens, whole // min(_BLOCKS_A_SHARD, whole)))

    def num_tokens(self, shard: int) -> int:
        """Return the number of tokens in a shard."""
        full, rest = divmod(self._num_tokens, self._block * self.num_shards)
        return full * self._block + min(max(rest - shard * self._block, 0), self._block)

    def places(self, shard: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where these tokens of the shard, counted from its first one, are in the corpus."""
        blocks, offsets = np.divmod(positions, self._block)
        return (blocks * self.num_shards + shard) * self._block + offsets


class Batches:
    """Windows of a corpus, each starting at a random token. Any batch takes the same time to find.

    Once a shard is chosen, windows start in it and run on in the corpus (decision 40).
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        context_tokens: int,
        batch_sequences: int,
        run_sha256: str,
        peer_id: str,
        position: int = 0,
    ) -> None:
        """Take `tokens` (n,), any integer type. Raises RunFileError if n is less than one sequence, T + 1."""
        if len(tokens) < context_tokens + 1:
            raise RunFileError(
                f"the corpus has {len(tokens)} tokens and a sequence needs {context_tokens + 1}: lower "
                "model.context_tokens or give more text",
                code="too-little-text",
            )
        self._tokens = tokens
        self._key = peer_seed(run_sha256, peer_id)
        self._batch_sequences = batch_sequences
        self._offsets = np.arange(context_tokens + 1)
        self._position = position
        self._shards: Shards | None = None
        self._shard: int | None = None

    @property
    def position(self) -> int:
        """Number of batches drawn so far."""
        return self._position

    @property
    def num_shards(self) -> int:
        """Number of shards that `use_shard` can choose from; 0 if there are none. See `BatchSource`."""
        return 0 if self._shards is None else self._shards.num_shards

    def cut(self, num_shards: int) -> None:
        """Cut the corpus into shards. Until one is chosen, batches are drawn from everywhere."""
        self._shards = Shards(len(self._tokens), num_shards, len(self._offsets) - 1)

    def use_shard(self, shard: int) -> None:
        """Draw from this shard from now on. See `BatchSource`."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of a corpus of {self.num_shards}")
        self._shard = shard

    def rewind(self, position: int) -> None:
        """Draw the batch of this number next, again."""
        self._position = position

    def next_batch(self) -> torch.Tensor:
        """Return the next batch, int64 (B, T + 1)."""
        # Each batch has 2**64 counts of its own.
        generator = np.random.Philox(key=self._key, counter=self._position << 64)
        self._position += 1
        numbers = generator.random_raw(self._batch_sequences)
        num_starts = len(self._tokens) - len(self._offsets) + 1
        if self._shards is None or self._shard is None:
            starts = _modulo(numbers, num_starts)
        else:
            of_shard = _modulo(numbers, self._shards.num_tokens(self._shard))
            # A window that would run over the corpus' end starts where the last whole window does.
            starts = self._shards.places(self._shard, of_shard).clip(max=num_starts - 1)
        places = starts[:, None] + self._offsets
        return torch.from_numpy(self._tokens[places].astype(np.int64))


def _modulo(numbers: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.int64]:
    # Biased by at most limit / 2**64, as the numbers have 64 bits.
    return (numbers % np.uint64(limit)).astype(np.int64)


class StreamingBatches:
    """Sequences cut one after the other from documents that are read while training.

    `documents(epoch)` yields the peer's documents of one pass, always the same ones; passes follow each other. Memory
    holds one batch and one document. A resume reads and encodes everything before `position` again: the documents'
    lengths are unknown.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterator[bytes]],
        tokenizer: Tokenizer,
        *,
        context_tokens: int,
        batch_sequences: int,
        position: int = 0,
    ) -> None:
        """Prepare a stream; the documents before `position` are skipped at the first `next_batch`."""
        self._sequence_tokens = context_tokens + 1
        self._batch_sequences = batch_sequences
        self._position = position
        self._parts = self._encoded(documents, tokenizer)
        self._rest: Tokens = np.empty(0, np.uint8)
        self._to_skip = position * batch_sequences * self._sequence_tokens

    @property
    def position(self) -> int:
        """Number of batches drawn so far."""
        return self._position

    @property
    def num_shards(self) -> int:
        """0: a stream has no shards, since its length is unknown."""
        return 0

    def use_shard(self, shard: int) -> None:
        """Raise ValueError: a stream has no shards."""
        raise ValueError(f"shard {shard} of a stream")

    def next_batch(self) -> torch.Tensor:
        """Return the next batch, int64 (B, T + 1). Raises RunFileError if the data is unreadable or has no text."""
        while self._to_skip:
            skipped = min(self._to_skip, len(self._rest))
            self._rest = self._rest[skipped:]
            self._to_skip -= skipped
            if self._to_skip:
                self._rest = next(self._parts)
        needed = self._batch_sequences * self._sequence_tokens
        parts, num_tokens = [self._rest], len(self._rest)
        while num_tokens < needed:
            parts.append(next(self._parts))
            num_tokens += len(parts[-1])
        tokens = np.concatenate(parts)
        self._rest = tokens[needed:]
        self._position += 1
        return torch.from_numpy(tokens[:needed].astype(np.int64).reshape(self._batch_sequences, self._sequence_tokens))

    @staticmethod
    def _encoded(documents: Callable[[int], Iterator[bytes]], tokenizer: Tokenizer) -> Iterator[Tokens]:
        epoch = 0
        while True:
            empty = True
            for text in documents(epoch):
                if text:
                    empty = False
                    yield tokenizer.encode(text if text.endswith(b"\n") else text + b"\n")
            if empty:
                raise RunFileError(
                    "data: the stream holds no text that is not in the run's held-out text; give more text",
                    code="only-held-out-text",
                )
            epoch += 1


def held_out_batches(tokens: Tokens, context_tokens: int, batch_sequences: int) -> Iterator[torch.Tensor]:
    """Yield windows (B, T + 1) in which every token of the held-out text is a target exactly once.

    A newline precedes the text, so that its first token is a target too, and each window begins with the last target of
    the one before. All windows are full except the last, which comes by itself as (1, r + 1); the last batch of full
    windows may have fewer. Exactly, then:

        nats per byte = sum over the batches of the summed cross entropy of `[:, 1:]` / bytes of the text
    """
    text = np.concatenate([np.array([START_TOKEN]), tokens]).astype(np.int64)
    num_windows, rest = divmod(len(tokens), context_tokens)
    offsets = np.arange(context_tokens + 1)
    for first in range(0, num_windows, batch_sequences):
        starts = np.arange(first, min(first + batch_sequences, num_windows)) * context_tokens
        yield torch.from_numpy(text[starts[:, None] + offsets])
    if rest:
        yield torch.from_numpy(text[None, num_windows * context_tokens :].copy())
