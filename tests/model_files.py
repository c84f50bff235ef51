"""Model files of a few MiB for tests, and peers without a network that serve them from their folders."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replies import Replies as Stream

from swarmtrain.errors import UnreachableError
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.snapshots.replies import Reply
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.peer.model_files.file_hashes import FileHashes
from swarmtrain.peer.model_files.model_folder import ModelFolder, pinned_list
from swarmtrain.protocol.pinned_files.file_list import PinnedFiles
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

NUM_CHUNKS = 21
WEIGHTS = hashlib.shake_128(b"weights").digest((NUM_CHUNKS - 1) * CHUNK_BYTES + 1000)
CONTENTS: Mapping[str, bytes] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}


def write_model(folder: Path, contents: Mapping[str, bytes] = CONTENTS) -> Path:
    """Write a model's files, and some that are never pinned."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {**contents, "README.md": b"# A model", "pytorch_model.bin": b"a pickle"}.items():
        (folder / name).write_bytes(data)
    return folder


def pinned(folder: Path, names: tuple[str, ...] = tuple(CONTENTS)) -> PinnedFiles:
    """Return the list of the files in a folder."""
    return pinned_list(folder, names, FileHashes(folder / ".hashes"), lambda num_bytes: None)


def model_folder(cache: Path, source: Path, files: PinnedFiles) -> ModelFolder:
    """Return a folder in `cache` in which all files are."""
    folder = ModelFolder(cache, files)
    with folder.locked(lambda: None):
        assert all(folder.link(file, source / file.name) for file in files.files)
    return folder


@dataclass
class FilePeer:
    """Peer that serves files from a folder; counts what it sends."""

    served: Mapping[str, ServedFile]
    num_served: Any = lambda num_chunks: num_chunks
    sent_bytes: int = 0

    def replies(self, request: pb.PullRequest) -> AsyncGenerator[Reply, None]:
        """Answer a pull as the service does."""
        store = SnapshotStore(num_served=self.num_served)
        file = self.served.get(request.snapshot_sha256.hex())
        return store.serve(request) if file is None else store.serve_model_file(file, request, self._count)

    def _count(self, size_bytes: int) -> None:
        self.sent_bytes += size_bytes


@dataclass
class FilePeers:
    """Calls to peers by name (`network.model_files.fetch.FileCalls`)."""

    peers: dict[str, FilePeer]
    asked: Counter[str] = field(default_factory=Counter)
    pull_slots: Any = field(default_factory=lambda: asyncio.Semaphore(8))

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        """Open a pull's stream."""
        self.asked[peer] += 1
        if peer not in self.peers:
            raise UnreachableError("nobody is there")
        return Stream(self.peers[peer].replies(request))

    async def blob_once_untrusted(self, peer: str, sha256: str, max_bytes: int) -> bytes:
        """Fetch a chunk list."""
        file = self.peers[peer].served.get(sha256) if peer in self.peers else None
        data = None if file is None else await file.whole(max_bytes)
        if data is None:
            raise UnreachableError("it does not hold this file of the run", code="not-held")
        return data

    async def find(self) -> list[str]:
        """Return all names."""
        return list(self.peers)
