"""Bringing a roster's pseudo-gradients here and averaging them, whole or in shares.

In a small group everyone pulls everything and averages it. With more than `share_above` on the roster each averages
one range of chunks over the whole roster, and the others pull that range's result from it, so that the bytes stay
those of an all-reduce; whoever finds a share missing averages it from the hashes itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity
from swarmtrain.network.roster import check_publication
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.signing import open_signed_untrusted
from swarmtrain.network.snapshots import (
    CHUNK_BYTES,
    Body,
    Held,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    all_finite,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_chunks,
    pull_manifest,
)
from swarmtrain.network.tasks import run_together
from swarmtrain.protocol.lifecycle import Membership, PeerState
from swarmtrain.protocol.rosters import Publication, Roster, share_due_s, share_ranges, sources_of
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Average", "Merger", "RoundSettings", "UnobtainableError"]

_log = logging.getLogger(__name__)
_ASK_AGAIN_S = 0.1
_T = TypeVar("_T")

Average = Callable[[Sequence[memoryview], Sequence[int]], "tuple[bytearray, list[int]]"]
"""(bodies or equal parts of them, weights) -> (weighted mean as bytes, indices left out as not finite)."""


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """What the run file says about rounds. Seconds, tokens, and the tensor tables of gradient and state."""

    run_sha256: str
    specs: tuple[TensorSpec, ...]
    state_specs: tuple[TensorSpec, ...]
    max_tokens: int
    share_above: int
    round_limit_s: float
    silence_s: float
    pull: PullLimits


class UnobtainableError(Exception):
    """Nobody could deliver the publications of `peers`."""

    def __init__(self, *peers: str) -> None:
        super().__init__(f"nobody could deliver the publication of {', '.join(sorted(peers))}")
        self.peers = frozenset(peers)


@dataclass
class Merger:
    """Pulls and averages. `publications` are those known of the round, by peer; it adds what it has to look for."""

    identity: Identity
    calls: PeerCalls
    store: SnapshotStore
    membership: Membership
    settings: RoundSettings
    average: Average
    refused: Callable[[str, PeerError], None]
    share_ready: Callable[[Held], None]
    last_known: Callable[[str], bytes] = lambda peer: b""
    """The hash of the last roster that a peer is known to have told of."""
    roster_sha256: bytes = b""
    """The hash by which the others know the roster that is merged."""
    _own_share_s: float = field(default=0.0, init=False)

    async def merge(self, roster: Roster, publications: dict[str, Held]) -> bytearray:
        """The mean as bytes, over those publications that are finite. Raises UnobtainableError."""
        entries: list[Held] = []
        for entry in roster.entries:
            held = publications.get(entry.peer)
            if held is None or held.snapshot.sha256 != entry.snapshot:
                held = await self._find(roster, entry)
                if entry.peer != self.identity.peer_id:
                    publications[entry.peer] = held
            self._check_entry(entry, held)
            entries.append(held)
        num_chunks = entries[0].snapshot.num_chunks
        if len(entries) <= self.settings.share_above:
            return await self._average_range(roster, entries, range(num_chunks))
        return await self._average_in_shares(roster, entries, num_chunks)

    def _check_entry(self, entry: Publication, held: Held) -> None:
        manifest = held.snapshot.manifest
        if (manifest.tokens, manifest.inner_steps) != (entry.tokens, entry.inner_steps):
            raise UnobtainableError(entry.peer)  # the roster says something else than what it points to

    async def _find(self, roster: Roster, entry: Publication) -> Held:
        for source in self._sources(roster, entry.peer):
            try:
                signed = await pull_manifest(source, entry.snapshot, self.calls.open_pull, self.settings.pull)
                kind = pb.SNAPSHOT_KIND_PSEUDO_GRADIENT
                snapshot = manifest_untrusted(signed, self.settings.run_sha256, kind, self.settings.specs)
                check_publication(snapshot, entry.peer, roster.round, self.settings.max_tokens)
                return empty_held(snapshot)
            except PeerError as error:
                self.blame(source, error)
        raise UnobtainableError(entry.peer)

    def _sources(self, roster: Roster, author: str) -> list[str]:
        """Those who are not known to be gone."""
        sources, gone = sources_of(roster, author), (PeerState.LOST, PeerState.LEFT)
        return [p for p in sources if p != self.identity.peer_id and self.membership.state(p) not in gone]

    async def pull(self, held: Held, chunks: range, sources: Sequence[str]) -> None:
        """Bring chunks here and serve them on. Raises UnreachableError."""
        sources = [source for source in sources if source != self.identity.peer_id]
        async with held.pulling, self.calls.pull_slots:
            await pull_chunks(held, chunks, sources, self.calls.open_pull, self.settings.pull, self.blame)
        self.store.add(held)

    def _rotated(self, items: list[_T]) -> list[_T]:
        """The same items, begun elsewhere by every peer, so that not all pull from the first one first."""
        start = int.from_bytes(self.identity.peer_id[-4:].encode(), "big") % max(1, len(items))
        return items[start:] + items[:start]

    def blame(self, peer: str, error: PeerError) -> None:
        """Tell of hostile bytes; log the rest."""
        if isinstance(error, BadBytesError):
            self.refused(peer, error)
        else:
            _log.debug("pulling from %s: %s", peer, error)

    async def _average_range(self, roster: Roster, entries: Sequence[Held], chunks: range) -> bytearray:
        """The weighted mean of one range of chunks over the whole roster, in roster order."""

        lacking: list[str] = []

        async def bring(entry: Publication, held: Held) -> None:
            try:
                await self.pull(held, chunks, self._sources(roster, entry.peer))
            except UnreachableError:
                lacking.append(entry.peer)

        pairs = list(zip(roster.entries, entries, strict=True))
        await run_together(bring(entry, held) for entry, held in self._rotated(pairs))
        if lacking:
            raise UnobtainableError(*lacking)
        total = entries[0].snapshot.manifest.total_bytes
        start, end = chunks.start * CHUNK_BYTES, min(chunks.stop * CHUNK_BYTES, total)
        parts = [held.part(start, end) for held in entries]
        weights = [entry.tokens for entry in roster.entries]
        mean, left_out = await asyncio.to_thread(self.average, parts, weights)
        for index in left_out:
            self.refused(roster.entries[index].peer, BadBytesError("a pseudo-gradient that is not finite"))
        return mean

    # ------------------------------------------------------------- shares

    async def _average_in_shares(self, roster: Roster, entries: Sequence[Held], num_chunks: int) -> bytearray:
        mean = bytearray(entries[0].snapshot.manifest.total_bytes)
        ranges = share_ranges(num_chunks, len(entries))
        roster_s = swarm_time()
        own = roster.peers.index(self.identity.peer_id) if self.identity.peer_id in roster.peers else None

        async def fill(index: int) -> None:
            chunks = ranges[index]
            if not chunks:
                return
            part = None
            if index != own:
                part = await self._pull_share(roster, index, _range_bytes(chunks, len(mean)), roster_s)
            if part is None:
                part = await self._average_range(roster, entries, chunks)
            mean[chunks.start * CHUNK_BYTES : chunks.start * CHUNK_BYTES + len(part)] = part
            if index == own:
                await self._publish_share(roster, index, part)

        self._own_share_s = float("inf") if own is not None and ranges[own] else roster_s
        await run_together(fill(index) for index in self._rotated(list(range(len(ranges)))))
        return mean

    async def _publish_share(self, roster: Roster, index: int, part: bytearray) -> None:
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.settings.run_sha256),
            kind=pb.SNAPSHOT_KIND_SHARE,
            round=roster.round,
            part=index,
            roster_sha256=bytes.fromhex(roster.digest),
        )
        specs = [TensorSpec("share", (len(part) // 4,))]
        held = await asyncio.to_thread(build_snapshot, self.identity, manifest, specs, Body([part]))
        self.store.add(held)
        self._own_share_s = swarm_time()
        self.share_ready(held)

    async def _pull_share(self, roster: Roster, index: int, size_bytes: int, roster_s: float) -> bytearray | None:
        """The share that its owner averaged; None when it is lost, or overdue."""
        owner = roster.peers[index]
        specs = [TensorSpec("share", (size_bytes // 4,))]
        while swarm_time() < share_due_s(roster_s, self._own_share_s, self.settings.silence_s):
            if self.membership.state(owner) in (PeerState.LOST, PeerState.LEFT):
                return None
            try:
                request = pb.RoundRequest(
                    round=roster.round,
                    has_publication=True,
                    has_roster_sha256=self.roster_sha256,
                    has_last_sha256=self.last_known(owner),
                    wait_s=1.0,
                )
                reply = await self.calls.round(owner, request)
                if reply.HasField("share") and self._is_of_untrusted(reply.share, roster):
                    kind = pb.SNAPSHOT_KIND_SHARE
                    snapshot = manifest_untrusted(reply.share, self.settings.run_sha256, kind, specs)
                    manifest = snapshot.manifest
                    if snapshot.author != owner or manifest.round != roster.round or manifest.part != index:
                        raise BadBytesError("a share of another peer, round or index")
                    held = empty_held(snapshot)
                    await self.pull(held, range(snapshot.num_chunks), [owner])
                    await self.check_finite(held.part(0, size_bytes))
                    return held.buffer
            except BadBytesError as error:
                self.blame(owner, error)
                return None
            except PeerError as error:
                self.blame(owner, error)
            await asyncio.sleep(_ASK_AGAIN_S)
        return None

    async def check_finite(self, part: memoryview) -> None:
        """BadBytesError if these fp32 numbers are not all finite."""
        if not await asyncio.to_thread(all_finite, part):
            raise BadBytesError("numbers that are not finite")

    def _is_of_untrusted(self, signed: pb.Signed, roster: Roster) -> bool:
        """Whether a share belongs to this roster; its owner may be about another one."""
        _, manifest = open_signed_untrusted(signed, "manifest", self.settings.run_sha256, pb.Manifest)
        return manifest.roster_sha256.hex() == roster.digest


def _range_bytes(chunks: range, total_bytes: int) -> int:
    return min(chunks.stop * CHUNK_BYTES, total_bytes) - chunks.start * CHUNK_BYTES
