"""Prepare a run's data for bootstrap and volunteers; the entry points of this package.

The bootstrap calls `publishable_data` before it publishes the run file. Every peer calls `training_data`, then
`training_batches`, and `held_out.held_out_parts` to measure the loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from swarmtrain.data import huggingface
from swarmtrain.data.batches import Batches, Windows
from swarmtrain.data.cache import load_array, store_array
from swarmtrain.data.corpus import (
    Corpus,
    HeldOut,
    cut_held_out,
    first_documents,
    joined_held_out,
    prepare_corpus,
    too_little_text,
)
from swarmtrain.data.document_encoder import DocumentEncoder, EncodedCorpus, joined_documents, nothing_to_learn
from swarmtrain.data.documents import read_documents, survey
from swarmtrain.data.held_out import held_out_tokens
from swarmtrain.data.mixture import MixedBatches, PeerPlace, SequenceSource, peer_seed
from swarmtrain.data.overlap import HeldOutIndex
from swarmtrain.data.streams import PlaceLog, SequenceStream, TextBlocks, stacked
from swarmtrain.data.tokenizer_file import TokenizerFile
from swarmtrain.data.tokenizer_source import NamedTokenizer, find_tokenizer
from swarmtrain.data.tokens import (
    LEARNT_FROM_BYTES,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    Tokens,
    require_bpe,
    tokenizer_from_bytes_untrusted,
)
from swarmtrain.data.windows import CorpusWindows
from swarmtrain.errors import Problem, RunFileError
from swarmtrain.run import RunFile
from swarmtrain.run_data import DataSource
from swarmtrain.words import counted, percent_in_words

STREAM_SAMPLE_BYTES = 1 << 25  # bytes that the bootstrap reads of a streamed data set; more for a large held-out text
LOOK_DOCUMENTS = 8  # documents read of a data set that is only looked at
LOOK_BYTES = 1 << 22  # learning a tokenizer from more, or writing more conversations, takes many seconds
_MOST_UNSPELT = 0.1  # share of the held-out text that a named tokenizer may not know


class PublishableData(NamedTuple):
    """Data that travels with a run."""

    held_out: HeldOut
    tokenizer_bytes: bytes  # empty for bytes
    revisions: tuple[str, ...] = ("",)  # the commit of each source's data set of the hub; empty for other text
    tokenizer_name: str = ""  # model.tokenizer as the published run has it


class FirstLook(NamedTuple):
    """Findings about a run's text without reading all of it."""

    sizes: tuple[int | None, ...]  # of each source's files here, about; None if that is not known
    problems: tuple[Problem, ...] = ()  # what the bootstrap would refuse, and why
    unseen: tuple[str, ...] = ()  # what was not looked at
    is_estimated: bool = False  # True if the sizes include those of compressed files that were not read

    @property
    def num_bytes(self) -> int | None:
        """Size of all text, about; None if that of a source is not known."""
        return None if None in self.sizes else sum(size or 0 for size in self.sizes)


@dataclass(frozen=True, kw_only=True)
class SourceText:
    """Text of one source that a peer trains on."""

    encoded: EncodedCorpus  # its tokens are the corpus' own memory for bytes; empty if streamed
    corpus: Corpus

    @property
    def tokens(self) -> Tokens:
        """Tokens (n,)."""
        return self.encoded.tokens


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Data that a peer trains on."""

    sources: tuple[SourceText, ...]  # in the order of the run's mixture
    tokenizer: Tokenizer
    held_out: bytes
    base: Path  # folder that the paths of streamed data sets are relative to
    cache_dir: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 that peers with the same text have, in hexadecimal."""
        digests = [source.corpus.digest for source in self.sources]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def num_left_out(self) -> int:
        """Samples without anything to learn."""
        return sum(source.encoded.num_left_out for source in self.sources)

    def part(self, number: int, num_parts: int) -> TrainingData:
        """Return one of so many equal parts of each corpus."""
        parts = []
        for source in self.sources:
            begin, end = (len(source.tokens) * each // num_parts for each in (number, number + 1))
            parts.append(dataclasses.replace(source, encoded=source.encoded.part(begin, end)))
        return dataclasses.replace(self, sources=tuple(parts))


def publishable_data(run: RunFile, base: Path, model_files: Path | None = None) -> PublishableData:
    """Cut a run's held-out text, and learn its tokenizer on the rest or find the one that it names.

    `model_files` is the folder of the model's files, if it has some. Raises RunFileError.
    """
    named = _named_tokenizer(run, base, model_files)
    data, is_learnt = run.data, run.model.tokenizer == "bpe"
    revisions, parts, kept = [], [], []
    for source, limit in zip(data.mixture, data.held_out_limits, strict=True):
        with _naming(source):
            revision = huggingface.newest_revision(source, base) if source.source == "datasets" else ""
            if source.is_streamed:
                documents = list(first_documents(source, base, _sample_bytes(limit), revision))
            else:
                documents = list(read_documents(source, base, revision))
            parts.append(cut_held_out(documents, limit, run.run.seed, are_samples=source.has_samples))
            revisions.append(revision)
            kept.append([document.text for document in documents] if is_learnt else [])
    held_out = joined_held_out(parts) if data.sources else parts[0]
    tokenizer: Tokenizer
    if named is not None:
        tokenizer = named.tokenizer
    else:
        tokenizer = _learnt(run, held_out.text, kept) if is_learnt else ByteTokenizer()
    for source, part, revision in zip(data.mixture, parts, revisions, strict=True):
        with _naming(source):
            _check_held_out(source, part.text, tokenizer, functools.partial(_name_of, source, base, revision))
    name = run.model.tokenizer if named is None else named.name
    return PublishableData(held_out, tokenizer.to_bytes(), tuple(revisions), name)


def _named_tokenizer(run: RunFile, base: Path, model_files: Path | None) -> NamedTokenizer | None:
    """Return the tokenizer that the run names; None if it is bytes, or is learnt. Raises RunFileError."""
    if run.model.tokenizer in ("bytes", "bpe"):
        return None
    found = find_tokenizer(run.model.tokenizer, base, model_files)
    if found.tokenizer.vocabulary_size > run.model.vocabulary_size:
        number, most = found.tokenizer.vocabulary_size, run.model.vocabulary_size
        name = run.model.tokenizer
        if run.model.is_built_in:
            said = f"model.vocabulary_size: {most} with model.tokenizer = {name}, which has {number} tokens; allowed: "
            raise RunFileError(f"{said}{number} or more", code="keys-disagree")
        raise RunFileError(
            f'model.tokenizer: "{name}" has {number} tokens, but the model in model.base has {most}; give a tokenizer '
            f"with {most} at most, or the model that this one belongs to",
            code="keys-disagree",
        )
    return found


def _check_held_out(source: DataSource, text: bytes, tokenizer: Tokenizer, name_of: Callable[[bytes], str]) -> None:
    """Raise RunFileError unless the tokenizer can write the held-out text or samples."""
    held_out = held_out_tokens(source.format, text, tokenizer, name_of)
    if held_out.unspelt_bytes > _MOST_UNSPELT * held_out.num_bytes:
        share = percent_in_words(held_out.unspelt_bytes, held_out.num_bytes)
        raise RunFileError(
            f"model.tokenizer: it cannot spell {share} of the held-out text; use one that is made for such text",
            code="tokenizer-misfit",
        )
    if source.has_samples and not held_out.num_targets:
        raise RunFileError(
            "data.format: no held-out sample has anything to learn, such as a turn of the assistant; check the roles, "
            "or raise data.held_out_bytes",
            code="nothing-to-learn",
        )


def _learnt(run: RunFile, held_out: bytes, texts: Sequence[list[bytes]]) -> BpeTokenizer:
    """Learn a tokenizer on the texts of each source, without what they share with the held-out text.

    Each source gives at most its share of what a tokenizer is learnt from.
    """
    index = HeldOutIndex(held_out)
    parts = [
        index.cut(of_source).text[: math.ceil(LEARNT_FROM_BYTES * share)]
        for of_source, share in zip(texts, run.data.shares, strict=True)
    ]
    return BpeTokenizer.learn(np.concatenate(parts), run.model.vocabulary_size)


@contextlib.contextmanager
def _naming(source: DataSource) -> Iterator[None]:
    """Name the source first in a RunFileError, if it has a name."""
    try:
        yield
    except RunFileError as error:
        raise RunFileError(*_named(source, error.problems)) from None


def _named(source: DataSource, problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(each.found_in(f"source {source.name}") if source.name else each for each in problems)


@dataclass(frozen=True)
class _SourceLook:
    """Findings about one source."""

    num_bytes: int | None
    problems: tuple[Problem, ...] = ()
    unseen: tuple[str, ...] = ()
    texts: list[bytes] | None = None
    """Texts of all its documents, if they were all read."""
    held_out: bytes = b""
    is_estimated: bool = False


def first_look(run: RunFile, base: Path, model_files: Path | None = None) -> FirstLook:
    """Try what `publishable_data` would do on the first documents; of a data set only a few are downloaded.

    Raises nothing for unusable data: all problems found are listed in the result.
    """
    problems: list[Problem] = []
    named: NamedTokenizer | None = None
    try:
        if run.model.tokenizer == "bpe":
            require_bpe()
        named = _named_tokenizer(run, base, model_files)
    except RunFileError as error:
        problems += error.problems
    looks, unseen, can_learn = [], list[str](), not problems
    for source, limit in zip(run.data.mixture, run.data.held_out_limits, strict=True):
        look = (
            _look_at_data_set(source, base)
            if source.source == "datasets"
            else _look_at_files(source, base, limit, run.run.seed)
        )
        if look.held_out and (named is not None or source.has_samples):
            look = _looked_at_by(source, look, ByteTokenizer() if named is None else named.tokenizer, base)
        looks.append(look)
        problems += _named(source, look.problems)
        unseen += [f"source {source.name}: {each}" if source.name else each for each in look.unseen]
    if run.model.tokenizer == "bpe" and not any(look.problems for look in looks):
        texts = [look.texts for look in looks if look.texts is not None]
        if can_learn and len(texts) == len(looks) and sum(len(t) for each in texts for t in each) <= LOOK_BYTES:
            try:
                _learnt(run, b"".join(look.held_out for look in looks), texts)
            except RunFileError as error:
                problems += error.problems
        else:
            unseen.append(f"whether model.vocabulary_size = {run.model.vocabulary_size} can be learnt from this text")
    sizes = tuple(look.num_bytes for look in looks)
    return FirstLook(sizes, tuple(problems), tuple(unseen), any(look.is_estimated for look in looks))


def _looked_at_by(source: DataSource, look: _SourceLook, tokenizer: Tokenizer, base: Path) -> _SourceLook:
    """Return the findings, and what the tokenizer finds in the held-out text and all conversations of small files."""
    texts, name_of = look.texts or [], functools.partial(_name_of, source, base, "")
    try:
        if source.format == "chat" and sum(map(len, texts)) > LOOK_BYTES:
            look = dataclasses.replace(look, unseen=("what the chat template makes of all conversations",))
        elif source.format == "chat":
            with DocumentEncoder(source.format, tokenizer, name_of) as encoder:
                joined_documents(encoder.encode(texts))
        _check_held_out(source, look.held_out, tokenizer, name_of)
    except RunFileError as error:
        return dataclasses.replace(look, problems=(*look.problems, *error.problems))
    return look


def _look_at_data_set(source: DataSource, base: Path) -> _SourceLook:
    section = source.model_copy(update={"streaming": True})
    try:
        revision = huggingface.newest_revision(section, base)
        count = sum(1 for _ in itertools.islice(read_documents(section, base, revision), LOOK_DOCUMENTS))
    except RunFileError as error:
        return _SourceLook(None, error.problems)
    if not count:
        problem = f'data.field: no row of "{section.dataset}" has text in "{section.field}"; set it to the one that has'
        return _SourceLook(None, (Problem(problem, "no-text"),))
    unseen = f"the data set after its first {counted(count, 'document')}, and so whether it is large enough"
    return _SourceLook(None, (), (unseen,))


def _look_at_files(source: DataSource, base: Path, held_out_bytes: int, seed: int) -> _SourceLook:
    """Read the first documents of files, and try to cut from them what the bootstrap will publish."""
    found = survey(source, base, _sample_bytes(held_out_bytes))
    if found.problems:
        small = None if found.most_bytes is None else too_little_text(found.most_bytes)
        problems = (*found.problems, small) if small else found.problems
        return _SourceLook(found.num_bytes, problems, ("the files after these",) if found.is_cut else ())
    texts = [document.text for document in found.documents]
    read = sum(map(len, texts))
    if read >= _sample_bytes(held_out_bytes):
        unseen = f"the text after its first {read >> 20} MiB"
        return _SourceLook(found.num_bytes, (), (unseen,), is_estimated=found.is_estimated)
    try:
        held_out = cut_held_out(found.documents, held_out_bytes, seed, are_samples=source.has_samples)
    except RunFileError as error:
        return _SourceLook(found.num_bytes, error.problems, is_estimated=found.is_estimated)
    return _SourceLook(found.num_bytes, texts=texts, held_out=held_out.text, is_estimated=found.is_estimated)


def training_data(
    run: RunFile, base: Path, held_out: bytes, tokenizer_bytes: bytes, cache_dir: Path | None
) -> TrainingData:
    """Return this peer's corpora, encoded. `tokenizer_bytes` come from another peer and are checked here.

    Raises RunFileError for unusable data, and BadBytesError for an unusable tokenizer.
    """
    tokenizer = tokenizer_from_bytes_untrusted(tokenizer_bytes, run.model.vocabulary_size)
    texts = []
    for source, revision in zip(run.data.mixture, run.dataset_revisions, strict=True):
        with _naming(source):
            corpus = prepare_corpus(source, base, held_out, cache_dir, revision)
            name_of = functools.partial(_name_of, source, base, revision)
            encoded = _encoded(corpus, _How(source.format, run.data.packing, name_of), tokenizer, cache_dir)
            if encoded.num_left_out and not len(encoded.tokens):
                where = source.dataset or ", ".join(source.paths)
                raise nothing_to_learn(f'{counted(encoded.num_left_out, "sample")} in "{where}"')
        texts.append(SourceText(encoded=encoded, corpus=corpus))
    return TrainingData(sources=tuple(texts), tokenizer=tokenizer, held_out=held_out, base=base, cache_dir=cache_dir)


def training_batches(run: RunFile, data: TrainingData, place: PeerPlace) -> MixedBatches:
    """Return a peer's batches, from its corpora and, with `data.streaming`, from streams. Raises RunFileError."""
    num_shards = run.num_shards(*(len(text.tokens) for text in data.sources))
    if not run.data.sources and not run.data.is_streamed and run.batch_rows == 1:
        batches = Batches(
            data.sources[0].tokens,
            context_tokens=run.model.context_tokens,
            batch_sequences=run.inner.batch_sequences,
            run_sha256=place.run_sha256,
            peer_id=place.peer_id,
            position=place.position,
        )
        if num_shards[0]:
            batches.cut(num_shards[0])
        return batches
    sources: list[SequenceSource] = []
    for number, source in enumerate(run.data.mixture):
        with _naming(source):
            if source.is_streamed:
                sources.append(_stream(run, data, place, number))
            else:
                windows = _windows(data.sources[number].encoded, run)
                if num_shards[number]:
                    windows.cut(num_shards[number])
                sources.append(windows)
    weights = [source.weight for source in run.data.mixture]
    return MixedBatches(sources, weights, run.inner.batch_sequences, place)


def _windows(encoded: EncodedCorpus, run: RunFile) -> Windows:
    if run.batch_rows == 1:
        return Windows(encoded.tokens, run.model.context_tokens)
    return CorpusWindows(encoded, run.model.context_tokens, run.batch_rows)


def _stream(run: RunFile, data: TrainingData, place: PeerPlace, number: int) -> _NamedStream:
    """Return the stream of source `number`; the log of its places is kept in the cache, by all that it depends on."""
    source, revision = run.data.mixture[number], run.dataset_revisions[number]
    seed = peer_seed(f"{place.run_sha256} {source.name}".rstrip(), place.peer_id)
    rows = huggingface.HubRows(source, data.base, revision)
    path = None
    if data.cache_dir is not None:
        told = [seed, rows.fingerprint, data.sources[number].corpus.digest]
        told.append(hashlib.sha256(data.tokenizer.to_bytes()).hexdigest())
        told += [source.format] if source.has_samples else []
        path = data.cache_dir / f"stream-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}.array"
    blocks = TextBlocks(rows, data.held_out, seed, are_samples=source.has_samples)
    encoder = DocumentEncoder(source.format, data.tokenizer)  # a template's process ends with this one

    def encode(document: bytes) -> Tokens:
        (documents,) = encoder.encode([document])
        return documents[0].tokens if run.batch_rows == 1 else stacked(documents)

    stream = SequenceStream(blocks, encode, run.model.context_tokens, PlaceLog(path), run.batch_rows)
    return _NamedStream(stream, source)


class _NamedStream:
    """Stream whose errors name its source. See `SequenceSource`."""

    is_stream, num_shards = True, 0

    def __init__(self, stream: SequenceStream, source: DataSource) -> None:
        self._stream, self._source = stream, source

    def use_shard(self, shard: int) -> None:
        """Do nothing: a stream has no shards."""

    def sequences(self, first: int, numbers: npt.NDArray[np.uint64]) -> torch.Tensor:
        """Return the stream's sequences from number `first` on. Raises RunFileError as `SequenceStream` does."""
        with _naming(self._source):
            return self._stream.sequences(first, numbers)


def _sample_bytes(held_out_bytes: int) -> int:
    return max(STREAM_SAMPLE_BYTES, 16 * held_out_bytes)


@dataclass(frozen=True)
class _How:
    """How a source's documents are encoded."""

    format: str
    packing: str
    name_of: Callable[[bytes], str]


def _name_of(source: DataSource, base: Path, revision: str, sample: bytes) -> str:
    """Return where a sample comes from: its data are read once more, since nothing else needs to know."""
    wanted = sample.rstrip(b"\n")
    documents = read_documents(source, base, revision)
    name = next((document.name for document in documents if document.text == wanted), "")
    return f"the conversation at {name}" if name else "a conversation"


def _encoded(corpus: Corpus, how: _How, tokenizer: Tokenizer, cache_dir: Path | None) -> EncodedCorpus:
    """Return the encoded corpus, which the cache keeps, unless encoding costs nothing."""
    if how.format == "text" and isinstance(tokenizer, ByteTokenizer):
        starts = np.concatenate([[0], corpus.ends[:-1]]).astype(np.int64)
        return EncodedCorpus(tokenizer.encode(corpus.text), starts=starts)
    if how.format == "text" and how.packing == "stream" and not isinstance(tokenizer, TokenizerFile):
        return EncodedCorpus(_encoded_stream(corpus, tokenizer, cache_dir))
    identity = hashlib.sha256(f"{how.format} {corpus.digest} ".encode() + tokenizer.to_bytes()).hexdigest()[:32]
    names = ("tokens", "targets", "starts")
    paths = [] if cache_dir is None else [cache_dir / f"encoded-{identity}.{name}.array" for name in names]
    if found := _kept(paths):
        return found
    with DocumentEncoder(how.format, tokenizer, how.name_of) as encoder:
        encoded = joined_documents(encoder.encode(corpus.documents()))
    wanted = np.empty(0, np.bool_) if encoded.is_target is None else encoded.is_target
    starts = np.empty(0, np.int64) if encoded.starts is None else encoded.starts
    for path, array in zip(paths, (encoded.tokens, wanted, starts), strict=False):
        store_array(path, array, {"num_left_out": encoded.num_left_out})
    return encoded


def _kept(paths: Sequence[Path]) -> EncodedCorpus | None:
    """Return the encoded corpus in these files of the cache; None unless all of them are there."""
    found = [load_array(path) for path in paths]
    if not found or any(each is None for each in found):
        return None
    (tokens, header), (is_target, _), (starts, _) = (each for each in found if each is not None)
    return EncodedCorpus(tokens, is_target if len(is_target) else None, starts, int(header.get("num_left_out", 0)))


def _encoded_stream(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None) -> Tokens:
    """Return the tokens of a corpus as one text."""
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
