"""Pinned file that arrives: chunks are checked and written in their places of `NAME.part`, then the whole is hashed.

There is no record of what has arrived: after a kill or a power cut each chunk in the part is checked again, so nothing
that the disk lost counts, and nothing that it has is fetched twice.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import mmap
import os
import sys
from pathlib import Path

from swarmtrain.errors import BadBytesError
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.snapshots.store import CHUNKS_UNCHECKED
from swarmtrain.peer.model_files.file_hashes import Advance, FileHashes, hash_file
from swarmtrain.protocol.pinned_files.file_list import PinnedFile
from swarmtrain.run import CHUNK_BYTES


class PartFile:
    """Part of one pinned file on the disk. Chunks may be written from several threads at once."""

    def __init__(self, path: Path, file: PinnedFile, chunk_list: bytes) -> None:
        """`path` is the place of the whole file; `chunk_list` the checked list, empty for a file of one chunk."""
        self.path, self.file = path, file
        self.part_path = path.with_name(f"{path.name}.part")
        self._digests = chunk_list or bytes.fromhex(file.sha256)

    def kept_chunks(self, advance: Advance = lambda num_bytes: None) -> list[int]:
        """Return the chunks that are on the disk already. `advance` is called with the bytes looked at."""
        try:
            stream = self.part_path.open("rb", buffering=0)
        except FileNotFoundError:
            return []
        with stream:
            kept = []
            for chunk in range(self.file.num_chunks):
                size = self.file.chunk_size(chunk)
                start = chunk * CHUNK_BYTES
                is_written = _has_data(stream.fileno(), start, size)
                if is_written and self._is_chunk(chunk, os.pread(stream.fileno(), size, start)):
                    kept.append(chunk)
                advance(size)
            return kept

    def write(self, chunk: int, data: memoryview) -> bool:
        """Check a chunk and write it; return False if it is another one. Raises the file system's OSError."""
        if not self._is_chunk(chunk, data):
            return False
        descriptor = os.open(self.part_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            done = 0
            while done < len(data):  # a disk that is nearly full takes fewer bytes at first
                done += os.pwrite(descriptor, data[done:], chunk * CHUNK_BYTES + done)
        finally:
            os.close(descriptor)
        return True

    def finish(self, hashes: FileHashes, advance: Advance = lambda num_bytes: None) -> None:
        """Hash the whole file, sync it, and give it its name.

        Raises BadBytesError if it does not match its hash although every chunk does: whoever pinned them was wrong.
        """
        with self.part_path.open("r+b") as stream:
            os.truncate(stream.fileno(), self.file.size_bytes)
            os.fsync(stream.fileno())
        hashed = hash_file(ServedFile.of(self.part_path), advance)
        if hashed.sha256 != self.file.sha256:
            raise BadBytesError(f"{self.file.name} does not match its hash, though its chunks do", code="bad-hash")
        self.part_path.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        hashes.keep(dataclasses.replace(hashed, file=ServedFile.of(self.path)))

    def _is_chunk(self, chunk: int, data: bytes | memoryview) -> bool:
        wanted = self._digests[32 * chunk : 32 * chunk + 32]
        return len(data) == self.file.chunk_size(chunk) and hashlib.sha256(data).digest() == wanted


class ArrivingRun:
    """Run of chunks of a part that one source sends (a `ChunkTarget`): in memory only until they are checked."""

    def __init__(self, part: PartFile) -> None:
        self._part = part
        # Given back at once when the run has ended, unlike a bytearray; and a short run uses only a part of it.
        self._room = memoryview(mmap.mmap(-1, min(CHUNKS_UNCHECKED, part.file.num_chunks) * CHUNK_BYTES))
        self.sha256 = part.file.sha256
        self.title = part.file.name
        self.num_accepted = 0
        """Number of chunks that are checked and written; they come in their order."""

    def chunk_size(self, chunk: int) -> int:
        """Return the size in bytes of a chunk. See `ChunkTarget`."""
        return self._part.file.chunk_size(chunk)

    def room(self, chunk: int) -> memoryview:
        """Return the memory into which a chunk is put. See `ChunkTarget`."""
        start = chunk * CHUNK_BYTES % len(self._room)
        return self._room[start : start + self.chunk_size(chunk)]

    def accept(self, chunk: int) -> bool:
        """Check and write a chunk. See `ChunkTarget`."""
        if not self._part.write(chunk, self.room(chunk)):
            return False
        self.num_accepted += 1
        return True


def _has_data(descriptor: int, start: int, size: int) -> bool:
    """Return whether any of these bytes were ever written, as far as the file system knows."""
    if sys.platform != "linux":
        return True
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) < start + size
    except OSError as error:
        return error.errno != errno.ENXIO  # which says that only a hole follows
