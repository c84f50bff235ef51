"""Cut long texts where tokenizers lose nothing, or next to nothing."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 1 << 16
CHUNKS_AT_ONCE = 16
"""Chunks that are encoded at once: an encoder's result takes a hundred times the memory of its text."""


def chunks(text: memoryview) -> Iterator[memoryview]:
    """Yield `text` in pieces of about 64 KiB that end with a line, or else between two UTF-8 characters."""
    begin = 0
    while len(text) - begin > CHUNK_BYTES:
        end = begin + CHUNK_BYTES
        line = bytes(text[end - CHUNK_BYTES // 2 : end]).rfind(b"\n") + 1
        if line:
            end = end - CHUNK_BYTES // 2 + line
        else:
            end -= next((back for back in range(4) if text[end - back] & 0xC0 != 0x80), 0)
        yield text[begin:end]
        begin = end
    yield text[begin:]
