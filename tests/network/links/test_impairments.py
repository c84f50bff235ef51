"""Bad networks: late pieces, and outages, in virtual time; and what they do to real connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from virtual_loop import virtually

from swarmtrain.network.links.impairments import PACKET_BYTES, Lateness, Outage, Outages
from swarmtrain.network.links.proxy import Line, LinkShape, PeerLink, PeerLinks, Way, carry

# ---------------------------------------------------------------- late pieces


def test_nothing_is_late_on_a_good_link() -> None:
    assert [Lateness().of(10**6) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_jitter_is_at_most_what_was_said() -> None:
    lateness = Lateness(jitter_s=0.02, rng=random.Random(0))
    late_s = [lateness.of(1) for _ in range(5000)]
    assert 0.0 <= min(late_s) < 0.001 and 0.019 < max(late_s) <= 0.02
    assert sum(late_s) / 5000 == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("rtt_s", "late_s"), [(0.04, 0.2), (0.3, 0.3)])
def test_a_piece_that_lost_a_packet_is_late_by_a_timeout_or_a_round_trip(rtt_s: float, late_s: float) -> None:
    """One of ten packets at 1 % each: 1 - 0.99^10 of the pieces."""
    lateness = Lateness(loss=0.01, rtt_s=rtt_s, rng=random.Random(0))
    seen = [lateness.of(10 * PACKET_BYTES) for _ in range(20_000)]
    assert set(seen) == {0.0, late_s}
    assert seen.count(late_s) / 20_000 == pytest.approx(1 - 0.99**10, rel=0.05)


def test_the_same_seed_makes_the_same_ones_late() -> None:
    def seen(seed: str) -> list[float]:
        lateness = Lateness(jitter_s=0.1, loss=0.1, rng=random.Random(seed))
        return [lateness.of(1000) for _ in range(50)]

    assert seen("a") == seen("a") != seen("b")


def test_late_pieces_arrive_in_order_and_all() -> None:
    async def body(clock: Callable[[], float]) -> list[tuple[float, bytes]]:
        said, heard = [bytes([number]) for number in range(200)] + [b""], []
        lateness = Lateness(jitter_s=0.05, loss=0.2, rtt_s=0.1, rng=random.Random(1))

        async def receive(most_bytes: int) -> bytes:
            await asyncio.sleep(0.01)
            return said.pop(0)

        async def send(data: bytes) -> None:
            heard.append((clock(), data))

        await carry(receive, send, Way(Line(), 0.05, Line(), lateness))
        return heard

    heard = virtually(body)
    assert [data[0] for _, data in heard] == list(range(200))
    times = [time_s for time_s, _ in heard]
    assert times == sorted(times) and 2.05 < times[-1] < 2.05 + 0.26


def test_what_an_outage_held_up_passes_at_the_rate_of_the_line_and_not_at_once() -> None:
    """It passed as if it had come in time."""

    async def body(clock: Callable[[], float]) -> list[float]:
        outages, said, times = Outages(random.Random(0)), [bytes(1000)] * 50 + [b""], []
        outage = outages.begin([["a"]])
        asyncio.get_running_loop().call_later(10.0, outages.end, outage)

        async def receive(most_bytes: int) -> bytes:
            return said.pop(0)

        async def send(data: bytes) -> None:
            times.append(clock())

        await carry(receive, send, Way(Line(), 0.0, Line(10_000.0), passable=lambda: outages.passable("a", "b")))
        return times

    times = virtually(body)
    assert times[0] > 10.0 and times[-1] - times[0] == pytest.approx(4.9, abs=0.05)


# ---------------------------------------------------------------- outages


def test_an_outage_parts_its_sides_and_who_is_on_none_is_on_one_more() -> None:
    outage = Outage((frozenset("ab"), frozenset("c")))
    assert not outage.parts("a", "b") and not outage.parts("d", "e") and not outage.parts("c", "c")
    assert outage.parts("a", "c") and outage.parts("a", "d") and outage.parts("d", "c")


def test_what_was_held_up_goes_on_after_the_outage_within_as_long_again() -> None:
    async def body(clock: Callable[[], float]) -> list[float]:
        outages = Outages(random.Random(0))
        await outages.passable("a", "b")
        assert clock() == 0.0
        outage = outages.begin([["a"]])
        arrived = []

        async def pass_to(name: str) -> None:
            await outages.passable("a", name)
            arrived.append(clock())

        waiting = [asyncio.create_task(pass_to(name)) for name in "bcde"]
        await outages.passable("b", "c")
        await asyncio.sleep(10.0)
        assert arrived == []
        outages.end(outage)
        await asyncio.gather(*waiting)
        return arrived

    arrived = virtually(body)
    assert len(set(arrived)) == 4 and all(10.0 < time_s <= 20.0 for time_s in arrived)


def test_of_two_outages_both_must_end() -> None:
    async def body(clock: Callable[[], float]) -> float:
        outages = Outages(random.Random(0))
        first, second = outages.begin([["a"]]), outages.begin([["b"]])
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, outages.end, second)
        loop.call_later(5.0, outages.end, first)
        await outages.passable("a", "b")
        return clock()

    assert 5.0 <= virtually(body) <= 10.0


# ---------------------------------------------------------------- real connections


async def serve_echo(link: PeerLink, was_reset: asyncio.Event) -> asyncio.Server:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
        except ConnectionResetError:
            was_reset.set()
        writer.close()

    return await asyncio.start_server(echo, "127.0.0.1", link.port)


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def dial(source: PeerLink, target: PeerLink) -> Ends:
    """Dial as libp2p does, from the port that the peer listens at."""
    end = socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    end.setblocking(False)
    end.bind(("127.0.0.1", source.port))
    await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", target.front))
    return await asyncio.open_connection(sock=end)


@dataclass
class Two:
    """Anna echoes what others say; Ben and Cleo can dial her."""

    links: PeerLinks
    anna: PeerLink
    ben: PeerLink
    cleo: PeerLink
    was_reset: asyncio.Event = field(default_factory=asyncio.Event)
    """Anna was told of a reset."""


@contextlib.asynccontextmanager
async def swarm() -> AsyncIterator[Two]:
    links = PeerLinks()
    two = Two(links, *[await links.open(name, LinkShape()) for name in ("anna", "ben", "cleo")])
    server = await serve_echo(two.anna, two.was_reset)
    try:
        yield two
    finally:
        server.close()
        await links.close()


async def ask(ends: Ends, word: bytes, limit_s: float = 5.0) -> bytes:
    ends[1].write(word)
    return await asyncio.wait_for(ends[0].read(100), limit_s)


async def is_deaf(ends: Ends) -> bool:
    try:
        await ask(ends, b"!", 0.1)
    except TimeoutError:
        return True
    return False


def test_a_real_connection_waits_while_its_ends_are_parted_and_goes_on() -> None:
    async def body() -> None:
        async with swarm() as two:
            ends = await dial(two.ben, two.anna)
            assert await ask(ends, b"hello") == b"hello"
            outage = await two.links.part([["anna"]])
            assert await is_deaf(ends)
            await two.links.mend(outage)
            assert await asyncio.wait_for(ends[0].read(100), 5.0) == b"!"
            ends[1].close()

    asyncio.run(body())


def test_a_reset_is_told_to_both_ends() -> None:
    async def body() -> None:
        async with swarm() as two:
            ends = await dial(two.ben, two.anna)
            assert await ask(ends, b"hello") == b"hello"
            await two.links.reset("anna")
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(ends[0].read(100), 5.0)
            await asyncio.wait_for(two.was_reset.wait(), 5.0)
            ends[1].close()

    asyncio.run(body())


def test_of_a_forgotten_connection_nobody_is_told_and_new_ones_work() -> None:
    async def body() -> None:
        async with swarm() as two:
            old = await dial(two.ben, two.anna)
            assert await ask(old, b"hello") == b"hello"
            await two.links.forget("anna")
            assert await is_deaf(old)
            new = await dial(two.cleo, two.anna)
            assert await ask(new, b"hello") == b"hello" and await is_deaf(old)
            for ends in (old, new):
                ends[1].close()

    asyncio.run(body())
