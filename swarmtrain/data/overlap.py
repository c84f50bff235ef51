"""Find text shared between documents by sampled windows: near duplicates, and overlap with the held-out text.

A *window* is 64 bytes of text. One position in sixteen is sampled, chosen by the 8 bytes that stand there, so that a
passage is sampled alike wherever it occurs; two texts that share a run of L bytes share about (L - 56) / 16 sampled
windows. Everything is counted in windows, vectorised, in a fraction of a second for ten megabytes. Three rules follow;
decision 6 has what they drop on real corpora.

* **Near duplicate**: at least half of a document's windows are in larger documents of the corpus.
* **Held-out document**: at least a fifth of its windows are in the held-out text; the whole document is dropped.
  This removes another version of the same file.
* **Held-out passage**: four or more different windows of a passage (4 KiB) are in the held-out text, which is a run
  of about 120 bytes, or several shorter ones; the passage is dropped, the rest of its document stays. This keeps a
  corpus of one large file whose held-out text was cut out of its middle.

*Boilerplate* never counts: windows with fewer than 8 different bytes (rules, tables of zeros), and windows that are in
more than 8 documents and in more than one document of 200 (licence headers, templates). A document too short for a
sampled window is dropped if each of its lines of 16 bytes or more is a line of the held-out text.

A *sample*, such as a conversation, is a document of one line that is never taken apart: it is dropped as a whole for a
held-out passage too, and always if the same line is held out. Conversations are compared without their tools, which
many share and nobody learns, and in whatever order their keys are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW_BYTES = 64
SAMPLED_ONE_IN = 16
PASSAGE_BYTES = 4096
PASSAGE_WINDOWS = 4
HELD_OUT_SHARE = 0.2
NEAR_DUPLICATE_SHARE = 0.5
BOILERPLATE_DOCUMENTS = 8
BOILERPLATE_ONE_IN = 200
BOILERPLATE_DISTINCT_BYTES = 8
LINE_BYTES = 16

_BLOCK_BYTES = 1 << 20  # bytes hashed in one pass: few enough for the processor's cache
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: spreads the low bits over the high ones
_THRESHOLD = np.uint64(2**64 // SAMPLED_ONE_IN)

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def sampled_windows(text: Bytes) -> Iterator[tuple[Indices, Hashes]]:
    """Yield the sampled windows of `text`, a contiguous uint8 array: (positions, hashes) of equal length, block by
    block."""
    num_positions = len(text) - WINDOW_BYTES + 1
    if num_positions <= 0:
        return
    words = np.ndarray((len(text) - 7,), "<u8", buffer=text, strides=(1,))  # words[i] is the 8 bytes from i on
    for begin in range(0, num_positions, _BLOCK_BYTES):
        end = min(begin + _BLOCK_BYTES, num_positions)
        positions = np.flatnonzero(words[begin:end] * _MULTIPLIER < _THRESHOLD).astype(np.int64) + begin
        hashes = words[positions] * _MULTIPLIER
        for offset in range(8, WINDOW_BYTES, 8):
            hashes = (hashes ^ (hashes >> np.uint64(29)) ^ words[positions + offset]) * _MULTIPLIER
        yield positions, hashes ^ (hashes >> np.uint64(32))


def near_duplicates(texts: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Return which documents are near duplicates of larger ones (n,); of two equally large, the later one is.

    A window counts as seen if any larger document has it, even one that is dropped itself.
    """
    joined, ends = _join(texts)
    sizes = np.diff(ends, prepend=0)
    rank = np.empty(len(texts), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(texts))
    pairs = [(hashes, rank[documents]) for _, hashes, documents in _windows_within(joined, ends)]
    if not pairs:
        return np.zeros(len(texts), np.bool_)
    hashes, ranks = (np.concatenate(column) for column in zip(*pairs, strict=True))

    order = np.lexsort((ranks, hashes))
    hashes, ranks = hashes[order], ranks[order]
    new_hash = np.append(True, hashes[1:] != hashes[:-1])
    distinct = new_hash | np.append(True, ranks[1:] != ranks[:-1])
    hashes, ranks, new_hash = hashes[distinct], ranks[distinct], new_hash[distinct]
    group = np.cumsum(new_hash) - 1
    counted = (np.bincount(group) <= _boilerplate_documents(len(texts)))[group]
    total = np.bincount(ranks[counted], minlength=len(texts))
    seen = np.bincount(ranks[counted & ~new_hash], minlength=len(texts))
    answer: npt.NDArray[np.bool_] = ((total > 0) & (seen >= NEAR_DUPLICATE_SHARE * total))[rank]
    return answer


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Rest of a corpus after the overlap is removed."""

    text: Bytes  # documents one after the other, each ending with a newline
    ends: Indices  # end of each document in `text`, also of those of which nothing is left
    num_documents: int  # documents of which anything is left
    dropped_documents: int  # documents of which nothing is left
    dropped_bytes: int


class HeldOutIndex:
    """Windows of a held-out text; removes from documents what must not be trained on because of them."""

    def __init__(self, held_out: bytes) -> None:
        held_out = b"\n".join(map(_compared, held_out.split(b"\n")))
        text = np.frombuffer(held_out, np.uint8)
        found = [(p, h) for p, h in sampled_windows(text)]
        hashes = np.empty(0, np.uint64)
        if found:
            positions, hashes = (np.concatenate(column) for column in zip(*found, strict=True))
            hashes, first = np.unique(hashes, return_index=True)
            content = np.sort(text[positions[first][:, None] + np.arange(WINDOW_BYTES)], axis=1)
            distinct_bytes = 1 + np.count_nonzero(np.diff(content, axis=1), axis=1)
            hashes = hashes[distinct_bytes >= BOILERPLATE_DISTINCT_BYTES]
        self._hashes = hashes  # sorted, each once
        self._lines = {line for line in held_out.split(b"\n") if len(line) >= LINE_BYTES}

    def cut(self, texts: Sequence[bytes], *, are_samples: bool = False) -> Cut:
        """Return the documents without what they share with the held-out text, by the rules of this module."""
        joined, ends = _join([_compared(text) for text in texts] if are_samples else texts)
        hits, num_windows = self._hits(joined, ends)
        documents = np.searchsorted(ends, hits[:, 0], side="right")
        num_documents_with = np.bincount(_distinct(documents, hits[:, 1])[1], minlength=len(self._hashes))
        boilerplate = num_documents_with > _boilerplate_documents(len(texts))
        hits = hits[~boilerplate[hits[:, 1]]]
        if are_samples:
            return self._whole_without(texts, joined, ends, hits, num_windows)
        return self._without(joined, ends, hits, num_windows)

    def _hits(self, joined: Bytes, ends: Indices) -> tuple[Indices, Indices]:
        """Return (positions and held-out window numbers (n, 2), in order; number of sampled windows per document)."""
        num_windows = np.zeros(len(ends), np.int64)
        hits = [np.empty((0, 2), np.int64)]
        for positions, hashes, documents in _windows_within(joined, ends):
            num_windows += np.bincount(documents, minlength=len(ends))
            if len(self._hashes):
                index = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
                hit = self._hashes[index] == hashes
                hits.append(np.stack([positions[hit], index[hit]], axis=1))
        return np.concatenate(hits), num_windows

    def _without(self, joined: Bytes, ends: Indices, hits: Indices, num_windows: Indices) -> Cut:
        """Drop the documents and passages with too many hits, and return what is left.

        `hits` (n, 2) are positions and numbers of shared windows; `num_windows` counts all sampled windows of each
        document.
        """
        starts = ends - np.diff(ends, prepend=0)
        dropped = self._dropped_documents(joined, np.stack([starts, ends], axis=1), hits, num_windows)

        documents = np.searchsorted(ends, hits[:, 0], side="right")
        begins = hits[:, 0] - (hits[:, 0] - starts[documents]) % PASSAGE_BYTES  # start of each hit's passage
        passages, num_shared = np.unique(_distinct(begins, hits[:, 1])[0], return_counts=True)
        cuts = [(int(starts[d]), int(ends[d])) for d in np.flatnonzero(dropped)]
        for begin in passages[num_shared >= PASSAGE_WINDOWS].tolist():
            end = int(ends[np.searchsorted(ends, begin, side="right")])
            cuts.append((begin, min(begin + PASSAGE_BYTES, end)))

        keep = np.ones(len(joined), np.bool_)
        for begin, end in cuts:
            keep[begin:end] = False
        text = joined[keep] if cuts else joined
        left = np.add.reduceat(keep, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)
        num_documents = int(np.count_nonzero(left))
        return Cut(
            text=text,
            ends=np.cumsum(left),
            num_documents=num_documents,
            dropped_documents=len(ends) - num_documents,
            dropped_bytes=len(joined) - len(text),
        )

    def _whole_without(
        self, texts: Sequence[bytes], joined: Bytes, ends: Indices, hits: Indices, num_windows: Indices
    ) -> Cut:
        """Drop the samples that share a passage with the held-out text, or are held out. See `_without`."""
        starts = ends - np.diff(ends, prepend=0)
        dropped = self._dropped_documents(joined, np.stack([starts, ends], axis=1), hits, num_windows)
        documents = np.searchsorted(ends, hits[:, 0], side="right")
        num_shared = np.bincount(_distinct(documents, hits[:, 1])[0], minlength=len(ends))
        dropped |= num_shared >= PASSAGE_WINDOWS
        dropped |= np.array([line in self._lines for line in joined.tobytes().split(b"\n")[:-1]], np.bool_)
        joined, ends = _join(texts)
        sizes = np.diff(ends, prepend=0)
        lengths = np.where(dropped, 0, sizes)
        text = joined[np.repeat(~dropped, sizes)] if dropped.any() else joined
        return Cut(
            text=text,
            ends=np.cumsum(lengths),
            num_documents=int(np.count_nonzero(~dropped)),
            dropped_documents=int(np.count_nonzero(dropped)),
            dropped_bytes=len(joined) - len(text),
        )

    def _dropped_documents(
        self, joined: Bytes, bounds: Indices, hits: Indices, num_windows: Indices
    ) -> npt.NDArray[np.bool_]:
        documents = np.searchsorted(bounds[:, 1], hits[:, 0], side="right")
        num_shared = np.bincount(_distinct(documents, hits[:, 1])[0], minlength=len(bounds))
        dropped: npt.NDArray[np.bool_] = (num_shared > 0) & (num_shared >= HELD_OUT_SHARE * num_windows)
        for document in np.flatnonzero(num_windows == 0):
            begin, end = bounds[document]
            lines = [line for line in joined[begin:end].tobytes().split(b"\n") if len(line) >= LINE_BYTES]
            dropped[document] = bool(lines) and self._lines.issuperset(lines)
        return dropped


def _compared(line: bytes) -> bytes:
    """Return a conversation as it is compared, without tools and its keys sorted; any other line as it is."""
    try:
        table = {"messages": json.loads(line)["messages"]}
        text = json.dumps(table, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return line
    return text.encode(errors="replace")


def _distinct(places: Indices, numbers: Indices) -> tuple[Indices, Indices]:
    """Return the distinct pairs (place, number), sorted."""
    if not len(places):
        return places, numbers
    base = int(numbers.max()) + 1
    pairs = np.unique(places * base + numbers)
    return pairs // base, pairs % base


def _join(texts: Sequence[bytes]) -> tuple[Bytes, Indices]:
    """Return (documents joined, each ending with a newline; end of each). Documents must not be empty."""
    assert all(texts), "an empty document"
    joined = np.frombuffer(b"".join(t if t.endswith(b"\n") else t + b"\n" for t in texts), np.uint8)
    return joined, np.cumsum([len(t) + (not t.endswith(b"\n")) for t in texts], dtype=np.int64)


def _windows_within(joined: Bytes, ends: Indices) -> Iterator[tuple[Indices, Hashes, Indices]]:
    """Yield the sampled windows that lie within one document: (positions, hashes, documents), block by block."""
    for positions, hashes in sampled_windows(joined):
        documents = np.searchsorted(ends, positions, side="right").astype(np.int64)
        within = positions + WINDOW_BYTES <= ends[documents]
        yield positions[within], hashes[within], documents[within]


def _boilerplate_documents(num_documents: int) -> int:
    return max(BOILERPLATE_DOCUMENTS, num_documents // BOILERPLATE_ONE_IN)
