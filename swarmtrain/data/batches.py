"""Batches: which tokens a peer trains on, as a function of the run, the peer, a count of batches and a shard.

Nothing but that count has to be kept to go on exactly where one stopped; which shard a round is drawn from is chosen at
its start. Shapes: B sequences, T context tokens;
a batch is (B, T + 1), of which `[:, :-1]` is the input and `[:, 1:]` the targets.
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
"""At least, however small the corpus."""


class BatchSource(Protocol):
    """What the trainer draws batches from."""

    @property
    def position(self) -> int:
        """Batches drawn so far, since the peer's first one in this run."""
        ...

    @property
    def num_shards(self) -> int:
        """Shards that `use_shard` can choose from; 0 if there are none."""
        ...

    def use_shard(self, shard: int) -> None:
        """Draw from this shard from now on."""
        ...

    def next_batch(self) -> torch.Tensor:
        """The next batch, int64 (B, T + 1)."""
        ...


def peer_seed(run_sha256: str, peer_id: str) -> int:
    """128 bits for a peer's random choices in a run."""
    return int.from_bytes(hashlib.sha256(f"batches {run_sha256} {peer_id}".encode()).digest()[:16], "little")


class Shards:
    """A corpus cut into shards that are alike: dealt out block by block, so that each has something of all of it.

    Training on one neighbourhood of the text for a whole round would pull a peer towards it. A block is as long as a
    sequence, shorter in a small corpus. What is drawn from a shard begins in one of its blocks.
    """

    def __init__(self, num_tokens: int, num_shards: int, context_tokens: int) -> None:
        """Each of `num_shards` must have a token at least: ValueError else."""
        if not 1 <= num_shards <= num_tokens:
            raise ValueError(f"{num_tokens} tokens in {num_shards} shards; allowed: 1 to {num_tokens} shards")
        self.num_shards, self._num_tokens = num_shards, num_tokens
        whole = num_tokens // num_shards
        self._block = max(1, min(context_tokens, whole // min(_BLOCKS_A_SHARD, whole)))

    def num_tokens(self, shard: int) -> int:
        """Tokens of a shard."""
        full, rest = divmod(self._num_tokens, self._block * self.num_shards)
        return full * self._block + min(max(rest - shard * self._block, 0), self._block)

    def places(self, shard: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in the corpus these tokens of the shard are, counted from its first one."""
        blocks, offsets = np.divmod(positions, self._block)
        return (blocks * self.num_shards + shard) * self._block + offsets


class Batches:
    """Windows of a corpus, each begun at a random token; batch b of a peer takes the same time to find for any b.

    Once a shard is chosen they begin in it, and run on in the corpus.
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
        """`tokens` (n,), any integer type. Raises RunFileError if n is less than one sequence, T + 1."""
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
        """Batches drawn so far."""
        return self._position

    @property
    def num_shards(self) -> int:
        """See `BatchSource`."""
        return 0 if self._shards is None else self._shards.num_shards

    def cut(self, num_shards: int) -> None:
        """Cut the corpus into shards; until one is chosen, batches are drawn from everywhere."""
        self._shards = Shards(len(self._tokens), num_shards, len(self._offsets) - 1)

    def use_shard(self, shard: int) -> None:
        """See `BatchSource`."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of a corpus of {self.num_shards}")
        self._shard = shard

    def next_batch(self) -> torch.Tensor:
        """The next batch, int64 (B, T + 1)."""
        generator = np.random.Philox(key=self._key, counter=self._position << 64)  # a batch has 2**64 counts of its own
        self._position += 1
        numbers = generator.random_raw(self._batch_sequences)
        num_starts = len(self._tokens) - len(self._offsets) + 1
        if self._shards is None or self._shard is None:
            starts = _modulo(numbers, num_starts)
        else:
            of_shard = _modulo(numbers, self._shards.num_tokens(self._shard))
            starts = self._shards.places(self._shard, of_shard).clip(max=num_starts - 1)
        places = starts[:, None] + self._offsets
        return torch.from_numpy(self._tokens[places].astype(np.int64))


def _modulo(numbers: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.int64]:
    return (numbers % np.uint64(limit)).astype(np.int64)


class StreamingBatches:
    """Sequences cut one after the other from documents that are read while training.

    `documents(epoch)` gives the peer's documents of one pass, always the same ones; a pass that ends is followed
    by the next. Memory holds one batch and one document. To resume, everything before `position` is read and
    encoded again, which a stream of unknown document lengths cannot avoid.
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
        """Reads nothing yet: the documents before `position` are skipped at the first `next_batch`."""
        self._sequence_tokens = context_tokens + 1
        self._batch_sequences = batch_sequences
        self._position = position
        self._parts = self._encoded(documents, tokenizer)
        self._rest: Tokens = np.empty(0, np.uint8)
        self._to_skip = position * batch_sequences * self._sequence_tokens

    @property
    def position(self) -> int:
        """Batches drawn so far."""
        return self._position

    @property
    def num_shards(self) -> int:
        """A stream has none: how much is still to come is not known."""
        return 0

    def use_shard(self, shard: int) -> None:
        """There is none to choose."""
        raise ValueError(f"shard {shard} of a stream")

    def next_batch(self) -> torch.Tensor:
        """The next batch, int64 (B, T + 1). Raises RunFileError if the data cannot be read or holds no text."""
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
    """Windows (B, T + 1) in which every token of the held-out text is a target exactly once.

    A newline stands before the text, so that its first token is a target too, and each window begins with the last
    target of the one before. All windows are full (the last batch may have fewer) but the last, which comes by
    itself as (1, r + 1). Exactly, then:

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
