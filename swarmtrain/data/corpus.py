"""Cut a run's held-out text once, on the bootstrap, and prepare each peer's training text.

The two never share passages: a peer removes from its own corpus whatever overlaps the run's held-out text (`overlap.py`
has the rules), because other machines have other versions of the same files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swarmtrain.data import huggingface
from swarmtrain.data.cache import load_array, store_array
from swarmtrain.data.documents import Document, read_documents, source_files
from swarmtrain.data.overlap import HeldOutIndex
from swarmtrain.errors import Problem, RunFileError
from swarmtrain.run import RunFile
from swarmtrain.run_data import SourceKeys

HELD_OUT_PIECES = 8  # the held-out text comes from about so many places, or more
MIN_PIECE_BYTES = 512  # a shorter piece would not be recognised in its document
HELD_OUT_ONE_IN = 8  # the held-out text is at most one part in so many of the corpus
LEAST_HELD_OUT = 1024
_ALIGNED_BYTES = 8
_CACHE_FORM = 3  # increases whenever the same files give another corpus


@dataclass(frozen=True)
class HeldOut:
    """Text by which a run is judged."""

    text: bytes
    names: tuple[str, ...]  # the documents it was cut from
    source_bytes: tuple[int, ...] = ()  # of several sources: the bytes of each, one after the other


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text on which one peer trains."""

    text: npt.NDArray[np.uint8]  # (num_bytes,), read-only; documents each ending with a newline; empty if streamed
    digest: str  # SHA-256 of the text, in hexadecimal; of the data set's description if streamed
    ends: npt.NDArray[np.int64]  # (num_documents,), the end of each document in the text
    num_documents: int
    dropped_documents: int  # wholly dropped for what they share with the held-out text
    dropped_bytes: int  # dropped for that reason, single passages included

    @property
    def num_bytes(self) -> int:
        """Size of the text in bytes."""
        return len(self.text)

    def documents(self) -> Iterator[bytes]:
        """Yield each document, which ends with a newline."""
        begin = 0
        for end in self.ends.tolist():
            yield self.text[begin:end].tobytes()
            begin = end


def cut_held_out(
    documents: Iterable[Document], held_out_bytes: int, seed: int, *, are_samples: bool = False
) -> HeldOut:
    """Cut the held-out text: at most `held_out_bytes`, and an eighth of the corpus, from pieces that `seed` picks all
    over it.

    A piece is a document, or an eighth of the held-out text of a longer one, and ends with a line where there are
    lines. Samples stay whole. Raises RunFileError if that is less than 1,024 bytes, or no sample is as small as that.
    """
    documents = list(documents)
    num_bytes = sum(len(document.text) for document in documents)
    if problem := too_little_text(num_bytes):
        raise RunFileError(problem)
    held_out_bytes = min(held_out_bytes, num_bytes // HELD_OUT_ONE_IN)
    pieces: list[tuple[str, bytes]] = []
    piece_bytes = max(MIN_PIECE_BYTES, held_out_bytes // HELD_OUT_PIECES)
    for document in documents:
        texts = [document.text] if are_samples else _pieces(document.text, piece_bytes)
        pieces += [(document.name, piece) for piece in texts]
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(pieces)), kind="stable")
    chosen: dict[str, None] = {}
    text = bytearray()
    for index in order:
        name, piece = pieces[index]
        if not piece.endswith(b"\n"):
            piece += b"\n"
        room = held_out_bytes - len(text)
        if room < MIN_PIECE_BYTES // 2:
            break
        if len(piece) > room:
            if are_samples:
                continue
            piece = piece[: _cut_before(piece, room)]
        text += piece
        chosen[name] = None
    if not text:
        raise RunFileError(
            f"{held_out_bytes} bytes of held-out text, which data.held_out_bytes and an eighth of the data allow, are "
            "less than any sample has: raise data.held_out_bytes, or give more samples",
            code="too-little-text",
        )
    return HeldOut(bytes(text), tuple(chosen))


def joined_held_out(parts: Sequence[HeldOut]) -> HeldOut:
    """Return the held-out text of several sources: their parts, one after the other."""
    text = b"".join(part.text for part in parts)
    names = tuple(name for part in parts for name in part.names)
    return HeldOut(text, names, tuple(len(part.text) for part in parts))


def held_out_of_sources(run: RunFile, text: bytes) -> dict[str, bytes]:
    """Return the part of each source of a published run's held-out `text`, by its name; "" for a source without one."""
    sizes = None if run.published is None else run.published.held_out_source_bytes
    if sizes is None:
        return {"": text}
    ends = np.cumsum(sizes).tolist()
    return {
        source.name: text[end - size : end] for source, size, end in zip(run.data.sources, sizes, ends, strict=True)
    }


def too_little_text(num_bytes: int) -> Problem | None:
    """Explain why a corpus of `num_bytes` is too small for a held-out text; None if it is large enough."""
    least = HELD_OUT_ONE_IN * LEAST_HELD_OUT
    if num_bytes >= least:
        return None
    return Problem(
        f"the corpus has {num_bytes} bytes, of which an eighth is held out; give it more text, {least} bytes at least",
        "too-little-text",
    )


def prepare_corpus(
    section: SourceKeys, base: Path, held_out: bytes, cache_dir: Path | None, revision: str = ""
) -> Corpus:
    """Read the documents of `section` and drop what they share with `held_out`.

    With `cache_dir` the result is kept there, and reused as long as the files (name, size, time), the section, the
    hub's commit `revision`, the held-out text and these rules stay the same. A streamed data set is not read: its text
    is empty. Raises RunFileError if the data is unusable or nothing is left of it.
    """
    described = [_keys(section), hashlib.sha256(held_out).hexdigest()]
    description = json.dumps(described + ([revision] if revision else []))
    if section.is_streamed:
        digest = hashlib.sha256(description.encode()).hexdigest()
        ends = np.empty(0, np.int64)
        return Corpus(
            text=_read_only(b""), digest=digest, ends=ends, num_documents=0, dropped_documents=0, dropped_bytes=0
        )
    cached = None if cache_dir is None else _cache_path(section, base, revision, description, cache_dir)
    if cached is not None and (corpus := _kept(cached)) is not None:
        return corpus
    texts = [document.text for document in read_documents(section, base, revision)]
    cut = HeldOutIndex(held_out).cut(texts, are_samples=section.has_samples)
    if not len(cut.text):
        raise RunFileError(
            "data: every document shares passages with the run's held-out text, so nothing is left to train on; "
            "give more text",
            code="only-held-out-text",
        )
    corpus = Corpus(
        text=_read_only(cut.text),
        digest=hashlib.sha256(cut.text.data).hexdigest(),
        ends=np.unique(cut.ends[cut.ends > 0]),
        num_documents=cut.num_documents,
        dropped_documents=cut.dropped_documents,
        dropped_bytes=cut.dropped_bytes,
    )
    if cached is not None:
        counts = {name: getattr(corpus, name) for name in ("num_documents", "dropped_documents", "dropped_bytes")}
        padding = np.zeros(-len(corpus.text) % _ALIGNED_BYTES, np.uint8)
        array = np.concatenate([corpus.text, padding, corpus.ends.view(np.uint8)])
        store_array(cached, array, {**counts, "num_bytes": corpus.num_bytes, "digest": corpus.digest})
    return corpus


def _kept(path: Path) -> Corpus | None:
    """Return the corpus that the cache has at `path`: its text, and after it the ends of its documents."""
    if (found := load_array(path)) is None or "digest" not in found[1]:
        return None
    array, header = found
    num_bytes = header["num_bytes"]
    return Corpus(
        text=array[:num_bytes],
        digest=header["digest"],
        ends=array[num_bytes + -num_bytes % _ALIGNED_BYTES :].view(np.int64),
        num_documents=header["num_documents"],
        dropped_documents=header["dropped_documents"],
        dropped_bytes=header["dropped_bytes"],
    )


def _keys(section: SourceKeys) -> dict[str, object]:
    """Return the keys that say which text a source has, whatever else its section has."""
    kept = set(SourceKeys.model_fields) - (set() if section.has_samples else {"format"})
    return section.model_dump(mode="json", include=kept)


def first_documents(section: SourceKeys, base: Path, num_bytes: int, revision: str = "") -> Iterator[Document]:
    """Yield documents until `num_bytes` are reached: for the bootstrap of a stream, and for `check`."""
    read = 0
    for document in read_documents(section, base, revision):
        yield document
        read += len(document.text)
        if read >= num_bytes:
            return


def _pieces(text: bytes, piece_bytes: int) -> Iterator[bytes]:
    begin = 0
    while 2 * (len(text) - begin) > 3 * piece_bytes:  # leaves no short piece at the end
        end = begin + _cut_before(text[begin : begin + piece_bytes + 1], piece_bytes)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _cut_before(text: bytes, limit: int) -> int:
    """Return where to cut `text`, at `limit` or a little earlier: after a line, else between two characters."""
    line = text.rfind(b"\n", limit // 2, limit) + 1
    if line:
        return line
    end = limit
    while end > max(0, limit - 3) and end < len(text) and text[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end or limit


def _cache_path(section: SourceKeys, base: Path, revision: str, description: str, cache_dir: Path) -> Path | None:
    """Return the cache file for this corpus, by all that determines it; None if its content has no fingerprint."""
    identity: list[object] = [_CACHE_FORM, sys.byteorder, description]
    if section.source == "datasets":
        fingerprint = huggingface.fingerprint(section, base, revision)
        if fingerprint is None:
            return None
        identity.append(fingerprint)
    else:
        for file in source_files(section, base):
            try:
                status = file.path.stat()
            except OSError:
                identity.append([file.name, None])
            else:
                identity.append([file.name, str(file.path), status.st_size, status.st_mtime_ns])
    return cache_dir / f"corpus-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.array"


def _read_only(text: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    array = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text
    array.flags.writeable = False
    return array
