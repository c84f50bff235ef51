"""Fetch pinned files from peers: `protocol.pinned_files.transfer` decides what to ask whom, this asks.

Runs in the network thread's loop. Chunks go from the stream into a few MiB of memory, and from there, checked, to the
disk; whatever touches the disk runs in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from swarmtrain.errors import (
    BadBytesError,
    BrokenOffError,
    BusyError,
    PeerError,
    RunTimeError,
    StalledError,
    UnreachableError,
)
from swarmtrain.network.snapshots.store import ChunkTarget, PullLimits, PullStream, SourcePace, pull_run
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, check_chunk_list_untrusted
from swarmtrain.protocol.pinned_files.transfer import PATIENCE_S, FileTransfer, RangeRequest, RequestEnd
from swarmtrain.v1 import snapshot_pb2 as pb

_SEARCH_EVERY_S = 15.0
_BUSY_STALLS = 60
"""Limits of a stalled transfer after which sources that are only busy are given up: ten minutes, unless the run file
says otherwise."""


class FileCalls(Protocol):
    """Part of `PeerCalls` that a fetch needs."""

    @property
    def pull_slots(self) -> AbstractAsyncContextManager[Any]:
        """Context held while something is pulled; it limits the number of pulls at once."""

    async def open_pull(self, peer: str, request: pb.PullRequest) -> PullStream:
        """Open a pull's stream. See `PeerCalls`."""

    async def blob_once_untrusted(self, peer: str, sha256: str, max_bytes: int) -> bytes:
        """Fetch a small file by its hash. See `PeerCalls`."""


class RunTarget(ChunkTarget, Protocol):
    """Target of a run of chunks that one source sends."""

    @property
    def num_accepted(self) -> int:
        """Number of its chunks that are checked and written."""


class FileDisk(Protocol):
    """Disk on which the files arrive. Methods are called in threads, and raise the file system's OSError."""

    def chunk_list(self, file: PinnedFile) -> bytes | None:
        """Return the chunk list of a file if it is here; empty for a file of one chunk."""

    def keep_chunk_list(self, file: PinnedFile, chunk_list: bytes) -> None:
        """Keep a checked chunk list."""

    def kept_chunks(self, file: PinnedFile) -> Iterable[int]:
        """Return the chunks that are here from an earlier start, checked."""

    def target(self, file: PinnedFile) -> RunTarget:
        """Return a target for a run of chunks."""

    def finish(self, file: PinnedFile) -> None:
        """Check a file of which all chunks are here, and give it its name. Raises BadBytesError if it is wrong."""


@dataclass(kw_only=True)
class PeerFetch:
    """Fetch of some pinned files from peers of the run."""

    files: Sequence[PinnedFile]
    disk: FileDisk
    calls: FileCalls
    limits: PullLimits
    blame: Callable[[str, PeerError], None]
    """Called with a source and its error where an event reports it: wrong bytes, or a stalled transfer."""
    find: Callable[[], Awaitable[Iterable[str]]]
    """Returns peers that may have the files; asked again every `_SEARCH_EVERY_S`."""
    clock: Callable[[], float] = time.monotonic
    transfer: FileTransfer = field(init=False)
    _targets: dict[RangeRequest, tuple[RunTarget, int]] = field(default_factory=dict, init=False)
    """Target of each request under way, and how many of its chunks the transfer knows of."""
    _paces: dict[str, SourcePace] = field(default_factory=dict, init=False)
    _requests: dict[asyncio.Task[RequestEnd], RangeRequest] = field(default_factory=dict, init=False)
    _finishing: dict[int, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _search: asyncio.Task[None] | None = field(default=None, init=False)
    _searched_s: float = field(default=float("-inf"), init=False)
    _kept_bytes: int = field(default=0, init=False)
    _came_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        busy_limit_s = max(PATIENCE_S, _BUSY_STALLS * self.limits.stall_limit_s)
        self.transfer = FileTransfer(self.files, self.clock(), busy_limit_s)

    @property
    def here_bytes(self) -> int:
        """Bytes of the files that are checked and on the disk. May be read from any thread."""
        under_way = [
            self._bytes_of(request, target.num_accepted) for request, (target, _) in list(self._targets.items())
        ]
        return self._kept_bytes + self._came_bytes + sum(under_way)

    def _bytes_of(self, request: RangeRequest, num_chunks: int) -> int:
        return sum(map(self.files[request.file].chunk_size, request.chunks[:num_chunks]))

    @property
    def num_sources(self) -> int:
        """Number of peers that deliver now."""
        return self.transfer.num_serving

    async def run(self) -> None:
        """Fetch all files. Raises RunTimeError when nobody delivers, or a file is wrong as pinned; OSError when the
        disk does not take them. What has arrived by then is kept, and the next fetch begins there."""
        try:
            for number, file in enumerate(self.files):
                if await asyncio.to_thread(self.disk.chunk_list, file) is not None:
                    await self._listed(number)
            while not self._is_finished():
                await self._step()
        finally:
            tasks = [*self._requests, *self._finishing.values(), *([self._search] if self._search is not None else [])]
            await end_tasks(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # a full disk ends several: one of them is raised

    def _is_finished(self) -> bool:
        return len(self._finishing) == len(self.files) and all(task.done() for task in self._finishing.values())

    async def _step(self) -> None:
        """Begin what can begin, then wait until something ends, or for a second."""
        now = self.clock()
        if self._search is None and now >= self._searched_s + _SEARCH_EVERY_S:
            self._search = asyncio.create_task(self._find())
        for request in self.transfer.next_requests(now):
            self._requests[asyncio.create_task(self._request(request))] = request
        for number in range(len(self.files)):
            if number not in self._finishing and self.transfer.file_is_complete(number):
                work = asyncio.to_thread(self.disk.finish, self.files[number])
                self._finishing[number] = asyncio.create_task(work)
        if self.transfer.has_failed(now):
            raise RunTimeError(
                "no peer delivers the model's files: those that have them have left, are busy, or cannot be reached; "
                "start again when more peers are there (what has arrived is kept), or give a folder with them with "
                "--model-dir",
                code="files-not-delivered",
            )
        waiting = {*self._requests, *(task for task in self._finishing.values() if not task.done())}
        waiting |= {self._search} if self._search is not None else set()
        if waiting:
            await asyncio.wait(waiting, timeout=self.transfer.wait_s(now), return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(self.transfer.wait_s(now))
        self._look()

    def _look(self) -> None:
        """Take in what has arrived and what has ended."""
        now = self.clock()
        for request, (target, told) in list(self._targets.items()):
            num_accepted = target.num_accepted
            self.transfer.came(request, num_accepted - told, now)
            self._targets[request] = target, num_accepted
        for task in [task for task in self._requests if task.done()]:
            request = self._requests.pop(task)
            if request in self._targets:
                self._came_bytes += self._bytes_of(request, self._targets.pop(request)[1])
            self.transfer.ended(request, task.result(), now)
        for number, finishing in self._finishing.items():
            if finishing.done():
                try:
                    finishing.result()
                except BadBytesError as error:
                    raise RunTimeError(
                        f"{error}: the run's publisher has pinned what cannot be; tell the person who invited you "
                        f"(file {self.files[number].name})",
                        code="files-not-delivered",
                    ) from None
        if self._search is not None and self._search.done():
            self._search.result()
            self._search = None

    # ------------------------------------------------------------- one request

    async def _request(self, request: RangeRequest) -> RequestEnd:
        """Make one request and return how it ended."""
        source, file = request.source, self.files[request.file]
        try:
            if not request.chunks:
                most_bytes = file.chunk_list_bytes
                chunk_list = await self.calls.blob_once_untrusted(source, file.chunks_sha256, most_bytes)
                await asyncio.to_thread(self._keep_untrusted, file, chunk_list)
                await self._listed(request.file)
                return RequestEnd.DONE
            target = await asyncio.to_thread(self.disk.target, file)
            self._targets[request] = target, 0
            pace = self._paces.setdefault(source, SourcePace(self.limits))
            async with self.calls.pull_slots:
                await pull_run(target, request.chunks, source, self.calls.open_pull, pace)
            return RequestEnd.DONE
        except PeerError as error:
            if error.is_incident:
                self.blame(source, error)
            if isinstance(error, StalledError):
                del self._paces[source]
            return _end_of(error)

    def _keep_untrusted(self, file: PinnedFile, chunk_list: bytes) -> None:
        check_chunk_list_untrusted(file, chunk_list)
        self.disk.keep_chunk_list(file, chunk_list)

    async def _listed(self, number: int) -> None:
        file = self.files[number]
        kept = await asyncio.to_thread(lambda: list(self.disk.kept_chunks(file)))
        self._kept_bytes += sum(map(file.chunk_size, kept))
        self.transfer.listed(number, kept)

    async def _find(self) -> None:
        self.transfer.add_sources(await self.find())
        self._searched_s = self.clock()


def _end_of(error: PeerError) -> RequestEnd:
    match error:
        case BadBytesError():
            return RequestEnd.WRONG_BYTES
        case BusyError():
            return RequestEnd.BUSY
        case BrokenOffError():
            return RequestEnd.BROKEN_OFF
        case StalledError():
            return RequestEnd.STALLED
        case UnreachableError() if error.code == "not-held":
            return RequestEnd.NOT_HELD
        case _:
            return RequestEnd.UNREACHABLE
