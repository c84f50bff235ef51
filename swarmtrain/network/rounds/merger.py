"""Pull and average the pseudo-gradients that a roster names, whole or in shares.

In a small group every peer pulls everything and averages it. On a roster of more than `share_above` peers each averages
one range of chunks over the whole roster, and the others pull that range's result from it, so a round moves as many
bytes as an all-reduce. Who averages how much may follow from the links (`protocol.rounds.roles`): then each share is
averaged in pieces, which the others pull while the next ones are made. A peer that cannot get a share, or a piece of
one, averages it itself from the hashes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, open_signed_untrusted
from swarmtrain.network.rounds.downloads import Downloads, WaitsFor, check_finite
from swarmtrain.network.rounds.gradient_groups import GradientGroups, GradientPiece
from swarmtrain.network.rounds.roster import check_publication
from swarmtrain.network.snapshots.store import (
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
from swarmtrain.protocol.rounds.link_claims import AveragingTimes
from swarmtrain.protocol.rounds.roles import MAX_PIECES, PIECES_AT_ONCE, share_pieces
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication, share_ranges, sources_of
from swarmtrain.protocol.rounds.share_waits import MergeLimit, ShareWaits, author_due_s
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.run_batch import BatchTarget
from swarmtrain.v1 import snapshot_pb2 as pb
from swarmtrain.words import short_peer

_log = logging.getLogger("swarmtrain.network.rounds.runner")
_ASK_AGAIN_S = 0.1  # between two questions for a share
_NAMED = 6  # peers that the log names with their shares
_FIND_AT_ONCE = 16  # publications whose manifests are looked for at once
_LOOK_S = 0.05  # between two looks whether a piece can be averaged
_OTHERS_TOO_S = 1.0
"""Seconds to wait, once one publication cannot be had, for others that cannot either: each would cost a roster more."""
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
    target: BatchTarget | None = None
    """Size of the batches that all make together; None: a round has no such number."""
    dtype: str = "float32"
    """Type of the numbers of publications; what they are averaged to is fp32."""

    @cached_property
    def groups(self) -> GradientGroups:
        """Groups of tensors that a pseudo-gradient may leave out."""
        return GradientGroups(self.specs, self.dtype)


@dataclass(frozen=True, kw_only=True)
class ShareOwners:
    """What is known of the peers that average shares.

    A request for a share carries the hash of the roster that the owner applied last, `last_known(owner)`: the owner
    then need not repeat that roster in its reply. `averaging_times` returns how long averaging a roster should take,
    None if that is unknown. `limit_s` returns the seconds that the authors among some peers have to deliver what this
    peer averages: with these shares, equal ones if they are empty, and everything if they are None. `judged` is called
    with an owner and whether its share came in time.
    """

    last_known: Callable[[str], bytes]
    averaging_times: Callable[[Roster], AveragingTimes | None] = lambda roster: None
    limit_s: Callable[[Sequence[str], Sequence[int] | None], float] = lambda peers, shares: math.inf
    judged: Callable[[str, bool], None] = lambda owner, in_time: None


@dataclass(frozen=True)
class AuthorPatience:
    """How long the sources of publications are waited for: `waits_for` is for `Downloads.pull`, and all authors have
    `limit` together."""

    waits_for: WaitsFor
    limit: MergeLimit

    def left_s(self) -> float:
        """Return the seconds that the authors have left."""
        return self.limit.due_s - swarm_time()


class UnobtainableError(Exception):
    """No peer could deliver the publications of `peers`."""

    def __init__(self, *peers: str) -> None:
        super().__init__(f"nobody could deliver the publication of {', '.join(sorted(peers))}")
        self.peers = frozenset(peers)


class Merger:
    """Averages the publications of rosters."""

    def __init__(
        self,
        identity: Identity,
        downloads: Downloads,
        membership: Membership,
        settings: RoundSettings,
        average: Average,
        owners: ShareOwners,
    ) -> None:
        self.identity, self.downloads, self.membership, self.settings = identity, downloads, membership, settings
        self.owners = owners
        self._average = average

    async def merge(
        self,
        roster: Roster,
        name: str,
        publications: dict[str, HeldSnapshot],
        share_ready: Callable[[Sequence[HeldSnapshot]], None],
    ) -> bytearray:
        """Return the mean of a roster's publications that are finite, as bytes; zero where none has a group.

        `publications` holds the known publications of the round by peer; publications that this merge had to fetch are
        added to it. `name` is the name that others give to the signed roster. `share_ready` is called with the
        pieces of this peer's share that are averaged, each time there are more, if the merge has shares. Raises
        UnobtainableError.
        """

        async def find(entry: RoundPublication) -> None:
            held = publications.get(entry.peer)
            if held is None or held.snapshot.sha256 != entry.snapshot:
                held = await self._find(roster, entry)
                if entry.peer != self.identity.peer_id:
                    publications[entry.peer] = held
            _check_entry(entry, held)
            found[entry.peer] = held

        found: dict[str, HeldSnapshot] = {}
        for first in range(0, len(roster.entries), _FIND_AT_ONCE):
            await run_together(find(entry) for entry in roster.entries[first : first + _FIND_AT_ONCE])
        entries = [found[peer] for peer in roster.peers]
        if len(entries) <= self.settings.share_above:
            return await self.average_range(
                roster, entries, (0, self.settings.groups.total_bytes), self.patience(roster)
            )
        return await _MergeInShares(self, roster, name, entries, share_ready).run()

    def roles_in_words(self, roster: Roster) -> str:
        """Say who averages how much of a roster's mean, for the log."""
        if len(roster.entries) <= self.settings.share_above:
            return "each peer all of it"
        if not roster.shares:
            return "in equal shares"
        total, owners = sum(roster.shares), sorted(zip(roster.shares, roster.peers, strict=True), reverse=True)
        said = [f"{self._name(peer)} {share / total:.0%}" for share, peer in owners[:_NAMED] if share]
        more = sum(share > 0 for share in roster.shares) - len(said)
        return ", ".join([*said, *([f"{more} more"] if more else [])])

    def _name(self, peer: str) -> str:
        info = self.membership.info(peer)
        return "this peer" if peer == self.identity.peer_id else (info.name if info else "") or short_peer(peer)

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

    def patience(self, roster: Roster, times: AveragingTimes | None = None) -> AuthorPatience:
        """Return how long the sources of this roster's publications are waited for from now on: one that lives and
        brings nothing for as long as its link may be the slow one, and all together for one limit."""
        began_s, silence_s = swarm_time(), self.settings.silence_s
        limit_s = self.limit_s(roster)
        places = {peer: place for place, peer in enumerate(roster.peers)}

        def waits_for(source: str, quiet_s: float) -> bool:
            if self.membership.state(source) in (PeerState.LOST, PeerState.LEFT):
                return False
            if times is None or source not in places:
                return quiet_s < silence_s
            now = swarm_time()
            pair_s = times.pairs_s[places[source]]
            return now < author_due_s(began_s, now - quiet_s, pair_s, times.everyone_s, silence_s, limit_s)

        return AuthorPatience(waits_for, MergeLimit(began_s, limit_s))

    def limit_s(self, roster: Roster) -> float:
        """Return the seconds that the authors on a roster have."""
        in_shares = len(roster.entries) > self.settings.share_above
        return self.owners.limit_s(roster.peers, roster.shares if in_shares else None)

    async def pull_whole(self, held: HeldSnapshot, sources: Sequence[str]) -> None:
        """Pull a publication of a small group, in which each peer pulls all of each. Raises UnreachableError."""
        limit = MergeLimit(swarm_time(), self.owners.limit_s([self.identity.peer_id, *sources], None))
        chunks = range(held.snapshot.num_chunks)
        await self.downloads.pull(held, chunks, sources, None, lambda: limit.due_s - swarm_time())

    async def _fetch(
        self,
        roster: Roster,
        entry: RoundPublication,
        held: HeldSnapshot,
        pieces: Sequence[GradientPiece],
        patience: AuthorPatience,
    ) -> bool:
        """Pull pieces of a publication; return False if nobody delivers them in time."""
        if entry.peer == self.identity.peer_id and held.complete:
            return True
        limit, sources = patience.limit, self._sources(roster, entry.peer)
        limit.asked()
        try:
            await self.downloads.pull(held, _chunks(pieces), sources, patience.waits_for, patience.left_s)
            return True
        except UnreachableError as error:
            _log.info("round %d: the publication of %s: %s", roster.round, self._name(entry.peer), error)
            return False
        finally:
            limit.ended(swarm_time())

    def rotated(self, items: list[_T]) -> list[_T]:
        """Return the same items, starting from an item that depends on this peer, so that not all peers pull from the
        same source first."""
        start = int.from_bytes(self.identity.peer_id[-4:].encode(), "big") % max(1, len(items))
        return items[start:] + items[:start]

    async def average_range(
        self, roster: Roster, entries: Sequence[HeldSnapshot], bounds: tuple[int, int], patience: AuthorPatience
    ) -> bytearray:
        """Return the weighted mean of a range of bytes of the gradient, as (start, end), over the roster, in roster
        order.

        Each group of an adapter is the mean of the publications that have it. Raises UnobtainableError.
        """
        groups, lacking, (start, end) = self.settings.groups, list[str](), bounds
        pieces = [groups.pieces(held.snapshot, start, end) for held in entries]

        async def fetch(entry: RoundPublication, held: HeldSnapshot, its: Sequence[GradientPiece]) -> None:
            if not await self._fetch(roster, entry, held, its, patience):
                lacking.append(entry.peer)

        wanted = [each for each in zip(roster.entries, entries, pieces, strict=True) if each[2]]
        await run_together(fetch(*each) for each in self.rotated(wanted))
        if lacking:
            raise UnobtainableError(*lacking)
        return await self._mean(roster, wanted, start, end)

    async def average_pieces(
        self,
        roster: Roster,
        entries: Sequence[HeldSnapshot],
        ranges: Sequence[tuple[int, int]],
        averaged: Callable[[int, bytearray], Awaitable[None]],
        patience: AuthorPatience,
    ) -> None:
        """Average byte ranges of the gradient that follow each other, and call `averaged` with each one's number and
        mean as soon as its bytes are here. Raises UnobtainableError."""
        groups, lacking = self.settings.groups, list[str]()

        async def fetch(entry: RoundPublication, held: HeldSnapshot) -> None:
            its = groups.pieces(held.snapshot, ranges[0][0], ranges[-1][1])
            if its and not await self._fetch(roster, entry, held, its, patience):
                lacking.append(entry.peer)

        async def average() -> None:
            for number, (start, end) in enumerate(ranges):
                pieces = [groups.pieces(held.snapshot, start, end) for held in entries]
                wanted = [each for each in zip(roster.entries, entries, pieces, strict=True) if each[2]]
                while not all(chunk in held.have for _, held, its in wanted for chunk in _chunks(its)):
                    if lacking:
                        await asyncio.sleep(_OTHERS_TOO_S)
                        raise UnobtainableError(*lacking)
                    await asyncio.sleep(_LOOK_S)
                await averaged(number, await self._mean(roster, wanted, start, end))

        fetches = [fetch(*each) for each in zip(roster.entries, entries, strict=True)]
        await run_together([average(), *self.rotated(fetches)])

    async def _mean(
        self,
        roster: Roster,
        wanted: Sequence[tuple[RoundPublication, HeldSnapshot, Sequence[GradientPiece]]],
        start: int,
        end: int,
    ) -> bytearray:
        """Return the weighted mean of bytes `start` to `end`, which are here.

        In shares a publication with numbers that are not finite is left out of the chunks that have them: what is left
        out then does not depend on who averages which chunks.
        """
        groups, mean, refused = self.settings.groups, bytearray(end - start), set[str]()
        in_shares = len(roster.entries) > self.settings.share_above
        for first, last in groups.segments(start, end, by_chunk=in_shares):
            have = [
                (entry, held.part(*groups.in_body(piece, first, last)))
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
    """Merge in which each peer on the roster averages a share, in one piece or, if shares follow from the links, in
    many."""

    def __init__(
        self,
        merger: Merger,
        roster: Roster,
        name: str,
        entries: Sequence[HeldSnapshot],
        share_ready: Callable[[Sequence[HeldSnapshot]], None],
    ) -> None:
        self._merger, self._roster, self._name, self._entries = merger, roster, name, entries
        self._share_ready = share_ready
        me, groups = merger.identity.peer_id, merger.settings.groups
        self._own = roster.peers.index(me) if me in roster.peers else None
        self._mean = bytearray(groups.total_bytes)
        ranges = share_ranges(groups.num_chunks, len(entries), roster.shares)
        self._pieces = [share_pieces(chunks) if roster.shares else [chunks] for chunks in ranges]
        self._roster_s = swarm_time()
        self._times = merger.owners.averaging_times(roster) if roster.shares else None
        sizes, silence_s = [len(chunks) for chunks in ranges], merger.settings.silence_s
        limit_s = merger.limit_s(roster)
        self._until_s = self._roster_s + limit_s
        """Time after which a piece that still comes from its owner is given up."""
        self._waits = ShareWaits(self._roster_s, sizes, self._own, self._times, silence_s, limit_s)

    async def run(self) -> bytearray:
        """Return the mean. Raises UnobtainableError."""
        await run_together(self._fill(index) for index in self._merger.rotated(list(range(len(self._pieces)))))
        return self._mean

    async def _fill(self, index: int) -> None:
        pieces = [(number, chunks) for number, chunks in enumerate(self._pieces[index]) if chunks]
        if not pieces:
            return
        if index == self._own:
            await self._average_own(index)
            return
        if missing := await self._pull_all(index, pieces):
            await self._average_missing([chunks for _, chunks in missing])

    async def _average_missing(self, pieces: Sequence[range]) -> None:
        """Average pieces of another's share. Their authors have one time for all of them together."""
        patience = self._merger.patience(self._roster, self._times)

        async def average(run: list[tuple[int, int]]) -> None:
            async def averaged(number: int, part: bytearray) -> None:
                start, end = run[number]
                self._mean[start:end] = part

            await self._merger.average_pieces(self._roster, self._entries, run, averaged, patience)

        runs: list[list[tuple[int, int]]] = []
        for start, end in map(self._bytes, pieces):
            if runs and runs[-1][-1][1] == start:
                runs[-1].append((start, end))
            else:
                runs.append([(start, end)])
        await run_together(average(run) for run in runs)

    async def _average_own(self, index: int) -> None:
        """Average this peer's own share piece by piece, and let the others pull what is ready."""
        ranges, made = [self._bytes(chunks) for chunks in self._pieces[index]], list[HeldSnapshot]()

        async def averaged(number: int, part: bytearray) -> None:
            start, end = ranges[number]
            self._mean[start:end] = part
            made.append(await self._publish(self._part(index, self._pieces[index][number]), part))
            if len(made) == len(ranges):
                now, num = swarm_time(), len(ranges)
                self._waits.own_is_ready(now)
                took_s = now - self._roster_s
                _log.info("round %d: own share averaged in %d pieces in %.2f s", self._roster.round, num, took_s)
            self._share_ready(made)

        patience = self._merger.patience(self._roster, self._times)
        await self._merger.average_pieces(self._roster, self._entries, ranges, averaged, patience)

    def _bytes(self, chunks: range) -> tuple[int, int]:
        return chunks.start * CHUNK_BYTES, min(chunks.stop * CHUNK_BYTES, len(self._mean))

    def _part(self, index: int, chunks: range) -> int:
        """Return the number that the manifest of a piece carries, so that no piece can be taken for another: its first
        chunk, or its owner's place on a roster of equal shares."""
        return chunks.start if self._roster.shares else index

    async def _publish(self, number: int, part: bytearray) -> HeldSnapshot:
        """Let others pull a piece, in whose manifest is this number."""
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self._merger.settings.run_sha256),
            kind=pb.SNAPSHOT_KIND_SHARE,
            round=self._roster.round,
            part=number,
            roster_sha256=bytes.fromhex(self._roster.digest),
        )
        specs = [TensorSpec("share", (len(part) // 4,))]
        held = await asyncio.to_thread(build_snapshot, self._merger.identity, manifest, specs, Body([part]))
        self._merger.downloads.store.add(held)
        return held

    # ------------------------------------------------------------- shares of others

    async def _pull_all(self, index: int, pieces: Sequence[tuple[int, range]]) -> list[tuple[int, range]]:
        """Pull an owner's pieces, a few at once; return those that are lost or overdue."""
        merger, owner, missing = self._merger, self._roster.peers[index], list(pieces)
        ready: asyncio.Queue[tuple[tuple[int, range], pb.Signed] | None] = asyncio.Queue()
        is_bad = asyncio.Event()

        async def ask() -> None:
            """Ask for the first piece that is not ready yet: the answer comes once it is, with all that are by then."""
            at = 0
            while at < len(pieces) and not is_bad.is_set() and not self._is_lost(index):
                manifests = await self._manifests(index, pieces[at][0])
                for piece, signed in zip(pieces[at:], manifests, strict=False):
                    ready.put_nowait((piece, signed))
                at += len(manifests)
                if not manifests:
                    await asyncio.sleep(_ASK_AGAIN_S)
            for _ in range(PIECES_AT_ONCE):
                ready.put_nowait(None)

        async def pull_some() -> None:
            while (one := await ready.get()) is not None:
                piece, signed = one
                try:
                    part = await self._pull(index, piece[1], signed)
                except BadBytesError as error:
                    merger.downloads.blame(owner, error)
                    is_bad.set()
                    return
                if part is not None:
                    start, end = self._bytes(piece[1])
                    self._mean[start:end] = part
                    self._waits.came(index, len(piece[1]), swarm_time())
                    missing.remove(piece)

        await run_together([ask(), *(pull_some() for _ in range(PIECES_AT_ONCE))])
        if not missing or not self._is_gone(owner):
            merger.owners.judged(owner, not missing)
        return missing

    def _is_gone(self, owner: str) -> bool:
        return self._merger.membership.state(owner) in (PeerState.LOST, PeerState.LEFT)

    def _left_s(self, index: int) -> float:
        return max(self._until_s, self._waits.due_s(index)) - swarm_time()

    def _is_lost(self, index: int) -> bool:
        return swarm_time() >= self._waits.due_s(index) or self._is_gone(self._roster.peers[index])

    async def _manifests(self, index: int, number: int) -> list[pb.Signed]:
        """Ask an owner for the pieces of its share from this number on. Returns the manifests of those that are
        ready."""
        owner = self._roster.peers[index]
        request = pb.RoundRequest(
            round=self._roster.round,
            has_publication=True,
            has_roster_sha256=bytes.fromhex(self._name),
            has_last_sha256=self._merger.owners.last_known(owner),
            share_piece=number,
            wait_s=1.0,
        )
        try:
            reply = await self._merger.downloads.calls.round(owner, request)
            first, size_bytes = self._part_and_bytes(index, self._pieces[index][number])
            if reply.HasField("share") and self._is_of_untrusted(reply.share, first, size_bytes):
                return [reply.share, *reply.more_shares[:MAX_PIECES]]
        except PeerError as error:
            self._merger.downloads.blame(owner, error)
        return []

    async def _pull(self, index: int, chunks: range, signed: pb.Signed) -> bytearray | None:
        """Pull a piece of the share of the peer number `index` on the roster. Returns None if it is lost or overdue.

        Raises BadBytesError if it is not what the owner owes.
        """
        merger, roster, downloads = self._merger, self._roster, self._merger.downloads
        owner, (part, size_bytes) = roster.peers[index], self._part_and_bytes(index, chunks)
        specs = [TensorSpec("share", (size_bytes // 4,))]
        snapshot = manifest_untrusted(signed, merger.settings.run_sha256, pb.SNAPSHOT_KIND_SHARE, specs)
        manifest = snapshot.manifest
        if snapshot.author != owner or manifest.round != roster.round or manifest.part != part:
            raise BadBytesError("a share of another peer, round or index than asked for", code="bad-round")
        if manifest.roster_sha256.hex() != roster.digest:
            raise BadBytesError("a piece of another share than the one before it", code="bad-round")
        held = empty_held(snapshot)
        while not self._is_lost(index):
            try:
                await downloads.pull(held, range(snapshot.num_chunks), [owner], None, lambda: self._left_s(index))
            except UnreachableError as error:
                downloads.blame(owner, error)
                await asyncio.sleep(_ASK_AGAIN_S)
                continue
            # A share is used as it is, and its owner can write anything into it.
            await check_finite(held.part(0, size_bytes))
            return held.buffer
        return None

    def _part_and_bytes(self, index: int, chunks: range) -> tuple[int, int]:
        """Return the number in the manifest of a piece, and the piece's size."""
        start, end = self._bytes(chunks)
        return self._part(index, chunks), end - start

    def _is_of_untrusted(self, signed: pb.Signed, part: int, size_bytes: int) -> bool:
        """Return whether a share belongs to this roster: its owner may be merging a different one, or one of the same
        publications with other shares."""
        _, manifest = open_signed_untrusted(signed, "manifest", self._merger.settings.run_sha256, pb.Manifest)
        is_here = (manifest.part, manifest.total_bytes) == (part, size_bytes)
        return is_here and manifest.roster_sha256.hex() == self._roster.digest


def _check_entry(entry: RoundPublication, held: HeldSnapshot) -> None:
    manifest = held.snapshot.manifest
    if (manifest.tokens, manifest.inner_steps) != (entry.tokens, entry.inner_steps):
        raise UnobtainableError(entry.peer)  # the roster contradicts the manifest that it points to


def _chunks(pieces: Sequence[GradientPiece]) -> range:
    """Return the chunks of a body that has these pieces one after the other."""
    first, last = pieces[0], pieces[-1]
    return range(first.at // CHUNK_BYTES, math.ceil(last.ends_at / CHUNK_BYTES))
