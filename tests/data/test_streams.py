"""A stream gives the same sequences after a resume, with and without its log of places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from codes import raises_code

from swarmtrain.data import streams
from swarmtrain.data.streams import PlaceLog, SequenceStream, StreamPlace, TextBlocks
from swarmtrain.data.tokens import ByteTokenizer
from swarmtrain.errors import RunFileError

FILES = (25, 3, 0, 40, 11)
"""Rows of each file; every seventh row of them has no text."""


class Rows:
    """Data set in memory that counts what is read of it."""

    name, num_files = "owner/set", len(FILES)
    num_rows = sum(FILES)

    def __init__(self) -> None:
        self.read = 0

    def texts(self, file: int, begin: int, end: int | None) -> Iterator[bytes]:
        for row in range(begin, FILES[file] if end is None else min(end, FILES[file])):
            self.read += 1
            yield b"" if row % 7 == 3 else b"file %d row %d " % (file, row) + b"x" * row


class Counted:
    """Tokenizer of bytes that counts what it encodes."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, text: bytes) -> np.ndarray:
        self.encoded += 1
        return ByteTokenizer().encode(text)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_ROWS", 6)
    monkeypatch.setattr(streams, "_START_ROWS", 20)


def made(log: PlaceLog | None = None, seed: int = 5) -> tuple[SequenceStream, Rows, Counted]:
    rows, tokenizer = Rows(), Counted()
    return SequenceStream(TextBlocks(rows, b"", seed), tokenizer.encode, 15, log), rows, tokenizer


def sequences(stream: SequenceStream, first: int, number: int) -> torch.Tensor:
    return stream.sequences(first, np.zeros(number, np.uint64))


def documents(seed: int, epoch: int) -> list[bytes]:
    found = []
    for place, texts in TextBlocks(Rows(), b"", seed).from_place(StreamPlace(epoch)):
        if place.epoch != epoch:
            return found
        found += texts
    raise AssertionError("a stream has no end")


@pytest.mark.parametrize("seed", [0, 7, 2**100 + 3])
def test_a_pass_reads_every_text_once_in_an_order_of_its_own(seed: int) -> None:
    everything = sorted(text + b"\n" for file in range(len(FILES)) for text in Rows().texts(file, 0, None) if text)
    passes = [documents(seed, epoch) for epoch in range(2)]
    assert all(sorted(each) == everything for each in passes)
    assert passes[0] != passes[1] and passes[0] != documents(seed + 9, 0)


def test_sequences_are_cut_without_loss_across_passes() -> None:
    stream, _, _ = made()
    read = b"".join(bytes(row) for row in sequences(stream, 0, 500).tolist())
    assert b"".join(text for epoch in range(6) for text in documents(5, epoch)).startswith(read)


@pytest.mark.parametrize("has_log", [True, False])
@pytest.mark.parametrize("first", [1, 90, 137, 400])
def test_a_resume_finds_its_place_to_the_sample(tmp_path: Path, has_log: bool, first: int) -> None:
    log = tmp_path / "places.array" if has_log else None
    whole, _, _ = made(PlaceLog(log))
    expected = torch.cat([sequences(whole, number, 5) for number in range(0, 420, 5)])
    resumed, rows, tokenizer = made(PlaceLog(log))
    for begin in range(first, 410, 3):
        assert torch.equal(sequences(resumed, begin, 3), expected[begin : begin + 3])
        if begin == first:
            reread, encoded = rows.read, tokenizer.encoded
    if has_log:
        assert encoded <= 2 * 6, "at most the block that it was in, and the one that it goes on with"
        assert reread <= 3 * 6
    elif first > 90:
        assert encoded > 40, "all that came before"


def test_the_last_sequences_can_be_asked_for_again() -> None:
    stream, _, _ = made()
    calls = [(first, sequences(stream, first, 4)) for first in range(0, 40, 4)]
    for first, expected in calls[-4:]:
        assert torch.equal(sequences(stream, first, 4), expected)
    with pytest.raises(AssertionError, match="no longer kept"):
        sequences(stream, 0, 4)


def test_held_out_text_is_removed_within_a_block() -> None:
    prose = b" ".join(b"word%d" % (n * n) for n in range(400))

    class Two(Rows):
        num_files, num_rows = 1, 2

        def texts(self, file: int, begin: int, end: int | None) -> Iterator[bytes]:
            yield from [prose, b"another text"][begin:end]

    blocks = TextBlocks(Two(), prose, 4).from_place(StreamPlace())
    assert sorted(next(blocks)[1]) == [b"", b"another text\n"]


def test_a_stream_without_text_is_an_error_and_no_endless_loop() -> None:
    class Empty(Rows):
        def texts(self, file: int, begin: int, end: int | None) -> Iterator[bytes]:
            yield b""

    stream = SequenceStream(TextBlocks(Empty(), b"", 0), ByteTokenizer().encode, 15)
    for _ in range(2):
        with raises_code("only-held-out-text", RunFileError):
            sequences(stream, 0, 1)


@pytest.mark.parametrize(("most", "num_samples"), [(100_000, 67), (30, 30)])
@pytest.mark.parametrize("has_begun", [False, True])
def test_samples_that_teach_nothing_are_given_up(
    monkeypatch: pytest.MonkeyPatch, most: int, num_samples: int, has_begun: bool
) -> None:
    monkeypatch.setattr(streams, "_MOST_LEFT_OUT", most)
    taught = iter([b"all that there is to learn"] if has_begun else [])
    rows = Rows()
    stream = SequenceStream(TextBlocks(rows, b"", 5), lambda _: ByteTokenizer().encode(next(taught, b"")), 15)
    if has_begun:
        assert bytes(sequences(stream, 0, 1)[0].tolist()) == b"all that there i"
    for _ in range(2):  # the trainer may ask again
        read = rows.read
        with raises_code("nothing-to-learn", RunFileError, 'samples read of "owner/set"') as caught:
            sequences(stream, int(has_begun), 1)
        assert rows.read - read <= 2 * rows.num_rows + 6, "at most the rest of a pass, a whole one, and a block"
        counted = int(str(caught.value).split()[2])
        assert counted == most if most == 30 else num_samples <= counted < 2 * num_samples


def test_an_error_of_the_data_set_costs_no_sequence() -> None:
    class Torn(Rows):
        is_torn = True

        def texts(self, file: int, begin: int, end: int | None) -> Iterator[bytes]:
            for number, text in enumerate(super().texts(file, begin, end)):
                if self.is_torn and number == 8:
                    raise RunFileError("the hub is gone", code="dataset-not-loaded")
                yield text

    rows = Torn()
    stream = SequenceStream(TextBlocks(rows, b"", 5), ByteTokenizer().encode, 15)
    read = [sequences(stream, 0, 2)]
    with raises_code("dataset-not-loaded", RunFileError):
        for first in range(2, 400, 2):
            read.append(sequences(stream, first, 2))
    rows.is_torn = False
    read.append(sequences(stream, 2 * len(read), 30))
    assert torch.equal(torch.cat(read), sequences(made()[0], 0, sum(map(len, read))))


def test_a_log_thins_out_what_is_long_ago(tmp_path: Path) -> None:
    log = PlaceLog(None)
    for number in range(3000):
        log.add(10 * number, StreamPlace(0, number, 6))
        log.add(10 * number, StreamPlace(9, 9, 9))  # it was read again
    assert len(log._tokens) == 256
    for at in range(0, 30_000, 7):
        tokens, place = log.before(at)
        assert place == (0, tokens // 10, 6) and 0 <= at - tokens <= 10 + 0.1 * (30_000 - at)
    kept = PlaceLog(tmp_path / "places.array")
    for number in range(5):
        kept.add(10 * number, StreamPlace(0, number, 6))
    again = PlaceLog(tmp_path / "places.array")
    assert again.before(34) == (30, StreamPlace(0, 3, 6))
    assert again.before(-1) == (0, StreamPlace()) == PlaceLog(None).before(10**9)


@pytest.mark.parametrize("content", [b"", b"not a log", b"{}" * 4000])
def test_a_damaged_log_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "places.array").write_bytes(content)
    assert PlaceLog(tmp_path / "places.array").before(100) == (0, StreamPlace())
