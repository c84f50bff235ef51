"""Downloads of a round from an author behind a slow link: everyone gets it, in turn, in about bytes / bandwidth; who
never delivers is given up."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from virtual_loop import virtual_swarm

from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.network.identity import new_identity
from swarmtrain.network.rounds.downloads import Downloads, WaitsFor
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
)
from swarmtrain.network.tasks import run_until
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

AUTHOR = new_identity(b"a" * 32)
NUM_CHUNKS = 8
SPECS = (TensorSpec("w", (NUM_CHUNKS * CHUNK_BYTES // 4,)),)
RATE = 1.25e6
SILENCE_S = 20.0


def publication(kind: pb.SnapshotKind = pb.SNAPSHOT_KIND_PSEUDO_GRADIENT) -> HeldSnapshot:
    body = b"".join(bytes([number]) * CHUNK_BYTES for number in range(NUM_CHUNKS))
    return build_snapshot(AUTHOR, pb.Manifest(run_sha256=b"r" * 32, kind=kind), SPECS, Body([body]))


WHOLE = publication()


@dataclass
class Uplink:
    """The author's link: bytes pass one after the other, also those that nobody waits for any more."""

    bytes_per_s: float
    free_s: float = 0.0
    passed_bytes: int = 0

    async def passes(self, size_bytes: int) -> None:
        now = asyncio.get_running_loop().time()
        self.free_s = max(now, self.free_s) + size_bytes / self.bytes_per_s
        self.passed_bytes += size_bytes
        await asyncio.sleep(self.free_s - now)


class Stream:
    """Replies of a store that pass a link."""

    def __init__(self, replies: AsyncIterator[Any], link: Uplink) -> None:
        self.replies, self.link = replies, link

    async def __anext__(self) -> Any:
        await self.link.passes(200)
        return await anext(self.replies)

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        reply = await anext(self.replies)
        data = b"".join(bytes(view) for view in reply.views)
        await self.link.passes(len(data))
        room_of(chunks.start)[:] = data
        came(chunks.start)

    async def count(self, size_bytes: int) -> None:
        """Nothing limits a reader."""

    async def aclose(self) -> None:
        aclose: Any = getattr(self.replies, "aclose")  # noqa: B009 - of an asynchronous generator
        await aclose()


Opener = Callable[[str, pb.PullRequest, str], Awaitable[Any]]


@dataclass
class Reader:
    """Peer that pulls. Stands in for `PeerCalls`."""

    name: str
    opens: Opener
    pull_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))
    asked: list[tuple[str, int, float]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    num_disturbed: int = 0
    held: HeldSnapshot = field(default_factory=lambda: empty_held(WHOLE.snapshot))
    store: SnapshotStore = field(default_factory=SnapshotStore)

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        self.asked.append((peer, request.num_chunks, asyncio.get_running_loop().time()))
        return await self.opens(peer, request, self.name)

    async def pull(self, sources: list[str], waits_for: WaitsFor | None = None, chunks: int = NUM_CHUNKS) -> float:
        """Pull `chunks` chunks; return the time at which they are here."""

        def refuse(peer: str, error: PeerError) -> None:
            self.refused.append(peer)

        def disturbed() -> None:
            self.num_disturbed += 1

        calls: Any = self
        limits = PullLimits(clock=asyncio.get_running_loop().time)
        downloads = Downloads(self.name, calls, self.store, limits, refuse, disturbed)
        await downloads.pull(self.held, range(chunks), sources, waits_for)
        assert self.held.buffer is not None
        assert all(self.held.buffer[chunk * CHUNK_BYTES] == chunk for chunk in range(chunks))
        return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check chunks in no virtual time: a thread takes real time, in which the virtual clock runs on."""

    async def at_once(work: Any, *args: Any) -> Any:
        return work(*args)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


def patient(source: str, quiet_s: float) -> bool:
    return quiet_s < SILENCE_S


def of_store(store: SnapshotStore, link: Uplink) -> Opener:
    async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
        await asyncio.sleep(0.05)
        return Stream(store.serve(request, peer=reader), link)

    return opens


@pytest.mark.parametrize("places", [16, 4, 2])
def test_seven_readers_of_a_slow_link_all_get_it_in_about_bytes_by_bandwidth(places: int) -> None:
    """Where there are places for few at once, each reader has its turn and none is told BUSY until it gives up."""
    link = Uplink(RATE / 4)  # 2.5 Mbit/s: 47 s for all, longer than a busy source is waited for
    all_s = 7 * NUM_CHUNKS * CHUNK_BYTES / link.bytes_per_s

    async def run() -> list[float]:
        store = SnapshotStore(max_readers=places // 2, round_places=2, clock=asyncio.get_running_loop().time)
        store.add(WHOLE)
        readers = [Reader(f"reader-{number}", of_store(store, link)) for number in range(7)]
        ends_s = await asyncio.gather(*(reader.pull([AUTHOR.peer_id], patient) for reader in readers))
        assert not any(reader.refused for reader in readers)
        return ends_s

    ends_s = virtual_swarm(run)
    assert max(ends_s) == pytest.approx(all_s, rel=0.25)
    assert min(ends_s) > 0.6 * max(ends_s), "fairly: nobody has it long before the others"
    assert link.passed_bytes < 1.1 * 7 * NUM_CHUNKS * CHUNK_BYTES, "nothing is sent twice"


@pytest.mark.parametrize("places", [2, 1])
def test_an_author_with_a_place_for_one_part_is_busy_with_the_other_for_as_long_as_it_takes(places: int) -> None:
    """Its own first part is what the second one waits for: longer than a busy source is, in all."""
    link = Uplink(40e3)

    async def run() -> float:
        store = SnapshotStore(max_readers=1, round_places=places, clock=asyncio.get_running_loop().time)
        store.add(WHOLE)
        return await Reader("reader", of_store(store, link)).pull([AUTHOR.peer_id])

    assert virtual_swarm(run) == pytest.approx(NUM_CHUNKS * CHUNK_BYTES / link.bytes_per_s, rel=0.1)


def test_parts_of_a_round_are_small_where_the_link_is_slow_and_large_where_it_is_fast() -> None:
    for rate, least, most in ((RATE / 10, 1, 1), (100 * RATE, 2, NUM_CHUNKS)):

        async def run(rate: float = rate) -> list[int]:
            store = SnapshotStore()
            store.add(WHOLE)
            reader = Reader("reader", of_store(store, Uplink(rate)))
            await reader.pull([AUTHOR.peer_id], patient)
            return [num for _, num, _ in reader.asked]

        asked = virtual_swarm(run)
        assert sum(asked) == NUM_CHUNKS
        assert least <= max(asked) <= most


@pytest.mark.parametrize("waits_for", [patient, None])
def test_one_that_is_busy_for_ever_is_given_up(waits_for: WaitsFor | None) -> None:
    async def run() -> tuple[float, int]:
        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            async def busy() -> AsyncIterator[pb.PullReply]:
                yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)

            return Stream(busy(), Uplink(RATE))

        reader = Reader("reader", opens)
        with pytest.raises(UnreachableError):
            await reader.pull([AUTHOR.peer_id], waits_for)
        return asyncio.get_running_loop().time(), len(reader.asked)

    ended_s, num_asked = virtual_swarm(run)
    assert 30 <= ended_s < 33, "as long as a busy source is waited for"
    assert num_asked < 100, "its link is not filled with questions"


def test_one_that_falls_silent_is_asked_again_and_may_take_longer() -> None:
    """Behind a slow link an answer may wait 15 s for what was sent before it."""

    async def run() -> tuple[float, Reader]:
        store = SnapshotStore()
        store.add(WHOLE)
        delays = iter([15.0, 15.0, 15.0, 15.0])

        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            async def late() -> AsyncIterator[Any]:
                await asyncio.sleep(next(delays, 0.0))
                async for reply in store.serve(request, peer=reader):
                    yield reply

            return Stream(late(), Uplink(RATE))

        reader = Reader("reader", opens)
        return await reader.pull([AUTHOR.peer_id], lambda source, quiet_s: quiet_s < 60), reader

    ended_s, reader = virtual_swarm(run)
    assert 25 < ended_s < 40
    assert reader.num_disturbed == 2, "what was measured meanwhile is not the link's rate"


@pytest.mark.parametrize("waits", [True, False])
def test_one_that_does_not_answer_is_waited_for_while_it_is_said_to_live(waits: bool) -> None:
    async def run() -> tuple[float, int]:
        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            raise UnreachableError("no answer within 6 s")

        reader = Reader("reader", opens)
        with pytest.raises(UnreachableError):
            await reader.pull([AUTHOR.peer_id, "other"], patient if waits else None)
        return asyncio.get_running_loop().time(), len(reader.asked)

    ended_s, num_asked = virtual_swarm(run)
    assert (SILENCE_S <= ended_s < SILENCE_S + 2) if waits else ended_s == 0
    assert num_asked < 100


def test_one_that_does_not_hold_it_is_not_asked_again() -> None:
    async def run() -> list[str]:
        store = SnapshotStore()

        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            if peer == AUTHOR.peer_id:
                raise UnreachableError("no answer within 6 s")
            return Stream(store.serve(request, peer=reader), Uplink(RATE))

        reader = Reader("reader", opens)
        with pytest.raises(UnreachableError):
            await reader.pull([AUTHOR.peer_id, "other"], patient, chunks=1)
        return [peer for peer, _, _ in reader.asked]

    asked = virtual_swarm(run)
    assert asked.count("other") == 1 and asked.count(AUTHOR.peer_id) > 10


def test_one_that_brings_a_chunk_now_and_then_is_given_up_although_something_comes() -> None:
    """At 9 s a chunk it would never fall silent."""

    async def run() -> float:
        store = SnapshotStore()
        store.add(WHOLE)
        reader = Reader("reader", of_store(store, Uplink(CHUNK_BYTES / 9.0)))
        with pytest.raises(UnreachableError):
            await reader.pull([AUTHOR.peer_id], lambda source, quiet_s: True)
        return asyncio.get_running_loop().time()

    assert 30 < virtual_swarm(run) < 80


def test_who_waits_holds_no_slot() -> None:
    """A round has few slots: sources that bring nothing must not keep others from delivering."""

    async def run() -> float:
        store = SnapshotStore()
        store.add(WHOLE)
        deliver = of_store(store, Uplink(RATE))

        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            if peer == "dead":
                raise UnreachableError("no answer within 6 s")
            return await deliver(peer, request, reader)

        good, bad = Reader("reader", opens, asyncio.Semaphore(1)), Reader("reader", opens)
        bad.pull_slots = good.pull_slots
        waiting = asyncio.create_task(bad.pull(["dead"], patient))
        await asyncio.sleep(1.0)
        ended_s = await good.pull([AUTHOR.peer_id], patient)
        with pytest.raises(UnreachableError):
            await waiting
        return ended_s

    assert virtual_swarm(run) < 1 + 2 * NUM_CHUNKS * CHUNK_BYTES / RATE


@pytest.mark.parametrize("waits_for", [patient, None])
def test_one_that_is_busy_is_not_given_up_for_the_time_in_which_nobody_asked_it(waits_for: WaitsFor | None) -> None:
    """Other publications have all slots for longer than a busy source is waited for."""

    async def run() -> float:
        store = SnapshotStore()
        store.add(WHOLE)
        deliver = of_store(store, Uplink(RATE))

        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            async def busy() -> AsyncIterator[pb.PullReply]:
                yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)

            return await deliver(peer, request, reader) if len(waiting.asked) > 4 else Stream(busy(), Uplink(RATE))

        waiting = Reader("reader", opens, asyncio.Semaphore(1))
        await waiting.pull_slots.acquire()
        asyncio.get_running_loop().call_later(40.0, waiting.pull_slots.release)
        return await waiting.pull([AUTHOR.peer_id], waits_for)

    assert 40 < virtual_swarm(run) < 45


def test_a_failure_while_a_pull_is_given_up_is_reported_nowhere() -> None:
    """Whoever gives up cancels until all has ended, and the pull may fail only then."""
    reported: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                raise UnreachableError("it is gone")

        given_up = asyncio.create_task(run_until(work(), lambda: 60.0))
        await asyncio.sleep(0.1)
        for _ in range(2):
            given_up.cancel()
            await asyncio.sleep(0.001)
        with pytest.raises(asyncio.CancelledError):
            await given_up
        del given_up
        await asyncio.sleep(1.0)
        gc.collect()

    virtual_swarm(run)
    assert not reported


def test_states_are_pulled_in_one_piece() -> None:
    state = publication(pb.SNAPSHOT_KIND_STATE)

    async def run() -> list[int]:
        store = SnapshotStore()
        store.add(state)
        reader = Reader("reader", of_store(store, Uplink(RATE)), held=empty_held(state.snapshot))
        await reader.pull([AUTHOR.peer_id])
        return [num for _, num, _ in reader.asked]

    assert virtual_swarm(run) == [NUM_CHUNKS]


@pytest.mark.parametrize(("kind", "keeps"), [(pb.SNAPSHOT_KIND_STATE, False), (pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, True)])
def test_the_beginning_of_a_publication_is_served_and_that_of_a_state_forgotten(
    kind: pb.SnapshotKind, keeps: bool
) -> None:
    """Anyone may offer a state: each that breaks off would take the memory of a whole one."""
    source = publication(kind)

    async def run() -> tuple[bool, bool]:
        store = SnapshotStore()
        store.add(source)

        async def opens(peer: str, request: pb.PullRequest, reader: str) -> Any:
            if reader_of_it.held.have:
                raise UnreachableError("no answer within 6 s")

            async def breaks_off() -> AsyncIterator[Any]:
                replies = store.serve(request, peer=reader)
                yield await anext(replies)
                yield await anext(replies)
                raise ConnectionError

            return Stream(breaks_off(), Uplink(RATE))

        reader_of_it = Reader("reader", opens, held=empty_held(source.snapshot))
        with pytest.raises(UnreachableError):
            await reader_of_it.pull([AUTHOR.peer_id])
        return bool(reader_of_it.held.have), reader_of_it.store.get(source.snapshot.sha256) is not None

    assert virtual_swarm(run) == (True, keeps)
