"""Decisions of a transfer of pinned files: which chunks to ask which source for next, and when a source is given up.

`FileTransfer` is told what arrives and how requests end, and returns the requests to begin. It knows no network: the
simulator of a test and `network.model_files` drive the same decisions. `now` is an argument, in seconds.

- A source serves one request at a time, and at most `MOST_STREAMS` sources serve at once. A request is for a run of
  chunks that takes the source about `_REQUEST_S` at its measured speed, and for less near the end, so that no slow
  source keeps the others waiting.
- A source that is busy, or whose stream broke off, is asked again soon: it only made this peer give way. One that
  failed or stalled is left alone for a time that doubles. One that sent wrong bytes is not asked again.
- The transfer has failed when nobody has delivered anything, or said that it is busy, for `PATIENCE_S`; and when
  sources have said nothing but that for `busy_limit_s`: an honest one would have had a turn for this peer by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from swarmtrain.protocol.pinned_files.file_list import PinnedFile
from swarmtrain.run import CHUNK_BYTES

MOST_STREAMS = 4
"""Sources that serve at once."""
PATIENCE_S = 120.0
"""Seconds without any delivery, and without a source that is busy, after which the transfer has failed."""
BUSY_LIMIT_S = 600.0
"""Seconds without any delivery, with sources that are busy, after which it has."""
_REQUEST_S = 10.0
_FIRST_CHUNKS, _MOST_CHUNKS = 4, 256
"""Chunks of a request to a source of unknown speed, and of any request: 1 and 64 MiB."""
_BUSY_S, _MOST_BUSY_S = 0.5, 8.0
_FAILED_S, _MOST_FAILED_S = 2.0, 120.0
_NOT_HELD_S = 15.0
_STALLED_S = 60.0
_NEWEST = 0.5
"""Weight of the newest request in a source's speed."""
_LOOK_S = 1.0

_MISSING, _REQUESTED, _HERE = 0, 1, 2


class RequestEnd(Enum):
    """How a request to a source ended."""

    DONE = "done"
    BUSY = "busy"
    BROKEN_OFF = "broken off"
    NOT_HELD = "not held"
    UNREACHABLE = "unreachable"
    STALLED = "stalled"
    WRONG_BYTES = "wrong bytes"


@dataclass(frozen=True)
class RangeRequest:
    """Request to `source`: for `chunks` of file number `file`, or for its chunk list if `chunks` is empty."""

    source: str
    file: int
    chunks: range


@dataclass
class _Source:
    """Peer that may have the files. `asked_from_s` is the time from which it may be asked again."""

    asked_from_s: float = 0.0
    bytes_per_s: float = 0.0
    """Measured speed; 0 before the first request has ended."""
    num_busy: int = 0
    num_failures: int = 0
    is_refused: bool = False


@dataclass
class _UnderWay:
    began_s: float
    num_came: int = 0


@dataclass
class FileTransfer:
    """Transfer of `files` from several sources. Times are seconds of one clock."""

    files: Sequence[PinnedFile]
    began_s: float
    busy_limit_s: float = BUSY_LIMIT_S
    _chunks: list[bytearray | None] = field(init=False)
    """State of each file's chunks; None while its chunk list is not here."""
    _sources: dict[str, _Source] = field(default_factory=dict, init=False)
    _under_way: dict[RangeRequest, _UnderWay] = field(default_factory=dict, init=False)
    _hopeful_s: float = field(init=False)
    """Last time at which a source delivered, or said that it is busy."""
    _delivered_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._hopeful_s = self._delivered_s = self.began_s
        self._chunks = [None for _ in self.files]

    # ------------------------------------------------------------- what it is told

    def add_sources(self, peers: Iterable[str]) -> None:
        """Ask these peers too from now on."""
        for peer in peers:
            self._sources.setdefault(peer, _Source())

    def listed(self, file: int, here: Iterable[int] = ()) -> None:
        """Record that the chunk list of a file is here, and `here`, the chunks that are already on the disk."""
        state = bytearray(self.files[file].num_chunks)
        for chunk in here:
            state[chunk] = _HERE
        self._chunks[file] = state

    def came(self, request: RangeRequest, num_chunks: int, now: float) -> None:
        """Record that so many more chunks of a request are here, checked and written, in their order."""
        if num_chunks == 0:
            return
        under_way, state = self._under_way[request], self._chunks[request.file]
        assert state is not None, "chunks come after their list"
        for chunk in request.chunks[under_way.num_came : under_way.num_came + num_chunks]:
            state[chunk] = _HERE
        under_way.num_came += num_chunks
        self._hopeful_s = self._delivered_s = now

    def ended(self, request: RangeRequest, end: RequestEnd, now: float) -> None:
        """Record how a request ended. Chunks of it that did not come are asked for again, perhaps elsewhere."""
        under_way, source = self._under_way.pop(request), self._sources[request.source]
        state = self._chunks[request.file]
        for chunk in request.chunks[under_way.num_came :]:
            assert state is not None
            if state[chunk] == _REQUESTED:
                state[chunk] = _MISSING
        if under_way.num_came:
            speed = under_way.num_came * CHUNK_BYTES / max(now - under_way.began_s, 1e-3)
            before = source.bytes_per_s or speed
            source.bytes_per_s = before + _NEWEST * (speed - before)
            source.num_busy = source.num_failures = 0
        source.asked_from_s = now + self._pause_s(source, end, delivered=under_way.num_came > 0)
        if end in (RequestEnd.DONE, RequestEnd.BUSY):
            self._hopeful_s = now
        if end is RequestEnd.DONE:
            self._delivered_s = now

    def _pause_s(self, source: _Source, end: RequestEnd, delivered: bool) -> float:
        """Return for how long a source is left alone after a request that ended so."""
        match end:
            case RequestEnd.DONE:
                source.num_busy = source.num_failures = 0
                return 0.0
            case RequestEnd.BUSY:
                source.num_busy += 1
                return min(_MOST_BUSY_S, _BUSY_S * 2.0 ** (source.num_busy - 1))
            case RequestEnd.BROKEN_OFF if delivered:
                return _BUSY_S
            case RequestEnd.NOT_HELD:
                return _NOT_HELD_S
            case RequestEnd.WRONG_BYTES:
                source.is_refused = True
                return 0.0
            case _:
                source.num_failures += 1
                first_s = _STALLED_S if end is RequestEnd.STALLED else _FAILED_S
                return min(_MOST_FAILED_S, first_s * 2.0 ** (source.num_failures - 1))

    # ------------------------------------------------------------- what it decides

    def next_requests(self, now: float) -> list[RangeRequest]:
        """Return the requests to begin now; they count as under way."""
        begun: list[RangeRequest] = []
        busy = {request.source for request in self._under_way}
        idle = [
            peer
            for peer, source in self._sources.items()
            if peer not in busy and not source.is_refused and source.asked_from_s <= now
        ]
        for peer in sorted(idle, key=self._rank):
            if len(self._under_way) >= MOST_STREAMS:
                break
            request = self._next_for(peer)
            if request is None:
                break
            self._under_way[request] = _UnderWay(now)
            begun.append(request)
        return begun

    def _rank(self, peer: str) -> tuple[int, float]:
        """Ask sources first that have not failed; among them those of unknown speed, then the quickest."""
        source = self._sources[peer]
        return source.num_failures, -source.bytes_per_s if source.bytes_per_s else -float("inf")

    def _next_for(self, peer: str) -> RangeRequest | None:
        """Return the next request to `peer`, in the order of the files; None if everything is here or under way."""
        for file, state in enumerate(self._chunks):
            if state is None:
                request = RangeRequest(peer, file, range(0))
                if not any(other.file == file and not other.chunks for other in self._under_way):
                    return request
                continue
            first = state.find(_MISSING)
            if first < 0:
                continue
            most = self._most_chunks(peer, state.count(_MISSING))
            end = first + 1
            while end < len(state) and end - first < most and state[end] == _MISSING:
                end += 1
            state[first:end] = bytes([_REQUESTED]) * (end - first)
            return RangeRequest(peer, file, range(first, end))
        return None

    def _most_chunks(self, peer: str, num_missing: int) -> int:
        """Return the length of the next request to `peer`: what it delivers in `_REQUEST_S`, and towards a file's end
        no more than its share."""
        bytes_per_s = self._sources[peer].bytes_per_s
        by_speed = int(bytes_per_s * _REQUEST_S / CHUNK_BYTES) if bytes_per_s else _FIRST_CHUNKS
        num_serving = min(MOST_STREAMS, sum(not source.is_refused for source in self._sources.values()))
        return max(1, min(by_speed, _MOST_CHUNKS, -(-num_missing // max(1, num_serving))))

    def wait_s(self, now: float) -> float:
        """Return after how many seconds to look again for requests to begin, if none ends before."""
        paused = [
            source.asked_from_s - now
            for source in self._sources.values()
            if not source.is_refused and source.asked_from_s > now
        ]
        return max(0.0, min([*paused, _LOOK_S]))

    @property
    def is_complete(self) -> bool:
        """True when every chunk of every file is here."""
        return all(state is not None and state.count(_HERE) == len(state) for state in self._chunks)

    def file_is_complete(self, file: int) -> bool:
        """Return whether every chunk of a file is here."""
        state = self._chunks[file]
        return state is not None and state.count(_HERE) == len(state)

    def has_failed(self, now: float) -> bool:
        """Return whether the transfer has failed: for `PATIENCE_S` nobody has delivered or been busy, or for
        `busy_limit_s` nobody has delivered."""
        has_no_hope = now - self._hopeful_s >= PATIENCE_S or now - self._delivered_s >= self.busy_limit_s
        return has_no_hope and not self.is_complete

    @property
    def num_serving(self) -> int:
        """Number of sources that serve a request now."""
        return len(self._under_way)
