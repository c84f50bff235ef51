"""Windows of a corpus: which tokens a peer trains on, as a function of run, peer, number of the batch and shard.

A peer resumes exactly where it stopped from the number of batches alone; the shard is chosen anew at each round's
start. Shapes: B sequences, T context tokens; a batch is (B, T + 1), of which `[:, :-1]` is the input and `[:, 1:]` the
targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from swarmtrain.data.mixture import MixedBatches, PeerPlace
from swarmtrain.data.tokens import Tokens
from swarmtrain.errors import RunFileError

START_TOKEN = ord("\n")
"""Token that begins a text for tokenizers in which every byte is a token."""
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


class Windows:
    """Windows of a corpus, each starting at a random token.

    Once a shard is chosen, windows start in it and run on in the corpus (decision 40). See `SequenceSource`.
    """

    is_stream = False

    def __init__(self, tokens: Tokens, context_tokens: int, *, runs_on: bool = False) -> None:
        """Take `tokens` (n,), any integer type. Raises RunFileError if n is less than one sequence, T + 1.

        With `runs_on` a window goes on at the corpus' beginning, so that one token is enough.
        """
        self._runs_on = runs_on
        if len(tokens) < (1 if runs_on else context_tokens + 1):
            raise RunFileError(
                f"the corpus has {len(tokens)} tokens and a sequence needs {context_tokens + 1}: lower "
                "model.context_tokens or give more text",
                code="too-little-text",
            )
        self._tokens = tokens
        self._offsets = np.arange(context_tokens + 1)
        self._shards: Shards | None = None
        self._shard: int | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards; 0 if there are none."""
        return 0 if self._shards is None else self._shards.num_shards

    def cut(self, num_shards: int) -> None:
        """Cut the corpus into shards. Until one is chosen, windows are drawn from everywhere."""
        self._shards = Shards(len(self._tokens), num_shards, len(self._offsets) - 1)

    def use_shard(self, shard: int) -> None:
        """Draw from this shard of the data from now on: with fewer shards, from shard modulo their number."""
        self._shard = shard % self._shards.num_shards if self._shards is not None else None

    def sequences(self, first: int, numbers: npt.NDArray[np.uint64]) -> torch.Tensor:
        """Return the windows of these random numbers (n,), int64 (n, T + 1)."""
        places = self._starts(numbers)[:, None] + self._offsets
        return torch.from_numpy(self._tokens[places].astype(np.int64))

    def _starts(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the tokens (n,) that these random numbers (n,) choose, at which windows may start."""
        num_starts = len(self._tokens) - (0 if self._runs_on else len(self._offsets) - 1)
        if self._shards is None or self._shard is None:
            return _modulo(numbers, num_starts)
        of_shard = _modulo(numbers, self._shards.num_tokens(self._shard))
        # A window that would run over the corpus' end starts where the last whole window does.
        return self._shards.places(self._shard, of_shard).clip(max=num_starts - 1)


class Batches(MixedBatches):
    """Batches of windows of one corpus. Any batch takes the same time to find."""

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
        self._windows = Windows(tokens, context_tokens)
        place = PeerPlace(run_sha256=run_sha256, peer_id=peer_id, position=position)
        super().__init__([self._windows], [1.0], batch_sequences, place)

    def cut(self, num_shards: int) -> None:
        """Cut the corpus into shards. Until one is chosen, batches are drawn from everywhere."""
        self._windows.cut(num_shards)


def _modulo(numbers: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.int64]:
    # Biased by at most limit / 2**64, as the numbers have 64 bits.
    return (numbers % np.uint64(limit)).astype(np.int64)


def held_out_batches(
    tokens: Tokens, context_tokens: int, batch_sequences: int, start_token: int = START_TOKEN
) -> Iterator[torch.Tensor]:
    """Yield windows (B, T + 1) in which every token of the held-out text is a target exactly once.

    The start token precedes the text, so that its first token is a target too, and each window begins with the last
    target of the one before. All windows are full except the last, which comes by itself as (1, r + 1); the last batch
    of full windows may have fewer. Exactly, then:

        nats per byte = sum over the batches of the summed cross entropy of their targets / bytes of the text
    """
    text = np.concatenate([np.array([start_token]), tokens]).astype(np.int64)
    num_windows, rest = divmod(len(tokens), context_tokens)
    offsets = np.arange(context_tokens + 1)
    for first in range(0, num_windows, batch_sequences):
        starts = np.arange(first, min(first + batch_sequences, num_windows)) * context_tokens
        yield torch.from_numpy(text[starts[:, None] + offsets])
    if rest:
        yield torch.from_numpy(text[None, num_windows * context_tokens :].copy())
