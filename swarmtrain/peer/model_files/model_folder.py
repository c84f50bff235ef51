"""Folder of a run's model files, in the cache of this machine: `models/<first 32 hex digits of the list's hash>`.

It has the pinned files under their names and nothing else that `transformers` would read. A file is here itself, or it
is a link to where this machine has it already: the folder of `--model-dir`, or the hub's cache. Beside them:

NAME.part   a file that is arriving
.chunks/    chunk lists, by their hash
.lock       held while a peer fetches: peers of one machine fetch once

Hashes of the files are kept in `models/hashes`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from swarmtrain.network.files import write_atomically
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.peer.model_files.file_hashes import Advance, FileHashes
from swarmtrain.peer.model_files.part_file import PartFile
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, PinnedFiles

_log = logging.getLogger(__name__)
_CHUNKS = ".chunks"


def pinned_list(folder: Path, names: Sequence[str], hashes: FileHashes, advance: Advance) -> PinnedFiles:
    """Return the list of the files of these names in `folder`, hashed. Raises the file system's OSError."""
    return PinnedFiles(tuple(hashes.of(folder / name, advance).pinned(name) for name in sorted(names)))


def path_of_list(cache: Path, list_sha256: str) -> Path:
    """Return where the cache has the files of a list with this SHA-256 (hex)."""
    return cache / "models" / list_sha256[:32]


class ModelFolder:
    """Folder of the files in one list, below the folder `cache`. Methods raise the file system's OSError."""

    def __init__(self, cache: Path, files: PinnedFiles, served: dict[str, ServedFile] | None = None) -> None:
        """Enter into `served` each file and chunk list that is found or has arrived, by its SHA-256."""
        self.files = files
        self._served = {} if served is None else served
        self.path = path_of_list(cache, files.sha256)
        self.hashes = FileHashes(cache / "models" / "hashes")

    @contextmanager
    def locked(self, wait: Callable[[], None]) -> Iterator[None]:
        """Create the folder and hold its lock. While another process holds it, `wait` is called: it sleeps, or raises
        to give up."""
        (self.path / _CHUNKS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    wait()
            self._remove_strangers()
            yield
        finally:
            os.close(descriptor)

    def _remove_strangers(self) -> None:
        """Remove files that are not in the list: `transformers` would prefer some of them to what is pinned."""
        known = {file.name for file in self.files.files} | {f"{file.name}.part" for file in self.files.files}
        for child in self.path.iterdir():
            if child.name not in known and not child.name.startswith("."):
                _log.warning("removing %s, which is none of the run's files", child)
                child.unlink()

    # ------------------------------------------------------------- files that are here

    def has(self, file: PinnedFile, advance: Advance = lambda num_bytes: None) -> bool:
        """Return whether a file is here, checked by its hash; what is here instead of it is removed."""
        path = self.path / file.name
        try:
            if ServedFile.of(path).size_bytes == file.size_bytes:
                hashed = self.hashes.of(path, advance)
                if hashed.sha256 == file.sha256 and hashed.pinned(file.name) == file:
                    self._keep(file, hashed.file, hashed.chunk_list)
                    return True
        except FileNotFoundError:  # also of a link to what is gone
            pass
        path.unlink(missing_ok=True)
        return False

    def link(self, file: PinnedFile, source: Path, advance: Advance = lambda num_bytes: None) -> bool:
        """Use a file that this machine has elsewhere; return False if it is another one."""
        if ServedFile.of(source).size_bytes != file.size_bytes:
            return False
        hashed = self.hashes.of(source, advance)
        if hashed.pinned(file.name) != file:
            return False
        link = self.path / f".{file.name}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(source.resolve())
        link.replace(self.path / file.name)
        self._keep(file, ServedFile.of(self.path / file.name), hashed.chunk_list)
        return True

    def _keep(self, file: PinnedFile, served: ServedFile, chunk_list: bytes) -> None:
        self.keep_chunk_list(file, chunk_list)
        self._serve(file, served)

    def _serve(self, file: PinnedFile, served: ServedFile) -> None:
        """Let others have a file that was checked, and its chunk list."""
        if file.chunks_sha256:
            self._served[file.chunks_sha256] = ServedFile.of(self._chunk_list_path(file))
        self._served[file.sha256] = served

    def served_files(self) -> dict[str, ServedFile]:
        """Return the files that were found or have arrived, and their chunk lists, by their SHA-256."""
        return dict(self._served)

    # ------------------------------------------------------------- files that arrive (`network.model_files.fetch`)

    def chunk_list(self, file: PinnedFile) -> bytes | None:
        """Return the chunk list of a file if it is here; empty for a file of one chunk."""
        if not file.chunks_sha256:
            return b""
        with contextlib.suppress(FileNotFoundError):
            data = self._chunk_list_path(file).read_bytes()
            if hashlib.sha256(data).hexdigest() == file.chunks_sha256:
                return data
        return None

    def keep_chunk_list(self, file: PinnedFile, chunk_list: bytes) -> None:
        """Keep a checked chunk list."""
        if file.chunks_sha256 and self.chunk_list(file) is None:
            write_atomically(self._chunk_list_path(file), chunk_list)

    def part(self, file: PinnedFile) -> PartFile:
        """Return the part of a file whose chunk list is here."""
        chunk_list = self.chunk_list(file)
        assert chunk_list is not None, "chunks come after their list"
        return PartFile(self.path / file.name, file, chunk_list)

    def has_part(self, file: PinnedFile) -> bool:
        """Return whether some of a file has arrived earlier."""
        return (self.path / f"{file.name}.part").exists()

    def finish(self, file: PinnedFile, part: PartFile, advance: Advance = lambda num_bytes: None) -> None:
        """Check a part as a whole and give it its name. Raises BadBytesError if it does not match its hash."""
        part.finish(self.hashes, advance)
        self._serve(file, ServedFile.of(part.path))

    def _chunk_list_path(self, file: PinnedFile) -> Path:
        return self.path / _CHUNKS / file.chunks_sha256
