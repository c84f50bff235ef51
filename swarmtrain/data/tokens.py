"""Convert text to tokens and back: bytes, a byte-level BPE that the bootstrap learns, or a file of Hugging Face's form.

In the first two, tokens 0 to 255 are the bytes, so every text has an encoding and every encoding a text; the third is
in `tokenizer_file.py`. A learnt tokenizer travels as its list of merges and nothing else: a peer receives numbers in a
range, never a pattern or a program, and each side builds the same encoder from them.

Form of the merges: `MAGIC`, then two little-endian uint32 per merge, the tokens that it joins. A merge makes the next
free token; if an earlier merge made the same bytes, it makes that token again.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from swarmtrain.data.text_chunks import CHUNKS_AT_ONCE, chunks
from swarmtrain.data.tokenizer_file import TokenizerBundle, TokenizerFile
from swarmtrain.errors import BadBytesError, RunFileError
from swarmtrain.extras import install_in_words

MAGIC = b"swarmtrain-bpe-1"
MAX_TOKEN_BYTES = 64
NUM_BYTES = 256
LEARNT_FROM_BYTES = 1 << 25  # the most text that a BPE is learnt from

Tokens = npt.NDArray[Any]  # (n,), unsigned integers


class Tokenizer(Protocol):
    """Vocabulary of the model."""

    def __hash__(self) -> int: ...

    @property
    def vocabulary_size(self) -> int:
        """Number of distinct tokens."""
        ...

    @property
    def start_token(self) -> int:
        """Token before the first one of a text that is measured or continued."""
        ...

    @property
    def document_begin(self) -> tuple[int, ...]:
        """Tokens before each document that is trained on."""
        ...

    @property
    def document_end(self) -> tuple[int, ...]:
        """Tokens after each document that is trained on, in place of its last newline; empty: the newline stays."""
        ...

    def encode(self, text: bytes | npt.NDArray[np.uint8]) -> Tokens:
        """Return the tokens of `text` (n,): uint8, uint16 or uint32, the smallest that holds the vocabulary."""
        ...

    def encode_all(self, texts: Iterable[bytes | npt.NDArray[np.uint8]]) -> Iterator[Tokens]:
        """Yield what `encode` returns for each text."""
        ...

    def encode_prompt(self, text: str) -> Tokens:
        """Return the tokens (n,) of what a person asks with: special tokens in it are what they are, and what begins a
        document begins it."""
        ...

    def num_unspelt_bytes(self, text: bytes) -> int:
        """Return how many bytes of `text` no token spells; 0 if every text can be spelt."""
        ...

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the text of `tokens`, exactly as it was encoded. Raises ValueError for a number that is no token."""
        ...

    def to_bytes(self) -> bytes:
        """Return the bytes from which a peer builds the same tokenizer; empty for bytes."""
        ...


class _EveryByte:
    """What tokenizers have in common in which every byte is a token."""

    start_token = ord("\n")
    document_begin: tuple[int, ...] = ()
    document_end: tuple[int, ...] = ()
    """Empty: a newline ends a document."""

    def num_unspelt_bytes(self, text: bytes) -> int:
        """Return 0: every text can be spelt."""
        return 0


class ByteTokenizer(_EveryByte):
    """Tokenizer whose tokens are the bytes."""

    vocabulary_size = NUM_BYTES

    def encode(self, text: bytes | npt.NDArray[np.uint8]) -> Tokens:
        """Return the bytes of `text` as uint8, without a copy."""
        return np.frombuffer(text, np.uint8)

    def encode_prompt(self, text: str) -> Tokens:
        """Return the bytes of `text`."""
        return self.encode(text.encode())

    def encode_all(self, texts: Iterable[bytes | npt.NDArray[np.uint8]]) -> Iterator[Tokens]:
        """Yield the bytes of each text."""
        return map(self.encode, texts)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the text of `tokens`. Raises ValueError for a number that is no byte."""
        return bytes(int(token) for token in tokens)

    def to_bytes(self) -> bytes:
        """Return b"": every peer has bytes."""
        return b""


class BpeTokenizer(_EveryByte):
    """Tokenizer whose tokens are bytes, and byte sequences that were frequent in the bootstrap's corpus.

    Bytes that are not UTF-8 are encoded one by one. Encoding needs the library `tokenizers`, decoding does not.
    """

    def __init__(self, merges: npt.NDArray[np.uint32]) -> None:
        """Build a tokenizer from `merges` (n, 2), in the form above. Raises ValueError if they are invalid."""
        self._merges = np.ascontiguousarray(merges, "<u4")
        self._spellings = spellings_of(self._merges)
        self._encoder = _encoder(self._merges, self._spellings)
        self._dtype = np.uint16 if self.vocabulary_size <= 2**16 else np.uint32

    @classmethod
    def learn(cls, text: bytes | npt.NDArray[np.uint8], vocabulary_size: int) -> BpeTokenizer:
        """Learn `vocabulary_size` tokens from (the first 32 MiB of) `text`.

        Raises RunFileError if the text is too small for so many, or the library is missing.
        """
        library = _library()
        learner = library.Tokenizer(library.models.BPE())
        learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        read = np.frombuffer(text, np.uint8)[:LEARNT_FROM_BYTES].data
        learner.train_from_iterator((str(chunk, errors="ignore") for chunk in chunks(read)), trainer)
        ids = {letter: byte for byte, letter in enumerate(byte_letters())}
        merges = []
        for pair in json.loads(learner.to_str())["model"]["merges"]:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            merges.append((ids[left], ids[right]))
            ids.setdefault(left + right, len(ids))
        if len(ids) != vocabulary_size:
            raise RunFileError(
                f"model.vocabulary_size = {vocabulary_size} is more than can be learnt from this corpus: lower it to "
                f"{len(ids)} or less, or give more text",
                code="too-little-text",
            )
        return cls(np.array(merges, np.uint32).reshape(-1, 2))

    @property
    def vocabulary_size(self) -> int:
        """Number of distinct tokens."""
        return len(self._spellings)

    def encode(self, text: bytes | npt.NDArray[np.uint8]) -> Tokens:
        """Return the tokens of `text` (n,), uint16 or uint32. Cuts it after lines, so that its length does
        not matter."""
        parts = [np.empty(0, self._dtype)]
        waiting: list[str | bytes] = []
        for chunk in chunks(np.frombuffer(text, np.uint8).data):
            waiting += _valid_and_invalid(chunk)
            if len(waiting) >= CHUNKS_AT_ONCE:
                parts += self._encode_parts(waiting)
                waiting = []
        return np.concatenate(parts + self._encode_parts(waiting))

    def encode_prompt(self, text: str) -> Tokens:
        """Return the tokens of `text` (n,)."""
        return self.encode(text.encode())

    def encode_all(self, texts: Iterable[bytes | npt.NDArray[np.uint8]]) -> Iterator[Tokens]:
        """Yield what `encode` returns for each text."""
        return map(self.encode, texts)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the text of `tokens`. Raises ValueError for a number that is no token."""
        numbers = [int(token) for token in tokens]
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self._spellings):
            raise ValueError(f"a token is at least 0 and below {len(self._spellings)}")
        return b"".join([self._spellings[number] for number in numbers])

    def to_bytes(self) -> bytes:
        """Return the merges in the form above."""
        return MAGIC + self._merges.tobytes()

    def _encode_parts(self, parts: Sequence[str | bytes]) -> list[Tokens]:
        encodings = iter(self._encoder.encode_batch_fast([part for part in parts if isinstance(part, str)]))
        return [
            np.array(next(encodings).ids, self._dtype) if isinstance(part, str) else np.frombuffer(part, np.uint8)
            for part in parts
        ]


def require_bpe() -> None:
    """Raise RunFileError, which says what to install, if the library for `BpeTokenizer` is missing."""
    _library()


def tokenizer_from_bytes_untrusted(data: bytes, vocabulary_size: int) -> Tokenizer:
    """Return the tokenizer that a peer sent; empty `data` means bytes.

    Raises BadBytesError if the form is wrong, the vocabulary is not `vocabulary_size`, or a `tokenizer.json` has tokens
    beyond it, and RunFileError if the library for it is missing on this machine.
    """
    if not data:
        if vocabulary_size < NUM_BYTES:
            raise BadBytesError(
                f"a run with a vocabulary of {vocabulary_size} tokens came without its tokenizer", code="bad-format"
            )
        return ByteTokenizer()
    if data.startswith(b"{"):
        return _from_file_untrusted(data, vocabulary_size)
    num_words, rest = divmod(len(data) - len(MAGIC), 4)
    if not data.startswith(MAGIC) or rest or num_words % 2 or num_words // 2 > 2 * vocabulary_size:
        raise BadBytesError(f"{len(data)} bytes are not a tokenizer of {vocabulary_size} tokens", code="bad-format")
    try:
        merges = merges_of(data)
        num_tokens = len(spellings_of(merges))
        if num_tokens != vocabulary_size:
            raise ValueError(f"it has {num_tokens} tokens")
        return BpeTokenizer(merges)
    except ValueError as error:
        raise BadBytesError(f"not a tokenizer of {vocabulary_size} tokens: {error}", code="bad-format") from None


def merges_of(tokenizer: bytes) -> npt.NDArray[np.uint32]:
    """Return the merges (n, 2) of a tokenizer in the form above; none if it is empty, which means bytes."""
    return np.frombuffer(tokenizer, "<u4", offset=len(MAGIC) if tokenizer else 0).reshape(-1, 2)


@functools.lru_cache(2)
def _from_file_untrusted(data: bytes, vocabulary_size: int) -> TokenizerFile:
    try:
        found = TokenizerFile(TokenizerBundle.from_bytes_untrusted(data))
    except ValueError as error:
        raise BadBytesError(f"{len(data)} bytes are not a usable tokenizer.json: {error}", code="bad-format") from None
    if found.vocabulary_size > vocabulary_size:
        raise BadBytesError(
            f"a tokenizer with token {found.vocabulary_size - 1} for a model of {vocabulary_size} tokens",
            code="bad-format",
        )
    return found


def spellings_of(merges: npt.NDArray[np.uint32]) -> list[bytes]:
    """Return the bytes of each token. Raises ValueError if a merge joins a token that does not exist yet, or makes one
    that is too long."""
    spellings = [bytes([byte]) for byte in range(NUM_BYTES)]
    known = set(spellings)
    for left, right in merges.tolist():
        if left >= len(spellings) or right >= len(spellings):
            raise ValueError("a merge joins a token that no merge before it makes")
        joined = spellings[left] + spellings[right]
        if len(joined) > MAX_TOKEN_BYTES:
            raise ValueError(f"a token is longer than {MAX_TOKEN_BYTES} bytes")
        if joined not in known:
            known.add(joined)
            spellings.append(joined)
    return spellings


def _encoder(merges: npt.NDArray[np.uint32], spellings: Sequence[bytes]) -> Any:
    library = _library()
    letters = byte_letters()
    spelt = ["".join([letters[byte] for byte in spelling]) for spelling in spellings]
    vocabulary = {letters: number for number, letters in enumerate(spelt)}
    pairs = [(spelt[left], spelt[right]) for left, right in merges.tolist()]
    encoder = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs))
    encoder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return encoder


def byte_letters() -> list[str]:
    """Return the 256 printable characters with which byte-level BPE writes the bytes 0 to 255: the table of GPT-2 and
    of the `tokenizers` library."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]


def _valid_and_invalid(chunk: memoryview) -> Iterator[str | bytes]:
    """Yield the chunk's UTF-8 text as str, and the invalid bytes between as bytes."""
    while len(chunk):
        try:
            yield str(chunk, "utf-8")
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield str(chunk[: error.start], "utf-8")
            yield bytes(chunk[error.start : error.end])
            chunk = chunk[error.end :]


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise RunFileError(
            f'model.tokenizer = "bpe" needs tokenizers: {install_in_words("bpe")}', code="package-missing"
        ) from None
