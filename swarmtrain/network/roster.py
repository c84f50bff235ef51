"""Synchronous rounds over the network: asks, pulls, signs and merges as `membership.rosters.decide` says.

Runs in the network thread. The averaging itself is handed in (it needs torch); everything else here is bytes.
A peer that has ended its own round asks the others about it: calls that are answered at once when there is news
and are held for two seconds otherwise. The same call tells how far a peer is, hands out its publication's manifest,
the roster, and the share it averaged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.membership.lifecycle import Membership
from swarmtrain.membership.rosters import (
    Apply,
    CatchUp,
    Publication,
    Roster,
    RoundView,
    Sign,
    better_roster,
    decide,
    must_refetch,
    peers_to_ask,
    share_ranges,
)
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, peer_bytes, peer_id_from_bytes_untrusted
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.signing import open_signed_untrusted, payload_sha256, sign
from swarmtrain.network.snapshots import (
    CHUNK_BYTES,
    Body,
    Held,
    PullLimits,
    Snapshot,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_chunks,
    pull_manifest,
)
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Average", "Merged", "NewState", "Outcome", "RoundSettings", "Rounds", "roster_untrusted"]

_log = logging.getLogger(__name__)
_HOLD_S = 2.0
_RETRY_S = 0.25
_KEEP_ROUNDS = 3
_MAX_ROSTER = 4096

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


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The mean pseudo-gradient of a roster, as the bytes of one fp32 vector."""

    roster: Roster
    roster_sha256: str
    mean: bytearray
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NewState:
    """The state of those who finished the round without us: outer parameters, then momentum, fp32."""

    held: Held
    from_peer: str
    reason: str


Outcome = Merged | NewState


def roster_untrusted(signed: pb.Signed, run_sha256: str, max_tokens: int) -> Roster:
    """A checked roster; BadBytesError if it is forged, unsorted, or claims what nobody can have done."""
    signer, message = open_signed_untrusted(signed, "roster", run_sha256, pb.Roster)
    if not 1 <= len(message.entries) <= _MAX_ROSTER or message.attempt > _MAX_ROSTER:
        raise BadBytesError("a roster of a size or attempt out of range")
    entries = tuple(
        Publication(
            peer=peer_id_from_bytes_untrusted(entry.peer),
            snapshot=entry.snapshot_sha256.hex(),
            tokens=entry.tokens,
            inner_steps=entry.inner_steps,
        )
        for entry in message.entries
    )
    peers = [entry.peer for entry in entries]
    if peers != sorted(set(peers)) or any(len(entry.snapshot) != 64 for entry in entries):
        raise BadBytesError("a roster that is not sorted by peer, or with a malformed hash")
    if any(not 0 < entry.tokens <= max_tokens for entry in entries):
        raise BadBytesError("a roster that counts more tokens than a round has")
    return Roster(round=message.round, signer=signer, entries=entries, attempt=message.attempt)


def _roster_message(roster: Roster) -> pb.Roster:
    message = pb.Roster(round=roster.round, attempt=roster.attempt)
    for entry in roster.entries:
        message.entries.add(
            peer=peer_bytes(entry.peer),
            snapshot_sha256=bytes.fromhex(entry.snapshot),
            tokens=entry.tokens,
            inner_steps=entry.inner_steps,
        )
    return message


@dataclass
class _Round:
    """What is known of one round."""

    publications: dict[str, Held] = field(default_factory=dict)
    rosters: dict[str, tuple[Roster, pb.Signed]] = field(default_factory=dict)
    share: Held | None = None
    unobtainable: set[str] = field(default_factory=set)

    def best(self) -> tuple[Roster, pb.Signed] | None:
        roster = better_roster([roster for roster, _ in self.rosters.values()])
        return None if roster is None else next(pair for pair in self.rosters.values() if pair[0] == roster)


@dataclass
class Rounds:
    """This peer's side of all rounds: answers the others and finishes its own."""

    identity: Identity
    calls: PeerCalls
    store: SnapshotStore
    membership: Membership
    settings: RoundSettings
    average: Average
    refused: Callable[[str, PeerError], None] = lambda peer, error: None
    current_round: int = 0
    inner_steps_done: int = 0
    participating: bool = False
    waiting_for: str = ""
    last_roster: tuple[Roster, pb.Signed] | None = None
    must_fetch_from: str = ""
    _rounds: dict[int, _Round] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # ------------------------------------------------------------- answering

    async def answer(self, request: pb.RoundRequest) -> pb.RoundReply:
        """What is known about a round; waits up to `request.wait_s` for something the caller does not know."""
        ends_s = swarm_time() + min(request.wait_s, _HOLD_S)
        while True:
            reply, is_news = self._reply(request)
            left_s = ends_s - swarm_time()
            if is_news or left_s <= 0:
                return reply
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left_s)

    def _reply(self, request: pb.RoundRequest) -> tuple[pb.RoundReply, bool]:
        reply = pb.RoundReply(
            current_round=self.current_round,
            inner_steps_done=self.inner_steps_done,
            participating=self.participating,
        )
        if self.last_roster is not None:
            reply.last_roster.CopyFrom(self.last_roster[1])
        known = self._rounds.get(request.round, _Round())
        is_news = self.current_round > request.round
        own = known.publications.get(self.identity.peer_id)
        if own is not None and not request.has_publication:
            reply.publication.CopyFrom(own.snapshot.signed)
            is_news = True
        best = known.best()
        if best is not None and payload_sha256(best[1]) != request.has_roster_sha256.hex():
            reply.roster.CopyFrom(best[1])
            is_news = True
        if known.share is not None and not request.has_share:
            reply.share.CopyFrom(known.share.snapshot.signed)
            is_news = True
        return reply, is_news

    def tell(self) -> None:
        """Wake everyone who waits for news."""
        self._news.set()
        self._news = asyncio.Event()

    # ------------------------------------------------------------- finishing a round

    async def finish(self, round: int, publication: Held, started_at_s: float) -> Outcome:
        """Publish, agree on a roster and merge it; returns the mean, or the state of those who went on without us."""
        known = self._rounds.setdefault(round, _Round())
        known.publications[self.identity.peer_id] = publication
        self.store.add(publication)
        self.tell()
        ended_at_s = swarm_time()
        deadline_s = max(ended_at_s, started_at_s + self.settings.round_limit_s)
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                outcome = await self._step(round, known, (ended_at_s, deadline_s), tasks)
                if outcome is not None:
                    return outcome
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            self.waiting_for = ""

    async def _step(
        self, round: int, known: _Round, times_s: tuple[float, float], tasks: dict[str, asyncio.Task[None]]
    ) -> Outcome | None:
        news = self._news
        view = self._view(round, known, times_s)
        decision = decide(view, swarm_time())
        self.waiting_for = decision.reason
        if isinstance(decision, Sign):
            self._sign(round, known, decision)
        elif isinstance(decision, Apply):
            return await self._merge(round, known, decision.roster)
        elif isinstance(decision, CatchUp):
            state = await self.fetch_state(decision.sources, round + 1, decision.reason)
            if state is not None:
                return state
            await asyncio.sleep(_RETRY_S)
        else:
            self._keep_asking(round, known, view, tasks)
            wait_s = min(max(decision.until_s - swarm_time(), 0.01), 0.5)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), wait_s)
        return None

    def _view(self, round: int, known: _Round, times_s: tuple[float, float]) -> RoundView:
        volunteers = [info for info in self.membership.volunteers() if info.peer != self.identity.peer_id]
        return RoundView(
            me=self.identity.peer_id,
            round=round,
            ended_at_s=times_s[0],
            deadline_s=times_s[1],
            silence_s=self.settings.silence_s,
            share_above=self.settings.share_above,
            live=frozenset(info.peer for info in volunteers if info.round <= round),
            ahead=frozenset(info.peer for info in volunteers if info.round > round),
            announced={peer: _publication(held.snapshot) for peer, held in known.publications.items()},
            held=frozenset(peer for peer, held in known.publications.items() if held.complete),
            rosters=[roster for roster, _ in known.rosters.values()],
            heard_at_s={info.peer: self.membership.heard_s(info.peer) for info in volunteers},
            unobtainable=frozenset(known.unobtainable),
        )

    def _sign(self, round: int, known: _Round, decision: Sign) -> None:
        roster = Roster(round=round, signer=self.identity.peer_id, entries=decision.entries, attempt=decision.attempt)
        signed = sign(self.identity, "roster", self.settings.run_sha256, _roster_message(roster))
        known.rosters[payload_sha256(signed)] = (roster, signed)
        _log.info("round %d: signed a roster of %d: %s", round, len(roster.entries), decision.reason)
        self.tell()

    # ------------------------------------------------------------- asking

    def _keep_asking(self, round: int, known: _Round, view: RoundView, tasks: dict[str, asyncio.Task[None]]) -> None:
        """One asking task a peer, one pulling task a publication; those no longer needed are cancelled."""
        wanted = {f"ask {peer}": peer for peer in peers_to_ask(view, swarm_time())}
        for name in [name for name in tasks if name.startswith("ask ") and name not in wanted]:
            tasks.pop(name).cancel()
        for name, peer in wanted.items():
            if name not in tasks or tasks[name].done():
                tasks[name] = asyncio.create_task(self._ask(round, known, peer))
        if max(len(view.live) + 1, len(known.publications)) > self.settings.share_above:
            return
        for peer, held in known.publications.items():
            name = f"pull {held.snapshot.sha256}"
            if not held.complete and peer not in known.unobtainable and (name not in tasks or tasks[name].done()):
                tasks[name] = asyncio.create_task(self._prefetch(known, peer, held))

    async def _ask(self, round: int, known: _Round, peer: str) -> None:
        """Ask one peer about the round, again and again."""
        while True:
            best = known.best()
            request = pb.RoundRequest(
                round=round,
                has_publication=peer in known.publications,
                has_roster_sha256=bytes.fromhex(payload_sha256(best[1])) if best else b"",
                has_share=True,
                wait_s=_HOLD_S,
            )
            try:
                reply = await self.calls.round(peer, request)
                self._read_reply_untrusted(round, known, peer, reply)
            except BadBytesError as error:
                self.refused(peer, error)
                await asyncio.sleep(_HOLD_S)
            except PeerError as error:
                _log.debug("asking %s about round %d: %s", peer, round, error)
                self.tell()
                await asyncio.sleep(_RETRY_S)

    def _read_reply_untrusted(self, round: int, known: _Round, peer: str, reply: pb.RoundReply) -> None:
        run = self.settings.run_sha256
        self.membership.heard(peer, swarm_time(), round=reply.current_round, inner_steps_done=reply.inner_steps_done)
        if reply.HasField("publication"):
            snapshot = manifest_untrusted(reply.publication, run, pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, self.settings.specs)
            self._check_publication(round, peer, snapshot)
            known.publications.setdefault(peer, empty_held(snapshot))
        if reply.HasField("roster"):
            roster = roster_untrusted(reply.roster, run, self.settings.max_tokens)
            if roster.round != round:
                raise BadBytesError("a roster of another round")
            known.rosters[payload_sha256(reply.roster)] = (roster, reply.roster)
        if reply.HasField("last_roster") and self.last_roster is not None:
            heard = roster_untrusted(reply.last_roster, run, self.settings.max_tokens)
            if must_refetch(self.last_roster[0], heard):
                self.must_fetch_from = peer
        self.tell()

    def _check_publication(self, round: int, peer: str, snapshot: Snapshot) -> None:
        manifest = snapshot.manifest
        if snapshot.author != peer or manifest.round != round:
            raise BadBytesError("a publication of another peer or round")
        if not 0 < manifest.tokens <= self.settings.max_tokens:
            raise BadBytesError(f"a publication that claims {manifest.tokens} tokens, more than a round has")

    async def _prefetch(self, known: _Round, peer: str, held: Held) -> None:
        with contextlib.suppress(UnreachableError):
            others = [info.peer for info in self.membership.volunteers() if info.peer != peer]
            await self._pull(held, range(held.snapshot.num_chunks), [peer, *others])
            self.store.add(held)
            self.tell()

    async def _pull(self, held: Held, chunks: range, sources: Sequence[str]) -> None:
        sources = [source for source in sources if source != self.identity.peer_id]
        await pull_chunks(held, chunks, sources, self.calls.open_pull, self.settings.pull, self._blame)

    def _blame(self, peer: str, error: PeerError) -> None:
        if isinstance(error, BadBytesError):
            self.refused(peer, error)
        else:
            _log.debug("pulling from %s: %s", peer, error)

    # ------------------------------------------------------------- merging

    async def _merge(self, round: int, known: _Round, roster: Roster) -> Merged | None:
        """Average what the roster names; None if that failed and the round has to be decided anew."""
        signed = next(signed for known_roster, signed in known.rosters.values() if known_roster == roster)
        try:
            await self._know_manifests(round, known, roster)
            num_chunks = known.publications[roster.entries[0].peer].snapshot.num_chunks
            if len(roster.entries) <= self.settings.share_above:
                mean, left_out = await self._average_range(known, roster, range(num_chunks))
            else:
                mean, left_out = await self._average_in_shares(round, known, roster, num_chunks)
        except _UnobtainableError as error:
            known.unobtainable.add(error.peer)
            self.tell()
            return None
        self.last_roster = (roster, signed)
        return Merged(roster=roster, roster_sha256=payload_sha256(signed), mean=mean, left_out=tuple(sorted(left_out)))

    async def _know_manifests(self, round: int, known: _Round, roster: Roster) -> None:
        """Make sure that the publication known of each peer is the one on the roster."""
        for entry in roster.entries:
            held = known.publications.get(entry.peer)
            if held is None or held.snapshot.sha256 != entry.snapshot:
                known.publications[entry.peer] = await self._find(round, roster, entry)

    async def _find(self, round: int, roster: Roster, entry: Publication) -> Held:
        for source in _sources(roster, entry.peer, self.identity.peer_id):
            try:
                signed = await pull_manifest(source, entry.snapshot, self.calls.open_pull, self.settings.pull)
                snapshot = manifest_untrusted(
                    signed, self.settings.run_sha256, pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, self.settings.specs
                )
                self._check_publication(round, entry.peer, snapshot)
                return empty_held(snapshot)
            except PeerError as error:
                self._blame(source, error)
        raise _UnobtainableError(entry.peer)

    async def _average_range(self, known: _Round, roster: Roster, chunks: range) -> tuple[bytearray, set[str]]:
        """The weighted mean of one range of chunks over the whole roster, in roster order."""

        async def bring(entry: Publication) -> None:
            held = known.publications[entry.peer]
            try:
                await self._pull(held, chunks, _sources(roster, entry.peer, self.identity.peer_id))
            except UnreachableError as error:
                raise _UnobtainableError(entry.peer) from error
            self.store.add(held)

        await asyncio.gather(*(bring(entry) for entry in roster.entries))
        total = known.publications[roster.entries[0].peer].snapshot.manifest.total_bytes
        start, end = chunks.start * CHUNK_BYTES, min(chunks.stop * CHUNK_BYTES, total)
        parts = [_part(known.publications[entry.peer], start, end) for entry in roster.entries]
        weights = [entry.tokens for entry in roster.entries]
        mean, left_out = await asyncio.to_thread(self.average, parts, weights)
        bad = {roster.entries[i].peer for i in left_out}
        for peer in bad:
            self.refused(peer, BadBytesError("a pseudo-gradient that is not finite"))
        return mean, bad

    async def _average_in_shares(
        self, round: int, known: _Round, roster: Roster, num_chunks: int
    ) -> tuple[bytearray, set[str]]:
        """Everyone on the roster averages one range; the others' ranges are pulled from them."""
        total = known.publications[roster.entries[0].peer].snapshot.manifest.total_bytes
        mean, left_out = bytearray(total), set[str]()
        ranges = share_ranges(num_chunks, len(roster.entries))

        async def fill(index: int) -> None:
            chunks, owner = ranges[index], roster.entries[index].peer
            if not chunks:
                return
            if owner == self.identity.peer_id:
                part, bad = await self._average_range(known, roster, chunks)
                left_out.update(bad)
                await self._publish_share(round, known, roster, index, part)
            else:
                found = await self._pull_share(round, roster, index, len(chunks) * CHUNK_BYTES, total)
                if found is None:
                    found, bad = await self._average_range(known, roster, chunks)
                    left_out.update(bad)
                part = found
            mean[chunks.start * CHUNK_BYTES : chunks.start * CHUNK_BYTES + len(part)] = part

        await asyncio.gather(*(fill(index) for index in range(len(ranges))))
        return mean, left_out

    async def _publish_share(self, round: int, known: _Round, roster: Roster, index: int, part: bytearray) -> None:
        best = known.best()
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.settings.run_sha256),
            kind=pb.SNAPSHOT_KIND_SHARE,
            round=round,
            part=index,
            roster_sha256=bytes.fromhex(payload_sha256(best[1])) if best else b"",
        )
        specs = [TensorSpec("share", (len(part) // 4,))]
        known.share = await asyncio.to_thread(build_snapshot, self.identity, manifest, specs, Body([part]))
        self.store.add(known.share)
        self.tell()

    async def _pull_share(
        self, round: int, roster: Roster, index: int, max_bytes: int, total_bytes: int
    ) -> bytearray | None:
        """The share that its owner averaged; None if it does not deliver within a few silences."""
        owner = roster.entries[index].peer
        start = share_ranges(-(-total_bytes // CHUNK_BYTES), len(roster.entries))[index].start * CHUNK_BYTES
        size = min(max_bytes, total_bytes - start)
        specs = [TensorSpec("share", (size // 4,))]
        give_up_s = swarm_time() + 4 * self.settings.silence_s
        while swarm_time() < give_up_s:
            try:
                request = pb.RoundRequest(round=round, has_publication=True, wait_s=_HOLD_S)
                reply = await self.calls.round(owner, request)
                if not reply.HasField("share"):
                    await asyncio.sleep(0.05)
                    continue
                snapshot = manifest_untrusted(reply.share, self.settings.run_sha256, pb.SNAPSHOT_KIND_SHARE, specs)
                if snapshot.author != owner or snapshot.manifest.round != round or snapshot.manifest.part != index:
                    raise BadBytesError("a share of another peer, round or index")
                held = empty_held(snapshot)
                await self._pull(held, range(snapshot.num_chunks), [owner])
                self.store.add(held)
                return held.buffer
            except PeerError as error:
                self._blame(owner, error)
                return None
        return None

    # ------------------------------------------------------------- states

    async def fetch_state(self, sources: Sequence[str], min_round: int, reason: str) -> NewState | None:
        """The newest state of the first source that delivers one of `min_round` or later."""
        for source in sources:
            try:
                reply = await self.calls.state(source, min_round)
                if not reply.HasField("manifest"):
                    continue
                snapshot = manifest_untrusted(
                    reply.manifest, self.settings.run_sha256, pb.SNAPSHOT_KIND_STATE, self.settings.state_specs
                )
                if snapshot.manifest.round < min_round:
                    raise BadBytesError("a state older than asked for")
                held = empty_held(snapshot)
                await self._pull(held, range(snapshot.num_chunks), [source])
                return NewState(held=held, from_peer=source, reason=reason)
            except PeerError as error:
                self._blame(source, error)
        return None

    def forget_before(self, round: int) -> None:
        """Drop what is known of rounds long past."""
        self._rounds = {r: known for r, known in self._rounds.items() if r > round - _KEEP_ROUNDS}
        self.store.forget_before(round)


class _UnobtainableError(Exception):
    def __init__(self, peer: str) -> None:
        super().__init__(f"nobody could deliver the publication of {peer}")
        self.peer = peer


def _sources(roster: Roster, author: str, me: str) -> list[str]:
    """Where to pull an author's publication from: itself, the signer, then everyone on the roster."""
    return [p for p in dict.fromkeys([author, roster.signer, *roster.peers]) if p != me]


def _publication(snapshot: Snapshot) -> Publication:
    manifest = snapshot.manifest
    return Publication(
        peer=snapshot.author, snapshot=snapshot.sha256, tokens=manifest.tokens, inner_steps=manifest.inner_steps
    )


def _part(held: Held, start: int, end: int) -> memoryview:
    if held.buffer is not None:
        return memoryview(held.buffer)[start:end]
    return memoryview(bytearray(held.body.read(start, end - start)))
