"""Synchronous rounds over the network: asks, signs and merges as `protocol.rosters.decide` says.

Runs in the network thread. A peer that has ended its own round asks the others about it: calls that are answered
at once when there is news, and are held for two seconds otherwise. The same call tells how far a peer is and what it
applied last, and hands out its publication's manifest, the roster, and the share it averaged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.catching_up import Check, NewState, WantedState, fetch_state, unchecked
from swarmtrain.network.chains import ChainStore, chain_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity
from swarmtrain.network.merging import Average, Merger, RoundSettings, UnobtainableError
from swarmtrain.network.roster import check_publication, publication_of, roster_untrusted, sign_roster
from swarmtrain.network.round_state import KnownRound, Merged, RoundWork
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.signing import payload_sha256
from swarmtrain.network.snapshots import Held, SnapshotStore, empty_held, manifest_untrusted
from swarmtrain.protocol.chains import Chain, ChainView, chain_view
from swarmtrain.protocol.lifecycle import Change, Membership
from swarmtrain.protocol.progress import Progress
from swarmtrain.protocol.rosters import (
    Apply,
    CatchUp,
    Roster,
    RoundView,
    Sign,
    Standing,
    Told,
    Wait,
    decide,
    idled,
    is_silent,
    peers_to_ask,
    pulls_whole,
    standings,
    worst_roster,
)
from swarmtrain.protocol.signers import Signers
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Merged", "NewState", "Outcome", "Rounds"]

_log = logging.getLogger(__name__)
_HOLD_S = 2.0
_RETRY_S = 0.25
_LOOK_S = 0.5
_KEEP_ROUNDS = 3
_SOURCES = 4
_MAX_ATTEMPTS = 8
_MAX_ROSTERS = 64
"""So many rosters of others are kept of a round, those that hold against the rest: signers cost nothing."""
_MAX_CHECKED = 256
_MAX_CHECKED_ENTRIES = 65_536
_CHAIN_AGAIN_S = 1.0
"""A peer is asked for its chain so often at most: checking it takes a while."""
_CHAIN_TRIES = 2
_CHAIN_SILENCES = 3
"""For so many times as long as one may be silent nothing is signed before chains are shown."""


Outcome = Merged | NewState


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
    guest: bool = True
    """Whether nobody waits for this peer's round: before its first, in that one, and after catching up."""
    away: bool = False
    """Whether this peer has said goodbye: whoever missed that, and asks, is told so."""
    report: Callable[[Change], None] = lambda change: None
    wanted: bool = False
    """Whether somebody has ended the round that this peer is in, and asked for this peer's part of it."""
    waiting_for: str = ""
    waiting_until_s: float = 0.0
    """Until when that may be, in swarm time; 0 when there is no such time."""
    last: tuple[Roster, pb.Signed] | None = None
    trains: bool = True
    """Whether this peer's own weights count for the chain that it is on: not those of an archive."""
    chains: ChainStore = field(default_factory=ChainStore)
    listening_since_s: float = -math.inf
    _signers: Signers = field(default_factory=Signers)
    _pending: dict[str, tuple[Roster, pb.Signed]] = field(default_factory=dict)
    _manifests: dict[str, list[pb.Signed]] = field(default_factory=dict)
    _told: dict[str, tuple[float, Told]] = field(default_factory=dict)
    _chain_asked_s: dict[str, float] = field(default_factory=dict)
    _last_sha256: dict[str, bytes] = field(default_factory=dict)
    _rounds: dict[int, KnownRound] = field(default_factory=dict)
    _checked: dict[str, Roster] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # ------------------------------------------------------------- answering

    async def answer(self, request: pb.RoundRequest) -> pb.RoundReply:
        """What is known about a round; waits up to `request.wait_s` for something the caller does not know."""
        ends_s = swarm_time() + min(request.wait_s, _HOLD_S)
        self.wanted = self.wanted or (request.round == self.current_round and not request.has_publication)
        while True:
            news = self._news
            reply, is_news = self._reply(request)
            left_s = ends_s - swarm_time()
            if is_news or not left_s > 0:
                return reply
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), left_s)

    def _reply(self, request: pb.RoundRequest) -> tuple[pb.RoundReply, bool]:
        reply = pb.RoundReply(
            current_round=self.current_round,
            inner_steps_done=self.inner_steps_done,
            participating=not (self.guest or self.away),
            away=self.away,
        )
        if self.last is not None and payload_sha256(self.last[1]) == request.has_last_sha256.hex():
            reply.same_last = True
        elif self.last is not None:
            reply.last_roster.CopyFrom(self.last[1])
        if request.wants_chain:
            reply.chain.CopyFrom(self.chains.shows(request.chain_known))
        known = self._rounds.get(request.round, KnownRound())
        is_news = self.away or self.current_round > request.round or request.wants_chain
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

    async def wait_for_round(self, round: int, limit_s: float) -> None:
        """Until this peer's state is of `round` or later, or `limit_s` have passed."""
        ends_s = swarm_time() + limit_s
        while self.current_round < round and swarm_time() < ends_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), ends_s - swarm_time())

    # ------------------------------------------------------------- moving on

    def advance(self, progress: Progress) -> None:
        """The outer step is done, or another's state was taken: this peer is in round `progress.round` now."""
        if progress.roster_sha256:
            self.last = self._pending.get(progress.roster_sha256, self.last)
            assert self.last is not None and self.last[0].digest == progress.roster_sha256, "a state without its roster"
            self.chains.move_to(*self.last, self._manifests.get(progress.roster_sha256, ()))
        self._pending.clear()
        self._manifests.clear()
        self.wanted = self.wanted and progress.round == self.current_round
        self.current_round, self.inner_steps_done = progress.round, 0
        self._rounds = {r: known for r, known in self._rounds.items() if r > progress.round - _KEEP_ROUNDS}
        self.store.forget_before(progress.round)
        self.tell()

    def know_roster(self, roster: Roster, signed: pb.Signed) -> None:
        """A roster that `advance` may name: of a state that was pulled, or read from an archive."""
        self._pending[roster.digest] = (roster, signed)

    def forget_peer(self, peer: str) -> None:
        """A peer that has long been gone."""
        self._told.pop(peer, None)
        self._last_sha256.pop(peer, None)
        self._chain_asked_s.pop(peer, None)

    def stood_still(self, now: float, *, forgives: bool = True) -> None:
        """This process did not run until `now`: what it missed is nobody else's silence, and may be a round's end.
        See `Membership.resume`."""
        self.listening_since_s = now
        self.membership.resume(now, forgives=forgives)

    @property
    def gap_s(self) -> float:
        """A process that comes so much later to something than it should has stood still."""
        return max(1.0, self.settings.silence_s / 4)

    # ------------------------------------------------------------- finishing a round

    async def finish(self, round: int, publication: Held, started_s: float) -> Outcome:
        """Publish, agree on a roster and merge it; returns the mean, or the state of those who went on without us."""
        known = self._rounds[round] = KnownRound(started_s=started_s, ended_s=swarm_time())
        known.publications[self.identity.peer_id] = publication
        self.store.add(publication)
        self.tell()
        work = RoundWork()
        try:
            while True:
                outcome = await self._step(round, known, work)
                if outcome is not None:
                    return outcome
        finally:
            view = self._view(round, known)
            self._name_unproved(known)
            self._give_up_on_silent(view, work.asking)
            self._signers.round_over(round, idled(view, swarm_time()), {r.signer for r in view.rosters})
            await work.cancel()
            self.waiting_for = ""
            known.keep_only(self.identity.peer_id)

    async def _step(self, round: int, known: KnownRound, work: RoundWork) -> Outcome | None:
        """Decide once, and do it or wait for news. A merge goes on beside the asking, and is given up for a better
        decision."""
        news = self._news
        if work.merge is not None and work.merge.done() and work.merge.result() is None:
            work.merge = None
        view = self._view(round, known)
        self._keep_asking(round, known, view, work)
        decision = decide(view, swarm_time())
        if isinstance(decision, Sign) and self._lacks_chains(known):
            decision = Wait(until_s=swarm_time() + _RETRY_S, reason="others are asked how they came to where they are")
        self.waiting_for = decision.reason
        self.waiting_until_s = decision.until_s if isinstance(decision, Wait) else 0.0
        wait_s = _LOOK_S
        if isinstance(decision, Apply):
            if work.merge is not None and work.merge.done() and work.merging == decision.roster.digest:
                return work.merge.result()
            if work.merging != decision.roster.digest or work.merge is None:
                await work.give_up_merge()
                work.merging = decision.roster.digest
                signed = next(signed for kept, signed in known.rosters.values() if kept == decision.roster)
                work.merge = asyncio.create_task(self._merge(round, known, decision.roster, signed))
                work.merge.add_done_callback(lambda task: self.tell())
        else:
            await work.give_up_merge()
        if isinstance(decision, Sign):
            self._sign(round, known, decision)
            await asyncio.sleep(0)
            return None
        if isinstance(decision, CatchUp):
            return await self._catch_up(known, decision)
        if isinstance(decision, Wait):
            wait_s = min(max(decision.until_s - swarm_time(), 0.005), _LOOK_S)
        waits_from_s = swarm_time()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(news.wait(), wait_s)
        if swarm_time() - waits_from_s > wait_s + self.gap_s:
            self.stood_still(swarm_time())
        return None

    def _view(self, round: int, known: KnownRound) -> RoundView:
        heard_at_s = self.membership.heard_at_s()
        distrusted = known.distrusted.intersection(heard_at_s)
        found = standings(
            None if self.last is None else self.last[0],
            round,
            {peer: self._told.get(peer) for peer in heard_at_s.keys() - distrusted},
            since_s=known.started_s,
            undeliverable=known.undeliverable,
            holds=self._chain_view(known, distrusted).holds,
        )
        return RoundView(
            me=self.identity.peer_id,
            round=round,
            ended_at_s=known.ended_s,
            deadline_s=max(known.ended_s, known.started_s + self.settings.round_limit_s),
            silence_s=self.settings.silence_s,
            share_above=self.settings.share_above,
            live=found.of[Standing.WITH_US] | found.of[Standing.BEHIND],
            behind=found.of[Standing.BEHIND],
            base=self._base,
            guest=self.guest,
            guests=found.of[Standing.GUEST] | distrusted,
            ahead=found.of[Standing.AHEAD],
            applied=found.applied,
            far_ahead=found.of[Standing.FAR_AHEAD],
            announced={peer: publication_of(held.snapshot) for peer, held in known.publications.items()},
            held=frozenset(peer for peer, held in known.publications.items() if held.complete),
            rosters=[roster for roster, _ in known.rosters.values() if roster.digest not in known.impossible],
            heard_at_s=heard_at_s,
            asked_at_s=known.asked_at_s,
            answered_at_s=known.answered_at_s,
            listening_since_s=self.listening_since_s,
            unobtainable=frozenset(known.unobtainable),
            idle=self._signers.idle(round),
        )

    def _chain_view(self, known: KnownRound, distrusted: Collection[str] = ()) -> ChainView:
        """Which chain holds, for a peer in the midst of this round."""
        return chain_view(
            self.chains.chain,
            self.chains.shown,
            {peer: self._told.get(peer) for peer in self.membership.heard_at_s().keys() - distrusted},
            since_s=known.started_s,
            me=self.identity.peer_id,
            is_away=self.listening_since_s > known.started_s,
        )

    def _lacks_chains(self, known: KnownRound) -> bool:
        """Whether somebody has yet to show its chain, for which it has as long as it may be silent, and all together a
        few times as long: who comes after the other with one that nobody knows must not hold a round up for ever."""
        now, told = swarm_time(), self._told.keys() & self.membership.heard_at_s().keys()
        lacking = [peer for peer in told if self.chains.lacks(self._told[peer][1].last)]
        until_s = [known.lacking_s.setdefault(peer, now) + self.settings.silence_s for peer in lacking]
        most_s = min(known.lacking_s.values(), default=now) + _CHAIN_SILENCES * self.settings.silence_s
        return now < min(max(until_s, default=now), most_s)

    def _name_unproved(self, known: KnownRound) -> None:
        """Tell of those who claim more tokens than there are here, and neither show their chain nor move anybody."""
        own_tokens, view = 0 if self.last is None else self.last[0].total_tokens, self._chain_view(known)
        for peer, digest in view.stands.items():
            head, chain = view.heads.get(digest), self.chains.shown.get(digest)
            if head is None or chain is None or len(chain.links) > 1 or view.holds(head):
                continue
            if head.total_tokens > own_tokens:
                detail = f"a roster with {head.base_tokens} tokens behind it, of which it shows nothing"
                self.refused(peer, BadBytesError(detail))

    def _sign(self, round: int, known: KnownRound, decision: Sign) -> None:
        applied = None if self.last is None else self.last[0]
        roster = Roster(
            round=round,
            signer=self.identity.peer_id,
            entries=decision.entries,
            attempt=decision.attempt,
            base=self._base,
            base_tokens=0 if applied is None else applied.total_tokens,
        )
        self._keep(known, roster, sign_roster(self.identity, self.settings.run_sha256, roster))
        _log.info("round %d: signed a roster of %d: %s", round, len(roster.entries), decision.reason)
        self.tell()

    @property
    def _base(self) -> str:
        return "" if self.last is None else self.last[0].digest

    def _keep(self, known: KnownRound, roster: Roster, signed: pb.Signed) -> bool:
        """Remember a roster that starts from our weights, of one signer the latest few and of all signers those
        that hold against the rest; whether it is new."""
        name = payload_sha256(signed)
        if name in known.rosters or roster.base != self._base:
            return False
        same_signer = [other for other, (kept, _) in known.rosters.items() if kept.signer == roster.signer]
        if len(same_signer) >= _MAX_ATTEMPTS:
            oldest = min(same_signer, key=lambda other: known.rosters[other][0].attempt)
            if roster.attempt <= known.rosters[oldest][0].attempt:
                return False
            del known.rosters[oldest]
        known.rosters[name] = (roster, signed)
        others = [kept for kept, _ in known.rosters.values() if kept.signer != self.identity.peer_id]
        if len(others) > _MAX_ROSTERS:
            worst = worst_roster(others)
            known.rosters = {other: pair for other, pair in known.rosters.items() if pair[0] is not worst}
            if worst is roster:
                return False
        known.unobtainable.difference_update(roster.peers)
        return True

    async def _merge(self, round: int, known: KnownRound, roster: Roster, signed: pb.Signed) -> Merged | None:
        """Average what the roster names; None if that failed and the round has to be decided anew."""

        def share_ready(held: Held) -> None:
            known.share = held
            self.tell()

        merger = self._merger(share_ready, bytes.fromhex(payload_sha256(signed)))
        try:
            mean, left_out = await merger.merge(roster, known.publications)
        except UnobtainableError as error:
            _log.info("round %d: %s", round, error)
            if self.identity.peer_id in error.peers:
                known.impossible.add(roster.digest)
            known.unobtainable.update(error.peers - {self.identity.peer_id})
            return None
        self.know_roster(roster, signed)
        entries = (known.publications.get(entry.peer) for entry in roster.entries)
        self._manifests[roster.digest] = [held.snapshot.signed for held in entries if held is not None]
        return Merged(roster=roster, mean=mean, left_out=left_out)

    def _merger(self, share_ready: Callable[[Held], None] = lambda held: None, roster_sha256: bytes = b"") -> Merger:
        return Merger(
            self.identity,
            self.calls,
            self.store,
            self.membership,
            self.settings,
            self.average,
            refused=self.refused,
            share_ready=share_ready,
            last_known=self._last_known,
            roster_sha256=roster_sha256,
        )

    # ------------------------------------------------------------- asking

    def _keep_asking(self, round: int, known: KnownRound, view: RoundView, work: RoundWork) -> None:
        """One asking task a peer, one pulling task a publication; those no longer needed are cancelled."""
        wanted = dict.fromkeys(peers_to_ask(view, swarm_time()))
        unwanted = {peer: task for peer, task in work.asking.items() if peer not in wanted}
        self._give_up_on_silent(view, unwanted)
        for peer, task in unwanted.items():
            task.cancel()  # again at the next look, if this one is swallowed
            if task.done():
                del work.asking[peer]
        for peer in wanted:
            if peer not in work.asking or work.asking[peer].done():
                known.asked_at_s.setdefault(peer, swarm_time())
                work.asking[peer] = asyncio.create_task(self._ask(round, known, peer))
        if not pulls_whole(view):
            return
        for peer, held in known.publications.items():
            sha256 = held.snapshot.sha256
            fits = held.snapshot.manifest.roster_sha256.hex() == view.base
            if fits and not held.complete and peer not in known.unobtainable and sha256 not in work.pulling:
                work.pulling[sha256] = asyncio.create_task(self._prefetch(known, peer, held))

    def _give_up_on_silent(self, view: RoundView, asking: dict[str, asyncio.Task[None]]) -> None:
        """Questions that are given up now: one that was never answered has failed."""
        now = swarm_time()
        for peer, task in asking.items():
            if not task.done() and not task.cancelling() and is_silent(view, peer, now):
                self.calls.on_failure(peer, UnreachableError(f"it has not answered for {view.silence_s:g} s"))

    async def _ask(self, round: int, known: KnownRound, peer: str) -> None:
        """Ask one peer about the round, again and again; the first answer is not held."""
        wait_s = 0.0
        its_roster = b""
        while True:
            request = pb.RoundRequest(
                round=round,
                has_publication=peer in known.publications,
                has_roster_sha256=its_roster,
                has_share=True,
                has_last_sha256=self._last_known(peer),
                wait_s=wait_s,
            )
            asked_s = swarm_time()
            self._want_chain(request, peer, asked_s)
            try:
                reply = await self.calls.round(peer, request)
                is_new = self._read_untrusted(round, known, peer, reply)
                if request.wants_chain:
                    await self._take_chain_untrusted(peer, reply)
                known.answered_at_s[peer] = asked_s
                if reply.HasField("roster"):
                    its_roster = bytes.fromhex(payload_sha256(reply.roster))
                not_held = wait_s > 0 and swarm_time() - asked_s < _RETRY_S
                wait_s = _HOLD_S if asked_s >= self.listening_since_s else 0.0
                if not_held and not is_new:
                    await asyncio.sleep(_RETRY_S)  # it answers at once, has no news, and may do so for long
            except BadBytesError as error:
                self.refused(peer, error)
                known.distrusted.add(peer)
                self.tell()
                await asyncio.sleep(_HOLD_S)
            except PeerError as error:
                _log.debug("asking %s about round %d: %s", peer, round, error)
                self.tell()
                await asyncio.sleep(_RETRY_S)

    def _read_untrusted(self, round: int, known: KnownRound, peer: str, reply: pb.RoundReply) -> bool:
        """Take in an answer about the round; whether it brought anything."""
        is_new = False
        self._hear_untrusted(peer, reply)
        if reply.HasField("last_roster"):  # whoever has applied one hands it out, whatever others of the round it knows
            last = self._roster_untrusted(reply.last_roster)
            self.chains.check_untrusted(last)
            is_new = last.round == round and self._keep(known, last, reply.last_roster)
        if reply.HasField("publication"):
            kind = pb.SNAPSHOT_KIND_PSEUDO_GRADIENT
            snapshot = manifest_untrusted(reply.publication, self.settings.run_sha256, kind, self.settings.specs)
            check_publication(snapshot, peer, round, self.settings.max_tokens)
            if peer not in known.publications and snapshot.manifest.roster_sha256.hex() == self._base:
                known.publications[peer] = empty_held(snapshot)
                is_new = True
        if reply.HasField("roster"):
            roster = self._roster_untrusted(reply.roster)
            if roster.round != round:
                raise BadBytesError("a roster of another round")
            try:
                self.chains.check_untrusted(roster)
                is_new = self._keep(known, roster, reply.roster) or is_new
            except BadBytesError as error:
                self.refused(roster.signer, error)  # who hands it on may not know the base
        self.tell()
        return is_new

    def _hear_untrusted(self, peer: str, reply: pb.RoundReply) -> None:
        """What a peer tells of itself."""
        last = None
        if reply.same_last and peer in self._told:
            last = self._told[peer][1].last
        elif reply.HasField("last_roster"):
            last = self._roster_untrusted(reply.last_roster)
            self.chains.check_untrusted(last)
            self._last_sha256[peer] = bytes.fromhex(payload_sha256(reply.last_roster))
        if reply.current_round != (0 if last is None else last.round + 1):
            raise BadBytesError("a peer in another round than its last roster leads to")
        now = swarm_time()
        self.membership.heard(peer, now, round=reply.current_round, inner_steps_done=min(reply.inner_steps_done, 2**31))
        self._told[peer] = (now, Told(round=reply.current_round, last=last, participating=reply.participating))
        if reply.away and (change := self.membership.left(peer, now)) is not None:
            self.report(change)

    def _last_known(self, peer: str) -> bytes:
        """The hash of what this peer said last that it had applied."""
        return self._last_sha256.get(peer, b"") if peer in self._told else b""

    def _roster_untrusted(self, signed: pb.Signed) -> Roster:
        """Checked once, then known by the hash of what was signed and by whom."""
        name = payload_sha256(signed) + signed.author.hex() + signed.signature.hex()
        if name not in self._checked:
            roster = roster_untrusted(signed, self.settings.run_sha256, self.settings.max_tokens)
            self._checked[name] = roster
            num_entries = sum(len(kept.entries) for kept in self._checked.values())
            while len(self._checked) > _MAX_CHECKED or num_entries > _MAX_CHECKED_ENTRIES:
                num_entries -= len(self._checked.pop(next(iter(self._checked))).entries)
            return roster
        return self._checked[name]

    async def _prefetch(self, known: KnownRound, peer: str, held: Held) -> None:
        others = [info.peer for info in self.membership.volunteers() if info.peer != peer]
        try:
            await self._merger().pull(held, range(held.snapshot.num_chunks), [peer, *others])
        except UnreachableError:
            known.unobtainable.add(peer)
        self.tell()

    # ------------------------------------------------------------- chains

    def _want_chain(self, request: pb.RoundRequest, peer: str, now: float) -> None:
        """Ask with this question for the chain of one that told of a roster that is not on ours, nor the next."""
        told = self._told.get(peer)
        if told is None or not self.chains.lacks(told[1].last):
            return
        if now >= self._chain_asked_s.get(peer, -math.inf) + _CHAIN_AGAIN_S:
            self._chain_asked_s[peer] = now
            request.wants_chain, request.wait_s = True, 0.0
            request.chain_known.extend(self.chains.known())

    async def _take_chain_untrusted(self, peer: str, reply: pb.RoundReply) -> None:
        """Take in what a peer shows of its chain. One that does not know the question shows nothing."""
        last = self._told[peer][1].last if peer in self._told else None
        if last is None or last.digest in self.chains.chain:
            return
        if not reply.HasField("chain"):
            self.chains.keep_head(last)
            return
        ours = self.chains.chain
        shown = await asyncio.to_thread(chain_untrusted, reply.chain, ours, self.settings)
        if shown.chain.digest != last.digest:
            raise BadBytesError("a chain of rosters that does not lead to its last one")
        self.chains.keep(shown)
        self.tell()

    async def _ask_chain(self, peer: str) -> None:
        """Have a peer show its chain, whenever it did so before. Raises PeerError."""
        request = self._question_of_state(peer)
        request.wants_chain = True
        request.chain_known.extend(self.chains.known())
        reply = await self.calls.round(peer, request)
        self._hear_untrusted(peer, reply)
        await self._take_chain_untrusted(peer, reply)

    async def best_told(self, told: Mapping[str, Told]) -> Chain | None:
        """The chain that holds against ours and the others', of those who have just `told` their last rosters; None if
        that is ours. Each is asked for its chain before any is judged."""
        return self._view_of(await self._with_chains(told)).best

    async def _with_chains(self, told: Mapping[str, Told]) -> dict[str, Told]:
        """What these tell once the chains of their last rosters are here: who was asked may have gone on since."""
        for digest in {t.last.digest for t in told.values() if t.last is not None}:
            standing = [peer for peer, t in told.items() if t.last is not None and t.last.digest == digest]
            random.shuffle(standing)
            for peer in standing[:_CHAIN_TRIES]:
                if digest in self.chains.chain or digest in self.chains.shown:
                    break
                try:
                    await self._ask_chain(peer)
                except BadBytesError as error:
                    self.refused(peer, error)
                except PeerError as error:
                    _log.debug("asking %s for its chain: %s", peer, error)
        return {peer: self._told[peer][1] if peer in self._told else before for peer, before in told.items()}

    def _view_of(self, told: Mapping[str, Told]) -> ChainView:
        """Which chain holds, for a peer that comes, or comes back, and for an archive."""
        now = {peer: (0.0, t) for peer, t in told.items()}
        me = self.identity.peer_id if self.trains else ""
        chain, shown = self.chains.chain, self.chains.shown
        return chain_view(chain, shown, now, since_s=0.0, me=me, is_away=True)

    # ------------------------------------------------------------- states

    async def ask_now(self, peers: Sequence[str]) -> dict[str, Told]:
        """What these peers tell of themselves now; those that do not answer are missing."""

        async def ask(peer: str) -> None:
            try:
                self._hear_untrusted(peer, await self.calls.round(peer, self._question_of_state(peer)))
            except BadBytesError as error:
                self.refused(peer, error)
            except PeerError as error:
                _log.debug("asking %s: %s", peer, error)

        began_s = swarm_time()
        await asyncio.gather(*(ask(peer) for peer in peers))
        return {peer: self._told[peer][1] for peer in peers if self._told.get(peer, (-math.inf,))[0] >= began_s}

    def _question_of_state(self, peer: str) -> pb.RoundRequest:
        """How far are you?"""
        return pb.RoundRequest(
            round=self.current_round, has_publication=True, has_share=True, has_last_sha256=self._last_known(peer)
        )

    async def _catch_up(self, known: KnownRound, decision: CatchUp) -> NewState | None:
        sources = list(decision.sources)
        random.shuffle(sources)

        async def check(source: str, roster: Roster) -> None:
            if roster.digest not in self.chains.shown:
                await self._ask_chain(source)
            if source in known.unobtainable and source in roster.peers:
                raise UnreachableError("its roster has a publication of its own on it, which it does not deliver")
            if not self._chain_view(known).holds(roster):
                raise UnreachableError("its state does not hold against this peer's")

        for source in sources[:_SOURCES]:
            told = self._told.get(source)
            min_round = 0 if told is None or told[1].last is None else told[1].last.round + 1
            state = await self.fetch_state([source], min_round, decision.reason, check)
            if state is not None:
                return state
            known.undeliverable.add(source)
        return None

    async def fetch_newest_state(self, peers: Sequence[str], reason: str, above_tokens: int = 0) -> NewState | None:
        """The state that holds, from whoever of `peers` has it, if it counts more than `above_tokens` tokens.

        None if nobody has such a one, or nobody delivered.
        """
        return await self.fetch_told_state(await self.ask_now(peers), reason, above_tokens)

    async def fetch_told_state(self, told: Mapping[str, Told], reason: str, above_tokens: int = 0) -> NewState | None:
        """The same from those who have just `told` what they have; None too if it does not hold against ours."""
        told, ours = await self._with_chains(told), self.chains.chain
        best = self._view_of(told).best
        if best is None or best.head is None or best.head.total_tokens <= above_tokens:
            return None
        lasts = {peer: t.last.digest for peer, t in told.items() if t.last is not None}
        holders = [peer for peer, digest in lasts.items() if digest == best.digest]
        rest = [peer for peer, digest in lasts.items() if digest in best and digest not in ours and peer not in holders]
        random.shuffle(holders)

        async def check(source: str, roster: Roster) -> None:
            if roster.digest in ours:
                raise UnreachableError("its state is no newer than ours")
            if roster.digest in best:
                return
            await self._ask_chain(source)
            now = self._told.get(source)  # it may be a round further than its state was, or forgotten
            last = None if now is None else now[1].last
            chain = None if last is None else self._view_of(told).chain_of(last)
            if chain is None or best.digest not in chain or roster.digest not in chain:
                raise UnreachableError("it has gone to another chain meanwhile")

        state = await self.fetch_state(holders, best.head.round + 1, reason, check)
        state = state or await self.fetch_state(rest, 1, reason, check)
        return state if state is not None and state.roster.total_tokens > above_tokens else None

    async def fetch_state(
        self, sources: Sequence[str], min_round: int, reason: str, check: Check = unchecked
    ) -> NewState | None:
        """The newest state of the first source that delivers one of `min_round` or later, which passes `check`."""
        wanted = WantedState(min_round=min_round, reason=reason)

        async def believed(source: str, roster: Roster) -> None:
            await check(source, roster)
            self.chains.check_untrusted(roster)

        return await fetch_state(self._merger(), sources, wanted, self._roster_untrusted, believed)
