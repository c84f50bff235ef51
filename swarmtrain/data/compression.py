"""Open files that may be compressed, `.gz` and `.zst`, as streams of bytes: memory does not grow with the file.

A file that is torn, damaged, or grows far more than text does (a "bomb") raises `CompressionError`, whose sentence says
which. Zstandard needs the library `zstandard`, which is imported when a run file names such a file.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words

_ENDINGS = (".gz", ".zst")

_MOST_GROWTH = 300
"""Most bytes of text that a byte of a compressed file may become. Logs that repeat themselves reach 100."""

_ANY_GROWTH_BYTES = 1 << 24
"""Text that is read whatever the file's size: a small file of one repeated line is no bomb."""

_GZIP_BYTES = 1 << 16
"""Text that gzip gives at once, at most."""

_ZSTANDARD_BYTES = 512
"""Bytes of a file given to Zstandard at once. They become at most 16 MiB: a block has four bytes or more, and at most
128 KiB of text."""

_WINDOW_BYTES = 1 << 27
"""Most memory that a Zstandard frame may ask for: what the program `zstd` allows too."""


class CompressionError(Exception):
    """Unusable compressed file; its sentence goes on from the file's name."""


def is_compressed(path: Path) -> bool:
    """Return whether the name is one of a compressed file."""
    return path.name.endswith(_ENDINGS)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if its name says that it is compressed.

    Reading raises `CompressionError` and OSError. Raises RunFileError if the library for it is missing.
    """
    with path.open("rb") as file:
        if not is_compressed(path):
            yield file
            return
        chunks = _gzip_chunks(file) if path.name.endswith(".gz") else _zstandard_chunks(file, zstandard())
        most_bytes = max(_ANY_GROWTH_BYTES, _MOST_GROWTH * path.stat().st_size)
        yield io.BufferedReader(_Chunks(chunks, most_bytes), _GZIP_BYTES)


class _Chunks(io.RawIOBase):
    """Decompressed chunks as a file; at most so many bytes of them."""

    def __init__(self, chunks: Iterator[bytes], most_bytes: int) -> None:
        self._chunks, self._left_bytes = chunks, most_bytes
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left_bytes -= len(chunk)
            if self._left_bytes < 0:
                raise CompressionError(f"holds more than {_MOST_GROWTH} times its size, which no text does")
            self._rest = memoryview(chunk)
        number = min(len(buffer), len(self._rest))
        buffer[:number], self._rest = self._rest[:number], self._rest[number:]
        return number


def _gzip_chunks(file: IO[bytes]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as text:
            while chunk := text.read1(_GZIP_BYTES):
                yield chunk
    except EOFError:
        raise CompressionError("ends in the middle") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CompressionError(f"is not gzip, or damaged ({error})") from None


def _zstandard_chunks(file: IO[bytes], library: Any) -> Iterator[bytes]:
    decompressor = library.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    frame, data = None, b""
    try:
        while data := data or file.read(_ZSTANDARD_BYTES):
            frame = decompressor.decompressobj() if frame is None else frame
            yield frame.decompress(data)
            frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
    except library.ZstdError as error:
        raise CompressionError(f"is not Zstandard, or damaged ({error})") from None
    if frame is not None:
        raise CompressionError("ends in the middle")


def zstandard() -> Any:
    """Return the library for `.zst`. Raises RunFileError, which says what to install, if it is missing."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise RunFileError(
            f"data.paths: a file that ends with .zst needs zstandard: {install_in_words('zstd')}",
            code="package-missing",
        ) from None
