"""Send and receive a stream of `PullReply` with as few copies of a chunk as possible.

The wire format is hivemind's: a marker byte, eight bytes of length, a protobuf. hivemind itself copies a chunk five
times until it is in the daemon's socket, and six times after it left the other daemon's, all in the event loop's
thread, which holds Python's lock. Here the sender writes a chunk from the snapshot's own memory, and the reader's
thread blocks in the system call that puts it in its place (decision 23).

A reader asks for a number of chunks and reads nothing beyond them, so a slow reader holds the sender back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from swarmtrain.errors import BadBytesError, BrokenOffError, UnreachableError
from swarmtrain.network.daemon import MAX_FRAME_BYTES
from swarmtrain.network.tasks import end_tasks
from swarmtrain.v1 import snapshot_pb2 as pb

_HEAD_BYTES = 9  # marker and length
_MESSAGE, _ERROR = 0, 1
_END_OF_REQUESTS = bytes([_ERROR]) + bytes(8)
_SOCKET_BYTES = 200_000
"""Send buffer of the daemon's socket. Linux allows twice that, so a chunk fits at once. In a much larger buffer bytes
would only wait, uncounted."""
_MAX_REQUEST_BYTES = 4096
_REQUEST_LIMIT_S = 10.0
_HANG_UP_S = 2.0
"""Seconds that a finished stream stays open for its reader to hang up first.

If it were closed at once, the reader's own end mark could find it closed; the daemon then resets the stream, and bytes
under way are lost (seen in one of 7,000 short streams).
"""

_TAKES_S = 0.5
"""Seconds of chunks taken in before progress is reported: short, so that a slow link's progress is reported soon."""
_threads = ThreadPoolExecutor(32, "replies")
"""Threads that block while they wait for bytes. Not asyncio's pool: decoding and merging must not queue behind them."""

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Message)


@dataclass(frozen=True)
class ChunkReply:
    """`PullReply` whose chunk is sent from where it lies in memory."""

    chunk: int
    views: tuple[memoryview, ...]
    status: pb.PullReply.Status = pb.PullReply.STATUS_UNSPECIFIED
    end: bool = False

    @property
    def data(self) -> bytes:
        """Copy of the chunk."""
        return b"".join(self.views)


Reply = pb.PullReply | ChunkReply


def _before_data(chunk: int, size: int) -> bytes:
    """Return a chunk's message up to its data: field 2, then the head of field 3."""
    return pb.PullReply(chunk=chunk).SerializeToString() + b"\x1a" + pb.PullReply(chunk=size).SerializeToString()[1:]


def _own_socket(writer: asyncio.StreamWriter) -> socket.socket:
    """Return a second descriptor of a stream's socket."""
    return socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))


# ---------------------------------------------------------------- the sending end


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    request: _Request,
    replies_to: Callable[[_Request], AsyncGenerator[Reply, None]],
) -> None:
    """Read `request` from one of the daemon's streams and send the replies to it.

    Stops early if the reader hangs up, or if the task that sends is cancelled.
    """
    with contextlib.closing(writer), contextlib.suppress(OSError, EOFError, DecodeError):  # the stream has ended
        async with asyncio.timeout(_REQUEST_LIMIT_S):
            head = await reader.readexactly(_HEAD_BYTES)
            size = int.from_bytes(head[1:], "big")
            if head[0] != _MESSAGE or size > _MAX_REQUEST_BYTES:
                return
            request.ParseFromString(await reader.readexactly(size))
        gone = asyncio.create_task(_until_closed(reader))
        sending = asyncio.create_task(_send(writer, replies_to(request)))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not sending.cancelled():
                sending.result()
                await asyncio.wait({gone}, timeout=_HANG_UP_S)
        finally:
            await end_tasks([gone, sending])


async def _until_closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(_MAX_REQUEST_BYTES):
            pass


async def _send(writer: asyncio.StreamWriter, replies: AsyncGenerator[Reply, None]) -> None:
    # The transport would copy what the socket does not take at once, and move the rest with each piece that it takes.
    with _own_socket(writer) as daemon:
        daemon.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        async with contextlib.aclosing(replies):
            async for reply in replies:
                await _send_all(daemon, _parts(reply))


def _parts(reply: Reply) -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = []
    if isinstance(reply, ChunkReply):
        parts.append(_before_data(reply.chunk, sum(map(len, reply.views))))
        parts.extend(reply.views)
    else:
        parts.append(reply.SerializeToString())
    return [bytes([_MESSAGE]) + sum(map(len, parts)).to_bytes(8, "big"), *parts]


async def _send_all(daemon: socket.socket, parts: list[bytes | memoryview]) -> None:
    loop = asyncio.get_running_loop()
    try:
        sent = daemon.sendmsg(parts)
    except BlockingIOError:
        sent = 0
    for part in parts:
        if sent < len(part):
            await loop.sock_sendall(daemon, memoryview(part)[sent:])
        sent = max(0, sent - len(part))


# ---------------------------------------------------------------- the reading end


def put_untrusted(message: Reply, chunk: int, room: memoryview) -> None:
    """Copy a message's data into `room`. Raises BadBytesError if it is not that chunk."""
    if message.end:
        raise BrokenOffError("the stream ended early")
    data = message.data  # a copy, each time
    if message.chunk != chunk or len(data) != len(room):
        raise BadBytesError("chunks out of order, or of a wrong size", code="bad-stream")
    room[:] = data


class Replies:
    """Replies to one request.

    Its methods raise BrokenOffError when the replies end early, UnreachableError when they are not messages.
    """

    def __init__(self, writer: asyncio.StreamWriter, request: Message) -> None:
        """Send `request` over one of the daemon's streams that is still unused."""
        self._reading: Future[Any] | None = None
        data = request.SerializeToString()
        with contextlib.ExitStack() as if_it_fails:
            self._daemon = if_it_fails.enter_context(_own_socket(writer))
            writer.close()  # its descriptor is no longer needed
            self._daemon.setblocking(True)
            self._daemon.sendall(bytes([_MESSAGE]) + len(data).to_bytes(8, "big") + data + _END_OF_REQUESTS)
            if_it_fails.pop_all()

    async def __anext__(self) -> pb.PullReply:
        return await self._in_thread(self._message_untrusted)

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        """Put the next chunks where they belong, at least one, and call `came` for each.

        Returns after half a second, or sooner if all have arrived. Raises BadBytesError when anything else arrives.
        """
        await self._in_thread(self._take_untrusted, chunks, room_of, came)

    async def aclose(self) -> None:
        """Hang up. Nothing is written into any room afterwards."""
        with contextlib.suppress(OSError):
            self._daemon.shutdown(socket.SHUT_RDWR)
        reading = self._reading
        if reading is None or reading.done():
            self._daemon.close()
            return
        reading.add_done_callback(lambda _: self._daemon.close())
        with contextlib.suppress(Exception):
            await asyncio.wrap_future(reading)

    async def _in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        self._reading = _threads.submit(function, *args)
        result: _T = await asyncio.wrap_future(self._reading)
        return result

    # ------------------------------------------------------------- in a thread

    def _take_untrusted(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        ends_s = time.monotonic() + _TAKES_S
        for chunk in chunks:
            self._chunk_untrusted(chunk, room_of(chunk))
            came(chunk)
            if time.monotonic() >= ends_s:
                break

    def _chunk_untrusted(self, chunk: int, room: memoryview) -> None:
        """Read an expected chunk straight into `room`; parse anything else as a message."""
        marker, size = self._head_untrusted()
        before, start = _before_data(chunk, len(room)), b""
        if marker == _MESSAGE and size == len(before) + len(room):
            start = self._read(len(before))
            if start == before:
                self._fill(room)
                return
        put_untrusted(self._parsed_untrusted(marker, start + self._read(size - len(start))), chunk, room)

    def _message_untrusted(self) -> pb.PullReply:
        marker, size = self._head_untrusted()
        return self._parsed_untrusted(marker, self._read(size))

    def _head_untrusted(self) -> tuple[int, int]:
        head = self._read(_HEAD_BYTES)
        marker, size = head[0], int.from_bytes(head[1:], "big")
        if marker not in (_MESSAGE, _ERROR) or size > MAX_FRAME_BYTES:
            raise UnreachableError("it sent what is no message, or one that is too long")
        return marker, size

    def _parsed_untrusted(self, marker: int, data: bytes) -> pb.PullReply:
        if marker == _ERROR:
            raise UnreachableError("it could not answer")
        try:
            return pb.PullReply.FromString(data)
        except DecodeError:
            raise UnreachableError("it sent what is no message") from None

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, room: memoryview) -> None:
        while room:
            try:
                size = self._daemon.recv_into(room, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise BrokenOffError("the stream broke") from error
            if not size:
                raise BrokenOffError("the stream ended early")
            room = room[size:]
