"""Download snapshots of synchronous rounds (publications, shares of a mean, states) from any peer that has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.finite import none_negative
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.store import HeldSnapshot, PullLimits, SnapshotStore, all_finite, pull_chunks

__all__ = ["Downloads", "check_finite", "check_not_negative"]

_log = logging.getLogger(__name__)


class Downloads:
    """Pulls chunks from one source after the other, and serves them to other peers."""

    def __init__(
        self,
        me: str,
        calls: PeerCalls,
        store: SnapshotStore,
        limits: PullLimits,
        refused: Callable[[str, PeerError], None],
    ) -> None:
        self.calls, self.store, self.limits, self.refused = calls, store, limits, refused
        self._me = me

    async def pull(self, held: HeldSnapshot, chunks: range, sources: Sequence[str]) -> None:
        """Pull `chunks` from the first of `sources` that works, and serve them from then on. Raises
        UnreachableError."""
        sources = [source for source in sources if source != self._me]
        async with held.pulling, self.calls.pull_slots:
            await pull_chunks(held, chunks, sources, self.calls.open_pull, self.limits, self.blame)
        self.store.add(held)

    def blame(self, peer: str, error: PeerError) -> None:
        """Report a peer that sent bad bytes; only log other errors."""
        if isinstance(error, BadBytesError):
            self.refused(peer, error)
        else:
            _log.debug("pulling from %s failed: %s", peer, error)


async def check_finite(part: memoryview) -> None:
    """Raise BadBytesError if any of these fp32 numbers is not finite."""
    if not await asyncio.to_thread(all_finite, part):
        raise BadBytesError("numbers that are not finite", code="not-finite")


async def check_not_negative(part: memoryview) -> None:
    """Raise BadBytesError if any of these fp32 numbers is below 0."""
    if not await asyncio.to_thread(none_negative, part):
        raise BadBytesError("means of squares below 0", code="bad-number")
