"""Cut sequences from a data set that is read while training, one after the other, and find the place again at a resume.

A pass over the data set reads its files in an order that the peer's seed gives, and each file in blocks of
`BLOCK_ROWS` rows. The texts of a block are shuffled, and what they share with the held-out text is removed by the rules
of `overlap.py`, within the block. So what follows from the start of a block depends on nothing before it.

A checkpoint keeps the number of batches alone. How many tokens the blocks before have is known only when they are
encoded; a *place log* notes it as the stream is read, in the cache. A resume goes to the last noted block before its
batch: it skips the rows of that block's file before it, without encoding them, and encodes at most what follows in it.
Without the log, it reads and encodes everything again from the beginning. Either way the sequences are the same.

Memory holds a block, a batch, and the sequences of the last few batches.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from swarmtrain.algorithm.batch import join_rows
from swarmtrain.data.cache import load_array, store_array
from swarmtrain.data.document_encoder import EncodedDocument, nothing_to_learn
from swarmtrain.data.overlap import HeldOutIndex
from swarmtrain.data.tokens import Tokens
from swarmtrain.errors import RunFileError
from swarmtrain.words import counted

BLOCK_ROWS = 1000
"""Rows that are read, shuffled and compared with the held-out text at once."""

_START_ROWS = 2000
"""A pass begins at one of so many rows of its first file, so that peers do not all begin at its first one."""

_REWOUND_CALLS = 4
"""Calls whose sequences can be asked for again: those that a prefetching thread may be ahead, and one more."""

_MOST_LEFT_OUT = 100_000
"""Samples in a row without anything to learn after which a data set of any size is given up."""

_LOGGED_PLACES = 256
"""Most places in a log. Of a hundred thousand blocks it has one within 5 % of the way back to any of them."""

_log = logging.getLogger(__name__)


class StreamedRows(Protocol):
    """Rows of a data set, in files that can be read one by one."""

    @property
    def name(self) -> str:
        """Name of the data set, for messages."""
        ...

    @property
    def num_files(self) -> int:
        """Number of files."""
        ...

    @property
    def num_rows(self) -> int | None:
        """Number of rows of all files; None if it is not known."""
        ...

    def texts(self, file: int, begin: int, end: int | None) -> Iterator[bytes]:
        """Yield the text of each row of a file from row `begin` to before row `end`; b"" for a row without text.

        Raises RunFileError.
        """
        ...


class StreamPlace(NamedTuple):
    """Start of a block in a stream."""

    epoch: int = 0
    part: int = 0
    """Number of a file, or of what is read of it at once, in the order of this pass."""
    row: int = 0
    """Row in the part."""


class TextBlocks:
    """Documents of a stream, block by block, in the order of one peer, for ever."""

    def __init__(self, rows: StreamedRows, held_out: bytes, seed: int, *, are_samples: bool = False) -> None:
        self._rows, self._index, self._seed, self._are_samples = rows, HeldOutIndex(held_out), seed, are_samples

    @property
    def name(self) -> str:
        """Name of the data set, for messages."""
        return self._rows.name

    def from_place(self, place: StreamPlace) -> Iterator[tuple[StreamPlace, list[bytes]]]:
        """Yield (place, documents) of each block from `place` on. A document may be b"".

        Raises RunFileError if the data set is unreadable, or a whole pass has no text.
        """
        is_whole, has_text = place == (place.epoch, 0, 0), False
        while True:
            for part, (file, begin, end) in enumerate(self._parts(place.epoch)):
                if part < place.part:
                    continue
                for at, texts in self._blocks(file, begin, end, place.row if part == place.part else 0):
                    found = StreamPlace(place.epoch, part, at)
                    documents = self._cut(texts, found)
                    has_text = has_text or any(documents)
                    yield found, documents
            if is_whole and not has_text:
                raise RunFileError(
                    "data: the stream holds no text that is not in the run's held-out text; give more text",
                    code="only-held-out-text",
                )
            place, is_whole, has_text = StreamPlace(place.epoch + 1), True, False

    def _parts(self, epoch: int) -> list[tuple[int, int, int | None]]:
        """Return (file, first row, end row) of each part of a pass: the first file's beginning comes last."""
        seed = self._seed + epoch
        order = _shuffled(self._rows.num_files, f"files {seed}").tolist()
        begin = seed % min(self._rows.num_rows or _START_ROWS, _START_ROWS)
        first: list[tuple[int, int, int | None]] = [(order[0], begin, None)]
        return [*first, *((file, 0, None) for file in order[1:]), (order[0], 0, begin)]

    def _blocks(self, file: int, begin: int, end: int | None, row: int) -> Iterator[tuple[int, list[bytes]]]:
        texts: list[bytes] = []
        for text in self._rows.texts(file, begin + row, end):
            texts.append(text)
            if len(texts) == BLOCK_ROWS:
                yield row, texts
                row, texts = row + BLOCK_ROWS, []
        if texts:
            yield row, texts

    def _cut(self, texts: Sequence[bytes], place: StreamPlace) -> list[bytes]:
        """Return the documents of a block in shuffled order, without what they share with the held-out text."""
        order = _shuffled(len(texts), f"rows {self._seed} {place}").tolist()
        documents = [texts[number] for number in order if texts[number]]
        cut = self._index.cut(documents, are_samples=self._are_samples)
        text, begins = cut.text.tobytes(), [0, *cut.ends.tolist()]
        return [text[begin:end] for begin, end in itertools.pairwise(begins)]


def _shuffled(number: int, name: str) -> npt.NDArray[np.int64]:
    """Return a random order of 0 to `number` - 1 that depends on `name` only, on every machine."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(number), kind="stable")


class PlaceLog:
    """Tokens before the blocks of a stream, kept in a file of the cache. Losing it costs time, and changes nothing."""

    def __init__(self, path: Path | None) -> None:
        """Read the log at `path`; None: nothing is kept."""
        self._path = path
        found = None if path is None else load_array(path)
        rows = [] if found is None or len(found[0]) % 4 else found[0].astype(np.int64).reshape(-1, 4).tolist()
        self._tokens = [row[0] for row in rows]
        self._places = [StreamPlace(*row[1:]) for row in rows]

    def add(self, tokens: int, place: StreamPlace) -> None:
        """Note that the block at `place` begins after so many tokens of the stream."""
        if self._tokens and tokens <= self._tokens[-1]:
            return  # it is read again
        self._tokens.append(tokens)
        self._places.append(place)
        if len(self._tokens) > _LOGGED_PLACES:
            self._thin()
        if self._path is not None:
            rows = np.array([(tokens, *place) for tokens, place in zip(self._tokens, self._places, strict=True)])
            store_array(self._path, rows.astype(np.int64).ravel(), {})

    def _thin(self) -> None:
        """Drop the place whose neighbours are nearest to each other, relative to how long ago it was."""
        at = np.array(self._tokens)
        dropped = int(np.argmin((at[2:] - at[:-2]) / (at[-1] - at[1:-1]))) + 1
        del self._tokens[dropped], self._places[dropped]

    def before(self, tokens: int) -> tuple[int, StreamPlace]:
        """Return (tokens before it, place) of the last noted block with at most `tokens` before it."""
        number = bisect.bisect_right(self._tokens, tokens)
        return (self._tokens[number - 1], self._places[number - 1]) if number else (0, StreamPlace())


class SequenceStream:
    """Sequences of T + 1 tokens, cut one after the other from a stream's documents. See `SequenceSource`."""

    is_stream = True
    num_shards = 0
    """A stream has no shards, since its length is unknown."""

    def __init__(
        self,
        blocks: TextBlocks,
        encode: Callable[[bytes], Tokens],
        context_tokens: int,
        log: PlaceLog | None = None,
        rows: int = 1,
    ) -> None:
        """`encode` returns the tokens (n,) of a document. With 2 or 3 `rows` (`algorithm/batch.py`) it returns an array
        (3, n) of its tokens, of 1 where one is a target, and of positions (see `stacked`)."""
        self._blocks, self._encode, self._sequence_tokens, self._rows = blocks, encode, context_tokens + 1, rows
        self._log = PlaceLog(None) if log is None else log
        self._parts: Iterator[Tokens] = iter(())
        self._rest: Tokens = np.empty(0 if rows == 1 else (3, 0), np.uint8)
        self._next = -1
        """Number of the sequence that is cut next; -1 before the first."""
        shape = (context_tokens + 1,) if rows == 1 else (rows, context_tokens + 1)
        self._kept = torch.empty((0, *shape), dtype=torch.int64)
        """Last sequences, up to the next one."""
        self._firsts: deque[int] = deque(maxlen=_REWOUND_CALLS)

    def use_shard(self, shard: int) -> None:
        """Do nothing: a stream is read in its own order."""

    def sequences(self, first: int, numbers: npt.NDArray[np.uint64]) -> torch.Tensor:
        """Return the sequences from number `first` on, as many as there are `numbers`, int64 (n, T + 1) or
        (n, rows, T + 1).

        Sequences of the last few calls may be asked for again. Raises RunFileError if the data set is unreadable, has
        no text, or nothing to learn; the next call then begins with the same sequences.
        """
        if first > self._next or self._next < 0:
            self._seek(first)
        oldest = self._next - len(self._kept)
        assert first >= oldest, f"sequence {first} is no longer kept; the oldest one is {oldest}"
        end = first + len(numbers)
        if end > self._next:
            self._kept = torch.cat([self._kept, self._cut(end - self._next)])
            self._next = end
        self._firsts.append(first)
        found = self._kept[first - oldest : end - oldest]
        self._kept = self._kept[min(self._firsts) - oldest :].clone()
        return found

    def _cut(self, num_sequences: int) -> torch.Tensor:
        needed = num_sequences * self._sequence_tokens
        parts, num_tokens = [self._rest], self._rest.shape[-1]
        try:
            while num_tokens < needed:
                parts.append(next(self._parts))
                num_tokens += parts[-1].shape[-1]
        except BaseException:
            self._next = -1  # the next call looks for its place again
            raise
        joined = np.concatenate(parts, axis=-1)
        self._rest = joined[..., needed:]
        cut = joined[..., :needed].astype(np.int64).reshape(*joined.shape[:-1], num_sequences, self._sequence_tokens)
        return torch.from_numpy(cut) if self._rows == 1 else _with_rows(cut, self._rows)

    def _seek(self, first: int) -> None:
        """Go to sequence number `first`, from the last block before it whose place is known."""
        target = first * self._sequence_tokens
        num_tokens, place = self._log.before(target)
        _log.debug(
            "to token %d of a stream: %d of them from %s on are encoded again", target, target - num_tokens, place
        )
        self._parts, self._rest = self._encoded(num_tokens, place), self._rest[..., :0]
        self._kept, self._next = self._kept[:0], -1
        self._firsts.clear()
        while num_tokens < target:
            self._rest = next(self._parts)
            num_tokens += self._rest.shape[-1]
        self._rest = self._rest[..., self._rest.shape[-1] - (num_tokens - target) :]
        self._next = first

    def _encoded(self, num_tokens: int, place: StreamPlace) -> Iterator[Tokens]:
        """Yield the tokens of each document from `place` on, which has `num_tokens` before it.

        Raises RunFileError if those of a whole pass, or `_MOST_LEFT_OUT` in a row, have none.
        """
        epoch, is_empty_pass, num_left_out = place.epoch, place == (place.epoch, 0, 0), 0
        for at, documents in self._blocks.from_place(place):
            self._log.add(num_tokens, at)
            if at.epoch != epoch:
                if is_empty_pass and num_left_out:
                    raise self._nothing_to_learn(num_left_out)
                epoch, is_empty_pass = at.epoch, True
            for text in documents:
                if not text:
                    continue
                tokens = self._encode(text if text.endswith(b"\n") else text + b"\n")
                if tokens.shape[-1]:
                    is_empty_pass, num_left_out = False, 0
                    num_tokens += tokens.shape[-1]
                    yield tokens
                elif (num_left_out := num_left_out + 1) >= _MOST_LEFT_OUT:
                    raise self._nothing_to_learn(num_left_out)

    def _nothing_to_learn(self, num_samples: int) -> RunFileError:
        return nothing_to_learn(f'{counted(num_samples, "sample")} read of "{self._blocks.name}"')


def stacked(documents: Sequence[EncodedDocument]) -> Tokens:
    """Return what a document has become as an array (3, n) of tokens, of 1 where one is a target, and of positions."""
    parts = [
        np.stack(
            [
                tokens.astype(np.int64),
                np.ones_like(tokens, np.int64) if wanted is None else wanted,
                np.arange(len(tokens)),
            ]
        )
        for tokens, wanted in documents
    ]
    return np.concatenate([np.empty((3, 0), np.int64), *parts], axis=1)


def _with_rows(cut: npt.NDArray[np.int64], rows: int) -> torch.Tensor:
    """Return sequences (n, rows, T + 1) of tokens, targets and positions (3, n, T + 1).

    A document that a sequence begins within begins anew in it.
    """
    tokens, is_target, positions = cut
    if rows == 2:
        return join_rows(tokens, is_target > 0)
    places = np.arange(tokens.shape[1])
    positions = places - (places - positions).clip(min=0)
    return join_rows(tokens, (is_target > 0) & (positions > 0), positions)
