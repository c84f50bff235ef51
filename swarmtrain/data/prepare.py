"""Prepare a run's data for bootstrap and volunteers; the entry points of this package.

The bootstrap calls `publishable_data` before it publishes the run file. Every peer calls `training_data`, then
`training_batches`, and `batches.held_out_batches` to measure the loss.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from swarmtrain.data import huggingface
from swarmtrain.data.batches import Batches, StreamingBatches, peer_seed
from swarmtrain.data.cache import load_array, store_array
from swarmtrain.data.corpus import (
    Corpus,
    HeldOut,
    cut_held_out,
    first_documents,
    prepare_corpus,
    read_documents,
    too_little_text,
)
from swarmtrain.data.documents import survey
from swarmtrain.data.overlap import HeldOutIndex
from swarmtrain.data.tokens import (
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    Tokens,
    require_bpe,
    tokenizer_from_bytes_untrusted,
)
from swarmtrain.errors import Problem, RunFileError
from swarmtrain.run import DataSection, RunFile
from swarmtrain.words import counted

__all__ = [
    "FirstLook",
    "PeerPlace",
    "PublishableData",
    "TrainingData",
    "first_look",
    "publishable_data",
    "training_batches",
    "training_data",
]

STREAM_SAMPLE_BYTES = 1 << 25  # bytes that the bootstrap reads of a streamed data set; more for a large held-out text
LOOK_DOCUMENTS = 8  # documents read of a data set that is only looked at
LOOK_BPE_BYTES = 1 << 22  # learning a tokenizer from more takes many seconds


class PublishableData(NamedTuple):
    """Data that travels with a run."""

    held_out: HeldOut
    tokenizer_bytes: bytes  # empty for bytes
    revision: str = ""  # the commit of the hub's data set; empty for other text


class FirstLook(NamedTuple):
    """Findings about a run's text without reading all of it."""

    num_bytes: int | None  # of the files here, about; None if that is not known
    problems: tuple[Problem, ...] = ()  # what the bootstrap would refuse, and why
    unseen: tuple[str, ...] = ()  # what was not looked at


class TrainingData(NamedTuple):
    """Data that a peer trains on."""

    tokens: Tokens  # (n,); the corpus' own memory for bytes; empty if streamed
    tokenizer: Tokenizer
    corpus: Corpus


def publishable_data(run: RunFile, base: Path) -> PublishableData:
    """Cut a run's held-out text and learn its tokenizer on the rest. Raises RunFileError."""
    section = run.data
    revision = huggingface.newest_revision(section, base) if section.source == "datasets" else ""
    if section.source == "datasets" and section.streaming:
        documents = list(first_documents(section, base, _sample_bytes(section), revision))
    else:
        documents = list(read_documents(section, base, revision))
    held_out = cut_held_out(documents, section.held_out_bytes, run.run.seed)
    if run.model.tokenizer == "bytes":
        return PublishableData(held_out, ByteTokenizer().to_bytes(), revision)
    text = HeldOutIndex(held_out.text).cut([document.text for document in documents]).text
    return PublishableData(held_out, BpeTokenizer.learn(text, run.model.vocabulary_size).to_bytes(), revision)


def first_look(run: RunFile, base: Path) -> FirstLook:
    """Try what `publishable_data` would do on the first documents; of a data set only a few are downloaded.

    Raises nothing for unusable data: all problems found are listed in the result.
    """
    problems: list[Problem] = []
    try:
        if run.model.tokenizer == "bpe":
            require_bpe()
    except RunFileError as error:
        problems += error.problems
    look = _look_at_data_set if run.data.source == "datasets" else _look_at_files
    found = look(run, base, can_learn=not problems)
    return found._replace(problems=(*problems, *found.problems))


def _look_at_data_set(run: RunFile, base: Path, can_learn: bool) -> FirstLook:
    section = run.data.model_copy(update={"streaming": True})
    try:
        revision = huggingface.newest_revision(section, base)
        count = sum(1 for _ in itertools.islice(read_documents(section, base, revision), LOOK_DOCUMENTS))
    except RunFileError as error:
        return FirstLook(None, error.problems)
    if not count:
        problem = f'data.field: no row of "{section.dataset}" has text in "{section.field}"; set it to the one that has'
        return FirstLook(None, (Problem(problem, "no-text"),))
    unseen = f"the data set after its first {counted(count, 'document')}, and so whether it is large enough"
    return FirstLook(None, (), (unseen, *_vocabulary_unseen(run)))


def _look_at_files(run: RunFile, base: Path, can_learn: bool) -> FirstLook:
    """Read the first documents of files, and try to cut and learn from them what the bootstrap will publish."""
    section = run.data
    found = survey(section, base, _sample_bytes(section))
    if found.problems:
        small = None if found.most_bytes is None else too_little_text(found.most_bytes, section.held_out_bytes)
        problems = (*found.problems, small) if small else found.problems
        return FirstLook(found.num_bytes, problems, ("the files after these",) if found.is_cut else ())
    read = sum(len(document.text) for document in found.documents)
    if read >= _sample_bytes(section):
        unseen = f"the text after its first {read >> 20} MiB"
        return FirstLook(found.num_bytes, (), (unseen, *_vocabulary_unseen(run)))
    try:
        held_out = cut_held_out(found.documents, section.held_out_bytes, run.run.seed)
        if run.model.tokenizer == "bytes" or read > LOOK_BPE_BYTES or not can_learn:
            return FirstLook(found.num_bytes, (), _vocabulary_unseen(run))
        text = HeldOutIndex(held_out.text).cut([document.text for document in found.documents]).text
        BpeTokenizer.learn(text, run.model.vocabulary_size)
    except RunFileError as error:
        return FirstLook(found.num_bytes, error.problems)
    return FirstLook(found.num_bytes)


def _vocabulary_unseen(run: RunFile) -> tuple[str, ...]:
    if run.model.tokenizer == "bytes":
        return ()
    return (f"whether model.vocabulary_size = {run.model.vocabulary_size} can be learnt from this text",)


def training_data(
    run: RunFile, base: Path, held_out: bytes, tokenizer_bytes: bytes, cache_dir: Path | None
) -> TrainingData:
    """Return this peer's corpus, encoded. `tokenizer_bytes` come from another peer and are checked here.

    Raises RunFileError for unusable data, and BadBytesError for an unusable tokenizer.
    """
    tokenizer = tokenizer_from_bytes_untrusted(tokenizer_bytes, run.model.vocabulary_size)
    corpus = prepare_corpus(run.data, base, held_out, cache_dir, run.dataset_revision)
    return TrainingData(_encoded(corpus, tokenizer, cache_dir), tokenizer, corpus)


@dataclass(frozen=True, kw_only=True)
class PeerPlace:
    """Identity of the peer that draws batches, and how many it has drawn."""

    run_sha256: str
    peer_id: str
    position: int = 0  # batches drawn before


def training_batches(
    run: RunFile, data: TrainingData, place: PeerPlace, base: Path, held_out: bytes
) -> Batches | StreamingBatches:
    """Return a peer's batches, from the corpus or, with `data.streaming`, from the stream. Raises RunFileError."""
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
    texts = huggingface.StreamedTexts(run.data, base, run.dataset_revision)
    return StreamingBatches(
        functools.partial(_stream, texts, held_out, seed),
        data.tokenizer,
        context_tokens=run.model.context_tokens,
        batch_sequences=run.inner.batch_sequences,
        position=place.position,
    )


def _sample_bytes(section: DataSection) -> int:
    return max(STREAM_SAMPLE_BYTES, 16 * section.held_out_bytes)


def _stream(texts: huggingface.StreamedTexts, held_out: bytes, seed: int, epoch: int) -> Iterator[bytes]:
    index = HeldOutIndex(held_out)
    for text in texts.once_through(seed + epoch):
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
