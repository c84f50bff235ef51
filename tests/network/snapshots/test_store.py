"""Snapshots: built, checked, served, and pulled from peers of every kind over in-memory streams."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from replies import Replies
from virtual_loop import virtually

from swarmtrain.errors import BadBytesError, BrokenOffError, PeerError, StalledError, UnreachableError
from swarmtrain.network.identity import new_identity, peer_bytes, sign
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    Snapshot,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_chunks,
    pull_manifest,
)
from swarmtrain.protocol.membership.budgets import GIVES_WAY_S
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = hashlib.sha256(b"a run").hexdigest()
ME = new_identity(b"m" * 32)
KIND = pb.SNAPSHOT_KIND_PSEUDO_GRADIENT
NUM_CHUNKS = 7
SPECS = (TensorSpec("a", (3, CHUNK_BYTES // 4)), TensorSpec("b", (3 * CHUNK_BYTES // 4 + 25,)))
LIMITS = PullLimits(stall_limit_s=0.05, busy_wait_s=0.001, busy_limit_s=0.02)
BYTES = bytes(hashlib.shake_128(b"content").digest(sum(spec.size_bytes for spec in SPECS)))


def snapshot(round: int = 4, body: bytes = BYTES) -> HeldSnapshot:
    manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=KIND, round=round, part=1, tokens=100, inner_steps=2)
    cut = 3 * CHUNK_BYTES
    return build_snapshot(ME, manifest, SPECS, Body([body[:cut], bytearray(body[cut:])]))


WHOLE = snapshot()


# ---------------------------------------------------------------- bodies and manifests


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 40), st.integers(0, 40))
def test_a_body_reads_across_its_buffers(buffers: list[bytes], offset: int, size: int) -> None:
    body = Body(buffers)
    assert body.size_bytes == sum(map(len, buffers))
    assert body.read(offset, size) == b"".join(buffers)[offset : offset + size]


def test_a_built_snapshot_is_accepted_and_named_by_its_manifest() -> None:
    read = manifest_untrusted(WHOLE.snapshot.signed, RUN, KIND, SPECS)
    assert read.sha256 == WHOLE.snapshot.sha256 == hashlib.sha256(WHOLE.snapshot.signed.payload).hexdigest()
    assert (read.author, read.num_chunks, WHOLE.complete) == (ME.peer_id, NUM_CHUNKS, True)
    assert (read.chunk_size(0), read.chunk_size(6)) == (CHUNK_BYTES, 100)
    assert read.chunk_is(6, BYTES[-100:]) and not read.chunk_is(6, BYTES[-99:]) and not read.chunk_is(0, BYTES[-100:])


def test_a_body_that_does_not_fit_its_table_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="tensor table"):
        build_snapshot(ME, pb.Manifest(), SPECS, Body([b"short"]))


def altered(change: Callable[[pb.Manifest], object]) -> pb.Signed:
    """Return a manifest with a valid signature and a wrong field."""
    manifest = pb.Manifest.FromString(WHOLE.snapshot.signed.payload)
    change(manifest)
    return sign(ME, "manifest", RUN, manifest)


CHANGES: dict[str, Callable[[pb.Manifest], object]] = {
    "shape": lambda m: m.tensors[0].shape.append(2),
    "other shape, same size": lambda m: m.tensors[0].shape.reverse(),
    "dtype": lambda m: setattr(m.tensors[1], "dtype", "float16"),
    "unknown dtype": lambda m: setattr(m.tensors[1], "dtype", "object"),
    "name": lambda m: setattr(m.tensors[0], "name", "c"),
    "one tensor less": lambda m: m.tensors.pop(),
    "one tensor more": lambda m: m.tensors.add(name="c", shape=[1], dtype="float32"),
    "a shape as long as fits": lambda m: m.tensors[0].shape.extend([1] * 300_000),
    "as many tensors as fit": lambda m: [m.tensors.add(name="c", shape=[1]) for _ in range(20_000)],
    "no tensors": lambda m: m.ClearField("tensors"),
    "chunk size": lambda m: setattr(m, "chunk_bytes", 1),
    "no chunk size": lambda m: setattr(m, "chunk_bytes", 0),
    "a hash less": lambda m: setattr(m, "chunk_sha256", m.chunk_sha256[:-32]),
    "a hash more": lambda m: setattr(m, "chunk_sha256", m.chunk_sha256 + bytes(32)),
    "half a hash": lambda m: setattr(m, "chunk_sha256", m.chunk_sha256[:-1]),
    "huge total": lambda m: setattr(m, "total_bytes", 2**63),
    "total and tensors huge": lambda m: (setattr(m, "total_bytes", 2**62), m.tensors[0].shape.append(2**50)),
    "no total": lambda m: setattr(m, "total_bytes", 0),
    "round": lambda m: setattr(m, "round", 2**40),
    "tokens": lambda m: setattr(m, "tokens", 2**60),
    "run tokens": lambda m: setattr(m, "run_tokens", 2**60),
    "another run inside": lambda m: setattr(m, "run_sha256", bytes(32)),
    "another kind": lambda m: setattr(m, "kind", pb.SNAPSHOT_KIND_STATE),
    "another author": lambda m: setattr(m, "author", peer_bytes(new_identity(b"o" * 32).peer_id)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_wrong_manifest_is_refused_before_memory_is_taken(what: str) -> None:
    signed = altered(CHANGES[what])
    tracemalloc.start()
    try:
        with pytest.raises(BadBytesError):
            manifest_untrusted(signed, RUN, KIND, SPECS)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 3 * len(signed.payload), "its own bytes are here already"
    finally:
        tracemalloc.stop()


def test_a_manifest_may_have_any_of_the_tables_that_it_is_checked_against_and_no_mixture() -> None:
    coarse, fine = ([TensorSpec(name, (64,), dtype) for name in ("a", "b")] for dtype in ("int2", "int4"))
    for specs in (coarse, fine, [coarse[0], fine[1]]):
        size_bytes = sum(spec.size_bytes for spec in specs)
        held = build_snapshot(
            ME, pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=KIND), specs, Body([bytes(size_bytes)])
        )
        if specs in (coarse, fine):
            read = manifest_untrusted(held.snapshot.signed, RUN, KIND, coarse, fine)
            assert read.manifest.total_bytes == size_bytes
        else:
            with raises_code("bad-shape", BadBytesError):
                manifest_untrusted(held.snapshot.signed, RUN, KIND, coarse, fine)


def test_a_forged_or_foreign_manifest_is_refused() -> None:
    signed = WHOLE.snapshot.signed
    other_run = hashlib.sha256(b"another").hexdigest()
    for wrong, run in [
        (pb.Signed(payload=signed.payload, author=signed.author, signature=bytes(64)), RUN),
        (pb.Signed(payload=signed.payload[:-1], author=signed.author, signature=signed.signature), RUN),
        (pb.Signed(), RUN),
        (signed, other_run),
        (pb.Signed(payload=bytes(3 * 1024 * 1024), author=signed.author, signature=signed.signature), RUN),
    ]:
        with pytest.raises(BadBytesError):
            manifest_untrusted(wrong, run, KIND, SPECS)


def test_room_for_a_snapshot_takes_memory_only_as_it_fills() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    room = empty_held(Snapshot(pb.Manifest(total_bytes=1 << 29), pb.Signed(), "", ""))
    assert room.buffer is not None and len(room.buffer) == 1 << 29
    assert resident_pages() - before < 10_000


# ---------------------------------------------------------------- peers to pull from


def reply(chunk: int, data: bytes | None = None) -> pb.PullReply:
    body = BYTES[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES] if data is None else data
    return pb.PullReply(chunk=chunk, data=body)


OK, END = pb.PullReply(status=pb.PullReply.STATUS_OK), pb.PullReply(end=True)
Behaviour = Callable[[pb.PullRequest], AsyncIterator[pb.PullReply]]


class Stream(Replies):
    """Reader's end of an answer."""

    def __init__(self, network: Network, answer: AsyncIterator[pb.PullReply]) -> None:
        super().__init__(answer)
        self.network = network

    async def count(self, size_bytes: int) -> None:
        self.network.received_bytes += size_bytes

    async def aclose(self) -> None:
        self.network.num_open -= 1
        await super().aclose()


@dataclass
class Network:
    """Peers that answer pulls, by name; notes who was asked for what and who was blamed."""

    peers: dict[str, Behaviour]
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    blamed: list[tuple[str, type[PeerError]]] = field(default_factory=list)
    num_open: int = 0
    received_bytes: int = 0
    limits: PullLimits = LIMITS

    async def open_pull(self, source: str, request: pb.PullRequest) -> Stream:
        if source not in self.peers:
            raise UnreachableError(f"{source} does not answer")
        self.asked.append((source, request.first_chunk, request.num_chunks))
        self.num_open += 1
        return Stream(self, self.peers[source](request))

    def blame(self, source: str, error: PeerError) -> None:
        self.blamed.append((source, type(error)))

    def pull(
        self, sources: list[str], held: HeldSnapshot | None = None, chunks: range = range(NUM_CHUNKS)
    ) -> HeldSnapshot:
        """Pull until it is done; raises as `pull_chunks` does. All streams are closed then."""
        room = empty_held(WHOLE.snapshot) if held is None else held
        try:
            asyncio.run(pull_chunks(room, chunks, sources, self.open_pull, self.limits, self.blame))
        finally:
            assert self.num_open == 0
        return room


def honest(store: SnapshotStore | None = None) -> Behaviour:
    kept = SnapshotStore() if store is None else store
    kept.add(WHOLE)
    return kept.serve


def answers(*messages: pb.PullReply, then: Callable[[], Awaitable[None]] | None = None) -> Behaviour:
    async def answer(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        for message in messages:
            yield message
        if then is not None:
            await then()

    return answer


async def stand_still() -> None:
    await asyncio.Event().wait()


async def break_down() -> None:
    raise ConnectionResetError("the connection was reset")


def bytes_of(held: HeldSnapshot) -> bytes:
    assert held.buffer is not None
    return bytes(held.buffer)


def test_a_pull_brings_every_byte() -> None:
    network = Network({"a": honest()})
    held = network.pull(["a"])
    assert held.complete and bytes_of(held) == BYTES
    assert network.asked == [("a", 0, NUM_CHUNKS)] and not network.blamed
    assert network.received_bytes == len(BYTES)


def test_what_comes_slowly_counts_as_here_soon() -> None:
    held, now_s = empty_held(WHOLE.snapshot), [0.0]

    async def slowly(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        yield OK
        for chunk in range(NUM_CHUNKS):
            now_s[0] += 0.4
            for _ in range(5000 if chunk == 3 else 0):  # it is checked in a thread
                if held.have:
                    break
                await asyncio.sleep(0.001)
            assert held.have or chunk < 3
            yield reply(chunk)
        yield END

    network = Network({"a": slowly}, limits=PullLimits(clock=lambda: now_s[0]))
    assert bytes_of(network.pull(["a"], held)) == BYTES and not network.blamed


def test_a_pull_brings_a_part() -> None:
    held = Network({"a": honest()}).pull(["a"], chunks=range(2, 5))
    assert held.have == {2, 3, 4}


def test_what_is_here_is_not_asked_for() -> None:
    network = Network({"a": honest()})
    held = network.pull(["a"], chunks=range(2, 4))
    network.pull(["a"], held)
    assert network.asked == [("a", 2, 2), ("a", 0, 2), ("a", 4, 3)] and bytes_of(held) == BYTES


@pytest.mark.parametrize(
    ("then", "last"),
    [(None, ()), (None, (END,)), (break_down, ()), (stand_still, ())],
    ids=["silent end", "early end", "reset", "stalled"],
)
def test_a_pull_goes_on_at_another_source_where_the_first_stopped(
    then: Callable[[], Awaitable[None]] | None, last: tuple[pb.PullReply, ...]
) -> None:
    network = Network({"a": answers(OK, reply(0), reply(1), *last, then=then), "b": honest()})
    held = network.pull(["a", "b"])
    assert bytes_of(held) == BYTES
    assert network.asked == [("a", 0, NUM_CHUNKS), ("b", 2, NUM_CHUNKS - 2)], "what arrived is not asked for again"
    assert network.blamed == [("a", StalledError if then is stand_still else BrokenOffError)]


def slow_by(now_s: list[float], chunk_s: float) -> Behaviour:
    """Honest, with a chunk every `chunk_s` of the clock `now_s`."""

    async def answer(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        yield OK
        for chunk in range(request.first_chunk, request.first_chunk + request.num_chunks):
            now_s[0] += chunk_s
            yield reply(chunk)
        yield END

    return answer


def test_a_source_that_brings_a_chunk_now_and_then_is_left_for_the_next() -> None:
    now_s = [0.0]
    network = Network({"slow": slow_by(now_s, 10.0), "b": honest()}, limits=PullLimits(clock=lambda: now_s[0]))
    assert bytes_of(network.pull(["slow", "b"])) == BYTES
    assert now_s[0] == 30.0
    assert network.asked == [("slow", 0, NUM_CHUNKS), ("b", 3, NUM_CHUNKS - 3)]
    assert network.blamed == [("slow", StalledError)]


@pytest.mark.parametrize("chunk_s", [0.0, 7.9])
def test_a_source_that_is_fast_enough_is_kept(chunk_s: float) -> None:
    now_s = [0.0]
    network = Network({"a": slow_by(now_s, chunk_s)}, limits=PullLimits(clock=lambda: now_s[0]))
    assert bytes_of(network.pull(["a"])) == BYTES and not network.blamed


def test_a_pause_of_this_process_is_not_a_sources_slowness() -> None:
    now_s = [0.0]
    honestly = slow_by(now_s, 1.0)

    async def answer(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        async for message in honestly(request):
            now_s[0] += 3600.0 * (message.chunk == 4)
            yield message

    limits = PullLimits(clock=lambda: now_s[0], grace_s=5.0)
    network = Network({"a": answer}, limits=limits)
    assert bytes_of(network.pull(["a"])) == BYTES and not network.blamed


@pytest.mark.parametrize(
    "messages",
    [
        (OK, reply(0), reply(1, bytes(CHUNK_BYTES)), reply(2)),
        (OK, reply(0), reply(1, b"short"), reply(2)),
        (OK, reply(0), reply(1, b""), reply(2)),
        (OK, reply(0), reply(1, bytes(4 * CHUNK_BYTES)), reply(2)),
        (OK, reply(0), reply(2)),
        (OK, reply(0), reply(0)),
        (OK, reply(0), OK),
    ],
    ids=["wrong hash", "short", "empty", "long", "skips", "repeats", "nonsense"],
)
def test_a_source_that_sends_wrong_bytes_is_blamed_and_dropped(messages: tuple[pb.PullReply, ...]) -> None:
    network = Network({"liar": answers(*messages), "b": honest()})
    held = network.pull(["liar", "b"])
    assert bytes_of(held) == BYTES and network.blamed == [("liar", BadBytesError)]
    assert network.asked[-1] == ("b", 1, NUM_CHUNKS - 1), "the right chunk before the wrong one is kept"


def test_an_endless_stream_is_cut() -> None:
    sent = 0

    async def endless(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        nonlocal sent
        yield OK
        while True:
            yield reply(min(sent, NUM_CHUNKS - 1))
            sent += 1

    network = Network({"endless": endless, "b": honest()})
    assert bytes_of(network.pull(["endless", "b"])) == BYTES
    assert sent <= NUM_CHUNKS + 1 and network.blamed == [("endless", BadBytesError)]


def test_a_source_that_does_not_hold_it_or_answers_nonsense_is_passed_over() -> None:
    unknown = answers(pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN))
    network = Network({"unknown": unknown, "mute": answers(), "odd": answers(reply(0)), "b": honest()})
    assert bytes_of(network.pull(["gone", "unknown", "mute", "odd", "b"])) == BYTES
    assert [source for source, _ in network.blamed] == ["gone", "unknown", "mute", "odd"]


def test_a_busy_source_is_asked_again() -> None:
    store = SnapshotStore(max_readers=1)
    serve, num_asked = honest(store), 0

    async def busy_twice(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        nonlocal num_asked
        num_asked += 1
        if num_asked <= 2:
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
            return
        async for message in serve(request):
            yield message

    network = Network({"a": busy_twice})
    assert bytes_of(network.pull(["a"])) == BYTES
    assert num_asked == 3 and not network.blamed, "being busy is no fault"


def test_a_source_that_is_always_busy_is_given_up() -> None:
    network = Network({"busy": answers(pb.PullReply(status=pb.PullReply.STATUS_BUSY))})
    with pytest.raises(UnreachableError):
        network.pull(["busy"])
    assert 10 <= len(network.asked) <= 30


@pytest.mark.parametrize(("answer_s", "num_asked"), [(0.3, 600), (9.9, 4)])
def test_a_source_that_says_busy_late_is_given_up_as_soon_and_one_behind_a_slow_link_is_not(
    answer_s: float, num_asked: int
) -> None:
    async def says_busy(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        await asyncio.sleep(answer_s)
        yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)

    network = Network({"busy": says_busy})

    async def body(clock: Callable[[], float]) -> None:
        held, limits = empty_held(WHOLE.snapshot), PullLimits(clock=clock)
        with pytest.raises(UnreachableError):
            await pull_chunks(held, range(1), ["busy"], network.open_pull, limits, network.blame)

    virtually(body)
    assert len(network.asked) == pytest.approx(num_asked, abs=1)


def test_nobody_delivers() -> None:
    network = Network({"cut": answers(OK, reply(0))})
    held = empty_held(WHOLE.snapshot)
    with pytest.raises(UnreachableError, match=WHOLE.snapshot.sha256[:12]):
        network.pull(["gone", "cut"], held)
    assert held.have == {0}, "and a later pull resumes there"


def test_a_cancelled_pull_closes_its_stream() -> None:
    async def cancel() -> None:
        reached = asyncio.Event()

        async def hang() -> None:
            reached.set()
            await stand_still()

        network.peers["still"] = answers(OK, reply(0), then=hang)
        held = empty_held(WHOLE.snapshot)
        limits = PullLimits(stall_limit_s=60)
        task = asyncio.create_task(
            pull_chunks(held, range(NUM_CHUNKS), ["still"], network.open_pull, limits, network.blame)
        )
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.have == {0}

    network = Network({})
    asyncio.run(cancel())
    assert network.num_open == 0


def test_a_manifest_is_pulled_by_its_name() -> None:
    name = WHOLE.snapshot.sha256
    other = snapshot(round=5).snapshot.signed
    network = Network(
        {
            "a": honest(),
            "liar": answers(pb.PullReply(status=pb.PullReply.STATUS_OK, manifest=other)),
            "empty": answers(OK),
            "unknown": answers(pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)),
            "still": answers(then=stand_still),
        }
    )

    def pull(source: str) -> pb.Signed:
        return asyncio.run(pull_manifest(source, name, network.open_pull, LIMITS))

    assert manifest_untrusted(pull("a"), RUN, KIND, SPECS).sha256 == name
    for source, error in [
        ("liar", BadBytesError),
        ("empty", BadBytesError),
        ("unknown", UnreachableError),
        ("still", UnreachableError),
    ]:
        with pytest.raises(error):
            pull(source)
    assert network.num_open == 0


# ---------------------------------------------------------------- serving


def request(first_chunk: int = 0, num_chunks: int = NUM_CHUNKS, name: str = WHOLE.snapshot.sha256) -> pb.PullRequest:
    return pb.PullRequest(snapshot_sha256=bytes.fromhex(name), first_chunk=first_chunk, num_chunks=num_chunks)


def served(store: SnapshotStore, pull: pb.PullRequest) -> list[pb.PullReply]:
    async def collect() -> list[pb.PullReply]:
        return [message async for message in store.serve(pull)]

    return asyncio.run(collect())


def status_of(store: SnapshotStore, pull: pb.PullRequest) -> Any:
    return served(store, pull)[0].status


def test_what_is_not_held_is_unknown() -> None:
    store = SnapshotStore()
    store.add(WHOLE)
    for pull in (
        request(name="00" * 32),
        request(first_chunk=NUM_CHUNKS, num_chunks=1),
        request(num_chunks=2**32 - 1),
        request(first_chunk=2**32 - 1, num_chunks=2**32 - 1),
        pb.PullRequest(snapshot_sha256=b"short"),
    ):
        assert status_of(store, pull) == pb.PullReply.STATUS_UNKNOWN


def test_a_part_that_is_here_is_served_on() -> None:
    held = Network({"a": honest()}).pull(["a"], chunks=range(2, 4))
    store = SnapshotStore()
    store.add(held)
    assert [message.chunk for message in served(store, request(2, 2))[1:-1]] == [2, 3]
    assert status_of(store, request(1, 2)) == pb.PullReply.STATUS_UNKNOWN


def test_only_so_many_read_at_once_and_places_come_back() -> None:
    store = SnapshotStore(max_readers=2)
    store.add(WHOLE)

    async def crowd() -> None:
        first, second = store.serve(request()), store.serve(request())
        assert (await anext(first)).status == (await anext(second)).status == pb.PullReply.STATUS_OK
        assert [m.status async for m in store.serve(request())] == [pb.PullReply.STATUS_BUSY]
        manifest = [m async for m in store.serve(request(num_chunks=0))]
        assert manifest[0].manifest == WHOLE.snapshot.signed, "manifests are always served"
        await first.aclose()
        assert store.num_readers == 1
        assert len([m async for m in store.serve(request())]) == NUM_CHUNKS + 2
        await second.aclose()
        assert store.num_readers == 0

    asyncio.run(crowd())


def test_one_peer_has_half_of_the_places_at_most() -> None:
    now_s = 0.0
    store = SnapshotStore(max_readers=4, reader_stall_s=10.0, clock=lambda: now_s)
    store.add(WHOLE)

    async def crowd() -> None:
        nonlocal now_s

        async def asks(peer: str) -> Any:
            reader = store.serve(request(), peer=peer)
            return reader, (await anext(reader)).status

        flood = [await asks("mallory") for _ in range(20)]
        assert [status for _, status in flood] == [pb.PullReply.STATUS_OK] * 2 + [pb.PullReply.STATUS_BUSY] * 18
        assert not store.has_room_for("mallory") and store.has_room_for("anna")
        anna, ben = await asks("anna"), await asks("ben")
        assert anna[1] == ben[1] == pb.PullReply.STATUS_OK
        assert not store.has_room_for("carl"), "all four are taken"
        now_s = 11.0
        assert store.has_room_for("carl") and store.has_room_for("mallory"), "nobody has taken anything for long"
        for reader, _ in (*flood, anna, ben):
            await reader.aclose()
        assert store.num_readers == 0

    asyncio.run(crowd())


def test_where_there_is_one_place_everyone_may_have_it() -> None:
    store = SnapshotStore(max_readers=1)
    store.add(WHOLE)
    assert store.has_room_for("anna")


def test_a_reader_that_stands_still_loses_its_place_to_the_next() -> None:
    now_s = 0.0
    store = SnapshotStore(max_readers=1, reader_stall_s=10.0, clock=lambda: now_s)
    store.add(WHOLE)

    async def crowd() -> None:
        nonlocal now_s
        slow = store.serve(request())
        await anext(slow)
        now_s = 9.0
        await anext(slow)
        now_s = 18.0
        assert [m.status async for m in store.serve(request())] == [pb.PullReply.STATUS_BUSY], "9 s are not too long"
        now_s = 20.0
        assert len([m async for m in store.serve(request())]) == NUM_CHUNKS + 2
        with pytest.raises(StopAsyncIteration):
            await anext(slow)
        assert store.num_readers == 0

    asyncio.run(crowd())


@pytest.mark.parametrize("takes_nothing", [True, False])
def test_the_stream_of_one_that_lost_its_place_is_ended(takes_nothing: bool) -> None:
    """It waits for its transport, and would hold the snapshot in memory for as long as the reader likes: one that takes
    nothing at all, and one that is slow, whose last piece has ten seconds more."""

    async def body(clock: Callable[[], float]) -> None:
        store = SnapshotStore(max_readers=1, reader_stall_s=20.0, reader_gives_way_s=30.0, clock=clock)
        store.add(WHOLE)

        async def send() -> None:
            async for _ in store.serve(request(), peer="slow"):
                await asyncio.sleep(19 if clock() < 10 and not takes_nothing else 3600)

        sending = asyncio.create_task(send())
        await asyncio.sleep(35)
        assert len([m async for m in store.serve(request(), peer="next")]) == NUM_CHUNKS + 2
        await asyncio.sleep(0.01)
        assert sending.done() == takes_nothing
        await asyncio.sleep(10)
        assert sending.cancelled()

    virtually(body)


def test_what_is_being_read_is_kept_until_its_reader_ends() -> None:
    store = SnapshotStore(keep_rounds=2)
    store.add(WHOLE)

    async def read() -> None:
        reader = store.serve(request())
        await anext(reader)
        store.forget_before(5)
        assert store.get(WHOLE.snapshot.sha256) is WHOLE, "round 4 is one of the last two"
        store.forget_before(6)
        assert store.get(WHOLE.snapshot.sha256) is None
        data = b"".join([message.data async for message in reader])
        assert data == BYTES

    asyncio.run(read())
    assert status_of(store, request()) == pb.PullReply.STATUS_UNKNOWN


def test_what_is_dropped_while_it_is_read_goes_with_the_next_that_comes_or_goes() -> None:
    now_s = [0.0]
    store = SnapshotStore(reader_stall_s=10.0, clock=lambda: now_s[0])
    name = WHOLE.snapshot.sha256
    store.add(WHOLE)

    async def read() -> None:
        reader = store.serve(request())
        await anext(reader)
        async for _ in reader:
            store.drop(name)
            assert store.get(name) is WHOLE, "somebody is reading it"

    asyncio.run(read())
    now_s[0] = 4.0
    store.drop("another")
    assert store.get(name) is WHOLE, "it may ask for more"
    now_s[0] = 6.0
    store.drop("another")
    assert store.get(name) is None, "it has all that it wants"
    store.add(WHOLE)
    store.drop(name)
    assert store.get(name) is None, "nobody reads it"


def test_a_slow_reader_that_lacks_the_rest_is_waited_for_as_long_as_between_pieces() -> None:
    """What the transport holds still at a pull's end may take it longer than it takes to ask for the next 64 MiB."""
    now_s = [0.0]
    store = SnapshotStore(reader_stall_s=20.0, clock=lambda: now_s[0])
    name = WHOLE.snapshot.sha256
    store.add(WHOLE)

    async def read(first: int, num: int) -> list[Any]:
        return [message.status async for message in store.serve(request(first, num))]

    asyncio.run(read(0, NUM_CHUNKS - 1))
    store.drop(name)
    now_s[0] = 15.0
    store.drop("another")
    assert asyncio.run(read(NUM_CHUNKS - 1, 1))[0] == pb.PullReply.STATUS_OK
    now_s[0] = 21.0
    store.drop("another")
    assert store.get(name) is None, "it has all that it wants"


# ---------------------------------------------------------------- slow readers

ATTACK_BYTES_PER_S = 54_000.0


class SlowReplies(Replies):
    """Reader that takes so many bytes a second, like a slow link."""

    def __init__(self, replies: Any, bytes_per_s: float) -> None:
        super().__init__(replies)
        self._chunk_s = CHUNK_BYTES / bytes_per_s

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        await asyncio.sleep(self._chunk_s)
        await super().take(chunks, room_of, came)


@dataclass
class Crowded:
    """Peer that serves four readers at once, in virtual time; `big` has 256 chunks that are read repeatedly."""

    clock: Callable[[], float]
    store: SnapshotStore = field(init=False)
    big: HeldSnapshot = field(init=False)
    cuts: int = 0

    def __post_init__(self) -> None:
        self.store = SnapshotStore(clock=self.clock)
        manifest = pb.Manifest(total_bytes=256 * CHUNK_BYTES, chunk_sha256=bytes(32 * 256))
        body = Body([bytes(CHUNK_BYTES)] * 256)
        self.big = HeldSnapshot(Snapshot(manifest, pb.Signed(), "ab" * 32, ""), body, set(range(256)))
        self.store.add(self.big)
        self.store.add(WHOLE)

    async def attack(self, peer: str) -> None:
        """Reads slowly, for ever; tries again at once."""
        while True:
            async for reply in self.store.serve(request(0, 256, "ab" * 32), peer=peer):
                if reply.status == pb.PullReply.STATUS_BUSY:
                    await asyncio.sleep(0.05)
                else:
                    await asyncio.sleep(CHUNK_BYTES / ATTACK_BYTES_PER_S)

    async def pull(self, bytes_per_s: float, peer: str = "anna", busy_limit_s: float = 30.0) -> float:
        """Pull `WHOLE` as an honest reader; returns the time. UnreachableError if it is given up."""
        began_s, held = self.clock(), empty_held(WHOLE.snapshot)
        limits = PullLimits(clock=self.clock, busy_limit_s=busy_limit_s)

        async def open_pull(source: str, asked: pb.PullRequest) -> Any:
            self.cuts += 1
            return SlowReplies(self.store.serve(asked, peer=peer), bytes_per_s)

        await pull_chunks(held, range(NUM_CHUNKS), ["b"], open_pull, limits, lambda *_: None)
        assert held.complete
        return self.clock() - began_s


def crowded(attackers: list[str], body: Callable[[Crowded], Awaitable[None]]) -> None:
    async def run(clock: Callable[[], float]) -> None:
        here = Crowded(clock)
        attacks = [asyncio.create_task(here.attack(peer)) for peer in attackers]
        await asyncio.sleep(1.0)
        try:
            await body(here)
        finally:
            for attack in attacks:
                attack.cancel()
            await asyncio.gather(*attacks, return_exceptions=True)

    virtually(run)


def test_two_slow_readers_cannot_keep_an_honest_one_out() -> None:
    """They take 54 kB/s each with two streams each, so that all four places are theirs: it was BUSY 31 times of 31."""

    async def body(here: Crowded) -> None:
        times_s = [await here.pull(1e6) for _ in range(31)]
        assert max(times_s) < GIVES_WAY_S + 5 and sorted(times_s)[15] < 5

    crowded(["mallory", "mallory", "eve", "eve"], body)


def test_an_honest_reader_on_a_slow_link_gets_further_although_all_who_wait_are_quicker() -> None:
    """Six streams of three attackers want four places all the time; it is slower than they are, and gives way."""

    async def body(here: Crowded) -> None:
        assert await here.pull(40_000.0, busy_limit_s=GIVES_WAY_S + 5) < 4 * 6 * CHUNK_BYTES / 40_000.0 + GIVES_WAY_S
        assert here.cuts > 1

    crowded(["mallory", "mallory", "eve", "eve", "oscar", "oscar"], body)


def test_one_that_had_to_give_way_comes_back_to_the_only_source_that_has_it() -> None:
    """Others are named beside it that do not hold the snapshot."""

    async def body(here: Crowded) -> None:
        held, limits = empty_held(WHOLE.snapshot), PullLimits(clock=here.clock)

        async def open_pull(source: str, asked: pb.PullRequest) -> Any:
            if source == "empty":
                return Replies(SnapshotStore().serve(asked))
            here.cuts += 1
            return SlowReplies(here.store.serve(asked, peer="anna"), 40_000.0)

        await pull_chunks(held, range(NUM_CHUNKS), ["b", "empty"], open_pull, limits, lambda *_: None)
        assert held.complete and here.cuts > 1

    crowded(["mallory", "mallory", "eve", "eve", "oscar", "oscar"], body)


@pytest.mark.parametrize(("busy_limit_s", "most_s"), [(0.0, 2.0), (30.0, 40.0)])
def test_a_source_that_breaks_off_and_then_is_busy_is_waited_for_no_longer_than_it_delivered(
    busy_limit_s: float, most_s: float
) -> None:
    """It sends a chunk at once, breaks off, and is BUSY until just before it would be given up: no reader of its has to
    give way so early. Each chunk took half a minute."""

    async def run(clock: Callable[[], float]) -> float:
        held, limits = empty_held(WHOLE.snapshot), PullLimits(clock=clock, busy_limit_s=busy_limit_s)
        store = SnapshotStore(num_served=lambda num_chunks: min(num_chunks, 1))
        store.add(WHOLE)
        may_read_s = 0.0

        async def is_busy() -> AsyncIterator[pb.PullReply]:
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)

        async def open_pull(source: str, asked: pb.PullRequest) -> Any:
            nonlocal may_read_s
            if clock() < may_read_s:
                return Replies(is_busy())
            may_read_s = clock() + 29.0
            return Replies(store.serve(asked))

        with pytest.raises(UnreachableError):
            await pull_chunks(held, range(NUM_CHUNKS), ["b"], open_pull, limits, lambda *_: None)
        return clock()

    assert virtually(run) < most_s


def test_a_source_that_breaks_off_after_each_chunk_is_asked_again_after_a_pause() -> None:
    async def run(clock: Callable[[], float]) -> list[float]:
        held, asked_s = empty_held(WHOLE.snapshot), list[float]()
        store = SnapshotStore(num_served=lambda num_chunks: min(num_chunks, 1))
        store.add(WHOLE)

        async def open_pull(source: str, asked: pb.PullRequest) -> Any:
            asked_s.append(clock())
            return Replies(store.serve(asked))

        await pull_chunks(held, range(NUM_CHUNKS), ["b"], open_pull, PullLimits(clock=clock), lambda *_: None)
        assert held.complete
        return asked_s

    asked_s = virtually(run)
    pauses_s = [after - before for before, after in itertools.pairwise(asked_s)]
    assert len(asked_s) == NUM_CHUNKS and min(pauses_s) >= 0.05
    assert 0.5 <= pauses_s[-1] < 0.6, "at most"


def test_an_honest_reader_on_a_slow_link_is_left_alone_while_there_are_places() -> None:
    async def body(here: Crowded) -> None:
        assert await here.pull(40_000.0) < 7 * CHUNK_BYTES / 40_000.0 + 1
        assert here.cuts == 1

    crowded(["mallory", "mallory", "eve"], body)
