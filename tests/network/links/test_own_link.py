"""Link of a peer: what it dials and what others dial passes the link's lines, and ends where it was to go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from own_link import Address, OwnLink

from swarmtrain.network.links.proxy import LinkShape

SIZE_BYTES = 60_000
DELAY_S = 0.01
UP, DOWN = LinkShape(up_bytes_per_s=3e5, delay_s=DELAY_S), LinkShape(down_bytes_per_s=3e5, delay_s=DELAY_S)
LIMITED_S = SIZE_BYTES / 3e5


@contextlib.asynccontextmanager
async def link_before_a_server(shape: LinkShape) -> AsyncIterator[tuple[OwnLink, list[bytes]]]:
    """Run a link in front of a server that keeps what it receives and answers "thanks"."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readexactly(SIZE_BYTES))
        writer.write(b"thanks")
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    where: Address = server.sockets[0].getsockname()[:2]
    link = OwnLink(shape, "a", target=lambda near: where)
    serving = asyncio.create_task(link.serve())
    async with server:
        yield link, heard
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def said(port: int, data: bytes) -> tuple[bytes, float]:
    """Send and receive; returns the answer, and the time taken."""
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read(100)
    took_s = time.monotonic() - began_s
    writer.close()
    return answer, took_s


@pytest.mark.parametrize(
    ("shape", "is_dialled", "least_s"),
    [
        (UP, False, LIMITED_S),
        (DOWN, True, LIMITED_S),
        (UP, True, 0.0),
        (DOWN, False, 0.0),
    ],
    ids=["what it dials passes the line up", "what others dial passes the line down", "and not up", "and not down"],
)
def test_each_direction_passes_its_line_with_the_delay(shape: LinkShape, is_dialled: bool, least_s: float) -> None:
    async def work() -> None:
        async with link_before_a_server(shape) as (link, heard):
            data = bytes(range(250)) * (SIZE_BYTES // 250)
            answer, took_s = await said(link.dialled_port if is_dialled else link.dialling_port, data)
            assert answer == b"thanks" and heard == [data]
            assert took_s >= least_s + 4 * DELAY_S, "a handshake there and back, the data, and the answer"

    asyncio.run(work())


def test_two_connections_share_a_line() -> None:
    async def work() -> None:
        async with link_before_a_server(UP) as (link, heard):
            both = await asyncio.gather(*(said(link.dialling_port, bytes(SIZE_BYTES)) for _ in range(2)))
            assert max(took_s for _, took_s in both) >= 2 * LIMITED_S and len(heard) == 2

    asyncio.run(work())


def test_where_nobody_is_the_connection_ends() -> None:
    async def work() -> None:
        async with link_before_a_server(UP) as (link, _):
            link._target = lambda near: ("127.0.0.1", 1)
            with contextlib.suppress(ConnectionResetError):
                assert (await said(link.dialling_port, b"hello"))[0] == b""

    asyncio.run(work())
