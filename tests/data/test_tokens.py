"""Both tokenizers give back any bytes; a tokenizer from a peer is checked before it is used."""

from __future__ import annotations

import importlib
import types

import numpy as np
import pytest
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.data import text_chunks
from swarmtrain.data.tokens import MAGIC, BpeTokenizer, ByteTokenizer, Tokenizer, tokenizer_from_bytes_untrusted
from swarmtrain.errors import BadBytesError, RunFileError

SAMPLE = "".join(
    f"def method_{i}(self, value):\n    return self.value + {i}  # größer\n\n" for i in range(300)
).encode()


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.learn(SAMPLE, 400)


@given(text=st.binary(max_size=300))
def test_bytes_round_trip(text: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == list(text)


def test_bytes_are_encoded_without_a_copy() -> None:
    text = np.arange(256, dtype=np.uint8)
    assert np.shares_memory(ByteTokenizer().encode(text), text)
    assert ByteTokenizer().to_bytes() == b"" and ByteTokenizer().vocabulary_size == 256


@given(text=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode)))
def test_bpe_round_trips_what_is_utf8_and_what_is_not(bpe: BpeTokenizer, text: bytes) -> None:
    encoded = bpe.encode(text)
    assert encoded.dtype == np.uint16 and bpe.decode(encoded) == text


def test_bpe_compresses_and_does_not_depend_on_the_kind_of_buffer(bpe: BpeTokenizer) -> None:
    encoded = bpe.encode(SAMPLE)
    assert len(encoded) < len(SAMPLE) / 3 and encoded.max() < bpe.vocabulary_size == 400
    assert np.array_equal(bpe.encode(np.frombuffer(SAMPLE, np.uint8)), encoded)
    assert bpe.encode(b"\n").tolist() == [10] and len(bpe.encode(b"")) == 0


def test_bpe_chunks_end_with_lines_or_between_characters(monkeypatch: pytest.MonkeyPatch, bpe: BpeTokenizer) -> None:
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 64)
    for text in (SAMPLE[:5000], "€äö".encode() * 200, b"\xff\x80" * 300):
        chunks = list(text_chunks.chunks(memoryview(text)))
        assert b"".join(chunks) == text and len(chunks) > 1
        assert bpe.decode(bpe.encode(text)) == text
    assert all(bytes(chunk).decode() for chunk in text_chunks.chunks(memoryview("€äö".encode() * 200)))


def test_bpe_travels_as_bytes_and_is_the_same_there(bpe: BpeTokenizer) -> None:
    received = tokenizer_from_bytes_untrusted(bpe.to_bytes(), 400)
    assert np.array_equal(received.encode(SAMPLE), bpe.encode(SAMPLE))
    assert received.to_bytes() == bpe.to_bytes() == BpeTokenizer.learn(SAMPLE, 400).to_bytes()


def test_bpe_that_the_corpus_cannot_fill_says_how_far_to_lower_it() -> None:
    with raises_code("too-little-text", RunFileError, "model.vocabulary_size = 5000"):
        BpeTokenizer.learn(b"only a few words here\n", 5000)


def test_merges_that_make_the_same_bytes_make_one_token() -> None:
    merges = np.array([(97, 98), (98, 99), (256, 99), (97, 257), (258, 258)], np.uint32)
    tokenizer = BpeTokenizer(merges)
    assert tokenizer.vocabulary_size == 256 + 4
    assert tokenizer.decode([258, 259]) == b"abcabcabc"
    assert tokenizer.decode(tokenizer.encode(b"abcabcab")) == b"abcabcab"


def test_a_token_out_of_range_is_a_value_error(bpe: BpeTokenizer) -> None:
    for tokenizer, bad in ((bpe, 400), (bpe, -1), (ByteTokenizer(), 256)):
        with pytest.raises(ValueError):
            tokenizer.decode([bad])


def _merges(*pairs: tuple[int, int]) -> bytes:
    return MAGIC + np.array(pairs, "<u4").tobytes()


@pytest.mark.parametrize(
    ("data", "vocabulary_size"),
    [
        (b"", 255),
        (b"garbage", 256),
        (MAGIC + b"\0" * 7, 257),
        (MAGIC + b"\0" * 12, 257),
        (_merges((1, 2)), 400),  # too few
        (_merges((1, 256)), 257),  # joins itself
        (_merges((2**32 - 1, 1)), 257),
        (_merges(*[(0, 0)] * 600), 257),  # too many, whatever they make
        (_merges((0, 0), *[(255 + i, 255 + i) for i in range(1, 30)]), 286),  # 2**30 bytes
    ],
)
def test_a_bad_tokenizer_from_a_peer_is_refused(data: bytes, vocabulary_size: int) -> None:
    with pytest.raises(BadBytesError):
        tokenizer_from_bytes_untrusted(data, vocabulary_size)


@given(data=st.binary(max_size=64), vocabulary_size=st.integers(256, 264))
def test_any_bytes_give_a_tokenizer_or_the_one_error(data: bytes, vocabulary_size: int) -> None:
    try:
        tokenizer: Tokenizer = tokenizer_from_bytes_untrusted(MAGIC + data, vocabulary_size)
    except BadBytesError:
        return
    assert tokenizer.vocabulary_size == vocabulary_size


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with raises_code("package-missing", RunFileError, "pip install 'tokenizers>="):
        BpeTokenizer.learn(SAMPLE, 400)
