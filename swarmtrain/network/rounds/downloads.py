"""Download snapshots of synchronous rounds (publications, shares of a mean, states) from any peer that has them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.finite import all_finite, none_negative
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.store import HeldSnapshot, PullLimits, SnapshotStore, SourcePace, pull_chunks
from swarmtrain.network.tasks import run_together, run_until
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_OF_ROUNDS = (pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, pb.SNAPSHOT_KIND_SHARE)
_PARTS_AT_ONCE = 2
"""Parts that are asked of a source at once: while one is asked for, the other comes."""
_PART_S, _MOST_FASTER = 1.0, 4
"""Seconds that a part should take, and the most by which one may be larger than the one before."""
_AGAIN_S, _MOST_AGAIN_S = 0.1, 1.0
"""Seconds until sources that brought nothing are asked again, at first and at most: each question passes a link that
may be the slow one."""
_MAX_SOURCES = 1024

WaitsFor = Callable[[str, float], bool]
"""Returns whether a source that is busy, did not answer or fell silent is asked again; the number is the seconds since
anything came from any source."""


class Downloads:
    """Pulls chunks from one source after the other, and serves them to other peers.

    What a round averages is asked for in small parts, two at once: each about as much as comes in a second. More would
    fill the queues of a slow link, and everything else, such as the answer to a question, would wait behind it.
    `disturbed` is called when a source did not deliver: what passed meanwhile shows little of what a link can carry.
    """

    def __init__(
        self,
        me: str,
        calls: PeerCalls,
        store: SnapshotStore,
        limits: PullLimits,
        refused: Callable[[str, PeerError], None],
        disturbed: Callable[[], None] = lambda: None,
    ) -> None:
        self.calls, self.store, self.limits, self.refused = calls, store, limits, refused
        self._me, self._disturbed = me, disturbed
        self._part_chunks: dict[str, int] = {}
        """Chunks that came from each source in a second or so."""

    async def pull(
        self,
        held: HeldSnapshot,
        chunks: range,
        sources: Sequence[str],
        waits_for: WaitsFor | None = None,
        left_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Pull `chunks` from the first of `sources` that works, and serve them from then on.

        Without `waits_for` a source that fails is not asked again, and one that is busy only until nothing has come for
        `busy_limit_s`. `left_s` returns the seconds that are left for all of it, the wait for an earlier pull of the
        same snapshot included. Raises UnreachableError.
        """
        if not await run_until(self._pull(held, chunks, sources, waits_for), left_s):
            title = held.snapshot.sha256[:12]
            raise UnreachableError(f"snapshot {title} is not here within the time of a merge")

    async def _pull(
        self, held: HeldSnapshot, chunks: range, sources: Sequence[str], waits_for: WaitsFor | None
    ) -> None:
        pull = _Pull(self, held, chunks, [source for source in sources if source != self._me], waits_for)
        async with held.pulling:
            try:
                await run_together(pull.parts() for _ in range(pull.parts_at_once))
            finally:
                # Of a state that nobody delivered the rest is worth nothing, and takes as much memory as the whole.
                if held.have and (pull.is_of_round or all(chunk in held.have for chunk in chunks)):
                    self.store.add(held)

    def part_chunks(self, source: str) -> int:
        """Return how many chunks to ask this source for at once."""
        return self._part_chunks.get(source, 1)

    def came(self, source: str, num_chunks: int, seconds: float) -> None:
        """Record how long a part took."""
        _log.debug("%d chunks came from %s in %.2f s", num_chunks, source, seconds)
        before = self._part_chunks.pop(source, 1)
        now = int(num_chunks * _PART_S / max(seconds, 1e-9))
        self._part_chunks[source] = max(1, min(now, _MOST_FASTER * before))
        while len(self._part_chunks) > _MAX_SOURCES:
            del self._part_chunks[next(iter(self._part_chunks))]

    def blame(self, peer: str, error: PeerError) -> None:
        """Report a peer that sent bad bytes; only log other errors."""
        if isinstance(error, BadBytesError):
            self.refused(peer, error)
            return
        _log.debug("pulling from %s failed: %s", peer, error)
        if error.code != "not-held":
            self._disturbed()


class _Pull:
    """Pull of one snapshot's chunks in parts. Slots are held only while something is pulled, not between retries."""

    def __init__(
        self, downloads: Downloads, held: HeldSnapshot, chunks: range, sources: list[str], waits_for: WaitsFor | None
    ) -> None:
        self._downloads, self._held, self._chunks, self._waits_for = downloads, held, chunks, waits_for
        self._sources = sources
        """Sources that may still deliver, those that failed last at the end."""
        self._paces: dict[str, SourcePace] = {}
        self.is_of_round = held.snapshot.manifest.kind in _OF_ROUNDS
        self.parts_at_once = _PARTS_AT_ONCE if self.is_of_round else 1
        # A source may have a place for one of the parts only, and the other is busy for as long as all that takes.
        busy_s = 0.0 if self.is_of_round or waits_for is not None else downloads.limits.busy_limit_s
        self._limits = dataclasses.replace(
            downloads.limits, busy_limit_s=busy_s, paces=self._paces, streams=self.parts_at_once
        )
        self._came_s, self._num_here = swarm_time(), len(held.have)
        self._taken: set[int] = set()

    async def parts(self) -> None:
        """Pull one part after the other until none is left to begin. Raises UnreachableError."""
        while (part := self._next_part()) is not None:
            await self._pull(part)

    def _next_part(self) -> range | None:
        have, taken, chunks = self._held.have, self._taken, self._chunks
        first = next((chunk for chunk in chunks if chunk not in have and chunk not in taken), None)
        if first is None:
            return None
        most, stop = len(chunks), first + 1
        if self.is_of_round and self._sources:
            most = self._downloads.part_chunks(self._sources[0])
        while stop in chunks and stop - first < most and stop not in have and stop not in taken:
            stop += 1
        taken.update(range(first, stop))
        return range(first, stop)

    async def _pull(self, part: range) -> None:
        downloads, limits, wait_s, asked = self._downloads, self._limits, _AGAIN_S, list(self._sources)
        while True:
            failed = dict[str, PeerError]()

            def blame(source: str, error: PeerError) -> None:
                downloads.blame(source, error)
                failed[source] = error  # noqa: B023 - called before the next turn
                self._others_first(source, error)

            waits_s = swarm_time()
            async with downloads.calls.pull_slots:
                self._had_slot(waits_s)
                began_s = limits.clock()
                try:
                    await pull_chunks(self._held, part, asked, downloads.calls.open_pull, limits, blame)
                except UnreachableError:
                    if not (asked := self._to_ask_again(asked, failed)):
                        raise
                else:
                    if asked:
                        downloads.came(asked[0], len(part), limits.clock() - began_s)
                    return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _MOST_AGAIN_S)

    def _had_slot(self, waits_s: float) -> None:
        """Leave out of the time without bytes what passed since `waits_s`, in which all slots were others': no source
        was asked, and among many publications that may take long."""
        now = swarm_time()
        self._came_s = min(now, self._came_s + (now - waits_s) / self.parts_at_once)

    def _to_ask_again(self, asked: Sequence[str], failed: Mapping[str, PeerError]) -> list[str]:
        """Return those that may still deliver. What did not fail was busy: it is asked again while anything comes."""
        if self._waits_for is None and not self.is_of_round:
            return []
        if len(self._held.have) > self._num_here:
            self._came_s, self._num_here = swarm_time(), len(self._held.have)
        quiet_s, again = swarm_time() - self._came_s, list[str]()
        for source in asked:
            error, pace = failed.get(source), self._paces.get(source)
            if isinstance(error, BadBytesError) or (error is not None and error.code == "not-held"):
                continue
            is_busy = error is None and quiet_s < self._downloads.limits.busy_limit_s
            is_waited_for = is_busy or (self._waits_for is not None and self._waits_for(source, quiet_s))
            if is_waited_for and not (pace is not None and pace.is_too_slow):
                again.append(source)
        return again

    def _others_first(self, source: str, error: PeerError) -> None:
        if source in self._sources:
            self._sources.remove(source)
            if not isinstance(error, BadBytesError):
                self._sources.append(source)


async def check_finite(part: memoryview) -> None:
    """Raise BadBytesError if any of these fp32 numbers is not finite."""
    if not await asyncio.to_thread(all_finite, part):
        raise BadBytesError("numbers that are not finite", code="not-finite")


async def check_not_negative(part: memoryview) -> None:
    """Raise BadBytesError if any of these fp32 numbers is below 0."""
    if not await asyncio.to_thread(none_negative, part):
        raise BadBytesError("means of squares below 0", code="bad-number")
