"""Emulate the links of a rehearsal on one machine: each peer's traffic passes its link, with a rate each way and a
delay.

A peer listens at a private port and advertises only its link's *front*, where this process listens. libp2p dials from
the port at which it listens, so a connection to a front is known by its source port: it leaves through the caller's
link and enters through the callee's, whoever opened it and whatever it carries (libp2p's own traffic, the DHT, calls,
pulls). Any other process, such as a command on the same machine, passes only the callee's link.

The model is a stream, not packets. Bytes pass a line one after the other, and open connections take turns by pieces. A
connection begins a round trip late, like TCP's handshake, and has as many bytes under way as fit on the line and in a
small buffer. There is no slow start and there are no headers; faults of packets appear as what they do to the stream
(`impairments`). Connections can be reset or forgotten, and swarms parted. One event loop carries all links of a swarm.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from swarmtrain.network.links.impairments import PACKET_BYTES, Lateness, Narrowing, Outage, Outages, piece_bytes
from swarmtrain.network.tasks import end_tasks

_log = logging.getLogger(__name__)
_HOST = "127.0.0.1"
_PRIVATE_PORTS = range(20_000, 32_000)
"""Ports below the ephemeral range, so that no process gets one by chance before the peer listens there."""

_AHEAD_S = 0.02
"""Seconds before its last piece has passed at which a connection is read again: timers fire late on a busy machine, and
the line would be idle."""

_BUFFER_BYTES = 64 * 1024  # of each socket, and what a connection may have under way beyond its line
_FREE_BYTES = 4 * 1024 * 1024
"""Bytes that one connection may have under way on links without a rate."""

_SEGMENT_BYTES = PACKET_BYTES
"""Maximum segment size. With the loopback's own 64 KiB the kernel would buffer megabytes of a connection before us."""

_NAP_S = 0.001
"""Shortest wait. A line's times stay exact: a piece that is early by less makes the next one wait longer."""

_ACCEPT_AGAIN_S = 0.1  # after an error of accepting

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER option with which closing discards what is under way and resets the other end."""

Receive = Callable[[int], Awaitable[bytes]]
"""Returns at most the given number of bytes of a connection; b"" at its end."""

Send = Callable[[bytes], Awaitable[None]]
"""Returns when the bytes are on their way. Raises OSError if the other end is gone."""


@dataclass(frozen=True, kw_only=True)
class LinkShape:
    """Properties of a link: rates in bytes per second (0: no limit), and for each way delay, jitter and loss.

    A piece is late by up to `jitter_s` more than `delay_s`; `loss` is the share of packets that are lost.
    """

    delay_s: float = 0.0
    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0


@dataclass
class Line:
    """Direction of a link, as arithmetic: bytes pass one after the other. 0 bytes per second is no limit."""

    bytes_per_s: float = 0.0
    passed_bytes: int = 0
    """Bytes that have passed the line, or are about to."""
    _free_s: float = 0.0

    def passed_s(self, size_bytes: int, now_s: float) -> float:
        """Let bytes that arrive at `now_s` pass, behind all earlier ones, and return the time at which they have
        passed."""
        self.passed_bytes += size_bytes
        if self.bytes_per_s <= 0:
            return now_s
        self._free_s = max(now_s, self._free_s) + size_bytes / self.bytes_per_s
        return self._free_s


async def _nothing_in_the_way() -> bool:
    return False


@dataclass(frozen=True)
class Way:
    """Path from one peer to another: out of the one's link, into the other's.

    `passable` returns when a piece may arrive, and whether an outage had delayed it.
    """

    up: Line
    delay_s: float
    down: Line
    lateness: Lateness = field(default_factory=Lateness)
    passable: Callable[[], Awaitable[bool]] = _nothing_in_the_way

    @property
    def _bytes_per_s(self) -> float:
        return min((line.bytes_per_s for line in (self.up, self.down) if line.bytes_per_s > 0), default=0.0)

    @property
    def piece_bytes(self) -> int:
        """Bytes taken from a connection at once."""
        rate = self._bytes_per_s
        return piece_bytes(rate or math.inf)

    @property
    def flight_bytes(self) -> int:
        """Bytes that a connection may have under way: as many as fit on the line, and a small buffer."""
        rate = self._bytes_per_s
        return int(rate * self.delay_s) + _BUFFER_BYTES if rate else _FREE_BYTES


class _Flight:
    """Bytes of a connection that are under way, as (arrival time, bytes)."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._size_bytes = 0
        self._changed = asyncio.Condition()

    async def put(self, arrives_s: float, data: bytes) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._size_bytes < self._most_bytes)
            self._pieces.append((arrives_s, data))
            self._size_bytes += len(data)
            self._changed.notify_all()

    async def get(self) -> tuple[float, bytes]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces)
            arrives_s, data = self._pieces.popleft()
            self._size_bytes -= len(data)
            self._changed.notify_all()
            return arrives_s, data


async def _until(when_s: float) -> None:
    wait_s = when_s - asyncio.get_running_loop().time()
    if wait_s > _NAP_S:
        await asyncio.sleep(wait_s)


async def carry(receive: Receive, send: Send, way: Way) -> None:
    """Carry what one end of a connection sends to the other, until the first has ended or the second is gone."""
    loop, flight = asyncio.get_running_loop(), _Flight(way.flight_bytes)

    async def take_off() -> None:
        arrives_s = 0.0
        while data := await receive(way.piece_bytes):
            passed_s = way.up.passed_s(len(data), loop.time())
            arrives_s = max(arrives_s, passed_s + way.delay_s + way.lateness.of(len(data)))  # in order, as with TCP
            await flight.put(arrives_s, data)
            await _until(passed_s - _AHEAD_S)
        await flight.put(max(arrives_s, loop.time() + way.delay_s), b"")

    async def land() -> None:
        while True:
            arrives_s, data = await flight.get()
            await _until(arrives_s)
            if await way.passable():
                arrives_s = loop.time()
            if not data:
                return
            await _until(way.down.passed_s(len(data), arrives_s))
            try:
                await send(data)
            except OSError:
                return  # the other end is gone

    taking_off, landing = asyncio.create_task(take_off()), asyncio.create_task(land())
    try:
        await landing
    finally:
        await end_tasks([taking_off, landing])


@dataclass(frozen=True)
class PeerLink:
    """Link of a peer, which listens at the private `port` and is reached at `front`."""

    name: str
    port: int
    front: int
    shape: LinkShape
    up: Line
    down: Line

    @property
    def listen(self) -> str:
        """HOST:PORT at which the peer has to listen."""
        return f"{_HOST}:{self.port}"

    @property
    def announce(self) -> str:
        """HOST:PORT, the only address that the peer has to announce."""
        return f"{_HOST}:{self.front}"


_OUTSIDE = PeerLink("outside", 0, 0, LinkShape(), Line(), Line())


@dataclass(eq=False)
class _Connection:
    """Open connection. If it is `forgotten`, nothing passes between its ends, and neither end learns of it."""

    source: PeerLink
    target: PeerLink
    ends: tuple[socket.socket, socket.socket]
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    forgotten: bool = False


@dataclass
class PeerLinks:
    """Links of a swarm, carried by the event loop in which `open` is called."""

    seed: int = 0
    num_strangers: int = 0
    """Connections that came from no peer of these links."""
    outages: Outages = field(init=False)
    _narrowings: list[Narrowing] = field(default_factory=list)
    _num_connections: int = 0
    _open: set[_Connection] = field(default_factory=set)
    _by_port: dict[int, PeerLink] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.outages = Outages(random.Random(f"outages of {self.seed}"))

    async def open(self, name: str, shape: LinkShape, *, hidden: bool = False) -> PeerLink:
        """Open a link for a peer that will listen at its `port`. If it is `hidden`, nobody can dial it, as behind a
        router that lets in nothing; what it dials works both ways."""
        listener = listening_socket()
        front = listener.getsockname()[1]
        link = PeerLink(
            name, self._private_port(), front, shape, Line(shape.up_bytes_per_s), Line(shape.down_bytes_per_s)
        )
        self._by_port[link.port] = link
        self._start(self._refuse(listener) if hidden else self._accept(listener, link))
        return link

    async def part(self, sides: Sequence[Iterable[str]]) -> Outage:
        """Let nothing pass between these sides from now on; names in none of them are one more side. Connections stay
        open."""
        return self.outages.begin(sides)

    async def mend(self, outage: Outage) -> None:
        """End an outage; what it held up arrives little by little."""
        self.outages.end(outage)

    async def narrow(self, names: Iterable[str], share: float) -> Narrowing:
        """Let the links of these peers carry only this share of their bandwidth from now on, both ways."""
        narrowing = Narrowing(frozenset(names), share)
        self._narrowings.append(narrowing)
        self._set_rates()
        return narrowing

    async def widen(self, narrowing: Narrowing) -> None:
        """End a narrowing."""
        self._narrowings.remove(narrowing)
        self._set_rates()

    def _set_rates(self) -> None:
        for link in self._by_port.values():
            share = math.prod(each.share for each in self._narrowings if link.name in each.names)
            link.up.bytes_per_s = share * link.shape.up_bytes_per_s
            link.down.bytes_per_s = share * link.shape.down_bytes_per_s

    async def reset(self, name: str) -> None:
        """Reset a link's connections at both ends, like a router that has lost its memory."""
        for connection in self._of(name):
            for end in connection.ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.cut.set()

    async def forget(self, name: str) -> None:
        """Leave a link's connections half open: nothing passes, and neither end learns of it. New connections work."""
        for connection in self._of(name):
            connection.forgotten = True

    def _of(self, name: str) -> list[_Connection]:
        return [each for each in self._open if name in (each.source.name, each.target.name)]

    @property
    def passed_bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes that each link has carried (up, down), libp2p's own traffic included, by its peer's name."""
        return {link.name: (link.up.passed_bytes, link.down.passed_bytes) for link in self._by_port.values()}

    async def close(self) -> None:
        """Cut all connections."""
        await end_tasks(self._tasks)

    def _private_port(self) -> int:
        free = (port for port in iter(lambda: self._rng.choice(_PRIVATE_PORTS), None) if port not in self._by_port)
        return next(port for port in free if _is_free(port))

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, link: PeerLink) -> None:
        async for near, port in accepted(listener):
            self._start(self._connect(near, self._whose(port, link), link))

    async def _refuse(self, listener: socket.socket) -> None:
        async for near, _ in accepted(listener):
            near.close()

    def _whose(self, port: int, target: PeerLink) -> PeerLink:
        """Return the link through which a connection from `port` to `target` leaves: that of the peer which uses the
        port."""
        if port in self._by_port:
            return self._by_port[port]
        self.num_strangers += 1
        _log.info("an unknown process connects to %s, from port %d", target.name, port)
        return _OUTSIDE

    async def _connect(self, near: socket.socket, source: PeerLink, target: PeerLink) -> None:
        """Carry a new connection to its peer, after the round trip that TCP's handshake takes."""
        loop = asyncio.get_running_loop()
        with near, plain_socket() as far:
            connection = _Connection(source, target, (near, far))
            self._open.add(connection)
            try:
                there, back = self._way(connection, source, target), self._way(connection, target, source)
                await asyncio.sleep(there.delay_s + back.delay_s + there.lateness.of(1) + back.lateness.of(1))
                await there.passable()
                try:
                    await loop.sock_connect(far, (_HOST, target.port))
                except OSError:
                    return  # the peer is not there: the caller sees its connection end
                await self._carry(connection, there, back)
            finally:
                self._open.discard(connection)

    async def _carry(self, connection: _Connection, there: Way, back: Way) -> None:
        """Carry a connection until one end closes. libp2p never closes one direction alone: an end that has closed
        reads no more."""
        near, far = connection.ends
        ways = [(near, far, there), (far, near, back)]
        tasks = [asyncio.create_task(carry(receiver(a), sender(b), way)) for a, b, way in ways]
        tasks.append(asyncio.create_task(_cut(connection)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(tasks)

    def _way(self, connection: _Connection, source: PeerLink, target: PeerLink) -> Way:
        """Return the path of one direction of a connection, with random numbers of its own."""
        shapes, self._num_connections = (source.shape, target.shape), self._num_connections + 1
        lateness = Lateness(
            jitter_s=sum(shape.jitter_s for shape in shapes),
            loss=1.0 - (1.0 - shapes[0].loss) * (1.0 - shapes[1].loss),
            rtt_s=2.0 * sum(shape.delay_s for shape in shapes),
            rng=random.Random(f"{self.seed} {source.name} {target.name} {self._num_connections}"),
        )

        async def passable() -> bool:
            was_held_up = await self.outages.passable(source.name, target.name)
            if connection.forgotten:
                await asyncio.Event().wait()
            return was_held_up

        return Way(source.up, sum(shape.delay_s for shape in shapes), target.down, lateness, passable)


async def accepted(listener: socket.socket) -> AsyncIterator[tuple[socket.socket, int]]:
    """Yield each new connection with the port it comes from; never ends."""
    loop = asyncio.get_running_loop()
    with listener:
        while True:
            try:
                near, address = await loop.sock_accept(listener)
            except OSError as error:  # for example, no descriptor is left
                _log.warning("a link could not accept a connection: %s", error)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            yield near, address[1]


async def _cut(connection: _Connection) -> None:
    await connection.cut.wait()


def receiver(end: socket.socket) -> Receive:
    """Return a function that reads from an end of a connection."""

    async def receive(most_bytes: int) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(end, most_bytes)
        except OSError:
            return b""  # the connection was reset

    return receive


def sender(end: socket.socket) -> Send:
    """Return a function that writes to an end of a connection."""

    async def send(data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(end, data)

    return send


def plain_socket() -> socket.socket:
    """Return a TCP socket with small buffers at either end."""
    plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    plain.setblocking(False)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return plain


def listening_socket(host: str = _HOST) -> socket.socket:
    """Return a listening socket; accepted sockets inherit its options."""
    listener = plain_socket()
    listener.bind((host, 0))
    listener.listen(128)
    return listener


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


class FailingPulls:
    """Makes pulls from a peer break off midway at random; with the same seed, the same pulls fail."""

    def __init__(self, share: float, seed: str) -> None:
        self.share = share
        self._rng = random.Random(f"pulls of {seed}")

    def num_served(self, num_chunks: int) -> int:
        """Return how many of the next pull's chunks are served: all, or fewer if it fails."""
        fails, place = self._rng.random() < self.share, self._rng.random()
        return int(place * num_chunks) if fails else num_chunks
