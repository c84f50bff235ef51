"""Download a snapshot from one peer, resuming when its stream breaks off.

Pulls from partners, hidden peers, workers and state providers all use this function.
"""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from swarmtrain.errors import BrokenOffError, BusyError, PeerError, UnreachableError
from swarmtrain.network.snapshots.store import HeldSnapshot, PullLimits, PullStream, pull_chunks
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
ATTEMPTS = 3
"""Streams opened at a peer before its breaking off counts as a failure."""


class SnapshotCalls(Protocol):
    """Part of `PeerCalls` that a download needs."""

    @property
    def pull_slots(self) -> AbstractAsyncContextManager[Any]:
        """Context held while something is pulled; it limits the number of pulls at once."""

    async def open_pull(self, peer: str, request: pb.PullRequest) -> PullStream:
        """Open a pull's stream. See `PeerCalls`."""


async def download_snapshot(
    calls: SnapshotCalls, peer: str, held: HeldSnapshot, limits: PullLimits, chunks: range | None = None
) -> PeerError | None:
    """Pull all of a snapshot, or only `chunks`, from `peer`; after a broken stream, resume with a new one.

    Returns the last error that did not prevent the download, or None. Raises the PeerError that says why it failed:
    BusyError when `peer` serves others.
    """
    wanted = range(held.snapshot.num_chunks) if chunks is None else chunks
    failures: list[PeerError] = []
    for attempts_left in reversed(range(ATTEMPTS)):
        failures.clear()
        try:
            async with calls.pull_slots:
                blame = lambda _, error: failures.append(error)  # noqa: E731 - as short as it can be
                await pull_chunks(held, wanted, [peer], calls.open_pull, limits, blame)
            break
        except UnreachableError as error:
            failure = failures[-1] if failures else BusyError("it serves as many readers as it may")
            if not attempts_left or not isinstance(failure, BrokenOffError):
                raise failure from error
            _log.debug("%s failed, trying again: %s", peer, failure)
    return failures[-1] if failures else None
