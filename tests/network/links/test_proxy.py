"""Links of ours: the arithmetic, connections in virtual time, and real peers of which no byte goes round them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from connections import between
from hypothesis import given
from hypothesis import strategies as st
from virtual_loop import virtually

from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.links.proxy import FailingPulls, Line, LinkShape, PeerLink, PeerLinks, Way, carry
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.network.node import NetworkThread, Node, NodeSettings
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

MBIT = BYTES_PER_S_OF_MBIT
_T = TypeVar("_T")


# ---------------------------------------------------------------- the arithmetic


@given(st.floats(1000, 1e9), st.lists(st.tuples(st.floats(0, 5), st.integers(1, CHUNK_BYTES)), min_size=1))
def test_a_line_carries_its_rate_and_no_more(rate: float, pieces: list[tuple[float, int]]) -> None:
    """Each piece takes what it takes, none overtakes, and a line is never idle while something waits for it."""
    line, now_s, before_s = Line(rate), 0.0, 0.0
    for later_s, size_bytes in pieces:
        now_s += later_s
        passed_s = line.passed_s(size_bytes, now_s)
        assert passed_s == pytest.approx(max(now_s, before_s) + size_bytes / rate)
        before_s = passed_s


def test_a_line_without_a_limit_is_passed_at_once() -> None:
    line = Line()
    assert [line.passed_s(10**9, now_s) for now_s in (3.0, 4.0)] == [3.0, 4.0]


# ---------------------------------------------------------------- one connection, in virtual time


@dataclass
class End:
    """End of a connection: what it sends, and when it was received. `takes_s`: time of the receiver per piece."""

    clock: Callable[[], float]
    said: bytes = b""
    pieces: list[tuple[float, int]] = field(default_factory=list)
    takes_s: float = 0.0
    taken_bytes: int = 0

    async def receive(self, most_bytes: int) -> bytes:
        data = self.said[self.taken_bytes : self.taken_bytes + most_bytes]
        self.taken_bytes += len(data)
        return data

    async def send(self, data: bytes) -> None:
        await asyncio.sleep(self.takes_s)
        self.pieces.append((self.clock(), len(data)))

    @property
    def heard_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self.pieces)


def way(up_mbit: float = 0.0, delay_s: float = 0.0, down_mbit: float = 0.0) -> Way:
    return Way(Line(up_mbit * MBIT), delay_s, Line(down_mbit * MBIT))


@pytest.mark.parametrize(
    ("link", "size_bytes", "expected_s"),
    [
        (way(), 5_000_000, 0.0),
        (way(delay_s=0.05), 100, 0.05),
        (way(delay_s=0.05), 4_000_000, 0.05),
        (way(up_mbit=10, delay_s=0.05), 2_500_000, 2.05),
        (way(delay_s=0.05, down_mbit=10), 2_500_000, 2.05),
        (way(up_mbit=20, delay_s=0.05, down_mbit=10), 2_500_000, 2.05),
        (way(up_mbit=10, delay_s=2.0, down_mbit=20), 2_500_000, 4.0),
        (way(up_mbit=0.1), 12_500, 1.0),
    ],
)
def test_bytes_take_what_rate_and_delay_say(link: Way, size_bytes: int, expected_s: float) -> None:
    async def body(clock: Callable[[], float]) -> End:
        end = End(clock, bytes(size_bytes))
        await carry(end.receive, end.send, link)
        assert clock() == end.pieces[-1][0], "the end takes no longer than the last byte"
        return end

    end = virtually(body)
    assert end.heard_bytes == size_bytes
    assert end.pieces[-1][0] == pytest.approx(expected_s, rel=0.02, abs=0.02)


def test_connections_share_a_line_by_turns() -> None:
    """Six at once get a sixth each, and who says little need not wait until the others have said all."""

    async def body(clock: Callable[[], float]) -> list[End]:
        up = Line(10 * MBIT)
        ends = [End(clock, bytes(1_250_000)) for _ in range(5)] + [End(clock, b"hello")]
        await asyncio.gather(*(carry(end.receive, end.send, Way(up, 0.05, Line())) for end in ends))
        return ends

    *many, little = virtually(body)
    assert all(end.pieces[-1][0] == pytest.approx(5.05, abs=0.2) for end in many)
    assert little.pieces[0][0] < 0.05 + 6 * 0.0301


def test_a_reader_that_takes_nothing_holds_its_own_connection_up_and_no_other() -> None:
    async def body(clock: Callable[[], float]) -> tuple[End, End]:
        link = way(up_mbit=10, delay_s=0.05, down_mbit=10)
        deaf, other = End(clock, bytes(10**7), takes_s=10**9), End(clock, bytes(1_250_000))
        stuck = asyncio.create_task(carry(deaf.receive, deaf.send, link))
        await carry(other.receive, other.send, link)
        stuck.cancel()
        return deaf, other

    deaf, other = virtually(body)
    assert deaf.taken_bytes < 200_000, "it is not read for without end"
    assert other.pieces[-1][0] < 1.05 + 0.2


def test_what_was_said_before_the_end_arrives_and_whoever_is_gone_ends_it() -> None:
    async def body(clock: Callable[[], float]) -> None:
        end = End(clock, bytes(1_000_000))

        async def gone(data: bytes) -> None:
            raise BrokenPipeError

        await carry(end.receive, gone, way(up_mbit=1, delay_s=0.05))
        assert clock() < 0.1 and end.taken_bytes < 20_000

    virtually(body)


# ---------------------------------------------------------------- pulls that fail


def test_narrowed_links_carry_a_share_until_the_last_narrowing_is_over() -> None:
    async def rates() -> list[tuple[float, float]]:
        links = PeerLinks()
        anna = await links.open("anna", LinkShape(up_bytes_per_s=100.0, down_bytes_per_s=200.0))
        ben = await links.open("ben", LinkShape(up_bytes_per_s=10.0))
        found = list[tuple[float, float]]()
        first = await links.narrow(["anna", "ben"], 0.5)
        found += [(anna.up.bytes_per_s, anna.down.bytes_per_s), (ben.up.bytes_per_s, ben.down.bytes_per_s)]
        second = await links.narrow(["anna"], 0.1)
        found.append((anna.up.bytes_per_s, anna.down.bytes_per_s))
        await links.widen(first)
        found += [(anna.up.bytes_per_s, anna.down.bytes_per_s), (ben.up.bytes_per_s, ben.down.bytes_per_s)]
        await links.widen(second)
        found.append((anna.up.bytes_per_s, anna.down.bytes_per_s))
        await links.close()
        return found

    assert asyncio.run(rates()) == [(50, 100), (5, 0), (5, 10), (10, 20), (10, 0), (100, 200)]


def test_so_many_pulls_fail_and_the_same_ones_for_the_same_seed() -> None:
    def served(share: float, seed: str) -> list[int]:
        pulls = FailingPulls(share, seed)
        return [pulls.num_served(20) for _ in range(2000)]

    assert served(0.3, "anna") == served(0.3, "anna") != served(0.3, "ben")
    failed = [number for number in served(0.3, "anna") if number < 20]
    assert 0.27 < len(failed) / 2000 < 0.33
    assert set(failed) == set(range(20)), "anywhere, at the very beginning too"
    assert set(served(0.0, "anna")) == {20} and max(served(1.0, "anna")) < 20
    assert FailingPulls(1.0, "anna").num_served(1) == 0


# ---------------------------------------------------------------- real peers


RUN = "ab" * 32
SIZE_BYTES = 5 * CHUNK_BYTES


class Answering:
    """Answers of a peer to its service: none here."""

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        return pb.HelloReply()


@dataclass
class Here:
    """Real nodes, each behind its link; `calls` of the last one."""

    network: NetworkThread
    links: PeerLinks
    ends: list[PeerLink]
    nodes: list[Node]

    def run(self, coroutine: Coroutine[Any, Any, _T], limit_s: float = 30.0) -> _T:
        return self.network.run(coroutine, limit_s)


async def start(network_folder: Path, links: PeerLinks, name: str, shape: LinkShape) -> tuple[PeerLink, Node]:
    link = await links.open(name, shape)
    folder = network_folder / name
    folder.mkdir()
    (host, port), (_, front) = link.listen.split(":"), link.announce.split(":")
    settings = NodeSettings(
        directory=folder,
        listen=(f"/ip4/{host}/tcp/{port}",),
        announce=(f"/ip4/{host}/tcp/{front}",),
        only_announced=True,
    )
    identity = load_or_create_identity(folder / "identity.key")
    node = await Node.start(settings, identity, folder / "identity.key")
    answering: Any = Answering()
    file = {"cd" * 32: bytes(SIZE_BYTES)}
    await node.serve(service_type()(answering, SnapshotStore(), file, node), namespace_of(RUN))
    return link, node


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    network, links = NetworkThread(), PeerLinks()
    limited = LinkShape(delay_s=0.025, up_bytes_per_s=10 * MBIT, down_bytes_per_s=20 * MBIT)
    shapes = {"bootstrap": LinkShape(delay_s=0.025), "anna": limited, "ben": limited}

    async def all_of_them() -> list[tuple[PeerLink, Node]]:
        return [await start(tmp_path, links, name, shape) for name, shape in shapes.items()]

    started = network.run(all_of_them(), 60)
    yield Here(network, links, [link for link, _ in started], [node for _, node in started])
    for _, node in started:
        network.run(node.stop(), 10)
    network.run(links.close(), 10)
    network.stop()


async def bytes_from(calls: PeerCalls, peer: str) -> int:
    stream = await calls._open(peer, "blob", pb.BlobRequest(sha256=bytes.fromhex("cd" * 32)))
    size_bytes = 0
    while not (message := await stream.__anext__()).end:
        size_bytes += len(message.data)
    await stream.aclose()
    return size_bytes


@pytest.mark.processes
def test_everything_of_real_peers_passes_their_links(here: Here) -> None:
    bootstrap, anna, ben = here.nodes

    async def meet() -> None:
        for node in (bootstrap, anna, ben):
            assert await node.addresses() == node.settings.announce
        await bootstrap.join_dht([])
        for node in (anna, ben):
            await node.connect(bootstrap.identity.peer_id, await bootstrap.addresses())
            await node.join_dht([(bootstrap.identity.peer_id, await bootstrap.addresses())])

    here.run(meet())
    calls = PeerCalls(ben, RUN)  # it was never told where anna is: libp2p finds out

    async def timed(call: Callable[[], Awaitable[_T]]) -> tuple[float, _T]:
        began_s = time.monotonic()
        result = await call()
        return time.monotonic() - began_s, result

    async def measure() -> tuple[float, float]:
        peer = anna.identity.peer_id
        await calls.hello(peer, pb.HelloRequest(), 20.0)
        call_s = min([(await timed(lambda: calls.hello(peer, pb.HelloRequest(), 20.0)))[0] for _ in range(3)])
        pull_s, size_bytes = await timed(lambda: bytes_from(calls, peer))
        assert size_bytes == SIZE_BYTES
        return call_s, pull_s

    call_s, pull_s = here.run(measure())
    expected_s = SIZE_BYTES / (10 * MBIT)
    print(f"call {call_s:.3f} s, pull {pull_s:.2f} s of {expected_s:.2f} s")
    assert 0.1 <= call_s < 2.0
    assert 0.9 * expected_s <= pull_s < 5 * expected_s + 5.0
    assert here.links.num_strangers == 0
    carried = here.links.passed_bytes
    assert carried["anna"][0] > SIZE_BYTES and carried["ben"][1] > SIZE_BYTES, "a link counts what passes"
    assert not between(end.port for end in here.ends)
