"""What the bootstrap and a volunteer call: everything about data from a run file, in three functions.

The bootstrap: `publishable_data` before the run file is published. Every peer: `training_data`, then
`training_batches`; `batches.held_out_batches` to measure the loss.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from swarmtrain.data import huggingface
from swarmtrain.data.batches import Batches, BatchSource, StreamingBatches, peer_seed
from swarmtrain.data.cache import load_array, store_array
from swarmtrain.data.corpus import Corpus, HeldOut, cut_held_out, first_documents, prepare_corpus, read_documents
from swarmtrain.data.overlap import HeldOutIndex
from swarmtrain.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer, Tokens, tokenizer_from_bytes_untrusted
from swarmtrain.run import DataSection, RunFile

__all__ = ["PeerPlace", "PublishableData", "TrainingData", "publishable_data", "training_batches", "training_data"]

STREAM_SAMPLE_BYTES = 1 << 25  # what the bootstrap reads of a streamed data set, or more for a large held-out text


class PublishableData(NamedTuple):
    """What travels with a run."""

    held_out: HeldOut
    tokenizer_bytes: bytes  # empty for bytes


class TrainingData(NamedTuple):
    """What a peer trains on."""

    tokens: Tokens  # (n,); the corpus' own memory for bytes; empty if streamed
    tokenizer: Tokenizer
    corpus: Corpus


def publishable_data(run: RunFile, base: Path) -> PublishableData:
    """Cut the held-out text of a run and learn its tokenizer on what is left. Raises RunFileError."""
    section = run.data
    if section.source == "datasets" and section.streaming:
        sample = max(STREAM_SAMPLE_BYTES, 16 * section.held_out_bytes)
        documents = list(first_documents(section, base, sample))
    else:
        documents = list(read_documents(section, base))
    held_out = cut_held_out(documents, section.held_out_bytes, run.run.seed)
    if run.model.tokenizer == "bytes":
        return PublishableData(held_out, ByteTokenizer().to_bytes())
    text = HeldOutIndex(held_out.text).cut([document.text for document in documents]).text
    return PublishableData(held_out, BpeTokenizer.learn(text, run.model.vocabulary_size).to_bytes())


def training_data(
    run: RunFile, base: Path, held_out: bytes, tokenizer_bytes: bytes, cache_dir: Path | None
) -> TrainingData:
    """The corpus of this peer, encoded. `tokenizer_bytes` come from another peer and are checked here.

    Raises RunFileError for data that cannot be used, BadBytesError for a tokenizer that cannot.
    """
    tokenizer = tokenizer_from_bytes_untrusted(tokenizer_bytes, run.model.vocabulary_size)
    corpus = prepare_corpus(run.data, base, held_out, cache_dir)
    return TrainingData(_encoded(corpus, tokenizer, cache_dir), tokenizer, corpus)


@dataclass(frozen=True, kw_only=True)
class PeerPlace:
    """Who draws batches, and where it stands."""

    run_sha256: str
    peer_id: str
    position: int = 0  # batches drawn before


def training_batches(run: RunFile, data: TrainingData, place: PeerPlace, base: Path, held_out: bytes) -> BatchSource:
    """The batches of one peer, from the corpus or, with `data.streaming`, from the stream. Raises RunFileError."""
    if not run.data.streaming or run.data.source != "datasets":
        batches = Batches(
            data.tokens,
            context_tokens=run.model.context_tokens,
            batch_sequences=run.inner.batch_sequences,
            run_sha256=place.run_sha256,
            peer_id=place.peer_id,
            position=place.position,
        )
        if num_shards := run.num_shards(len(data.tokens)):
            batches.cut(num_shards)
        return batches
    seed = peer_seed(place.run_sha256, place.peer_id)
    return StreamingBatches(
        functools.partial(_stream, run.data, base, held_out, seed),
        data.tokenizer,
        context_tokens=run.model.context_tokens,
        batch_sequences=run.inner.batch_sequences,
        position=place.position,
    )


def _stream(section: DataSection, base: Path, held_out: bytes, seed: int, epoch: int) -> Iterator[bytes]:
    index = HeldOutIndex(held_out)
    for text in huggingface.stream_texts(section, base, seed + epoch):
        yield index.cut_next(text)


def _encoded(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None) -> Tokens:
    tokenizer_bytes = tokenizer.to_bytes()
    if not tokenizer_bytes or cache_dir is None:
        return tokenizer.encode(corpus.text)
    identity = hashlib.sha256(corpus.digest.encode() + tokenizer_bytes).hexdigest()
    path = cache_dir / f"tokens-{identity[:32]}.array"
    found = load_array(path)
    if found is not None:
        return found[0]
    tokens = tokenizer.encode(corpus.text)
    store_array(path, tokens, {})
    return tokens
