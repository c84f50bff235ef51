"""Decisions of a transfer of pinned files, with peers that are quick, slow, busy, lying or gone, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from swarmtrain.protocol.pinned_files.file_list import PinnedFile
from swarmtrain.protocol.pinned_files.transfer import (
    BUSY_LIMIT_S,
    MOST_STREAMS,
    PATIENCE_S,
    FileTransfer,
    RangeRequest,
    RequestEnd,
)
from swarmtrain.run import CHUNK_BYTES

MIB = 2**20
Answer = Callable[[RangeRequest, float], tuple[int, RequestEnd, float]]
"""Returns (chunks delivered, end, seconds taken) for a request at a time."""


def serves(bytes_per_s: float) -> Answer:
    return lambda request, now: (
        len(request.chunks),
        RequestEnd.DONE,
        0.1 + len(request.chunks) * CHUNK_BYTES / bytes_per_s,
    )


def answers(end: RequestEnd, num_chunks: int = 0, seconds: float = 0.1) -> Answer:
    return lambda request, now: (min(num_chunks, len(request.chunks)), end, seconds)


@dataclass
class Play:
    """Transfer from `peers`, played until it is complete, has failed, or `limit_s` has passed."""

    peers: dict[str, Answer]
    sizes: tuple[int, ...] = (100, 512 * MIB, 64 * MIB)
    limit_s: float = 10_000.0
    asked: list[tuple[float, RangeRequest]] = field(default_factory=list)
    delivered: dict[str, int] = field(default_factory=dict)
    now: float = 0.0
    _ends: list[tuple[float, int, RangeRequest, int, RequestEnd]] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = [
            PinnedFile(f"{number}.safetensors", size, "ab" * 32, "cd" * 32 if size > CHUNK_BYTES else "")
            for number, size in enumerate(self.sizes)
        ]
        self.transfer = FileTransfer(files, 0.0)
        for number, file in enumerate(files):
            if file.num_chunks == 1:
                self.transfer.listed(number)

    def run(self) -> Play:
        transfer = self.transfer
        transfer.add_sources(self.peers)
        ends = self._ends
        while not transfer.is_complete and not transfer.has_failed(self.now) and self.now < self.limit_s:
            for request in transfer.next_requests(self.now):
                self.asked.append((self.now, request))
                num_chunks, end, seconds = self.peers[request.source](request, self.now)
                heapq.heappush(ends, (self.now + seconds, len(self.asked), request, num_chunks, end))
            assert transfer.num_serving == len(ends) <= MOST_STREAMS
            next_s = self.now + max(0.001, transfer.wait_s(self.now))
            if not ends or ends[0][0] > next_s:
                self.now = next_s
                continue
            self.now, _, request, num_chunks, end = heapq.heappop(ends)
            transfer.came(request, num_chunks, self.now)
            self.delivered[request.source] = self.delivered.get(request.source, 0) + num_chunks
            if not request.chunks and end is RequestEnd.DONE:
                transfer.listed(request.file)
            transfer.ended(request, end, self.now)
        return self

    def asked_of(self, peer: str) -> list[float]:
        return [at_s for at_s, request in self.asked if request.source == peer]


def test_each_chunk_is_asked_for_once_and_lists_before_chunks() -> None:
    play = Play({name: serves(10 * MIB) for name in "abc"}).run()
    assert play.transfer.is_complete
    chunks = [(request.file, chunk) for _, request in play.asked for chunk in request.chunks]
    assert len(chunks) == len(set(chunks)) == 1 + 2048 + 256
    for number in (1, 2):
        of_file = [request for _, request in play.asked if request.file == number]
        assert not of_file[0].chunks and all(request.chunks for request in of_file[1:])


def test_quick_sources_deliver_more_and_a_slow_one_does_not_hold_up_the_end() -> None:
    play = Play({"quick": serves(50 * MIB), "middling": serves(10 * MIB), "slow": serves(MIB / 4)}).run()
    assert play.transfer.is_complete
    assert play.delivered["quick"] > 3 * play.delivered["middling"] > 3 * play.delivered["slow"] > 0
    assert play.now < 576 / 60 + 20, "not the whole time of a long request to the slow one"


def test_one_source_is_enough() -> None:
    play = Play({"a": serves(10 * MIB)}).run()
    assert play.transfer.is_complete and play.now == pytest.approx(576 / 10, rel=0.1)


def busy_until(end_s: float) -> Answer:
    return lambda request, now: serves(100 * MIB)(request, now) if now > end_s else (0, RequestEnd.BUSY, 0.1)


def test_a_busy_source_is_asked_again_less_and_less_often() -> None:
    play = Play({"a": busy_until(BUSY_LIMIT_S - 20)}).run()
    assert play.transfer.is_complete
    first = play.asked_of("a")[:6]
    pauses = [round(after - before, 1) for before, after in itertools.pairwise(first)]
    assert pauses == [0.6, 1.1, 2.1, 4.1, 8.1]


def test_sources_that_only_say_that_they_are_busy_are_given_up() -> None:
    play = Play({"a": answers(RequestEnd.BUSY), "b": answers(RequestEnd.BUSY)}).run()
    assert play.transfer.has_failed(play.now) and BUSY_LIMIT_S <= play.now < BUSY_LIMIT_S + 10


def test_a_source_that_is_always_busy_does_not_end_what_another_delivers() -> None:
    play = Play({"a": serves(MIB / 2), "b": answers(RequestEnd.BUSY)}).run()
    assert play.transfer.is_complete and play.now > BUSY_LIMIT_S


def test_one_that_breaks_off_goes_on_where_it_broke() -> None:
    play = Play({"a": answers(RequestEnd.BROKEN_OFF, num_chunks=3)}, sizes=(4 * MIB,))
    play.transfer.listed(0)
    play.run()
    assert play.transfer.is_complete
    assert [request.chunks.start for _, request in play.asked] == [0, 3, 6, 9, 12, 15]


def test_one_that_lies_is_not_asked_again_and_another_delivers_what_it_kept_back() -> None:
    play = Play({"liar": answers(RequestEnd.WRONG_BYTES, num_chunks=2), "a": serves(10 * MIB)}).run()
    assert play.transfer.is_complete and len(play.asked_of("liar")) == 1


def test_what_is_unreachable_is_asked_seldom() -> None:
    play = Play({"gone": answers(RequestEnd.UNREACHABLE, seconds=1.0), "a": serves(MIB)}).run()
    assert play.transfer.is_complete
    pauses = [after - before for before, after in itertools.pairwise(play.asked_of("gone"))]
    assert pauses[0] < 5 and pauses == sorted(pauses) and pauses[-1] <= 122


def test_a_stalled_source_is_left_for_the_others_and_tried_again() -> None:
    def stalls_first(request: RangeRequest, now: float) -> tuple[int, RequestEnd, float]:
        return (0, RequestEnd.STALLED, 10.0) if now < 30 else serves(MIB)(request, now)

    play = Play({"a": stalls_first, "b": serves(MIB)}).run()
    assert play.transfer.is_complete
    assert play.asked_of("a")[1] - play.asked_of("a")[0] >= 60 and play.delivered["a"] > 0


def test_a_peer_that_does_not_have_the_files_yet_is_asked_again() -> None:
    def has_it_later(request: RangeRequest, now: float) -> tuple[int, RequestEnd, float]:
        return serves(10 * MIB)(request, now) if now > 40 else (0, RequestEnd.NOT_HELD, 0.1)

    play = Play({"a": has_it_later}).run()
    assert play.transfer.is_complete and len(play.asked_of("a")) < 30


def test_a_source_that_comes_later_is_asked_too() -> None:
    play = Play({"a": serves(MIB)}, limit_s=20.0).run()
    play.peers["b"], play.limit_s = serves(50 * MIB), 10_000.0
    play.run()
    assert play.transfer.is_complete and play.delivered["b"] > play.delivered["a"]


@pytest.mark.parametrize(
    "end", [RequestEnd.UNREACHABLE, RequestEnd.NOT_HELD, RequestEnd.STALLED, RequestEnd.WRONG_BYTES]
)
def test_it_fails_when_nobody_delivers(end: RequestEnd) -> None:
    play = Play({"a": answers(end), "b": answers(end)}).run()
    assert play.transfer.has_failed(play.now) and PATIENCE_S <= play.now < PATIENCE_S + 10


def test_it_fails_when_there_is_nobody() -> None:
    assert Play({}).run().now == pytest.approx(PATIENCE_S, abs=1.5)


def test_what_is_on_the_disk_is_not_asked_for() -> None:
    play = Play({"a": serves(10 * MIB)}, sizes=(4 * MIB,))
    play.transfer.listed(0, [0, 1, 5, 15])
    play.run()
    asked = {chunk for _, request in play.asked for chunk in request.chunks}
    assert play.transfer.is_complete and asked == set(range(16)) - {0, 1, 5, 15}
