"""Limits of the link, in virtual time: the arithmetic, turns, who is admitted, and how long transfers take."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_loop import virtually

from swarmtrain.errors import BusyError
from swarmtrain.network.links.throttle import (
    BYTES_PER_S_OF_MBIT,
    Places,
    Throttle,
    TokenBucket,
    TransferTimes,
    num_at_once,
)
from swarmtrain.network.node import Stream, TrafficCount
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, Snapshot, SnapshotStore
from swarmtrain.run import CHUNK_BYTES, NetworkSection
from swarmtrain.v1 import snapshot_pb2 as pb

MBIT = BYTES_PER_S_OF_MBIT
LEAST = NetworkSection().least_bytes_per_s


# ---------------------------------------------------------------- the arithmetic


@given(
    st.floats(10_000, 1e9),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, CHUNK_BYTES)), min_size=1, max_size=60),
)
def test_a_bucket_lets_its_rate_pass_and_no_more(rate: float, passing: list[tuple[float, int]]) -> None:
    """Whoever waits as told sends at most the rate and one burst; and nothing is told to wait without need."""
    bucket, now_s, passed_bytes = TokenBucket(rate), 0.0, 0
    burst_bytes = max(CHUNK_BYTES, rate * 0.1)
    for idle_s, size_bytes in passing:
        now_s += idle_s
        wait_s = bucket.wait_s(size_bytes, now_s)
        now_s += wait_s
        passed_bytes += size_bytes
        assert passed_bytes <= (now_s * rate + burst_bytes) * (1 + 1e-9) + 1
        assert wait_s <= size_bytes / rate * (1 + 1e-9) + 1e-9, "never longer than its own bytes take"
        bucket.take(size_bytes, now_s)


def test_a_bucket_without_a_limit_never_waits() -> None:
    bucket = TokenBucket()
    bucket.take(10**12, 0.0)
    assert bucket.wait_s(10**12, 0.0) == 0.0


def test_a_bucket_of_which_the_clock_is_turned_back_gives_nothing_away() -> None:
    bucket = TokenBucket(1e6)
    bucket.take(CHUNK_BYTES, 10.0)
    assert bucket.wait_s(CHUNK_BYTES, 5.0) == pytest.approx(CHUNK_BYTES / 1e6)


def test_small_calls_delay_chunks_by_a_second_at_most() -> None:
    bucket = TokenBucket(1e6)
    for _ in range(1000):
        bucket.take(100_000, 0.0)
    assert bucket.wait_s(CHUNK_BYTES, 0.0) == pytest.approx(1.0 + 2 * CHUNK_BYTES / 1e6)


@pytest.mark.parametrize(
    ("mbit", "expected"), [(0, 4), (100, 4), (2.1, 4), (2.0, 3), (1.5, 2), (1.0, 1), (0.53, 1), (0.1, 1)]
)
def test_fewer_share_a_slow_link(mbit: float, expected: int) -> None:
    assert num_at_once(4, mbit * MBIT, LEAST) == expected


def test_without_a_least_speed_the_number_stays() -> None:
    assert num_at_once(4, 1000.0, 0.0) == 4


# ---------------------------------------------------------------- turns


def test_a_chunk_waits_behind_those_that_came_first_and_a_small_call_behind_none() -> None:
    async def body(clock: Callable[[], float]) -> None:
        up, passed = Throttle(1e6, clock), list[tuple[str, float]]()

        async def send(name: str, number: int) -> None:
            for _ in range(number):
                await up.turn(250_000)
                passed.append((name, round(clock(), 3)))

        async with asyncio.TaskGroup() as group:
            group.create_task(send("a", 3))
            group.create_task(send("b", 2))
            group.create_task(send("c", 1))
            await asyncio.sleep(0)
            up.count(125_000)
            assert clock() == 0.0
        assert [name for name, _ in passed] == ["a", "a", "b", "c", "a", "b"], "one after the other"
        assert passed[-1][1] == pytest.approx((6 * 250_000 + 125_000 - CHUNK_BYTES) / 1e6, abs=0.01)

    virtually(body)


def test_a_limit_that_is_lifted_or_set_holds_soon() -> None:
    async def body(clock: Callable[[], float]) -> None:
        up = Throttle(1000.0, clock)
        await up.turn(CHUNK_BYTES)
        waiting = asyncio.create_task(up.turn(CHUNK_BYTES))
        await asyncio.sleep(10.0)
        assert not waiting.done()
        up.bytes_per_s = 0.0
        await waiting
        assert clock() < 10.5
        up.bytes_per_s = 1e6
        before_s = clock()
        for _ in range(9):
            await up.turn(CHUNK_BYTES)
        assert clock() - before_s >= 7 * CHUNK_BYTES / 1e6

    virtually(body)


def test_one_that_gives_up_waiting_lets_the_next_one_pass() -> None:
    async def body(clock: Callable[[], float]) -> None:
        up = Throttle(1e6, clock)
        await up.turn(CHUNK_BYTES)
        first, second = asyncio.create_task(up.turn(CHUNK_BYTES)), asyncio.create_task(up.turn(CHUNK_BYTES))
        await asyncio.sleep(0.1)
        first.cancel()
        await second
        assert clock() == pytest.approx(CHUNK_BYTES / 1e6)

    virtually(body)


def test_so_many_places_and_one_more_when_the_number_grows() -> None:
    async def body(clock: Callable[[], float]) -> list[int]:
        most, inside, seen = 2, 0, list[int]()
        places = Places(lambda: most)

        async def stay(index: int) -> None:
            nonlocal inside, most
            async with places:
                inside += 1
                seen.append(inside)
                if index == 4:
                    most = 4
                await asyncio.sleep(1.0)
                inside -= 1

        await asyncio.gather(*(stay(index) for index in range(14)))
        return seen

    seen = virtually(body)
    assert len(seen) == 14 and max(seen[:6]) == 2 and max(seen) == 4


def test_a_place_is_not_lost_with_one_that_gives_up_as_it_is_told_of_it() -> None:
    async def body(clock: Callable[[], float]) -> list[str]:
        places, entered = Places(lambda: 1), list[str]()

        async def stay(name: str) -> None:
            async with places:
                entered.append(name)
                await asyncio.sleep(1.0)

        async with places:
            second, third, fourth = (asyncio.create_task(stay(name)) for name in ("second", "third", "fourth"))
            await asyncio.sleep(1.0)
        second.cancel()
        await asyncio.wait([third, fourth], timeout=60)
        assert second.cancelled() and clock() == 3.0
        return entered

    assert virtually(body) == ["third", "fourth"]


# ---------------------------------------------------------------- serving


def held_of(num_chunks: int) -> HeldSnapshot:
    manifest = pb.Manifest(total_bytes=num_chunks * CHUNK_BYTES, chunk_sha256=bytes(32 * num_chunks))
    body = Body([bytes(CHUNK_BYTES)] * num_chunks)
    return HeldSnapshot(Snapshot(manifest, pb.Signed(), "ab" * 32, ""), body, set(range(num_chunks)))


def store_of(mbit: float, clock: Callable[[], float], num_chunks: int = 256) -> SnapshotStore:
    up = Throttle(mbit * MBIT, clock)
    store = SnapshotStore(up=up, min_bytes_per_s=LEAST, clock=clock)
    store.add(held_of(num_chunks))
    return store


def request(num_chunks: int = 256) -> pb.PullRequest:
    return pb.PullRequest(snapshot_sha256=bytes.fromhex("ab" * 32), num_chunks=num_chunks)


async def read(store: SnapshotStore, clock: Callable[[], float], took_s: float = 0.0) -> tuple[list[float], int]:
    """(when each message came, bytes) of a reader that takes so long for each."""
    came_s, size_bytes = list[float](), 0
    async for message in store.serve(request()):
        if message.status == pb.PullReply.STATUS_BUSY:
            return [], 0
        came_s.append(clock())
        size_bytes += len(message.data)
        await asyncio.sleep(took_s)
    return came_s, size_bytes


@pytest.mark.parametrize("mbit", [0.53, 0.7, 1.0, 1.3, 2.0, 5.0, 50.0])
def test_whoever_is_admitted_at_a_slow_server_is_never_too_slow(mbit: float) -> None:
    """For a minute as many read as may, and as many more try all the time: no reader would give up."""

    async def body(clock: Callable[[], float]) -> tuple[float, dict[int, tuple[list[float], int]]]:
        store, done = store_of(mbit, clock, 1024), dict[int, tuple[list[float], int]]()

        async def reader(index: int) -> None:
            came_s, size_bytes = [clock()], 0
            async for message in store.serve(request(1024)):
                if message.status == pb.PullReply.STATUS_BUSY:
                    return
                came_s.append(clock())
                size_bytes += len(message.data)
                done[index] = (came_s, size_bytes)
                if clock() > 60.0:
                    return

        async def pester() -> None:
            while clock() < 60.0:
                assert [message.status async for message in store.serve(request(8))] == [pb.PullReply.STATUS_BUSY]
                await asyncio.sleep(1.0)

        async with asyncio.TaskGroup() as group:
            for index in range(4):
                group.create_task(reader(index))
            await asyncio.sleep(0)
            group.create_task(pester())
        return clock(), done

    ended_s, done = virtually(body)
    assert len(done) == num_at_once(4, mbit * MBIT, LEAST)
    for came_s, size_bytes in done.values():
        gaps_s = [after - before for before, after in itertools.pairwise(came_s)]
        assert max(gaps_s) < NetworkSection().stall_limit_s / 2
        assert size_bytes / ended_s >= 1.9 * LEAST
    sent_bytes = sum(size_bytes for _, size_bytes in done.values())
    assert 0.97 * mbit * MBIT <= sent_bytes / ended_s <= 1.02 * mbit * MBIT + CHUNK_BYTES


def test_a_slow_reader_does_not_hold_up_a_fast_one_and_equals_get_the_same() -> None:
    async def body(clock: Callable[[], float]) -> list[tuple[list[float], int]]:
        store = store_of(16.0, clock)
        return list(await asyncio.gather(read(store, clock, 1.0), read(store, clock), read(store, clock)))

    (slow, _), (one, _), (other, _) = virtually(body)
    assert 257.0 <= slow[-1] < 1.2 * 257.0, "it gets what it takes"
    beside = sum(came_s <= one[-1] for came_s in slow)
    fast_s = (2 * 256 + beside) * CHUNK_BYTES / (16.0 * MBIT)
    assert one[-1] == pytest.approx(fast_s, rel=0.02) and other[-1] == pytest.approx(one[-1], abs=0.3)


def test_a_reader_that_waits_for_its_turn_keeps_its_place() -> None:
    """At a crawl a chunk takes longer than a reader may stand still: that is not the reader's fault."""

    async def body(clock: Callable[[], float]) -> None:
        store = store_of(0.1, clock, 4)
        reading = asyncio.create_task(collect(store, 4))
        await asyncio.sleep(15.0)
        assert [message.status async for message in store.serve(request(4))] == [pb.PullReply.STATUS_BUSY]
        assert await reading == 6
        assert clock() == pytest.approx(3 * CHUNK_BYTES / (0.1 * MBIT), abs=0.5)

    async def collect(store: SnapshotStore, num_chunks: int) -> int:
        return len([message async for message in store.serve(request(num_chunks))])

    virtually(body)


async def file_of(store: SnapshotStore, size_bytes: int) -> list[pb.PullReply]:
    return [message async for message in store.serve_file(bytes(size_bytes))]


def test_files_take_no_readers_place_and_have_few_of_their_own() -> None:
    async def limited(clock: Callable[[], float]) -> None:
        store = store_of(1.0, clock)
        reading = asyncio.create_task(file_of(store, 3 * CHUNK_BYTES))
        await asyncio.sleep(0)
        assert [message.status for message in await file_of(store, 10)] == [pb.PullReply.STATUS_BUSY], "one at a time"
        assert store.num_readers == 0 and store.has_room_for("anna")
        assert sum(len(message.data) for message in await reading) == 3 * CHUNK_BYTES
        assert clock() == pytest.approx(2 * CHUNK_BYTES / MBIT, abs=0.5)
        assert [message.data for message in await file_of(store, 10)][1] == bytes(10)

    async def free(clock: Callable[[], float]) -> None:
        store = store_of(0.0, clock)
        replies = [store.serve_file(bytes(10), peer=f"peer {number % 50}") for number in range(100)]
        statuses = [(await anext(reply)).status for reply in replies]
        assert statuses == [pb.PullReply.STATUS_OK] * 8 + [pb.PullReply.STATUS_BUSY] * 92
        assert store.num_readers == 0 and store.has_room_for("anna")
        await asyncio.sleep(21.0)
        late = store.serve_file(bytes(10), peer="anna")
        assert (await anext(late)).status == pb.PullReply.STATUS_OK, "the others took nothing for long"
        for reply in (*replies, late):
            await reply.aclose()

    async def one_peer(clock: Callable[[], float]) -> None:
        store = store_of(0.0, clock)
        replies = [store.serve_file(bytes(10), peer="mallory") for _ in range(9)]
        assert [(await anext(reply)).status for reply in replies].count(pb.PullReply.STATUS_OK) == 4, "half of them"

    virtually(one_peer)
    virtually(limited)
    virtually(free)


# ---------------------------------------------------------------- reading


class Sender:
    """Inner stream of a pull: chunks as fast as they are read."""

    def __init__(self, *messages: pb.PullReply) -> None:
        self._messages = iter(messages)

    async def __anext__(self) -> pb.PullReply:
        return next(self._messages)

    async def aclose(self) -> None:
        pass


def test_a_reader_reads_no_faster_than_it_may() -> None:
    async def body(clock: Callable[[], float]) -> None:
        traffic = TrafficCount(down=Throttle(1e6, clock))
        stream = Stream(Sender(*[pb.PullReply(data=bytes(CHUNK_BYTES))] * 40), traffic)
        for _ in range(40):
            await stream.count(len((await stream.__anext__()).data))
        assert clock() == pytest.approx(39 * CHUNK_BYTES / 1e6, rel=0.01)
        assert traffic.received_bytes == 40 * CHUNK_BYTES
        traffic.called(3, 5)
        assert (traffic.sent_bytes, traffic.received_bytes) == (3, 40 * CHUNK_BYTES + 5)

    virtually(body)


@pytest.mark.parametrize(("mbit", "at_once"), [(0.0, 16), (100.0, 4), (8.0, 1), (0.1, 1)])
def test_what_a_limited_reader_takes_at_once_is_what_may_pass_together(mbit: float, at_once: int) -> None:
    taken: list[range] = []

    class Chunks(Sender):
        async def take(self, chunks: range, room_of: Any, came: Any) -> None:
            taken.append(chunks)

    async def body() -> None:
        stream = Stream(Chunks(), TrafficCount(down=Throttle(mbit * 125_000)))
        await stream.take(range(3, 19), lambda chunk: memoryview(bytearray(CHUNK_BYTES)), lambda chunk: None)

    asyncio.run(body())
    assert taken == [range(3, 3 + at_once)]


class OneFile(PeerCalls):
    """Calls to a peer that is busy for a while, and then sends a file."""

    busy = 3

    async def _open(self, peer: str, method: str, request: Any) -> Any:
        self.busy -= 1
        ok, end = pb.PullReply(status=pb.PullReply.STATUS_OK), pb.PullReply(end=True)
        busy = Sender(pb.PullReply(status=pb.PullReply.STATUS_BUSY))
        return Stream(busy if self.busy >= 0 else Sender(ok, pb.PullReply(data=b"text"), end), TrafficCount())


def test_a_file_of_a_busy_peer_is_asked_for_again() -> None:
    name = hashlib.sha256(b"text").hexdigest()

    async def body(clock: Callable[[], float]) -> None:
        node: Any = None
        assert await OneFile(node, "ab" * 32).blob_untrusted("a", name, 100) == b"text"
        assert clock() == pytest.approx(1.5)
        always = OneFile(node, "ab" * 32)
        always.busy = 10**6
        with pytest.raises(BusyError):
            await always.blob_untrusted("a", name, 100)
        assert clock() == pytest.approx(1.5 + 119.5)

    virtually(body)


# ---------------------------------------------------------------- how long transfers take


def test_how_long_a_transfer_will_take() -> None:
    times = TransferTimes()
    assert times.expected_s(1000) is None and times.bytes_per_s is None
    times.finished(0, 5.0)
    times.finished(1_000_000, 0.0)
    assert times.expected_s(1000) is None, "neither says anything"
    times.finished(1_000_000, 2.0)
    assert times.expected_s(500_000) == pytest.approx(1.0) and times.bytes_per_s == pytest.approx(500_000)
    for _ in range(40):
        times.finished(4_000_000, 1.0)
    assert times.expected_s(4_000_000) == pytest.approx(1.0, rel=1e-3), "the newest count"


def test_a_limit_is_what_it_takes_at_least() -> None:
    down = Throttle(1e6)
    times = TransferTimes(down)
    assert times.expected_s(3_000_000) == 3.0
    times.finished(1_000_000, 0.1)
    assert times.expected_s(3_000_000) == 3.0, "what was fast before the limit"
    times.finished(1_000_000, 40.1)
    assert times.expected_s(3_000_000) == pytest.approx(30.3)
    down.bytes_per_s = 0.0
    assert times.expected_s(3_000_000) == pytest.approx(30.3)


def test_pulls_that_end_well_say_how_long_they_took() -> None:
    async def body() -> TrafficCount:
        traffic = TrafficCount()
        chunk = pb.PullReply(data=bytes(1000))
        for messages in ([chunk], [chunk, chunk, pb.PullReply(end=True)]):
            stream = Stream(Sender(*messages), traffic)
            for _ in messages:
                await stream.count(len((await stream.__anext__()).data))
            assert (traffic.times.bytes_per_s is not None) is bool(messages[1:])
        return traffic

    assert asyncio.run(body()).received_bytes == 3000
