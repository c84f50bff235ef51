"""Streams of pulls, with both ends over a pair of sockets: compatible with hivemind's in both directions."""

from __future__ import annotations

import asyncio
import socket
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from test_throttle import held_of, request

from swarmtrain.errors import BadBytesError, UnreachableError
from swarmtrain.network.snapshots import replies as replies_module
from swarmtrain.network.snapshots.replies import ChunkReply, Replies, Reply, answer
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

OK, END = pb.PullReply(status=pb.PullReply.STATUS_OK), pb.PullReply(end=True)
SIZES = [300_000, 300_000, 5]
BODY = [bytes([7 * index + 1]) * size for index, size in enumerate(SIZES)]
REQUEST = pb.PullRequest(snapshot_sha256=b"a name", num_chunks=3)
LONG = pb.PullRequest.FromString(REQUEST.SerializeToString() + b"\xfa\x3f\x88\x27" + bytes(5000))
"""Request with an unknown field."""
FRAME_OF_AN_ERROR = b"\1" + bytes(8)


def frame(message: Any) -> bytes:
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(8, "big") + data


class Pair:
    """Two ends of a daemon's stream: ours, and a plain socket."""

    ours: tuple[asyncio.StreamReader, asyncio.StreamWriter]

    async def __aenter__(self) -> Pair:
        here, self.there = socket.socketpair()
        self.there.setblocking(False)
        self.ours = await asyncio.open_unix_connection(sock=here)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.there.close()
        self.ours[1].close()

    async def write(self, *data: bytes) -> None:
        for part in data:
            await asyncio.get_running_loop().sock_sendall(self.there, part)

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := await asyncio.get_running_loop().sock_recv(self.there, size - len(data))):
            data += part
        return data


def with_a_pair(body: Callable[[Pair], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), Pair() as pair:
            await body(pair)

    asyncio.run(run())


def rooms_for(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


async def take_all(stream: Replies, rooms: list[memoryview]) -> None:
    came = list[int]()
    while len(came) < len(rooms):
        await stream.take(range(len(came), len(rooms)), rooms.__getitem__, came.append)
    assert came == list(range(len(rooms)))


# ---------------------------------------------------------------- the reading end


@pytest.mark.parametrize("at_once", [1, 1000, 10**6])
def test_it_reads_what_hivemind_sends(at_once: int) -> None:
    bodies = [data[: 100 * at_once] for data in BODY]
    messages = [OK, *(pb.PullReply(chunk=index, data=data) for index, data in enumerate(bodies)), END]
    sent = b"".join(map(frame, messages))

    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        asked = frame(REQUEST) + FRAME_OF_AN_ERROR
        assert await pair.read(len(asked)) == asked
        sending = asyncio.create_task(pair.write(*(sent[at : at + at_once] for at in range(0, len(sent), at_once))))
        assert (await anext(stream)).status == pb.PullReply.STATUS_OK
        rooms = rooms_for(*map(len, bodies))
        await take_all(stream, rooms)
        assert [bytes(room) for room in rooms] == bodies
        assert (await anext(stream)).end
        await sending
        await stream.aclose()
        assert await pair.read(1) == b"", "it has hung up"

    with_a_pair(body)


def test_a_message_in_another_order_is_read_too() -> None:
    data = b"\x1a\x05" + BODY[2] + b"\x10\x00"  # data first, and a chunk number that need not be there

    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        await pair.write(b"\0" + len(data).to_bytes(8, "big") + data)
        rooms = rooms_for(5)
        await take_all(stream, rooms)
        assert bytes(rooms[0]) == BODY[2]
        await stream.aclose()

    with_a_pair(body)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (frame(pb.PullReply(chunk=1, data=bytes(5))), BadBytesError),
        (frame(pb.PullReply(chunk=0, data=bytes(4))), BadBytesError),
        (frame(pb.PullReply(chunk=0, data=bytes(6))), BadBytesError),
        (frame(OK), BadBytesError),
        (frame(END), UnreachableError),
        (FRAME_OF_AN_ERROR, UnreachableError),
        (b"\0" + (2**40).to_bytes(8, "big"), UnreachableError),
        (b"\0" + (3).to_bytes(8, "big") + b"\xff\xff\xff", UnreachableError),
        (b"HTTP/1.1 200 OK", UnreachableError),
        (frame(pb.PullReply(data=bytes(5)))[:-1], UnreachableError),
        (b"", UnreachableError),
    ],
)
def test_whatever_else_comes_is_an_error(sent: bytes, error: type[Exception]) -> None:
    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        await pair.write(sent)
        pair.there.shutdown(socket.SHUT_WR)
        with pytest.raises(error):
            await take_all(stream, rooms_for(5))
        await stream.aclose()

    with_a_pair(body)


def test_what_had_come_before_it_broke_off_is_told() -> None:
    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        await pair.write(*(frame(pb.PullReply(chunk=chunk, data=bytes(5))) for chunk in range(2)), b"\0")
        pair.there.shutdown(socket.SHUT_WR)
        came = list[int]()
        with pytest.raises(UnreachableError):
            await stream.take(range(3), rooms_for(5, 5, 5).__getitem__, came.append)
        assert came == [0, 1]
        await stream.aclose()

    with_a_pair(body)


def test_it_tells_of_the_first_chunks_when_the_next_are_long_in_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies_module, "_TAKES_S", 0.0)

    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        await pair.write(frame(pb.PullReply(data=bytes(5))))
        came = list[int]()
        await stream.take(range(3), rooms_for(5, 5, 5).__getitem__, came.append)
        assert came == [0]
        await stream.aclose()

    with_a_pair(body)


def test_nothing_is_written_after_it_has_hung_up() -> None:
    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        sent = frame(pb.PullReply(data=b"x" * 1000))
        await pair.write(sent[:500])
        rooms = rooms_for(1000)
        taking = asyncio.create_task(take_all(stream, rooms))
        for _ in range(100_000):
            if rooms[0][0]:  # the thread that waits is in the system
                break
            await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([taking])
        await stream.aclose()
        assert stream._reading is not None and stream._reading.done()
        before = bytes(rooms[0])
        with pytest.raises(BrokenPipeError):
            await pair.write(sent[500:])
        assert bytes(rooms[0]) == before != b"x" * 1000
        assert stream._daemon.fileno() == -1

    with_a_pair(body)


def test_a_daemon_that_is_gone_is_an_error_and_leaves_nothing_open() -> None:
    async def body(pair: Pair) -> None:
        pair.there.close()
        num_open = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(OSError):
            Replies(pair.ours[1], REQUEST)
        assert len(list(Path("/proc/self/fd").iterdir())) <= num_open

    with_a_pair(body)


# ---------------------------------------------------------------- the sending end


def sender(*replies: Reply, ended: list[bool]) -> Callable[[Any], AsyncGenerator[Reply, None]]:
    async def replies_to(request: pb.PullRequest) -> AsyncGenerator[Reply, None]:
        assert request == REQUEST
        try:
            for reply in replies:
                yield reply
        finally:
            ended.append(True)

    return replies_to


def test_it_sends_what_hivemind_reads() -> None:
    views = [(memoryview(data)[:3], memoryview(data)[3:]) for data in BODY]
    replies = [OK, *(ChunkReply(index, parts) for index, parts in enumerate(views)), END]

    async def body(pair: Pair) -> None:
        await pair.write(frame(REQUEST) + FRAME_OF_AN_ERROR)
        ended = list[bool]()
        answering = asyncio.create_task(answer(*pair.ours, pb.PullRequest(), sender(*replies, ended=ended)))
        for message in (OK, *(pb.PullReply(chunk=index, data=data) for index, data in enumerate(BODY)), END):
            wanted = frame(message)
            assert await pair.read(len(wanted)) == wanted
        for _ in range(20):
            await asyncio.sleep(0)
        assert not answering.done(), "the reader is to hang up first"
        pair.there.shutdown(socket.SHUT_WR)
        await answering
        assert ended == [True] and await pair.read(1) == b""

    with_a_pair(body)


def test_it_reads_what_it_sends_straight_into_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies_module, "put_untrusted", None)  # the way round: not for what we send ourselves

    async def body(pair: Pair) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=pair.there.dup())
        replies = [OK, *(ChunkReply(index, (memoryview(data),)) for index, data in enumerate(BODY)), END]
        answering = asyncio.create_task(answer(reader, writer, pb.PullRequest(), sender(*replies, ended=[])))
        stream = Replies(pair.ours[1], REQUEST)
        assert (await anext(stream)).status == pb.PullReply.STATUS_OK
        rooms = rooms_for(*SIZES)
        await take_all(stream, rooms)
        assert [bytes(room) for room in rooms] == BODY and (await anext(stream)).end
        await stream.aclose()
        await answering

    with_a_pair(body)


def test_a_reader_that_hangs_up_ends_the_answer() -> None:
    async def body(pair: Pair) -> None:
        await pair.write(frame(REQUEST))
        ended = list[bool]()
        many = [ChunkReply(0, (memoryview(BODY[0]),))] * 100
        answering = asyncio.create_task(answer(*pair.ours, pb.PullRequest(), sender(*many, ended=ended)))
        await pair.read(1000)
        assert not ended
        pair.there.close()
        await answering
        assert ended == [True]

    with_a_pair(body)


def test_so_does_one_that_hangs_up_while_it_waits_for_its_turn() -> None:
    ended = list[bool]()

    async def limited(request: pb.PullRequest) -> AsyncGenerator[Reply, None]:
        yield OK
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def body(pair: Pair) -> None:
        await pair.write(frame(REQUEST))
        answering = asyncio.create_task(answer(*pair.ours, pb.PullRequest(), limited))
        await pair.read(len(frame(OK)))
        pair.there.close()
        await answering
        assert ended == [True]

    with_a_pair(body)


def test_one_that_takes_nothing_is_cut_off_for_the_next_and_holds_no_snapshot_any_more() -> None:
    async def body(pair: Pair) -> None:
        now_s, held = 0.0, held_of(16)
        store = SnapshotStore(max_readers=1, reader_stall_s=20.0, clock=lambda: now_s)
        store.add(held)
        await pair.write(frame(request(16)))
        answering = asyncio.create_task(answer(*pair.ours, pb.PullRequest(), store.serve))
        await pair.read(len(frame(OK)) + 1)
        is_held, name = weakref.ref(held), held.snapshot.sha256
        del held
        store.drop(name)
        now_s = 19.0
        assert [reply.status async for reply in store.serve(request(1))] == [pb.PullReply.STATUS_BUSY]
        now_s = 21.0
        store.add(held_of(1))
        assert [reply.end async for reply in store.serve(request(1))][-1]
        await answering
        assert is_held() is None and store.num_readers == 0
        before_the_end = 0
        while part := await pair.read(65536):
            before_the_end += len(part)
        assert before_the_end < 16 * CHUNK_BYTES, "what is left of it is not sent"

    with_a_pair(body)


@pytest.mark.parametrize(
    "sent",
    [
        frame(LONG),
        b"\1" + bytes(8),
        b"\0" + (1).to_bytes(8, "big") + b"\xff",
        b"\0",
    ],
)
def test_a_request_that_is_none_is_not_answered(sent: bytes) -> None:
    async def body(pair: Pair) -> None:
        await pair.write(sent)
        pair.there.shutdown(socket.SHUT_WR)
        ended = list[bool]()
        await answer(*pair.ours, pb.PullRequest(), sender(OK, ended=ended))
        assert not ended and await pair.read(1) == b""

    with_a_pair(body)


def test_those_who_wait_for_bytes_keep_no_other_thread_waiting() -> None:
    names = list[str]()

    def room_of(chunk: int) -> memoryview:
        names.append(threading.current_thread().name)
        return memoryview(bytearray(5))

    async def body(pair: Pair) -> None:
        stream = Replies(pair.ours[1], REQUEST)
        await pair.write(frame(pb.PullReply(data=bytes(5))))
        await stream.take(range(1), room_of, lambda chunk: None)
        assert names[0].startswith("replies"), "of a pool of their own"
        await stream.aclose()

    with_a_pair(body)
