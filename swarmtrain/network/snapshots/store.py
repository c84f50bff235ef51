"""Build, serve and pull snapshots: signed manifests with content-addressed chunks.

All tensors and checkpoints travel in this one form. A manifest names run, kind, round, tokens, the tensor table and the
SHA-256 of each chunk of 256 KiB; its own hash is the snapshot's name. Any peer that holds the chunks can serve them,
and a reader that knows the name checks every byte, so a pull can resume at another source. Hashing runs off the event
loop.
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
from swarmtrain.network.identity import Identity, open_signed_untrusted, payload_sha256, peer_bytes, sign
from swarmtrain.network.links.throttle import Throttle, num_at_once
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.snapshots.replies import ChunkReply, Reply
from swarmtrain.protocol.membership.budgets import GIVES_WAY_S, Reader, Readers
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

_CHUNKS_A_PULL = 256
"""Chunks requested in one stream: 64 MiB."""

_CHUNKS_AT_ONCE = 16
"""Chunks that a thread takes in before the event loop is told: 4 MiB."""

_T = TypeVar("_T")

NumServed = Callable[[int], int]
"""Maps the number of requested chunks to the number served; fewer in a rehearsal of failing pulls."""

_DTYPES = {"float32": (32, 0), "bfloat16": (16, 0), "int8": (8, 256), "int4": (4, 64), "int2": (2, 128)}
"""(bits per number, numbers per scale) of each `dtype` of a tensor; `algorithm.quantize` makes the bytes."""

_READER_STALL_S = 20.0
"""Seconds without a piece taken after which a reader counts as stalled.

The transport takes up to 1.3 MB from a sender at once, then nothing until the reader has read those. 20 s is that
amount at twice the speed below which a transfer is given up.
"""

_NEXT_PULL_S = 5.0
"""Seconds within which a reader that got the last chunk asks for more; afterwards it has all that it wants."""

_BACK_AGAIN_S = 0.5
"""Seconds after which a peer that had to give way asks again."""

_LAST_PIECE_S = 10.0
"""Seconds for bytes already sent to a reader that had to give way to arrive."""

_MAX_FILES = 8
"""Files of the run sent at once."""
_MOST_FILE_BYTES = 8 * 1024 * 1024
"""Size of a file on the disk that is sent as a whole: the chunk list of the largest model file. Others are pulled by
chunks."""

_OF_ROUNDS = (pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, pb.SNAPSHOT_KIND_SHARE)

_ANSWER_S = 0.5
"""Seconds that a BUSY reply may take over a slow link. A longer wait for it counts as time spent busy."""

_MOST_STALLS = 4
"""Longest silence allowed to a source that is asked again, in `stall_limit_s`."""

_MAX_AXES = 16  # of a tensor in a manifest


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor in the body."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size_bytes(self) -> int:
        """Bytes in the body: the numbers, and for dtypes quantised in blocks one fp32 scale per block."""
        bits, block = _DTYPES[self.dtype]
        numbers = math.prod(self.shape)
        return math.ceil(numbers * bits / 8) + (4 * math.ceil(numbers / block) if block else 0)


class Body:
    """Bytes of a snapshot over existing buffers: nothing is copied until a chunk is read."""

    def __init__(self, buffers: Sequence[memoryview | bytes | bytearray]) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in buffers]
        self.size_bytes = sum(len(view) for view in self._views)

    def read(self, offset: int, size: int) -> bytes:
        """Return a copy of `size` bytes from `offset`, fewer at the end of the body."""
        return b"".join(self.views(offset, size))

    def views(self, offset: int, size: int) -> tuple[memoryview, ...]:
        """Return the same bytes as views of the buffers, without a copy."""
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
    """Signed manifest with its name: the SHA-256 of the manifest's bytes, hex."""

    manifest: pb.Manifest
    signed: pb.Signed
    sha256: str
    author: str

    @property
    def num_chunks(self) -> int:
        """Number of chunks in the body."""
        return len(self.manifest.chunk_sha256) // 32

    def chunk_size(self, chunk: int) -> int:
        """Return the size in bytes of chunk number `chunk`."""
        return min(CHUNK_BYTES, self.manifest.total_bytes - chunk * CHUNK_BYTES)

    def chunk_is(self, chunk: int, data: bytes | memoryview) -> bool:
        """Return whether `data` has the size and the SHA-256 of that chunk."""
        want = self.manifest.chunk_sha256[32 * chunk : 32 * chunk + 32]
        return len(data) == self.chunk_size(chunk) and hashlib.sha256(data).digest() == want


@dataclass
class HeldSnapshot:
    """Snapshot of which this peer holds some or all chunks."""

    snapshot: Snapshot
    body: Body
    have: set[int]
    buffer: bytearray | None = None
    """Memory for pulled chunks, to be used only as a writable buffer; None in a snapshot made here."""
    pulling: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while chunks are pulled, so that two tasks that want the same bytes pull them once."""

    @property
    def complete(self) -> bool:
        """True if this peer holds every chunk."""
        return len(self.have) == self.snapshot.num_chunks

    @property
    def sha256(self) -> str:
        """Name of the snapshot. See `ChunkTarget`."""
        return self.snapshot.sha256

    @property
    def title(self) -> str:
        """Name for a person. See `ChunkTarget`."""
        return f"snapshot {self.snapshot.sha256[:12]}"

    def chunk_size(self, chunk: int) -> int:
        """Return the size in bytes of a chunk. See `ChunkTarget`."""
        return self.snapshot.chunk_size(chunk)

    def accept(self, chunk: int) -> bool:
        """Check a chunk that was put into its room, and hold it from now on. See `ChunkTarget`."""
        if not self.snapshot.chunk_is(chunk, self.room(chunk)):
            return False
        self.have.add(chunk)
        return True

    def room(self, chunk: int) -> memoryview:
        """Return the writable memory where a pulled chunk belongs."""
        assert self.buffer is not None
        start = chunk * CHUNK_BYTES
        return memoryview(self.buffer)[start : start + self.snapshot.chunk_size(chunk)]

    def part(self, start: int, end: int) -> memoryview:
        """Return bytes `start` to `end` of the body in writable memory."""
        if self.buffer is not None:
            return memoryview(self.buffer)[start:end]
        return memoryview(bytearray(self.body.read(start, end - start)))


def build_snapshot(identity: Identity, manifest: pb.Manifest, specs: Sequence[TensorSpec], body: Body) -> HeldSnapshot:
    """Hash and sign a snapshot. `manifest` carries run, kind, round and counters; this fills in the rest.

    Takes as long as hashing the body: call it in a thread. Raises ValueError when the body's size does not fit `specs`.
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
    """Return a verified manifest of this run and kind, whose tensor table is exactly one of `tables`.

    Raises BadBytesError when it is anything else, or when a counter is out of range.
    """
    author, manifest = open_signed_untrusted(signed, "manifest", run_sha256, pb.Manifest)
    if manifest.run_sha256.hex() != run_sha256 or manifest.author != signed.author or manifest.kind != kind:
        raise BadBytesError("a manifest of another run, author or kind than asked for", code="not-asked-for")
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
    """Serve every requested chunk: the default `NumServed`."""
    return num_chunks


@dataclass
class SnapshotStore:
    """Snapshots that this peer serves: its own publications and those it pulled from others.

    `protocol.membership.readers` decides who may read and who gives way. While `up` is limited, fewer peers read at
    once, so that each gets twice the `min_bytes_per_s` below which it would give up. Files have slots of their own. A
    dropped snapshot stays in memory until its last reader ends, since the reader holds a reference.
    """

    max_readers: int = 4
    keep_rounds: int = 2
    reader_stall_s: float = _READER_STALL_S
    reader_gives_way_s: float = GIVES_WAY_S
    up: Throttle = field(default_factory=Throttle)
    min_bytes_per_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    num_served: NumServed = all_chunks
    round_places: int = 1
    """Multiple of `max_readers` that may read what a synchronous round averages."""
    is_of_round: Callable[[str], bool] = lambda peer: True
    """Returns whether a peer may need that; the others read it after those."""
    arriving: HeldSnapshot | None = field(default=None, init=False)
    """State that is being pulled, so that its progress can be shown; None if none is."""
    _held: dict[str, HeldSnapshot] = field(default_factory=dict)
    _read_s: dict[str, float] = field(default_factory=dict)
    _num_reading: Counter[str] = field(default_factory=Counter)
    _readers: Readers = field(init=False)
    _round_readers: Readers = field(init=False)
    _files: Readers = field(init=False)
    _model_files: Readers = field(init=False)
    _sending: dict[Reader, asyncio.Task[object] | None] = field(default_factory=dict)
    _unwanted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._readers = Readers(self.reader_stall_s, self.reader_gives_way_s)
        self._round_readers = Readers(
            self.reader_stall_s, self.reader_gives_way_s, in_order=True, goes_first=self.is_of_round
        )
        # Twice as long: a file that breaks off is read again from its start.
        self._files = Readers(self.reader_stall_s, 2 * self.reader_gives_way_s)
        self._model_files = Readers(self.reader_stall_s, self.reader_gives_way_s)

    @property
    def num_readers(self) -> int:
        """Number of pulls being served."""
        return len(self._readers) + len(self._round_readers)

    def has_room_for(self, peer: str = "") -> bool:
        """Return whether `peer` (empty: an unknown one) would get a slot."""
        return self._readers.has_room_for(peer, self._most_readers, self.clock())

    @property
    def _most_readers(self) -> int:
        return self._num_at_once(self.max_readers)

    def _num_at_once(self, most: int) -> int:
        return num_at_once(most, self.up.bytes_per_s, self.min_bytes_per_s)

    def add(self, held: HeldSnapshot) -> None:
        """Serve `held` from now on."""
        self._unwanted.discard(held.snapshot.sha256)
        self._held[held.snapshot.sha256] = held
        self._sweep()

    def get(self, sha256: str) -> HeldSnapshot | None:
        """Return the snapshot of this name, or None."""
        return self._held.get(sha256)

    def drop(self, sha256: str) -> None:
        """Stop serving this snapshot. If somebody is reading it, a later `add` or `drop` removes it."""
        self._unwanted.add(sha256)
        self._sweep()

    def _sweep(self) -> None:
        for sha256 in [name for name in self._unwanted if not self.is_being_read(name)]:
            self._held.pop(sha256, None)
            self._read_s.pop(sha256, None)
            self._unwanted.discard(sha256)

    @contextlib.contextmanager
    def showing(self, held: HeldSnapshot) -> Iterator[None]:
        """Set `arriving` to `held`, a state, while its bytes are pulled."""
        self.arriving = held
        try:
            yield
        finally:
            self.arriving = None

    def touch(self, sha256: str) -> None:
        """Keep this snapshot for a while, because a peer has just learned its name and will read it."""
        if sha256 in self._held:
            self._read_s[sha256] = self.clock()

    def is_being_read(self, sha256: str) -> bool:
        """Return whether a peer reads the snapshot, or is about to."""
        return self._read_s.get(sha256, -math.inf) >= self.clock() - self.reader_stall_s

    def forget_before(self, round: int) -> None:
        """Drop snapshots of rounds before `round - keep_rounds + 1`, except those being read."""
        oldest = round - self.keep_rounds + 1
        self._held = {
            name: held
            for name, held in self._held.items()
            if held.snapshot.manifest.round >= oldest or self.is_being_read(name)
        }
        self._read_s = {name: read_s for name, read_s in self._read_s.items() if name in self._held}

    def _admit(self, readers: Readers, peer: str, most: int) -> Reader | None:
        """Return a slot for one more reader, or None. The reader that has to give way for it is cut."""
        now = self.clock()
        reader, gone = readers.admit(peer, most, now)
        sending = self._sending.pop(gone, None) if gone is not None else None
        if gone is not None and sending is not None and sending is not asyncio.current_task():
            # The send waits for the transport and would hold the snapshot just as long. Bytes under way may still
            # arrive, unless the reader has stalled.
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
        """Answer a pull of `peer` with a status, the requested chunks and an end mark.

        A request for no chunks gets the manifest. The reply is UNKNOWN when chunks are missing here, and BUSY, at once,
        when too many peers read.
        """
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
        in_round = self.round_places > 1 and held.snapshot.manifest.kind in _OF_ROUNDS
        readers, most = self._readers, self._most_readers
        if in_round:
            readers, most = self._round_readers, self._num_at_once(self.round_places * self.max_readers)
        reader = self._admit(readers, peer, most)
        if reader is None:
            self.touch(held.snapshot.sha256)  # it will ask again
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
            return
        name = held.snapshot.sha256
        self._num_reading[name] += 1
        try:
            yield pb.PullReply(status=pb.PullReply.STATUS_OK)
            for chunk in wanted[: self.num_served(len(wanted))]:
                if not await self._may_read(readers, reader, held.snapshot.chunk_size(chunk)):
                    return
                self._read_s[name] = self.clock()
                count_sent(held.snapshot.chunk_size(chunk))
                yield ChunkReply(chunk, held.body.views(chunk * CHUNK_BYTES, CHUNK_BYTES))
            yield pb.PullReply(end=True)
            # A reader that needs more asks at once.
            if self._num_reading[name] == 1 and wanted.stop == held.snapshot.num_chunks:
                self._read_s[name] = self.clock() - max(0.0, self.reader_stall_s - _NEXT_PULL_S)
        finally:
            self._num_reading -= Counter([name])  # a Counter's `-=` keeps only counts above zero
            self._leaves(readers, reader)

    async def _may_read(self, readers: Readers, reader: Reader, size_bytes: int) -> bool:
        """Wait for this piece's turn on the link and return True; return False if the reader has lost its slot."""
        if reader not in readers:
            return False
        readers.waits(reader, self.clock())
        await self.up.turn(size_bytes)
        readers.takes(reader, size_bytes, self.clock())
        return True

    async def serve_file(
        self, file: bytes | ServedFile, count_sent: Callable[[int], None] = lambda size_bytes: None, peer: str = ""
    ) -> AsyncGenerator[Reply, None]:
        """Send a file to `peer` in pieces, or BUSY at once when too many peers read files.

        One on the disk is read when it has a slot, so that a crowd takes no memory; the reply is UNKNOWN if it is not
        small, or no longer what it was. Files are small and few, so they take no slots from pulls of snapshots. While
        `up` is limited one file goes at a time: each reader's share of the link stays above the speed below which it
        would give up.
        """
        reader = self._admit(self._files, peer, 1 if self.up.bytes_per_s > 0 else _MAX_FILES)
        if reader is None:
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
            return
        try:
            data = file if isinstance(file, bytes) else await file.whole(_MOST_FILE_BYTES)
            if data is None:
                yield pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)
                return
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

    async def serve_model_file(
        self,
        file: ServedFile,
        request: pb.PullRequest,
        count_sent: Callable[[int], None] = lambda size_bytes: None,
        peer: str = "",
    ) -> AsyncGenerator[Reply, None]:
        """Answer a pull of chunks of a file on the disk, which is read piece by piece in a thread.

        The reply is UNKNOWN if the file has no such chunks, or is no longer what it was. Readers have slots of their
        own, so that a model of many gigabytes keeps nobody from pulling snapshots; on a limited link one.
        """
        wanted = range(request.first_chunk, request.first_chunk + min(request.num_chunks, 4 * _CHUNKS_A_PULL))
        if not wanted or wanted.stop > file.num_chunks:
            yield pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)
            return
        reader = self._admit(self._model_files, peer, 1 if self.up.bytes_per_s > 0 else self.max_readers)
        if reader is None:
            yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
            return
        try:
            if not await file.is_unchanged():
                yield pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)
                return
            yield pb.PullReply(status=pb.PullReply.STATUS_OK)
            async with contextlib.aclosing(file.pieces(wanted[: self.num_served(len(wanted))])) as pieces:
                async for chunk, data in pieces:
                    if not await self._may_read(self._model_files, reader, len(data)):
                        return
                    count_sent(len(data))
                    yield ChunkReply(chunk, (memoryview(data),))
            yield pb.PullReply(end=True)
        finally:
            self._leaves(self._model_files, reader)


class PullStream(Protocol):
    """Replies to one pull. The caller reports the bytes it takes to `count`."""

    async def __anext__(self) -> pb.PullReply: ...

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        """Put the next chunks where they belong, at least one, and call `came` for each.

        Returns soon, even if chunks are missing. Raises BadBytesError when anything else arrives.
        """

    async def count(self, size_bytes: int) -> None:
        """Count `size_bytes` as received; returns when more may be received."""

    async def aclose(self) -> None:
        """Hang up."""


PullOpener = Callable[[str, pb.PullRequest], Awaitable[PullStream]]
"""Opens a pull's stream at a peer. Raises UnreachableError when that fails."""

Blame = Callable[[str, PeerError], None]
"""Called with a source that failed and its error."""


class ChunkTarget(Protocol):
    """What chunks are pulled into: a snapshot in memory, or a file on the disk. `sha256` is its name in requests."""

    @property
    def sha256(self) -> str:
        """Name in requests, 64 hexadecimal digits."""

    @property
    def title(self) -> str:
        """Name for a person."""

    def chunk_size(self, chunk: int) -> int:
        """Return the size in bytes of a chunk."""

    def room(self, chunk: int) -> memoryview:
        """Return memory of that size, into which the chunk is put before it is checked.

        It may be used again once `CHUNKS_UNCHECKED` later chunks have got theirs.
        """

    def accept(self, chunk: int) -> bool:
        """Check the chunk in its room and keep it; return False if it is another one. Called in a thread, for chunks in
        their order."""


CHUNKS_UNCHECKED = 2 * _CHUNKS_AT_ONCE
"""Chunks at most that have been put into their rooms and not been checked yet."""


@dataclass(frozen=True, kw_only=True)
class PullLimits:
    """Time limits of a pull: seconds without a message, retries while busy, and the least speed.

    A source must deliver `min_bytes_per_s`, averaged over all the time spent waiting for it, once that is `grace_s`.
    Without this, a source that sends a chunk now and then would keep a reader for days.
    """

    stall_limit_s: float = 10.0
    busy_wait_s: float = 0.05
    busy_limit_s: float = 30.0
    min_bytes_per_s: float = 32 * 1024
    grace_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    paces: dict[str, SourcePace] | None = None
    """Paces of the sources so far, for a pull that is part of a larger one."""
    streams: int = 1
    """Streams at once of the larger pull: the time spent waiting for each counts only in part."""


async def pull_chunks(
    held: HeldSnapshot, chunks: range, sources: Sequence[str], open_pull: PullOpener, limits: PullLimits, blame: Blame
) -> None:
    """Pull `chunks` of `held` from the first of `sources` that works, and check each chunk as it arrives.

    Chunks that a source delivered before it failed are kept, and the next source continues from there. A source whose
    stream broke off is tried again after the others and a pause: it may only have made this reader give way. It may
    then be BUSY for as long as its stream lasted, since a reader gives way only after a while. The caller holds
    `held.pulling`, because chunks are put in place before they are checked. Raises UnreachableError when no source
    could deliver.
    """
    busy_s, patience_s, wait_s, pause_s = 0.0, limits.busy_limit_s, limits.busy_wait_s, limits.busy_wait_s
    most_s = max(limits.busy_limit_s, GIVES_WAY_S + _BACK_AGAIN_S)
    pending = list(sources)
    paces = {} if limits.paces is None else limits.paces
    while True:
        missing = _missing_run(held, chunks)
        if missing is None:
            return
        if not pending:
            raise UnreachableError(f"nobody could deliver snapshot {held.snapshot.sha256[:12]}")
        source = pending.pop(0)
        pace, asked_s, num_before = paces.setdefault(source, SourcePace(limits)), limits.clock(), len(held.have)
        turn_s = asked_s
        try:
            while (missing := _missing_run(held, chunks)) is not None:
                asked_s = limits.clock()
                await pull_run(held, missing, source, open_pull, pace)
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
            # As long as it takes until a reader there has to give way, if it was so with this one.
            patience_s = min(patience_s + limits.clock() - turn_s + _BACK_AGAIN_S, busy_s + most_s)
            await asyncio.sleep(pause_s)
            wait_s, pause_s = max(wait_s, _BACK_AGAIN_S), min(2 * pause_s, _BACK_AGAIN_S)
        except PeerError as error:
            blame(source, error)
            if isinstance(error, StalledError):
                pace.was_silent()


def _missing_run(held: HeldSnapshot, chunks: range) -> range | None:
    """Return the first run of missing chunks, at most one pull long."""
    first = next((chunk for chunk in chunks if chunk not in held.have), None)
    if first is None:
        return None
    last = first
    while last + 1 in chunks and last + 1 not in held.have and last + 1 - first < _CHUNKS_A_PULL:
        last += 1
    return range(first, last + 1)


class SourcePace:
    """Speed at which one source delivers.

    Only the time spent waiting for the source counts, each wait up to the stall limit: it is not blamed for this peer's
    own checks, nor for a suspended process.
    """

    def __init__(self, limits: PullLimits) -> None:
        self.limits = limits
        self.stall_limit_s = limits.stall_limit_s
        """Seconds without a message after which a stream counts as stalled."""
        self._waited_s = 0.0
        self._came_bytes = 0

    @property
    def is_too_slow(self) -> bool:
        """True if it has delivered less than it must."""
        limits = self.limits
        return self._waited_s >= limits.grace_s and self._came_bytes < limits.min_bytes_per_s * self._waited_s

    def was_silent(self) -> None:
        """Allow the source twice as long a silence if it is asked again: behind a slow link a reply waits for what was
        sent before it, and asking again does not make it come sooner."""
        self.stall_limit_s = min(2 * self.stall_limit_s, _MOST_STALLS * self.limits.stall_limit_s)

    def waited(self, seconds: float) -> None:
        """Count time spent waiting, also for a stream to open: a source that breaks off repeatedly has opened many."""
        self._waited_s += min(seconds, self.stall_limit_s) / self.limits.streams

    async def take(self, target: ChunkTarget, chunks: range, stream: PullStream, came: list[int]) -> None:
        """Take the next few of these chunks. Raises UnreachableError if none comes, StalledError if the source is too
        slow."""
        limits = self.limits
        if self.is_too_slow:
            rate = self._came_bytes / self._waited_s / 1024
            raise StalledError(f"it delivers {rate:.0f} KiB/s, less than {limits.min_bytes_per_s / 1024:.0f}")
        began_s = limits.clock()
        num_before = len(came)
        try:
            await _within(self.stall_limit_s, stream.take(chunks[:_CHUNKS_AT_ONCE], target.room, came.append))
        finally:
            self.waited(limits.clock() - began_s)
        size_bytes = sum(target.chunk_size(chunk) for chunk in came[num_before:])
        self._came_bytes += size_bytes
        await stream.count(size_bytes)


async def pull_run(target: ChunkTarget, run: range, source: str, open_pull: PullOpener, pace: SourcePace) -> None:
    """Pull one run of chunks in one stream. Raises the PeerError that ends it; chunks that came before are kept."""
    limits = pace.limits
    request = pb.PullRequest(snapshot_sha256=bytes.fromhex(target.sha256), first_chunk=run.start, num_chunks=len(run))
    asked_s = limits.clock()
    stream = await open_pull(source, request)
    try:
        first = await next_message(stream, pace.stall_limit_s)
        if first.status == pb.PullReply.STATUS_BUSY:
            raise BusyError("it serves as many readers as it may")
        if first.status != pb.PullReply.STATUS_OK:
            raise UnreachableError(f"it does not hold {target.title}", code="not-held")
        pace.waited(limits.clock() - asked_s)
        check = _Check(target)
        try:
            while len(check.came) < len(run):
                await pace.take(target, run[len(check.came) :], stream, check.came)
                await check.begin()
        finally:  # also when the stream broke: chunks that arrived count
            await check.finish()
        if not (await next_message(stream, pace.stall_limit_s)).end:
            raise BadBytesError("a transfer that continues after its last chunk", code="bad-stream")
    finally:
        await stream.aclose()


async def next_message(stream: PullStream, limit_s: float) -> pb.PullReply:
    """Return the next message of a stream.

    Raises BrokenOffError if the stream breaks or ends, and StalledError if nothing comes for `limit_s`.
    """
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
    except Exception as error:  # boundary to the adapter: a broken stream raises anything
        raise BrokenOffError(f"the stream broke ({type(error).__name__})") from error


class _Check:
    """Checks chunks in place, in a thread, while the next ones arrive. Only checked chunks count as held.

    One thread for both would get half as much of a processor that other programs want too (decision 23).
    """

    def __init__(self, target: ChunkTarget) -> None:
        self._target = target
        self.came: list[int] = []
        self._num_begun = 0
        self._checking: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Start to check the chunks that arrived since the last call. Raises BadBytesError if a chunk checked earlier
        is wrong."""
        if self._checking is not None:
            await self._checking
        chunks = self.came[self._num_begun :]
        self._num_begun += len(chunks)
        self._checking = asyncio.create_task(asyncio.to_thread(self._check, chunks))

    async def finish(self) -> None:
        """Check the remaining chunks."""
        await self.begin()
        assert self._checking is not None
        await self._checking

    def _check(self, chunks: list[int]) -> None:
        for chunk in chunks:
            if not self._target.accept(chunk):
                raise BadBytesError(f"a wrong hash of chunk {chunk} of {self._target.title}", code="bad-hash")


async def pull_manifest(source: str, sha256: str, open_pull: PullOpener, limits: PullLimits) -> pb.Signed:
    """Fetch the signed manifest of snapshot `sha256` from a peer that holds it; checks nothing but its hash.

    Raises BadBytesError when the hash is another, and UnreachableError when `source` does not hold the snapshot.
    """
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
    """Return an empty snapshot to pull into. Its memory is taken only as chunks arrive, so announcing a snapshot, or
    pulling a share of it, costs no more than the bytes pulled."""
    # A bytearray would be filled with zeros at once.
    buffer = cast(bytearray, mmap.mmap(-1, snapshot.manifest.total_bytes))
    return HeldSnapshot(snapshot, Body([buffer]), set(), buffer)
