"""Progress of long downloads, for a person who waits: the swarm's present weights, and the files of a run's model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain.events import ArrivingEvent, Event
from swarmtrain.network.snapshots.store import HeldSnapshot
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.words import size_in_words

_EVERY_S = 2.0
_EVERY_SHARE = 0.01


@dataclass
class FileProgress:
    """Shows how many bytes are done: on the board at once, and as an event every two seconds if more are done."""

    board: StatusBoard
    emit: Callable[[Event], None]
    clock: Callable[[], float] = time.monotonic
    _doing: str = field(default="", init=False)
    _shown_bytes: int = field(default=0, init=False)
    _told_bytes: int = field(default=0, init=False)
    _began_s: float = field(default=0.0, init=False)
    _told_s: float = field(default=0.0, init=False)

    def begin(self, doing: str) -> None:
        """Begin another piece of work; `doing` says which, in words."""
        self._doing, self._shown_bytes, self._told_bytes = doing, -1, 0
        self._began_s = self._told_s = self.clock()

    def show(self, here_bytes: int, total_bytes: int, where: str = "") -> None:
        """Show that `here_bytes` of `total_bytes` are done. `where`, such as "from 3 peers", is for the board."""
        if here_bytes == self._shown_bytes:
            return
        self._shown_bytes = here_bytes
        doing = f"{self._doing} {where}" if where else self._doing
        self.board.arriving(f"{doing}: {size_in_words(here_bytes)} of {size_in_words(total_bytes)}")
        now_s = self.clock()
        if here_bytes - self._told_bytes >= _EVERY_SHARE * total_bytes and now_s - self._told_s >= _EVERY_S:
            self._told_bytes, self._told_s = here_bytes, now_s
            elapsed_s = now_s - self._began_s
            self.emit(
                ArrivingEvent(
                    doing=self._doing, received_bytes=here_bytes, total_bytes=max(1, total_bytes), seconds=elapsed_s
                )
            )


@dataclass
class DownloadProgress:
    """Looks at a pull of the swarm's present weights now and then, and shows its progress."""

    board: StatusBoard
    emit: Callable[[Event], None]
    clock: Callable[[], float] = time.monotonic
    _held: HeldSnapshot | None = None
    _progress: FileProgress = field(init=False)

    def __post_init__(self) -> None:
        self._progress = FileProgress(self.board, self.emit, self.clock)

    def look(self, held: HeldSnapshot | None) -> None:
        """Look at `held`, the snapshot that is arriving; None if nothing arrives."""
        if held is None:
            self.board.arrived()
            return
        if held is not self._held:
            self._held = held
            self._progress.begin("fetching the swarm's current weights")
        if not held.have:
            return
        total_bytes = held.snapshot.manifest.total_bytes
        self._progress.show(min(total_bytes, len(held.have) * CHUNK_BYTES), total_bytes)
