"""Data of a driver: batches cut into microbatches, in order and each once, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from patience import PATIENCE_S
from torch import Tensor

from swarmtrain.data.batches import BatchSource
from swarmtrain.peer.pipeline.scheduler import MicrobatchSource, NoBatches

T = 3


class Counted:
    """Batches of sequences that are all different: of shard s they begin at 1000 s."""

    num_shards = 4

    def __init__(self, num_sequences: int) -> None:
        self._size, self._shard, self._drawn = num_sequences, 0, 0
        self.position = 0

    def use_shard(self, shard: int) -> None:
        self._shard, self._drawn = shard, 0

    def next_batch(self) -> Tensor:
        first = 1000 * self._shard + self._drawn * self._size
        self._drawn, self.position = self._drawn + 1, self.position + 1
        return torch.arange(first, first + self._size)[:, None] * 10 + torch.arange(T + 1)


def firsts(x: Tensor) -> list[int]:
    """Return which sequences these are."""
    return [int(value) // 10 for value in x[:, 0]]


@pytest.mark.parametrize(
    ("batch", "size", "sizes"),
    [(6, 2, [2, 2, 2]), (6, 6, [6]), (6, 1, [1] * 6), (7, 3, [3, 3, 1]), (5, 4, [4, 1]), (2, 8, [2])],
)
def test_microbatches_are_the_batches_cut_in_order(batch: int, size: int, sizes: Sequence[int]) -> None:
    source, batches = MicrobatchSource(Counted(batch), size), Counted(batch)
    for _ in range(3):
        whole, parts = batches.next_batch(), [source.next_microbatch() for _ in sizes]
        assert [len(x) for x, _ in parts] == list(sizes)
        assert torch.equal(torch.cat([x for x, _ in parts]), whole[:, :-1])
        assert torch.equal(torch.cat([targets for _, targets in parts]), whole[:, 1:])
        assert source.position == batches.position, "a batch counts as drawn once it is begun"
        assert all(x.is_contiguous() and targets.is_contiguous() for x, targets in parts)
        assert all(x.dtype == targets.dtype == torch.int64 for x, targets in parts)


def test_another_shard_is_begun_with_the_next_batch() -> None:
    source = MicrobatchSource(Counted(4), 2)
    assert source.num_shards == 4
    assert firsts(source.next_microbatch()[0]) == [0, 1]
    source.use_shard(3)
    assert firsts(source.next_microbatch()[0]) == [2, 3], "a batch is not left half drawn"
    assert firsts(source.next_microbatch()[0]) == [3000, 3001]


def test_whole_batches_are_drawn_besides() -> None:
    source = MicrobatchSource(Counted(4), 2)
    source.next_microbatch()
    assert firsts(source.next_batch()) == [4, 5, 6, 7] and source.position == 2
    assert firsts(source.next_microbatch()[0]) == [2, 3]
    assert firsts(source.next_microbatch()[0]) == [8, 9]


def test_several_threads_draw_each_microbatch_once() -> None:
    source = MicrobatchSource(Counted(5), 2)
    drawn: list[list[tuple[int, ...]]] = [[], [], [], []]
    together = threading.Barrier(len(drawn))

    def draw(mine: list[tuple[int, ...]]) -> None:
        together.wait(PATIENCE_S)
        for _ in range(150):
            mine.append(tuple(firsts(source.next_microbatch()[0])))

    threads = [threading.Thread(target=draw, args=(mine,)) for mine in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    everything = sorted(number for mine in drawn for microbatch in mine for number in microbatch)
    assert everything == list(range(1000)), "200 batches of three microbatches"
    assert source.position == 200
    for mine in drawn:
        assert mine == sorted(mine)


def test_stages_after_the_first_draw_nothing() -> None:
    none: BatchSource = NoBatches()
    none.use_shard(3)
    assert (none.position, none.num_shards) == (0, 0)
    with pytest.raises(AssertionError, match="only the first stage"):
        none.next_batch()
