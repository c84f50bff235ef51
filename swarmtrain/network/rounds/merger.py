"""Pull and average the pseudo-gradients that a roster names, whole or in shares.

In a small group every peer pulls everything and averages it. On a roster of more than `share_above` peers each averages
one range of chunks over the whole roster, and the others pull that range's result from it, so a round moves as many
bytes as an all-reduce. A peer that cannot get a share averages that range itself from the hashes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity
from swarmtrain.network.rounds.downloads import Downloads, check_finite
from swarmtrain.network.rounds.gradient_groups import GradientGroups, GradientPiece
from swarmtrain.network.rounds.roster import check_publication
from swarmtrain.network.signatures import open_signed_untrusted
from swarmtrain.network.snapshots.store import (
    CHUNK_BYTES,
    Body,
    HeldSnapshot,
    PullLimits,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_manifest,
)
from swarmtrain.network.tasks import run_together
from swarmtrain.protocol.membership.membership import Membership, PeerState
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication, share_due_s, share_ranges, sources_of
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Average", "Merger", "RoundSettings", "UnobtainableError"]

_ASK_AGAIN_S = 0.1  # between two questions for a share
_T = TypeVar("_T")

Average = Callable[[Sequence[memoryview], Sequence[int]], "tuple[bytearray, list[int]]"]
"""Maps (equal parts of bodies, weights) to (weighted mean as bytes, indices left out as not finite)."""


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """Settings of rounds from the run file: times in seconds, token limits, and the tensor tables of gradient and
    state."""

    run_sha256: str
    specs: tuple[TensorSpec, ...]
    state_specs: tuple[TensorSpec, ...]
    max_tokens: int
    share_above: int
    round_limit_s: float
    silence_s: float
    pull: PullLimits
    max_wait_s: float = math.inf
    dtype: str = "float32"
    """Type of the numbers of publications; what they are averaged to is fp32."""

    @cached_property
    def groups(self) -> GradientGroups:
        """Groups of tensors that a pseudo-gradient may leave out."""
        return GradientGroups(self.specs, self.dtype)


class UnobtainableError(Exception):
    """No peer could deliver the publications of `peers`."""

    def __init__(self, *peers: str) -> None:
        super().__init__(f"nobody could deliver the publication of {', '.join(sorted(peers))}")
        self.peers = frozenset(peers)


class Merger:
    """Averages the publications of rosters.

    A request for a share carries the hash of the roster that the owner applied last, `last_known(owner)`: the owner
    then need not repeat that roster in its reply.
    """

    def __init__(
        self,
        identity: Identity,
        downloads: Downloads,
        membership: Membership,
        settings: RoundSettings,
        average: Average,
        last_known: Callable[[str], bytes],
    ) -> None:
        self.identity, self.downloads, self.membership, self.settings = identity, downloads, membership, settings
        self.last_known = last_known
        self._average = average

    async def merge(
        self,
        roster: Roster,
        name: str,
        publications: dict[str, HeldSnapshot],
        share_ready: Callable[[HeldSnapshot], None],
    ) -> bytearray:
        """Return the mean of a roster's publications that are finite, as bytes; zero where none has a group.

        `publications` holds the known publications of the round by peer; publications that this merge had to fetch are
        added to it. `name` is the name that others give to the signed roster. `share_ready` is called with this peer's
        share, if the merge has shares. Raises UnobtainableError.
        """
        entries: list[HeldSnapshot] = []
        for entry in roster.entries:
            held = publications.get(entry.peer)
            if held is None or held.snapshot.sha256 != entry.snapshot:
                held = await self._find(roster, entry)
                if entry.peer != self.identity.peer_id:
                    publications[entry.peer] = held
            _check_entry(entry, held)
            entries.append(held)
        if len(entries) <= self.settings.share_above:
            return await self.average_range(roster, entries, 0, self.settings.groups.total_bytes)
        return await _MergeInShares(self, roster, name, entries, share_ready).run()

    async def _find(self, roster: Roster, entry: RoundPublication) -> HeldSnapshot:
        settings, downloads = self.settings, self.downloads
        for source in self._sources(roster, entry.peer):
            try:
                signed = await pull_manifest(source, entry.snapshot, downloads.calls.open_pull, settings.pull)
                snapshot = settings.groups.gradient_untrusted(signed, settings.run_sha256)
                check_publication(snapshot, entry.peer, roster.round, settings.max_tokens)
                return empty_held(snapshot)
            except PeerError as error:
                downloads.blame(source, error)
        raise UnobtainableError(entry.peer)

    def _sources(self, roster: Roster, author: str) -> list[str]:
        """Return the peers that should hold `author`'s publication and are not known to be gone."""
        sources, gone = sources_of(roster, author), (PeerState.LOST, PeerState.LEFT)
        return [p for p in sources if p != self.identity.peer_id and self.membership.state(p) not in gone]

    def rotated(self, items: list[_T]) -> list[_T]:
        """Return the same items, starting from an item that depends on this peer, so that not all peers pull from the
        same source first."""
        start = int.from_bytes(self.identity.peer_id[-4:].encode(), "big") % max(1, len(items))
        return items[start:] + items[:start]

    async def average_range(self, roster: Roster, entries: Sequence[HeldSnapshot], start: int, end: int) -> bytearray:
        """Return the weighted mean of bytes `start` to `end` of the gradient over the roster, in roster order.

        Each group of an adapter is the mean of the publications that have it. Raises UnobtainableError.
        """
        groups, lacking = self.settings.groups, list[str]()
        pieces = [groups.pieces(held.snapshot, start, end) for held in entries]

        async def fetch(entry: RoundPublication, held: HeldSnapshot, its: Sequence[GradientPiece]) -> None:
            try:
                await self.downloads.pull(held, _chunks(its), self._sources(roster, entry.peer))
            except UnreachableError:
                lacking.append(entry.peer)

        wanted = [each for each in zip(roster.entries, entries, pieces, strict=True) if each[2]]
        await run_together(fetch(*each) for each in self.rotated(wanted))
        if lacking:
            raise UnobtainableError(*lacking)
        mean, refused = bytearray(end - start), set[str]()
        for first, last in groups.segments(start, end):
            have = [
                (entry, held.part(*piece.of(first, last)))
                for entry, held, its in wanted
                for piece in its
                if piece.start <= first and last <= piece.end
            ]
            if not have:
                continue
            parts, weights = [part for _, part in have], [entry.tokens for entry, _ in have]
            averaged, left_out = await asyncio.to_thread(self._average, parts, weights)
            refused.update(have[index][0].peer for index in left_out)
            if len(averaged) == len(mean):
                mean = averaged
            else:
                mean[first - start : last - start] = averaged
        for peer in sorted(refused):
            error = BadBytesError("a pseudo-gradient with numbers that are not finite", code="not-finite")
            self.downloads.refused(peer, error)
        return mean


class _MergeInShares:
    """Merge in which each peer on the roster averages a share."""

    def __init__(
        self,
        merger: Merger,
        roster: Roster,
        name: str,
        entries: Sequence[HeldSnapshot],
        share_ready: Callable[[HeldSnapshot], None],
    ) -> None:
        self._merger, self._roster, self._name, self._entries = merger, roster, name, entries
        self._share_ready = share_ready
        me = merger.identity.peer_id
        self._own = roster.peers.index(me) if me in roster.peers else None
        self._total_bytes = merger.settings.groups.total_bytes
        self._ranges = share_ranges(merger.settings.groups.num_chunks, len(entries))
        self._roster_s = swarm_time()
        has_share = self._own is not None and bool(self._ranges[self._own])
        self._own_share_s = math.inf if has_share else self._roster_s
        """Time at which this peer's own share was ready."""

    async def run(self) -> bytearray:
        """Return the mean. Raises UnobtainableError."""
        mean = bytearray(self._total_bytes)

        async def fill(index: int) -> None:
            chunks = self._ranges[index]
            if not chunks:
                return
            start, end = chunks.start * CHUNK_BYTES, min(chunks.stop * CHUNK_BYTES, len(mean))
            part = None
            if index != self._own:
                part = await self._pull(index, end - start)
            if part is None:
                part = await self._merger.average_range(self._roster, self._entries, start, end)
            mean[start:end] = part
            if index == self._own:
                await self._publish(index, part)

        await run_together(fill(index) for index in self._merger.rotated(list(range(len(self._ranges)))))
        return mean

    async def _publish(self, index: int, part: bytearray) -> None:
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self._merger.settings.run_sha256),
            kind=pb.SNAPSHOT_KIND_SHARE,
            round=self._roster.round,
            part=index,
            roster_sha256=bytes.fromhex(self._roster.digest),
        )
        specs = [TensorSpec("share", (len(part) // 4,))]
        held = await asyncio.to_thread(build_snapshot, self._merger.identity, manifest, specs, Body([part]))
        self._merger.downloads.store.add(held)
        self._own_share_s = swarm_time()
        self._share_ready(held)

    async def _pull(self, index: int, size_bytes: int) -> bytearray | None:
        """Pull the share of the peer number `index` on the roster. Returns None if the share is lost or overdue."""
        merger, roster, downloads = self._merger, self._roster, self._merger.downloads
        owner = roster.peers[index]
        specs = [TensorSpec("share", (size_bytes // 4,))]
        while swarm_time() < share_due_s(self._roster_s, self._own_share_s, merger.settings.silence_s):
            if merger.membership.state(owner) in (PeerState.LOST, PeerState.LEFT):
                return None
            try:
                request = pb.RoundRequest(
                    round=roster.round,
                    has_publication=True,
                    has_roster_sha256=bytes.fromhex(self._name),
                    has_last_sha256=merger.last_known(owner),
                    wait_s=1.0,
                )
                reply = await downloads.calls.round(owner, request)
                if reply.HasField("share") and self._is_of_untrusted(reply.share):
                    kind = pb.SNAPSHOT_KIND_SHARE
                    snapshot = manifest_untrusted(reply.share, merger.settings.run_sha256, kind, specs)
                    manifest = snapshot.manifest
                    if snapshot.author != owner or manifest.round != roster.round or manifest.part != index:
                        raise BadBytesError("a share of another peer, round or index than asked for", code="bad-round")
                    held = empty_held(snapshot)
                    await downloads.pull(held, range(snapshot.num_chunks), [owner])
                    # A share is used as it is, and its owner can write anything into it.
                    await check_finite(held.part(0, size_bytes))
                    return held.buffer
            except BadBytesError as error:
                downloads.blame(owner, error)
                return None
            except PeerError as error:
                downloads.blame(owner, error)
            await asyncio.sleep(_ASK_AGAIN_S)
        return None

    def _is_of_untrusted(self, signed: pb.Signed) -> bool:
        """Return whether a share belongs to this roster: its owner may be merging a different one."""
        _, manifest = open_signed_untrusted(signed, "manifest", self._merger.settings.run_sha256, pb.Manifest)
        return manifest.roster_sha256.hex() == self._roster.digest


def _check_entry(entry: RoundPublication, held: HeldSnapshot) -> None:
    manifest = held.snapshot.manifest
    if (manifest.tokens, manifest.inner_steps) != (entry.tokens, entry.inner_steps):
        raise UnobtainableError(entry.peer)  # the roster contradicts the manifest that it points to


def _chunks(pieces: Sequence[GradientPiece]) -> range:
    """Return the chunks of a body that has these pieces one after the other."""
    first, last = pieces[0], pieces[-1]
    return range(first.at // CHUNK_BYTES, math.ceil(last.ends_at / CHUNK_BYTES))
