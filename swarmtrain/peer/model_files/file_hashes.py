"""Hashes of files on this machine, kept between starts: what has another size or time of change is read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from swarmtrain.network.files import write_atomically
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.protocol.pinned_files.file_list import PinnedFile
from swarmtrain.run import CHUNK_BYTES

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 8 * CHUNK_BYTES

Advance = Callable[[int], None]
"""Function that takes the number of bytes just done; it may raise to end the work."""


@dataclass(frozen=True)
class HashedFile:
    """File as it was when it was hashed, its SHA-256, and its chunk list (empty for a single chunk)."""

    file: ServedFile
    sha256: str
    chunk_list: bytes

    def pinned(self, name: str) -> PinnedFile:
        """Return the entry of a list of pinned files."""
        chunks_sha256 = hashlib.sha256(self.chunk_list).hexdigest() if self.chunk_list else ""
        return PinnedFile(name, self.file.size_bytes, self.sha256, chunks_sha256)


class FileHashes:
    """Hashes files, and keeps the result in a folder. A folder that cannot be written costs only time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, path: Path, advance: Advance = lambda num_bytes: None) -> HashedFile:
        """Return the hashes of a file. `advance` is called with bytes read. Raises the file system's OSError."""
        now = ServedFile.of(path)
        if (kept := self._kept(now)) is not None:
            advance(now.size_bytes)
            return kept
        hashed = hash_file(now, advance)
        if ServedFile.of(path) == now:  # nobody has written to it meanwhile
            self.keep(hashed)
        return hashed

    def keep(self, hashed: HashedFile) -> None:
        """Remember the hashes of a file as it is."""
        header = {
            "path": str(hashed.file.path.resolve()),
            "size_bytes": hashed.file.size_bytes,
            "modified_ns": hashed.file.modified_ns,
            "sha256": hashed.sha256,
            "chunks_sha256": hashlib.sha256(hashed.chunk_list).hexdigest(),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._record(hashed.file.path), json.dumps(header).encode() + b"\n" + hashed.chunk_list)
        except OSError as error:
            _log.info("hashes of %s are not kept: %s", hashed.file.path, error.strerror)

    def _record(self, path: Path) -> Path:
        return self._folder / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]

    def _kept(self, file: ServedFile) -> HashedFile | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            line, _, chunk_list = self._record(file.path).read_bytes().partition(b"\n")
            header = json.loads(line)
            wanted = {"path": str(file.path.resolve()), "size_bytes": file.size_bytes, "modified_ns": file.modified_ns}
            is_whole = hashlib.sha256(chunk_list).hexdigest() == header["chunks_sha256"]
            if is_whole and all(header[key] == value for key, value in wanted.items()):
                return HashedFile(file, str(header["sha256"]), chunk_list)
        return None


def hash_file(file: ServedFile, advance: Advance = lambda num_bytes: None) -> HashedFile:
    """Hash a file and its chunks, which reads it once. `advance` is called with bytes read.

    Both are hashed side by side, since hashlib lets other threads run meanwhile. Raises the file system's OSError.
    """
    whole, chunks = hashlib.sha256(), []
    with file.path.open("rb", buffering=0) as stream, ThreadPoolExecutor(1, "hash") as beside:
        for block in _blocks(stream.fileno()):
            hashing = beside.submit(whole.update, block)
            chunks += [
                hashlib.sha256(block[start : start + CHUNK_BYTES]).digest()
                for start in range(0, len(block), CHUNK_BYTES)
            ]
            hashing.result()
            advance(len(block))
    return HashedFile(file, whole.hexdigest(), b"".join(chunks) if len(chunks) > 1 else b"")


def _blocks(descriptor: int) -> Iterator[memoryview]:
    """Yield the file's bytes, each time in the same memory, `_BLOCK_BYTES` at once until the end."""
    room = memoryview(bytearray(_BLOCK_BYTES))
    while True:
        size = 0
        while size < len(room) and (read := os.readv(descriptor, [room[size:]])):
            size += read
        if size:
            yield room[:size]
        if size < len(room):
            return
