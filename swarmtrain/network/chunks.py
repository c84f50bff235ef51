"""How the body of a snapshot is cut into chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CHUNK_BYTES", "Cut"]

CHUNK_BYTES = 256 * 1024
"""The fastest message size measured over hivemind's streams."""


@dataclass(frozen=True)
class Cut:
    """How a body is cut into chunks: each of its sections, of so many bytes, begins with a chunk of its own."""

    section_bytes: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Of all sections."""
        return sum(math.ceil(size / CHUNK_BYTES) for size in self.section_bytes)

    def chunks_of(self, section: int) -> range:
        """The chunks of section number `section`."""
        first = Cut(self.section_bytes[:section]).num_chunks
        return range(first, first + math.ceil(self.section_bytes[section] / CHUNK_BYTES))

    def place(self, chunk: int) -> tuple[int, int]:
        """(offset in the body, size) of chunk number `chunk`."""
        start = 0
        for size in self.section_bytes:
            num = math.ceil(size / CHUNK_BYTES)
            if chunk < num:
                return start + chunk * CHUNK_BYTES, min(CHUNK_BYTES, size - chunk * CHUNK_BYTES)
            chunk, start = chunk - num, start + size
        raise IndexError("no such chunk")
