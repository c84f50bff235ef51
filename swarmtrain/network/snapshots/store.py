"""The one mechanism: a snapshot is a signed manifest and chunks, content-addressed.

A manifest names run, kind, round, tokens, the tensor table and the SHA-256 of each chunk of 256 KiB; its own hash is
the snapshot's name. Whoever holds the chunks can serve them, and a reader that knows the name can check every
byte, so a pull resumes and changes source freely. Hashing runs off the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import mmap
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast

from swarmtrain.errors import BadBytesError, BrokenOffError, BusyError, PeerError, StalledError, UnreachableError
from swarmtrain.network.finite import all_finite
from swarmtrain.network.identity import Identity, peer_bytes
from swarmtrain.network.links.throttle import Throttle, num_at_once
from swarmtrain.network.signatures import open_signed_untrusted, payload_sha256, sign
from swarmtrain.network.snapshots.replies import ChunkReply, Reply
from swarmtrain.protocol.membership.readers import GIVES_WAY_S, Reader, Readers
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = [
    "CHUNK_BYTES",
    "Body",
    "HeldSnapshot",
    "NumServed",
    "PullLimits",
    "PullStream",
    "Snapshot",
    "SnapshotStore",
    "TensorSpec",
    "all_chunks",
    "all_finite",
    "build_snapshot",
    "empty_held",
    "manifest_untrusted",
    "next_message",
    "pull_chunks",
    "pull_manifest",
]

_CHUNKS_A_PULL = 256
"""Chunks asked for in one stream: 64 MiB."""

_CHUNKS_AT_ONCE = 16
"""Chunks taken in by a thread before the event loop hears of it: 4 MiB."""

_T = TypeVar("_T")

NumServed = Callable[[int], int]
"""How many of a pull's chunks are served, given how many are asked for; fewer in a rehearsal of pulls that fail."""

_DTYPES = {"float32": (32, 0), "bfloat16": (16, 0), "int8": (8, 256), "int4": (4, 64), "int2": (2, 128)}
"""(bits a number, numbers a scale) of what a tensor's `dtype` may be; `algorithm.quantize` makes the bytes."""

_READER_STALL_S = 20.0
"""The transport takes up to 1.3 MB from a sender at once and then nothing until those have been read: so long at twice
the speed at which a transfer is given up."""

_NEXT_PULL_S = 5.0
"""Within so long a reader that was given the last piece asks for others; if it does not, it has all that it wants."""

_BACK_AGAIN_S = 0.5
"""Whoever had to give way asks again after so long."""

_LAST_PIECE_S = 10.0
"""What a reader was sent before it had to give way may take so long to arrive."""

_MAX_FILES = 8
"""Files of the run sent at once."""

_ANSWER_S = 0.5
"""BUSY may take so long to come, over a slow link; of one that keeps a reader waiting for it the rest counts."""

_MAX_AXES = 16


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's place in the body."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size_bytes(self) -> int:
        """Bytes it takes in the body: its numbers, and if they are quantised in blocks, an fp32 scale for each."""
        bits, block = _DTYPES[self.dtype]
        numbers = math.prod(self.shape)
        return math.ceil(numbers * bits / 8) + (4 * math.ceil(numbers / block) if block else 0)


class Body:
    """The bytes of a snapshot over buffers that already exist: nothing is copied until a chunk is read."""

    def __init__(self, buffers: Sequence[memoryview | bytes | bytearray]) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in buffers]
        self.size_bytes = sum(len(view) for view in self._views)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end."""
        return b"".join(self.views(offset, size))

    def views(self, offset: int, size: int) -> tuple[memoryview, ...]:
        """The same, where they lie."""
        parts = []
        for view in self._views:
            if size <= 0:
                break
            if offset < len(view):
                part = view[offset : offset + size]
                parts.append(part)
                size -= len(part)
                offset = 0
            else:
                offset -= len(view)
        return tuple(parts)


@dataclass(frozen=True)
class Snapshot:
    """A manifest, its signed form, and its name: the SHA-256 of the manifest's bytes, hex."""

    manifest: pb.Manifest
    signed: pb.Signed
    sha256: str
    author: str

    @property
    def num_chunks(self) -> int:
        """Chunks in the body."""
        return len(self.manifest.chunk_sha256) // 32

    def chunk_size(self, chunk: int) -> int:
        """Bytes in chunk number `chunk`."""
        return min(CHUNK_BYTES, self.manifest.total_bytes - chunk * CHUNK_BYTES)

    def chunk_is(self, chunk: int, data: bytes | memoryview) -> bool:
        """Whether `data` is that chunk."""
        want = self.manifest.chunk_sha256[32 * chunk : 32 * chunk + 32]
        return len(data) == self.chunk_size(chunk) and hashlib.sha256(data).digest() == want


@dataclass
class HeldSnapshot:
    """A snapshot whose bytes are here, wholly or in part."""

    snapshot: Snapshot
    body: Body
    have: set[int]
    buffer: bytearray | None = None
    """Where pulled bytes go, to be used as a writable buffer only; None in a snapshot of our own."""
    pulling: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while chunks are pulled into it, so that two that want the same bytes pull them once."""

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return len(self.have) == self.snapshot.num_chunks

    def room(self, chunk: int) -> memoryview:
        """Where a pulled chunk belongs."""
        assert self.buffer is not None
        start = chunk * CHUNK_BYTES
        return memoryview(self.buffer)[start : start + self.snapshot.chunk_size(chunk)]

    def part(self, start: int, end: int) -> memoryview:
        """The bytes from `start` to `end` of the body, in memory that may be written to."""
        if self.buffer is not None:
            return memoryview(self.buffer)[start:end]
        return memoryview(bytearray(self.body.read(start, end - start)))


def build_snapshot(identity: Identity, manifest: pb.Manifest, specs: Sequence[TensorSpec], body: Body) -> HeldSnapshot:
    """Hash and sign a snapshot. `manifest` carries run, kind, round and counters; the rest is filled in here.

    Takes as long as hashing the body: call it in a thread.
    """
    if body.size_bytes != sum(spec.size_bytes for spec in specs):
        raise ValueError(f"a body of {body.size_bytes} bytes does not fit its tensor table")
    manifest.author = peer_bytes(identity.peer_id)
    manifest.total_bytes, manifest.chunk_bytes = body.size_bytes, CHUNK_BYTES
    for spec in specs:
        manifest.tensors.add(name=spec.name, shape=spec.shape, dtype=spec.dtype)
    digests = [
        hashlib.sha256(body.read(offset, CHUNK_BYTES)).digest() for offset in range(0, body.size_bytes, CHUNK_BYTES)
    ]
    manifest.chunk_sha256 = b"".join(digests)
    signed = sign(identity, "manifest", manifest.run_sha256.hex(), manifest)
    snapshot = Snapshot(manifest, signed, payload_sha256(signed), identity.peer_id)
    return HeldSnapshot(snapshot, body, set(range(snapshot.num_chunks)))


def manifest_untrusted(signed: pb.Signed, run_sha256: str, kind: int, *tables: Sequence[TensorSpec]) -> Snapshot:
    """A checked manifest: of this run and kind, with exactly this tensor table or another of these; BadBytesError
    otherwise."""
    author, manifest = open_signed_untrusted(signed, "manifest", run_sha256, pb.Manifest)
    if manifest.run_sha256.hex() != run_sha256 or manifest.author != signed.author or manifest.kind != kind:
        raise BadBytesError("a manifest of another run, author or kind", code="not-asked-for")
    is_like = len(manifest.tensors) in map(len, tables) and all(len(t.shape) <= _MAX_AXES for t in manifest.tensors)
    table = tuple(TensorSpec(t.name, tuple(t.shape), t.dtype) for t in manifest.tensors) if is_like else ()
    is_known = is_like and any(table == tuple(one) for one in tables)
    if not is_known or manifest.total_bytes != (total_bytes := sum(spec.size_bytes for spec in table)):
        raise BadBytesError(
            "a manifest whose tensors have another shape, type or number than this model's", code="bad-shape"
        )
    if manifest.chunk_bytes != CHUNK_BYTES or len(manifest.chunk_sha256) != 32 * math.ceil(total_bytes / CHUNK_BYTES):
        raise BadBytesError("a manifest with another chunk size or number of chunks", code="bad-size")
    if manifest.round >= 2**40 or manifest.tokens >= 2**60 or manifest.run_tokens >= 2**60:
        raise BadBytesError("a manifest with a counter out of range", code="bad-number")
    return Snapshot(manifest, signed, payload_sha256(signed), author)


def all_chunks(num_chunks: int) -> int:
    """See `NumServed`."""
    return num_chunks


@dataclass
class SnapshotStore:
    """The snapshots that this peer serves: its own publications and what it pulled from others.

    One being read stays in memory until its reader ends, since the reader holds a reference. Who may read, and who
    gives way to whom, `protocol.membership.readers` says. While `up` is limited, fewer read at once, so that each gets
    twice the `min_bytes_per_s` below which it would give up. Files have places of their own.
    """

    max_readers: int = 4
    keep_rounds: int = 2
    reader_stall_s: float = _READER_STALL_S
    reader_gives_way_s: float = GIVES_WAY_S
    up: Throttle = field(default_factory=Throttle)
    min_bytes_per_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    num_served: NumServed = all_chunks
    arriving: HeldSnapshot | None = field(default=None, init=False)
    """The state that is being pulled, for whoever waits for it."""
    _held: dict[str, HeldSnapshot] = field(default_factory=dict)
    _read_s: dict[str, float] = field(default_factory=dict)
    _num_reading: Counter[str] = field(default_factory=Counter)
    _readers: Readers = field(init=False)
    _files: Readers = field(init=False)
    _sending: dict[Reader, asyncio.Task[object] | None] = field(default_factory=dict)
    _unwanted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._readers = Readers(self.reader_stall_s, self.reader_gives_way_s)
        self._files = Readers(self.reader_stall_s, 2 * self.reader_gives_way_s)  # one that breaks off begins anew

    @property
    def num_readers(self) -> int:
        """Pulls being served."""
        return len(self._readers)

    def has_room_for(self, peer: str = "") -> bool:
        """Whether `peer` (empty: one not known) would be served."""
        return self._readers.has_room_for(peer, self._most_readers, self.clock())

    @property
    def _most_readers(self) -> int:
        return num_at_once(self.max_readers, self.up.bytes_per_s, self.min_bytes_per_s)

    def add(self, held: HeldSnapshot) -> None:
        """Serve `held` from now on."""
        self._unwanted.discard(held.snapshot.sha256)
        self._held[held.snapshot.sha256] = held
        self._sweep()

    def get(self, sha256: str) -> HeldSnapshot | None:
        """What is held under this name."""
        return self._held.get(sha256)

    def drop(self, sha256: str) -> None:
        """Serve it no longer, or if somebody is reading it, when another comes or goes after that."""
        self._unwanted.add(sha256)
        self._sweep()

    def _sweep(self) -> None:
        for sha256 in [name for name in self._unwanted if not self.is_being_read(name)]:
            self._held.pop(sha256, None)
            self._read_s.pop(sha256, None)
            self._unwanted.discard(sha256)

    @contextlib.contextmanager
    def showing(self, held: HeldSnapshot) -> Iterator[None]:
        """While the bytes of `held`, a state, come, it is what arrives."""
        self.arriving = held
        try:
            yield
        finally:
            self.arriving = None

    def touch(self, sha256: str) -> None:
        """Somebody was told this name, and will read it."""
        if sha256 in self._held:
            self._read_s[sha256] = self.clock()

    def is_being_read(self, sha256: str) -> bool:
        """Whether somebody reads it, or is about to."""
        return self._read_s.get(sha256, -math.inf) >= self.clock() - self.reader_stall_s

    def forget_before(self, round: int) -> None:
        """Drop snapshots of rounds before `round - keep_rounds + 1`, but none that somebody is reading."""
        oldest = round - self.keep_rounds + 1
        self._held = {
            name: held
            for name, held in self._held.items()
            if held.snapshot.manifest.round >= oldest or self.is_being_read(name)
        }
        self._read_s = {name: read_s for name, read_s in self._read_s.items() if name in self._held}

    def _admit(self, readers: Readers, peer: str, most: int) -> Reader | None:
        """A place for one more reader, if there is one."""
        now = self.clock()
        reader, gone = readers.admit(peer, most, now)
        sending = self._sending.pop(gone, None) if gone is not None else None
        if gone is not None and sending is not None and sending is not asyncio.current_task():
            # It waits for the transport, and would hold the snapshot for as long. What is under way may still arrive.
            grace_s = 0.0 if readers.is_stalled(gone, now) else _LAST_PIECE_S
            asyncio.get_running_loop().call_later(grace_s, sending.cancel)
        if reader is not None:
            self._sending[reader] = asyncio.current_task()
        return reader

    def _leaves(self, readers: Readers, reader: Reader) -> None:
        readers.leaves(reader)
        self._sending.pop(reader, None)

    async def serve(
        self, request: pb.PullRequest, count_sent: Callable[[int], None] = lambda size_bytes: None, peer: str = ""
    ) -> AsyncGenerator[Reply, None]:
        """Answer a pull of `peer`: a status, the chunks asked for, an end mark; BUSY at once when too many read."""
        held = self._held.get(request.snapshot_sha256.hex())
        wanted = range(request.first_chunk, request.first_chunk + min(request.num_chunks, 4 * _CHUNKS_A_PULL))
        if held is None or not all(chunk in held.have for chunk in wanted):
            yield pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)
            return
        if not wanted:
            size_bytes = held.snapshot.signed.ByteSize()
            self.up.count(size_bytes)
            count_sent(size_bytes)
            yield pb.PullReply(status=pb.PullReply.STATUS_OK, manifest=held.snapshot.signed)
            yield pb.PullReply(end=True)
            return
        reader = self._admit(self._readers, peer, self._most_readers)
        if reader is None:
            self.touch(held.snapshot.sha256)  # it comes again
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
            return
        name = held.snapshot.sha256
        self._num_reading[name] += 1
        try:
            yield pb.PullReply(status=pb.PullReply.STATUS_OK)
            for chunk in wanted[: self.num_served(len(wanted))]:
                if not await self._may_read(self._readers, reader, held.snapshot.chunk_size(chunk)):
                    return
                self._read_s[name] = self.clock()
                count_sent(held.snapshot.chunk_size(chunk))
                yield ChunkReply(chunk, held.body.views(chunk * CHUNK_BYTES, CHUNK_BYTES))
            yield pb.PullReply(end=True)
            if self._num_reading[name] == 1 and wanted.stop == held.snapshot.num_chunks:  # who needs more asks at once
                self._read_s[name] = self.clock() - max(0.0, self.reader_stall_s - _NEXT_PULL_S)
        finally:
            self._num_reading -= Counter([name])  # keeps those above zero
            self._leaves(self._readers, reader)

    async def _may_read(self, readers: Readers, reader: Reader, size_bytes: int) -> bool:
        """Whether a reader that comes for its next piece still has its place; when it has had its turn."""
        if reader not in readers:
            return False
        readers.waits(reader, self.clock())
        await self.up.turn(size_bytes)
        readers.takes(reader, size_bytes, self.clock())
        return True

    async def serve_file(
        self, data: bytes, count_sent: Callable[[int], None] = lambda size_bytes: None, peer: str = ""
    ) -> AsyncGenerator[Reply, None]:
        """Send a file to `peer` in pieces; BUSY at once when too many take files. Those take no place of who pulls
        snapshots, as files are small and few; while `up` is limited one goes at a time, so that each who shares the
        link has as much still as makes a transfer too slow."""
        reader = self._admit(self._files, peer, 1 if self.up.bytes_per_s > 0 else _MAX_FILES)
        if reader is None:
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
            return
        try:
            yield pb.PullReply(status=pb.PullReply.STATUS_OK)
            for offset in range(0, len(data), CHUNK_BYTES):
                piece = data[offset : offset + CHUNK_BYTES]
                if not await self._may_read(self._files, reader, len(piece)):
                    return
                count_sent(len(piece))
                yield pb.PullReply(data=piece)
            yield pb.PullReply(end=True)
        finally:
            self._leaves(self._files, reader)


class PullStream(Protocol):
    """A pull's replies; whoever takes data out says how much."""

    async def __anext__(self) -> pb.PullReply: ...

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        """Put the next chunks where they belong, for a short while, and say of each when it has come: one at least.
        BadBytesError if something else comes."""

    async def count(self, size_bytes: int) -> None:
        """So much was received; returns when more may be."""

    async def aclose(self) -> None:
        """Hang up."""


PullOpener = Callable[[str, pb.PullRequest], Awaitable[PullStream]]
"""Opens a pull's stream at a peer; UnreachableError if that fails."""

Blame = Callable[[str, PeerError], None]
"""Told which source failed, and how."""


@dataclass(frozen=True, kw_only=True)
class PullLimits:
    """How long a pull may take: seconds without a message, busy retries in seconds, and how slow it may be.

    A source must bring `min_bytes_per_s`, averaged over all that was waited for it, once that is `grace_s`; else a
    chunk now and then would keep a reader for days.
    """

    stall_limit_s: float = 10.0
    busy_wait_s: float = 0.05
    busy_limit_s: float = 30.0
    min_bytes_per_s: float = 32 * 1024
    grace_s: float = 30.0
    clock: Callable[[], float] = time.monotonic


async def pull_chunks(
    held: HeldSnapshot, chunks: range, sources: Sequence[str], open_pull: PullOpener, limits: PullLimits, blame: Blame
) -> None:
    """Bring `chunks` of `held` here from `sources`, the first that works; each chunk is checked as it arrives.

    What a source delivered before it failed is kept, and the next one goes on from there; one whose stream broke off
    comes again after the others: this reader may have had to give way. Whoever calls this holds `held.pulling`: chunks
    are put in their place before they are checked. Raises UnreachableError when no source could deliver.
    """
    busy_s, patience_s, wait_s = 0.0, limits.busy_limit_s, limits.busy_wait_s
    pending = list(sources)
    paces: dict[str, _Pace] = {}
    while True:
        missing = _missing_run(held, chunks)
        if missing is None:
            return
        if not pending:
            raise UnreachableError(f"nobody could deliver snapshot {held.snapshot.sha256[:12]}")
        source = pending.pop(0)
        pace, asked_s, num_before = paces.setdefault(source, _Pace(limits)), limits.clock(), len(held.have)
        try:
            while (missing := _missing_run(held, chunks)) is not None:
                asked_s = limits.clock()
                await _pull_run(held, missing, source, open_pull, pace)
        except BusyError:
            busy_s += max(0.0, min(limits.clock() - asked_s, limits.stall_limit_s) - _ANSWER_S)
            if busy_s < patience_s:
                pending.append(source)
                await asyncio.sleep(wait_s)
                busy_s += wait_s
        except BrokenOffError as error:
            if pending or len(held.have) == num_before:
                blame(source, error)
            if len(held.have) == num_before:
                continue
            pending.append(source)
            busy_s, wait_s = 0.0, max(wait_s, _BACK_AGAIN_S)
            patience_s = max(patience_s, GIVES_WAY_S + _BACK_AGAIN_S)
        except PeerError as error:
            blame(source, error)


def _missing_run(held: HeldSnapshot, chunks: range) -> range | None:
    """The first stretch of chunks that are not here yet, of one pull's length at most."""
    first = next((chunk for chunk in chunks if chunk not in held.have), None)
    if first is None:
        return None
    last = first
    while last + 1 in chunks and last + 1 not in held.have and last + 1 - first < _CHUNKS_A_PULL:
        last += 1
    return range(first, last + 1)


class _Pace:
    """How fast one source delivers. What counts is the waiting, so that neither our own checks nor a pause of this
    process (longer than a stall) is its fault."""

    def __init__(self, limits: PullLimits) -> None:
        self.limits = limits
        self._waited_s = 0.0
        self._came_bytes = 0

    def waited(self, seconds: float) -> None:
        """For a stream to open: one that breaks off time and again has opened many."""
        self._waited_s += min(seconds, self.limits.stall_limit_s)

    async def take(self, held: HeldSnapshot, chunks: range, stream: PullStream, came: list[int]) -> None:
        """The next few of these chunks. UnreachableError if none comes, StalledError if the source is too slow."""
        limits = self.limits
        if self._waited_s >= limits.grace_s and self._came_bytes < limits.min_bytes_per_s * self._waited_s:
            rate = self._came_bytes / self._waited_s / 1024
            raise StalledError(f"it delivers {rate:.0f} KiB/s, less than {limits.min_bytes_per_s / 1024:.0f}")
        began_s = limits.clock()
        num_before = len(came)
        await _within(limits.stall_limit_s, stream.take(chunks[:_CHUNKS_AT_ONCE], held.room, came.append))
        self._waited_s += min(limits.clock() - began_s, limits.stall_limit_s)
        size_bytes = sum(held.snapshot.chunk_size(chunk) for chunk in came[num_before:])
        self._came_bytes += size_bytes
        await stream.count(size_bytes)


async def _pull_run(held: HeldSnapshot, run: range, source: str, open_pull: PullOpener, pace: _Pace) -> None:
    limits = pace.limits
    request = pb.PullRequest(
        snapshot_sha256=bytes.fromhex(held.snapshot.sha256), first_chunk=run.start, num_chunks=len(run)
    )
    asked_s = limits.clock()
    stream = await open_pull(source, request)
    try:
        first = await next_message(stream, limits.stall_limit_s)
        if first.status == pb.PullReply.STATUS_BUSY:
            raise BusyError("it serves as many readers as it may")
        if first.status != pb.PullReply.STATUS_OK:
            raise UnreachableError("it does not hold this snapshot", code="not-held")
        pace.waited(limits.clock() - asked_s)
        check = _Check(held)
        try:
            while len(check.came) < len(run):
                await pace.take(held, run[len(check.came) :], stream, check.came)
                await check.begin()
        finally:  # also when the stream broke: what had come counts
            await check.finish()
        if not (await next_message(stream, limits.stall_limit_s)).end:
            raise BadBytesError("a stream without an end", code="bad-size")
    finally:
        await stream.aclose()


async def next_message(stream: PullStream, limit_s: float) -> pb.PullReply:
    """The next message of a stream; UnreachableError if it breaks or ends, StalledError if it brings nothing for
    `limit_s`."""
    return await _within(limit_s, stream.__anext__())


async def _within(limit_s: float, coming: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(limit_s):
            return await coming
    except TimeoutError:
        raise StalledError(f"it sent nothing for {limit_s:g} s") from None
    except StopAsyncIteration:
        raise BrokenOffError("the stream ended early") from None
    except PeerError:
        raise
    except Exception as error:  # the adapter's boundary: whatever a broken stream raises
        raise BrokenOffError(f"the stream broke ({type(error).__name__})") from error


class _Check:
    """Checks chunks in their places, in a thread, while the next ones arrive: one thread for both would have half as
    much of a processor that others want too. What is not checked does not count as being here."""

    def __init__(self, held: HeldSnapshot) -> None:
        self._held = held
        self.came: list[int] = []
        self._num_begun = 0
        self._checking: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Check what has come since; BadBytesError when what came earlier turns out to be wrong."""
        if self._checking is not None:
            await self._checking
        chunks = self.came[self._num_begun :]
        self._num_begun += len(chunks)
        self._checking = asyncio.create_task(asyncio.to_thread(self._check, chunks))

    async def finish(self) -> None:
        """Check what is left."""
        await self.begin()
        assert self._checking is not None
        await self._checking

    def _check(self, chunks: list[int]) -> None:
        held = self._held
        for chunk in chunks:
            if not held.snapshot.chunk_is(chunk, held.room(chunk)):
                raise BadBytesError(
                    f"wrong hash of chunk {chunk} of snapshot {held.snapshot.sha256[:12]}", code="bad-hash"
                )
            held.have.add(chunk)


async def pull_manifest(source: str, sha256: str, open_pull: PullOpener, limits: PullLimits) -> pb.Signed:
    """The signed manifest of the snapshot named `sha256` from a peer that holds it, by that name; not yet checked
    further. BadBytesError if it is another's."""
    stream = await open_pull(source, pb.PullRequest(snapshot_sha256=bytes.fromhex(sha256)))
    try:
        first = await next_message(stream, limits.stall_limit_s)
    finally:
        await stream.aclose()
    if first.status != pb.PullReply.STATUS_OK:
        raise UnreachableError("it does not hold this snapshot", code="not-held")
    if payload_sha256(first.manifest) != sha256:
        raise BadBytesError("a manifest that does not match its hash", code="bad-hash")
    return first.manifest


def empty_held(snapshot: Snapshot) -> HeldSnapshot:
    """Room for a snapshot's bytes, to be pulled. It takes memory only as chunks arrive: whoever merely announces a
    snapshot, or of which a share is wanted, costs no more than that."""
    buffer = cast(bytearray, mmap.mmap(-1, snapshot.manifest.total_bytes))  # a bytearray would be filled with zeros
    return HeldSnapshot(snapshot, Body([buffer]), set(), buffer)
