"""Which tokens of a corpus a sequence has, and which of them are targets.

In a *stream* a window begins at any token and runs on over documents. With `packing = "documents"` it begins where a
document does, or a piece of one that is longer than a sequence, and runs on over the documents that follow; positions
begin anew with each, so that attention stays inside it, and its first token is no target: nothing before it belongs to
it. At its end the corpus goes on with its beginning.

A random token chooses the window that begins at it, or at the last beginning before it. So a piece is drawn as often as
it has tokens, and every token is read about equally often; first tokens of short documents more often, since windows of
those before them read them too.

A window without any target would teach nothing, and is never drawn. Shapes: B sequences, T context tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from swarmtrain.algorithm.batch import join_rows
from swarmtrain.data.batches import Windows
from swarmtrain.data.document_encoder import EncodedCorpus
from swarmtrain.errors import RunFileError

Indices = npt.NDArray[np.int64]


class CorpusWindows(Windows):
    """Windows of a corpus in which some tokens are no targets, or whose documents are kept apart.

    `rows` are those of its sequences (`algorithm/batch.py`): 3 where documents are kept apart.
    """

    def __init__(self, corpus: EncodedCorpus, context_tokens: int, rows: int) -> None:
        """Raises RunFileError if the corpus has fewer tokens than a sequence, T + 1, or nothing to learn."""
        super().__init__(corpus.tokens, context_tokens, runs_on=rows == 3)
        self._corpus, self._targets = corpus, np.empty(0, np.int64)
        self._begins: Indices | None = None
        """Where windows may begin, ascending; None: at any token that leaves room for a sequence."""
        if rows == 3:
            assert corpus.starts is not None, "an encoder of documents says where each begins"
            self._begins = self._teaching(piece_starts(corpus.starts, len(corpus.tokens), context_tokens))
        elif corpus.is_target is not None:
            self._targets = np.flatnonzero(corpus.is_target)

    def _teaching(self, begins: Indices) -> Indices:
        """Return those beginnings whose windows have a target. Raises RunFileError if there are none."""
        corpus, context_tokens = self._corpus, len(self._offsets) - 1
        wanted = np.ones(len(corpus.tokens), np.bool_) if corpus.is_target is None else corpus.is_target.copy()
        wanted[corpus.starts] = False
        # Sums over the corpus and over its beginning again, where the last windows end.
        again = np.resize(wanted, context_tokens)
        sums = np.concatenate([[0], np.cumsum(np.concatenate([wanted, again]), dtype=np.int64)])
        has_target = sums[begins + context_tokens + 1] > sums[begins + 1]
        if not has_target.any():
            raise RunFileError(
                "data: no document has a second token, so there is nothing to predict; give more text",
                code="too-little-text",
            )
        return begins[has_target]

    def sequences(self, first: int, numbers: npt.NDArray[np.uint64]) -> torch.Tensor:
        """Return the windows of these random numbers (n,), int64 (n, 2, T + 1) or (n, 3, T + 1)."""
        corpus, starts = self._corpus, self._windows_of(self._starts(numbers))
        places = (starts[:, None] + self._offsets) % len(corpus.tokens)
        is_target = np.ones_like(places, np.bool_) if corpus.is_target is None else corpus.is_target[places]
        positions = None
        if self._begins is not None:
            assert corpus.starts is not None
            positions = document_positions(starts, corpus.starts, len(corpus.tokens), len(self._offsets))
            is_target &= positions > 0
        return join_rows(corpus.tokens[places].astype(np.int64), is_target, positions)

    def _windows_of(self, places: Indices) -> Indices:
        """Return the first token of the window to which each of these tokens belongs."""
        if self._begins is not None:
            begins: Indices = self._begins[np.searchsorted(self._begins, places, side="right") - 1]
            return begins
        if not len(self._targets):
            return places
        # The first target after the window's first token or, behind all of them, the last one.
        next_ones = np.searchsorted(self._targets, places, side="right").clip(max=len(self._targets) - 1)
        found, context_tokens = self._targets[next_ones], len(self._offsets) - 1
        is_inside = (found > places) & (found <= places + context_tokens)
        most = len(self._tokens) - len(self._offsets)
        shifted: Indices = np.where(is_inside, places, (found - context_tokens // 2).clip(0, most))
        return shifted


def piece_starts(starts: Indices, num_tokens: int, context_tokens: int) -> Indices:
    """Return where documents begin, and where pieces of T tokens of longer ones do. The last token of a window is the
    first one of the next piece; a piece of that token alone is none."""
    lengths = np.diff(starts, append=num_tokens)
    pieces = np.maximum(1, -(-(lengths - 1) // context_tokens))
    firsts = np.repeat(np.cumsum(pieces) - pieces, pieces)
    found: Indices = np.repeat(starts, pieces) + (np.arange(pieces.sum()) - firsts) * context_tokens
    return found


def document_positions(begins: Indices, documents: Indices, num_tokens: int, length: int) -> Indices:
    """Return the positions (B, length) of the tokens of windows in the part of their document that the window has.

    A window runs on at the corpus' beginning.
    """
    positions = np.empty((len(begins), length), np.int64)
    for row, begin in zip(positions, begins.tolist(), strict=True):
        at, first = 0, begin
        row[:] = np.arange(length)
        while at < length:
            number = min(length - at, num_tokens - first)
            inside = slice(*np.searchsorted(documents, [first, first + number]).tolist())
            for start in (at + (documents[inside] - first)).tolist():
                row[start:] = np.arange(length - start)
            at, first = at + number, 0
    return positions
