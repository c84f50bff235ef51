"""Progress of a download of the swarm's present weights, for a person who waits: bytes here of bytes in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain.events import ArrivingEvent, Event
from swarmtrain.network.snapshots.store import CHUNK_BYTES, HeldSnapshot
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.words import size_in_words

__all__ = ["DownloadProgress"]

_EVERY_S = 2.0
_EVERY_SHARE = 0.01


@dataclass
class DownloadProgress:
    """Looks at a pull now and then; updates the board at once, and emits an event every two seconds if more arrived."""

    board: StatusBoard
    emit: Callable[[Event], None]
    clock: Callable[[], float] = time.monotonic
    _held: HeldSnapshot | None = None
    _seen: int = field(default=0, init=False)
    _told: int = field(default=0, init=False)
    _began_s: float = field(default=0.0, init=False)
    _told_s: float = field(default=0.0, init=False)

    def look(self, held: HeldSnapshot | None) -> None:
        """Look at `held`, the snapshot that is arriving; None if nothing arrives."""
        if held is None:
            self.board.arrived()
            return
        now_s, num_chunks = self.clock(), len(held.have)
        if held is not self._held:
            self._held, self._seen, self._told, self._began_s, self._told_s = held, 0, 0, now_s, now_s
        if num_chunks == self._seen:
            return
        self._seen = num_chunks
        total_bytes = held.snapshot.manifest.total_bytes
        here_bytes = min(total_bytes, num_chunks * CHUNK_BYTES)
        sentence = f"{size_in_words(here_bytes)} of {size_in_words(total_bytes)}"
        self.board.arriving(f"fetching the swarm's current weights: {sentence}")
        further = num_chunks - self._told >= _EVERY_SHARE * held.snapshot.num_chunks
        if further and now_s - self._told_s >= _EVERY_S:
            self._told, self._told_s = num_chunks, now_s
            elapsed_s = now_s - self._began_s
            self.emit(ArrivingEvent(received_bytes=here_bytes, total_bytes=total_bytes, seconds=elapsed_s))
