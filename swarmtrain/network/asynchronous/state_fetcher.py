"""Fetch the run's present weights in asynchronous rounds from several peers, since each has its own.

The consensus is the variance-corrected mean of the peers' weights after their last merge, with the median of three
peers' momenta. This module transfers the states; the caller averages them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.asynchronous.place_rows import check_place_rows_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.finite import all_finite
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.download import download_snapshot
from swarmtrain.network.snapshots.store import HeldSnapshot, SnapshotStore, empty_held, manifest_untrusted
from swarmtrain.network.tasks import run_together
from swarmtrain.network.token_rows import check_token_rows_untrusted
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_LEAST_LIMIT_S = 20.0  # for one state, or a reply with its manifest, however small
# A limit is this many times the time that a transfer is expected to take.
_PATIENCE = 4.0
MOMENTA = 3
"""Number of states that are fetched with their momentum: among three, one that lies is outvoted (decision 54)."""


@dataclass(frozen=True, kw_only=True)
class FetchedState:
    """State of a peer after its last merge. `whole` is True if its momentum was fetched too, not only the weights."""

    peer: str
    held: HeldSnapshot
    whole: bool

    @property
    def round(self) -> int:
        """Round that the state's author was in."""
        return self.held.snapshot.manifest.round

    @property
    def run_tokens(self) -> int:
        """Tokens of the run as the author counted them."""
        return self.held.snapshot.manifest.run_tokens


@dataclass
class StateFetcher:
    """Pulls states of peers that merge asynchronously."""

    calls: PeerCalls
    store: SnapshotStore
    settings: RoundSettings
    refused: Callable[[str, PeerError], None]

    async def fetch(self, peers: Sequence[str], min_round: int = 0) -> list[FetchedState]:
        """Fetch states of `min_round` or later, and return those that come, in the order of `peers`.

        The first three come with their momentum, the others as weights only. Returns an empty list if no peer delivers
        a whole state.
        """
        rest = await self._who_answers(peers)
        whole: FetchedState | None = None
        began_s = swarm_time()
        while rest and whole is None:
            began_s = swarm_time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limit_s()):
                    whole = await self._fetch_one(rest.pop(0), min_round, whole=True)
        if whole is None:
            return []
        # The first transfer shows how fast transfers are now; the others share the link.
        limit_s = max(_LEAST_LIMIT_S, _PATIENCE * len(rest) * (swarm_time() - began_s))
        return [whole, *await self._fetch_all(rest, min_round, limit_s, num_whole=MOMENTA - 1)]

    async def _who_answers(self, peers: Sequence[str]) -> list[str]:
        """Return those of `peers` that answer a greeting, in the given order.

        A peer that hangs would otherwise be waited for as long as building a state may take, while the caller could ask
        others.
        """
        answered: set[str] = set()

        async def greet(peer: str) -> None:
            try:
                await self.calls.hello(peer, pb.HelloRequest(run_sha256=bytes.fromhex(self.settings.run_sha256)))
                answered.add(peer)
            except PeerError as error:
                self._blame(peer, error)

        await run_together(greet(peer) for peer in peers)
        return [peer for peer in peers if peer in answered]

    async def fetch_weights(
        self, peers: Sequence[str], min_round: int = 0, limit_s: float | None = None
    ) -> list[FetchedState]:
        """Fetch only the weights of all `peers`, and return those that came within `limit_s`."""
        return await self._fetch_all(peers, min_round, self._limit_s() if limit_s is None else limit_s, num_whole=0)

    async def _fetch_all(
        self, peers: Sequence[str], min_round: int, limit_s: float, *, num_whole: int
    ) -> list[FetchedState]:
        """Return the states that came within `limit_s`; those of the first `num_whole` peers with momentum."""
        found: dict[str, FetchedState] = {}

        async def fetch(peer: str, whole: bool) -> None:
            state = await self._fetch_one(peer, min_round, whole=whole)
            if state is not None:
                found[peer] = state

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await run_together(fetch(peer, number < num_whole) for number, peer in enumerate(peers))
        return [found[peer] for peer in peers if peer in found]

    async def fetch_manifests(self, peers: Sequence[str]) -> list[pb.Manifest]:
        """Fetch the manifests of peers' states without the states, to learn who has trained how much.

        Returns those that come within 20 s.
        """
        found: dict[str, pb.Manifest] = {}

        async def ask(peer: str) -> None:
            try:
                reply = await self.calls.state(peer, 1)
                if reply.HasField("manifest"):
                    found[peer] = self._state_untrusted(reply.manifest, peer, 1).snapshot.manifest
            except PeerError as error:
                self._blame(peer, error)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAST_LIMIT_S):
                await run_together(ask(peer) for peer in peers)
        return [found[peer] for peer in peers if peer in found]

    def _limit_s(self) -> float:
        """Return the most seconds that one state may take: at least 20, else four times the expected time.

        The expected time follows from recent transfers, or without any from eight times the least speed. It is bounded
        because a peer that trickles must not hold a late joiner, or the archive, for hours.
        """
        size_bytes = sum(spec.size_bytes for spec in self.settings.state_specs)
        least_per_s = max(self.settings.pull.min_bytes_per_s, 1.0)
        expected_s = self.calls.node.traffic.times.expected_s(size_bytes)
        return max(_LEAST_LIMIT_S, _PATIENCE * (size_bytes / least_per_s / 8 if expected_s is None else expected_s))

    async def _fetch_one(self, peer: str, min_round: int, *, whole: bool) -> FetchedState | None:
        """Fetch one peer's state, or without `whole` only its weights. Returns None if the peer has none, or if the
        transfer fails."""
        try:
            reply = await self.calls.state(peer, min_round)
            if not reply.HasField("manifest"):
                return None
            held = self._state_untrusted(reply.manifest, peer, min_round)
            # A state is theta and then momentum, both fp32 and equally long: half of the bytes are the weights.
            size_bytes = held.snapshot.manifest.total_bytes // (1 if whole else 2)
            is_shown = whole and self.store.arriving is None
            with self.store.showing(held) if is_shown else contextlib.nullcontext():
                await download_snapshot(
                    self.calls, peer, held, self.settings.pull, range(math.ceil(size_bytes / CHUNK_BYTES))
                )
                if not await asyncio.to_thread(all_finite, held.part(0, size_bytes)):
                    raise BadBytesError("a state with numbers that are not finite", code="not-finite")
            return FetchedState(peer=peer, held=held, whole=whole)
        except PeerError as error:
            self._blame(peer, error)
            return None

    def _blame(self, peer: str, error: PeerError) -> None:
        if isinstance(error, BadBytesError):
            self.refused(peer, error)
        else:
            _log.debug("fetching the state of %s failed: %s", peer, error)

    def _state_untrusted(self, signed: pb.Signed, peer: str, min_round: int) -> HeldSnapshot:
        kind = pb.SNAPSHOT_KIND_STATE
        snapshot = manifest_untrusted(signed, self.settings.run_sha256, kind, self.settings.state_specs)
        manifest = snapshot.manifest
        if snapshot.author != peer:
            raise BadBytesError("a state of another peer than the one that sent it", code="bad-sender")
        if manifest.round < min_round or manifest.roster_sha256:
            raise BadBytesError("a state of another round than asked for, or of another way to merge", code="bad-round")
        check_token_rows_untrusted(manifest)
        check_place_rows_untrusted(manifest)
        return empty_held(snapshot)
