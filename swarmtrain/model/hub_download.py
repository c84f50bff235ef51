"""Download of a large file of the hub, which goes on after any end.

The library `huggingface_hub` keeps nothing of a file that broke off, since version 2. Here the file arrives in
`SHA256.part` among the blobs of the hub's cache and stays there until it is whole. It is compared with the hub's
SHA-256 and gets its name as a blob, where the library finds it. Only files in large storage have such a hash; others
are small.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 50_000_000_000
"""Larger files are delivered by another protocol only, which the library speaks."""
_READ_BYTES = 1 << 20


class DamagedFileError(Exception):
    """A file has arrived whole, and its bytes are not those that the hub names."""


@dataclass
class HubBlob:
    """File of a repository at a commit, as it comes into the cache."""

    library: Any
    """The module `huggingface_hub`."""
    repository: str
    commit: str
    name: str
    token: str | bool
    """Login to use; False for none."""
    advance: Callable[[int], None]
    """Called with the number of bytes that have arrived, or were here."""
    _blobs: Path = field(init=False)

    def __post_init__(self) -> None:
        self._blobs = blobs_of(self.library, self.repository)

    def fetch(self) -> None:
        """Download the file, unless it is small or there; where this cannot, the library will say why.

        Raises DamagedFileError, OSError if the disk is full, and whatever the library raises when it is not delivered.
        """
        http_get = getattr(importlib.import_module("huggingface_hub.file_download"), "http_get", None)
        found = self._metadata()
        if found is None or http_get is None:
            return
        blob = self._blobs / found.etag
        self._blobs.mkdir(parents=True, exist_ok=True)
        part = self._blobs / f"{found.etag}.part"
        with _alone(part, blob) as stream:
            if stream is None:
                return
            if stream.seek(0, os.SEEK_END) > found.size:
                stream.truncate(0)
            _check_free(self._blobs, found.size - stream.seek(0, os.SEEK_END))
            self.advance(stream.tell())
            self._receive(http_get, stream, found)
            stream.flush()
            os.fsync(stream.fileno())
            if (sha256 := _sha256_of(stream)) != found.etag:
                part.unlink()
                raise DamagedFileError(
                    f"its {self.name} has arrived damaged (its SHA-256 is {sha256[:12]}..., the hub's "
                    f"{found.etag[:12]}...)"
                )
            part.replace(blob)

    def _metadata(self) -> Any:
        """Return what the hub says of a large file; None if it is another, or the hub says nothing."""
        url = self.library.hf_hub_url(self.repository, self.name, revision=self.commit)
        try:
            found = self.library.get_hf_file_metadata(url, token=self.token)
        except Exception as error:  # the library's download meets it too, and is where it is translated
            _log.info("%s of %s: %r", self.name, self.repository, error)
            return None
        is_large = isinstance(found.etag, str) and _SHA256.fullmatch(found.etag)
        return found if is_large and found.size is not None and found.size <= _MOST_BYTES else None

    def _receive(self, http_get: Callable[..., None], stream: BinaryIO, found: Any) -> None:
        """Append what is missing. The address that the hub gives is valid for an hour or so: a new one is asked for as
        long as something came from the last."""
        counted: Any = _Counted(stream, self.advance)
        while (here := stream.seek(0, os.SEEK_END)) < found.size:
            headers = self.library.utils.build_hf_headers(token=self.token)
            url = self.library.hf_hub_url(self.repository, self.name, revision=self.commit)
            if urlsplit(url).netloc != urlsplit(found.location).netloc:
                headers.pop("authorization", None)  # for the hub alone
            try:
                http_get(found.location, counted, resume_size=here, headers=headers, expected_size=found.size)
            except Exception as error:  # boundary to the library, which raises those of many libraries below it
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                _log.info("%s of %s broke off: %r", self.name, self.repository, error)
                again = self._metadata() if stream.seek(0, os.SEEK_END) > here else None
                if again is None or again.etag != found.etag:
                    raise
                found = again


@dataclass
class _Counted:
    """File that tells how many bytes are written. The library needs no more of a file than this."""

    _stream: BinaryIO
    _advance: Callable[[int], None]

    def write(self, data: bytes) -> int:
        written = self._stream.write(data)
        self._advance(written)
        return written

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(place, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def truncate(self, size: int | None = None) -> int:
        return self._stream.truncate(size)

    def flush(self) -> None:
        self._stream.flush()


def blobs_of(library: Any, repository: str) -> Path:
    """Return the folder of the cache with the contents of a model repository's files, named by their hashes."""
    return Path(library.constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"


def check_room(library: Any, repository: str, sizes: Mapping[str, int]) -> None:
    """Raise OSError if the cache's disk has no room for these files, given their sizes by name: now rather than after
    hours. Parts of them that are here need none."""
    parts = blobs_of(library, repository).glob("*.part")
    _check_free(blobs_of(library, repository), sum(sizes.values()) - sum(part.stat().st_size for part in parts))


def _check_free(folder: Path, num_bytes: int) -> None:
    while not folder.exists():
        folder = folder.parent
    if num_bytes > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _alone(part: Path, blob: Path) -> Iterator[BinaryIO | None]:
    """Open a part to read and append, while nobody else of this machine does; None once the blob is there.

    What is opened may have become the blob meanwhile.
    """
    while not blob.exists():
        with part.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # waits
            if part.exists() and os.path.samestat(os.fstat(stream.fileno()), part.stat()):
                yield stream
                return
    yield None


def _sha256_of(stream: BinaryIO) -> str:
    stream.seek(0)
    hashed = hashlib.sha256()
    while data := stream.read(_READ_BYTES):
        hashed.update(data)
    return hashed.hexdigest()
