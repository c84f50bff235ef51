"""Batches drawn ahead are those of their source to the bit; nobody waits for more than the next one."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from codes import raises_code
from patience import PATIENCE_S
from torch import Tensor

from swarmtrain.data.batches import Batches, Windows
from swarmtrain.data.mixture import MixedBatches, PeerPlace
from swarmtrain.data.prefetch import PrefetchedBatches, prefetched
from swarmtrain.data.streams import SequenceStream, StreamPlace
from swarmtrain.data.tokens import ByteTokenizer
from swarmtrain.errors import RunFileError

TOKENS = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
CPU = torch.device("cpu")


class Counted(Batches):
    """Corpus that counts how often it was drawn from, and by which thread."""

    num_drawn = 0
    thread = ""

    def next_batch(self) -> Tensor:
        self.num_drawn += 1
        self.thread = threading.current_thread().name
        return super().next_batch()


def corpus(position: int = 0) -> Counted:
    made = Counted(TOKENS, context_tokens=16, batch_sequences=4, run_sha256="a1", peer_id="p", position=position)
    made.cut(5)
    return made


class OneByOne:
    """Blocks of one document each."""

    def __init__(self, documents: Callable[[int], Iterator[bytes]]) -> None:
        self.documents = documents

    def from_place(self, place: StreamPlace) -> Iterator[tuple[StreamPlace, list[bytes]]]:
        for epoch in itertools.count():
            for number, text in enumerate(self.documents(epoch)):
                yield StreamPlace(epoch, 0, number), [text]


def stream(documents: Callable[[int], Iterator[bytes]], position: int = 0) -> MixedBatches:
    source = SequenceStream(OneByOne(documents), ByteTokenizer().encode, 15)
    return MixedBatches([source], [1.0], 1, PeerPlace(run_sha256="a1", peer_id="p", position=position))


@pytest.fixture
def closed() -> Iterator[list[PrefetchedBatches]]:
    made = list[PrefetchedBatches]()
    yield made
    for each in made:
        each.close(PATIENCE_S)
        assert each._thread is None or not each._thread.is_alive()


def until(batches: PrefetchedBatches, is_so: Callable[[], bool]) -> None:
    """Wait for the thread."""
    with batches._change:
        assert batches._change.wait_for(is_so, PATIENCE_S)


@pytest.mark.parametrize("seed", range(3))
def test_the_draws_are_those_of_the_source_over_shards_and_checkpoints(
    closed: list[PrefetchedBatches], seed: int
) -> None:
    rng, plain, shard = random.Random(seed), corpus(), None
    closed.append(PrefetchedBatches(corpus()))
    for _ in range(120):
        ahead = closed[-1]
        what = rng.random()
        if what < 0.15:
            shard = rng.randrange(5)
            for each in (plain, ahead):
                each.use_shard(shard)
        elif what < 0.25:  # it is killed, and goes on from its checkpoint
            position = ahead.position
            ahead.close()
            closed.append(PrefetchedBatches(corpus(position)))
            if shard is not None:
                closed[-1].use_shard(shard)
        elif what < 0.5:
            until(ahead, lambda ahead=ahead: ahead._thread is None or len(ahead._drawn) == 2)  # type: ignore[misc]
        else:
            assert torch.equal(ahead.next_batch(), plain.next_batch())
        assert closed[-1].position == plain.position


def test_what_is_drawn_ahead_is_not_taken_and_is_at_most_two(closed: list[PrefetchedBatches]) -> None:
    source = corpus(position=7)
    closed.append(batches := PrefetchedBatches(source))
    assert batches.position == 7 and not source.num_drawn, "the thread begins with the first batch"
    batches.next_batch()
    until(batches, lambda: len(batches._drawn) == 2)
    assert (batches.position, source.position, source.num_drawn) == (8, 10, 3) and batches.num_shards == 5
    assert source.thread == "batches"
    batches.use_shard(2)
    until(batches, lambda: len(batches._drawn) == 2)
    assert (batches.position, source.position, source.num_drawn) == (8, 10, 5)
    batches.use_shard(2)  # nothing changes
    assert source.num_drawn == 5
    with pytest.raises(ValueError, match="shard 5"):
        batches.use_shard(5)
    expected = corpus(position=8)
    expected.use_shard(2)
    assert torch.equal(batches.next_batch(), expected.next_batch()), "as before that"


def test_a_batch_is_read_while_the_one_before_is_trained_on(closed: list[PrefetchedBatches]) -> None:
    reads, arrives = threading.Semaphore(0), threading.Semaphore(2)

    def documents(epoch: int) -> Iterator[bytes]:
        for number in range(100):
            reads.release()
            assert arrives.acquire(timeout=PATIENCE_S)
            yield bytes([number]) * 15

    closed.append(batches := PrefetchedBatches(stream(documents)))
    assert batches.next_batch().tolist() == [[0] * 15 + [10]]
    for _ in range(3):
        assert reads.acquire(timeout=PATIENCE_S), "nobody has asked for the second and third"
    arrives.release(200)
    assert [batches.next_batch()[0, 0].item() for _ in range(4)] == [1, 2, 3, 4]


def test_a_stream_has_no_shards_ahead_either(closed: list[PrefetchedBatches]) -> None:
    closed.append(batches := PrefetchedBatches(stream(lambda epoch: iter([b"x" * 100]))))
    assert not batches.num_shards
    with pytest.raises(ValueError, match="of data in 0 shards"):
        batches.use_shard(0)


def test_a_stream_beside_a_corpus_repeats_what_was_drawn_ahead_from_another_shard(
    closed: list[PrefetchedBatches],
) -> None:
    def mixed(position: int = 0) -> MixedBatches:
        windows = Windows(np.arange(5000), 15)
        windows.cut(5)
        letters = SequenceStream(OneByOne(lambda epoch: (b"%d" % n for n in range(9000))), ByteTokenizer().encode, 15)
        place = PeerPlace(run_sha256="a1", peer_id="p", position=position)
        return MixedBatches([windows, letters], [2.0, 1.0], 3, place)

    plain = mixed()
    closed.append(ahead := PrefetchedBatches(mixed()))
    for number in range(12):
        if number % 3 == 1:
            until(ahead, lambda: len(ahead._drawn) == 2)
            for each in (plain, ahead):
                each.use_shard(number % 5)
        assert torch.equal(ahead.next_batch(), plain.next_batch())


def test_an_error_of_the_source_is_raised_when_its_batch_is_taken(closed: list[PrefetchedBatches]) -> None:
    def documents(epoch: int) -> Iterator[bytes]:
        yield b"x" * 31
        raise RunFileError("the disk is gone", code="dataset-not-loaded")

    closed.append(batches := PrefetchedBatches(stream(documents)))
    assert batches.next_batch().shape == batches.next_batch().shape == (1, 16)
    for _ in range(2):
        with raises_code("dataset-not-loaded", RunFileError):
            batches.next_batch()
    assert batches.position == 2


def test_a_panic_of_a_library_ends_no_thread_in_silence(closed: list[PrefetchedBatches]) -> None:
    class Panic(BaseException):
        pass

    def documents(epoch: int) -> Iterator[bytes]:
        raise Panic
        yield b""

    closed.append(batches := PrefetchedBatches(stream(documents)))
    with pytest.raises(Panic):
        batches.next_batch()


def test_an_error_ahead_in_another_shard_is_forgotten_with_its_batch(closed: list[PrefetchedBatches]) -> None:
    class Torn(Counted):
        def next_batch(self) -> Tensor:
            if self._windows._shard is None and self.position == 1:
                raise OSError("torn")
            return super().next_batch()

    source = Torn(TOKENS, context_tokens=16, batch_sequences=4, run_sha256="a1", peer_id="p")
    source.cut(5)
    closed.append(batches := PrefetchedBatches(source))
    batches.next_batch()
    until(batches, lambda: batches._error is not None)
    batches.use_shard(1)
    assert batches.next_batch().shape == (4, 17) and batches.position == 2


def test_who_waits_can_be_asked_to_end_and_misses_no_batch(closed: list[PrefetchedBatches]) -> None:
    arrives, is_asked = threading.Event(), True

    def documents(epoch: int) -> Iterator[bytes]:
        assert arrives.wait(PATIENCE_S)
        yield b"x" * 100

    def check() -> None:
        if is_asked:
            raise InterruptedError

    closed.append(batches := PrefetchedBatches(stream(documents), check=check))
    with pytest.raises(InterruptedError):
        batches.next_batch()
    assert batches.position == 0
    is_asked = False
    arrives.set()
    assert batches.next_batch().tolist() == [[ord("x")] * 16] and batches.position == 1


def test_closing_ends_the_thread_and_waits_for_no_source() -> None:
    arrives = threading.Event()

    def documents(epoch: int) -> Iterator[bytes]:
        yield b"x" * 31
        assert arrives.wait(PATIENCE_S)
        yield b"x" * 31

    batches = PrefetchedBatches(stream(documents))
    batches.next_batch()
    thread = batches._thread
    assert thread is not None and thread.daemon
    batches.close(0.0)
    assert thread.is_alive(), "its source does not answer"
    arrives.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    batches = PrefetchedBatches(corpus())
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        batches.next_batch()


def test_batches_are_drawn_ahead_for_devices_and_streams(
    closed: list[PrefetchedBatches], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = list[str]()

    def pin(batch: Tensor) -> Tensor:
        pinned.append(threading.current_thread().name)
        return batch + 1000

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    source = corpus()
    assert prefetched(source, CPU) is source, "a thread would only cost"
    asked = list[int]()
    for number, (given, device) in enumerate(
        [
            (stream(lambda epoch: iter([b"x" * 100])), CPU),
            (corpus(), torch.device("cuda", 1)),
            (corpus(), torch.device("mps")),
        ]
    ):
        made = prefetched(given, device, lambda number=number: asked.append(number))  # type: ignore[misc]
        assert isinstance(made, PrefetchedBatches)
        closed.append(made)
        assert bool((made.next_batch() >= 1000).all()) == (device.type == "cuda")
        made._check()
    assert set(pinned) == {"batches"} and asked == [0, 1, 2]
