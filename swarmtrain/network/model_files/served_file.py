"""File on the disk that a node serves by its hash: read piece by piece in threads, never as a whole."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from swarmtrain.run import CHUNK_BYTES

_threads = ThreadPoolExecutor(4, "served-files")
"""Threads that wait for the disk. Not asyncio's pool: decoding and merging must not queue behind them."""


@dataclass(frozen=True)
class ServedFile:
    """File whose bytes were checked when it had this size and time of change; any other is not served."""

    path: Path
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> ServedFile:
        """Return the file as it is now. Raises the file system's OSError."""
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.size_bytes // CHUNK_BYTES)

    async def is_unchanged(self) -> bool:
        """Return whether the file still is what was checked."""
        return await asyncio.get_running_loop().run_in_executor(_threads, self._is_unchanged)

    async def pieces(self, chunks: range) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield the number and the bytes of each chunk; ends early if the file cannot be read or has changed."""
        loop = asyncio.get_running_loop()
        opened = await loop.run_in_executor(_threads, self._open)
        if opened is None:
            return
        try:
            for chunk in chunks:
                data = await loop.run_in_executor(_threads, opened.read, chunk)
                if data is None:
                    return
                yield chunk, data
        finally:
            # In a thread, where it waits for a read that goes on after this task was cancelled: no other file must get
            # the descriptor's number meanwhile.
            _threads.submit(opened.close)

    async def whole(self, max_bytes: int) -> bytes | None:
        """Return all bytes; None if they are more than `max_bytes`, or the file has changed."""
        if self.size_bytes > max_bytes:
            return None
        parts = [data async for _, data in self.pieces(range(self.num_chunks))]
        data = b"".join(parts)
        return data if len(data) == self.size_bytes else None

    # ------------------------------------------------------------- in a thread

    def _is_unchanged(self) -> bool:
        try:
            return ServedFile.of(self.path) == self
        except OSError:
            return False

    def _open(self) -> _OpenFile | None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        found = os.fstat(descriptor)
        if (found.st_size, found.st_mtime_ns) == (self.size_bytes, self.modified_ns):
            return _OpenFile(descriptor, self.size_bytes)
        os.close(descriptor)
        return None


class _OpenFile:
    """Open file. Its methods wait for each other."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor, self._size_bytes = descriptor, size_bytes
        self._lock = threading.Lock()

    def read(self, chunk: int) -> bytes | None:
        """Return a chunk; None if it cannot be read."""
        size = min(CHUNK_BYTES, self._size_bytes - chunk * CHUNK_BYTES)
        with self._lock:
            try:
                data = os.pread(self._descriptor, size, chunk * CHUNK_BYTES)
            except OSError:
                return None
        return data if len(data) == size else None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            os.close(self._descriptor)
