"""Synchronous rounds over the network: here is asked, pulled, signed and merged as `protocol.rounds.RoundEngine` says.

Runs in the network thread. Bytes of others are checked before the engine is told of them; what they mean, and what is
to be done about them, it decides alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, assert_never

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.catching_up import NewState, offered_state_untrusted, take_state
from swarmtrain.network.chains import ChainStore, chain_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity
from swarmtrain.network.merging import Average, Merger, RoundSettings, UnobtainableError
from swarmtrain.network.roster import check_publication, publication_of, roster_untrusted, sign_roster
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.signing import payload_sha256
from swarmtrain.network.snapshots import Held, SnapshotStore, empty_held, manifest_untrusted
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol import round_events as ev
from swarmtrain.protocol.lifecycle import Change, Membership
from swarmtrain.protocol.progress import Progress
from swarmtrain.protocol.rosters import Roster, Told
from swarmtrain.protocol.rounds import RoundEngine, RoundRules
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Merged", "NewState", "Outcome", "Rounds"]

_log = logging.getLogger(__name__)
_MAX_CHECKED = 256
_MAX_CHECKED_ENTRIES = 65_536
_MAX_OFFERED = 8
"""So many states that were offered are kept, the last: most are never taken, and have no bytes here."""

_T = TypeVar("_T")
_Event: TypeAlias = ev.Event[pb.Signed, pb.ChainLink]
_SignedRoster: TypeAlias = ev.SignedRoster[pb.Signed]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The mean pseudo-gradient of a roster, as the bytes of one fp32 vector."""

    roster: Roster
    mean: bytearray


Outcome: TypeAlias = Merged | NewState


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
    report: Callable[[Change], None] = lambda change: None
    trains: bool = True
    """Whether this peer's own weights count for the chain that it is on: not those of an archive."""
    chains: ChainStore = field(default_factory=ChainStore)
    inner_steps_done: int = field(default=0, init=False)
    engine: RoundEngine[pb.Signed, pb.ChainLink] = field(init=False)
    _timer: asyncio.TimerHandle | None = field(default=None, init=False)
    _numbers: Any = field(default_factory=itertools.count, init=False)
    _futures: dict[int, asyncio.Future[Any]] = field(default_factory=dict, init=False)
    """What those wait for who call this peer, or search."""
    _requests: dict[int, pb.RoundRequest] = field(default_factory=dict, init=False)
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict, init=False)
    """What was asked, by the engine's numbers."""
    _bytes: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    """The pulls of a round."""
    _merging: asyncio.Task[None] | None = field(default=None, init=False)
    _outcome: asyncio.Future[Outcome] | None = field(default=None, init=False)
    _mean: Merged | None = field(default=None, init=False)
    _publications: dict[str, Held] = field(default_factory=dict, init=False)
    """Those of the round that this peer ends, by their hashes."""
    _own: dict[int, Held] = field(default_factory=dict, init=False)
    _shares: dict[int, Held] = field(default_factory=dict, init=False)
    """What others may still ask for: what it published, and the share that it averaged last, by round."""
    _offered: dict[int, NewState] = field(default_factory=dict, init=False)
    _pending: dict[str, _SignedRoster] = field(default_factory=dict, init=False)
    _manifests: dict[str, list[pb.Signed]] = field(default_factory=dict, init=False)
    _last_signed: dict[str, tuple[Roster, str]] = field(default_factory=dict, init=False)
    """What each peer said last that it had applied, and the name of that."""
    _checked: dict[str, Roster] = field(default_factory=dict, init=False)
    _moved: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        rules = RoundRules(
            share_above=settings.share_above, round_limit_s=settings.round_limit_s, silence_s=settings.silence_s
        )
        self.engine = RoundEngine(self.membership, self.chains, rules, random.Random(), trains=self.trains)

    # ------------------------------------------------------------- what others look at

    @property
    def current_round(self) -> int:
        """The round that this peer is in."""
        return self.engine.round

    @property
    def last(self) -> tuple[Roster, pb.Signed] | None:
        """The roster that it applied last."""
        last = self.engine.last
        return None if last is None else (last.roster, last.signed)

    @property
    def away(self) -> bool:
        """See `RoundEngine.away`."""
        return self.engine.away

    @property
    def wanted(self) -> bool:
        """See `RoundEngine.wanted`."""
        return self.engine.wanted

    @property
    def waiting_for(self) -> str:
        """See `RoundEngine.waiting_for`."""
        return self.engine.waiting_for

    @property
    def waiting_until_s(self) -> float:
        """In swarm time; 0 when there is no such time."""
        return self.engine.waiting_until_s

    @property
    def listening_since_s(self) -> float:
        """Since when this process has run without a gap."""
        return self.engine.listening_since_s

    @property
    def gap_s(self) -> float:
        """A process that comes so much later to something than it should has stood still."""
        return self.engine.rules.gap_s

    # ------------------------------------------------------------- driving

    def _tell(self, event: _Event) -> None:
        """Tell the engine what happened, and do what it says."""
        for command in self.engine.receive(event, swarm_time()):
            self._do(command)
        if self._timer is not None:
            self._timer.cancel()
        self._timer, wake_s = None, self.engine.wake_at()
        if wake_s is not None:
            loop, now = asyncio.get_running_loop(), swarm_time()
            self._timer = loop.call_later(max(0.0, wake_s - now), self._woke, max(wake_s, now))

    def _woke(self, planned_s: float) -> None:
        try:
            if swarm_time() - planned_s > self.gap_s:
                self.stood_still()
            self._tell(ev.Woke())
        except Exception as error:  # whoever waits would do so for ever
            _log.exception("the work of a round ended")
            self._failed(error)

    def _do(self, command: ev.Command[pb.Signed]) -> None:
        match command:
            case ev.Ask():
                self._tasks[command.number] = self._begin(self._ask(command))
            case ev.HangUp():
                if (task := self._tasks.pop(command.number, None)) is not None:
                    task.cancel()
                self._offered.pop(command.number, None)
                if command.failed:
                    silence_s = self.settings.silence_s
                    self.calls.on_failure(command.peer, UnreachableError(f"it has not answered for {silence_s:g} s"))
            case ev.Answer():
                self._answer(command)
            case ev.Bring():
                task = self._begin(self._bring(command))
                self._bytes.add(task)
                task.add_done_callback(self._bytes.discard)
            case ev.Sign():
                roster, reason = command.roster, command.reason
                signed = sign_roster(self.identity, self.settings.run_sha256, roster)
                _log.info("round %d: signed a roster of %d: %s", roster.round, len(roster.entries), reason)
                self._tell(ev.Signed(ev.SignedRoster(roster, signed, payload_sha256(signed))))
            case ev.Merge():
                before, self._mean = self._merging, None
                self._merging = self._begin(self._merge(command.roster, before))
            case ev.GiveUpMerge():
                if self._merging is not None:
                    self._merging.cancel()
            case ev.Finish():
                # Another roster may name the same publications by now: the same weights come of it.
                assert self._mean is not None and self._mean.roster.digest == command.roster.roster.digest
                self._ends(self._mean)
            case ev.Fetch():
                self._tasks[command.number] = self._begin(self._fetch(command))
            case ev.Take():
                self._tasks[command.number] = self._begin(self._take(command.number))
            case ev.Adopt():
                self._ends(dataclasses.replace(self._offered.pop(command.number), reason=command.reason))
            case ev.Surveyed():
                self._found(command.search, dict(command.told))
            case ev.Sought():
                state = None if command.number is None else self._offered.pop(command.number)
                self._found(command.search, (command.is_ours, state))
            case ev.Name():
                self.refused(command.peer, BadBytesError(command.detail))
            case ev.Report():
                self.report(command.change)
            case _:
                assert_never(command)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._work_ended)
        return task

    def _work_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """Whoever waits for what does not come any more is told."""
        waiting = [future for future in (self._outcome, *self._futures.values()) if future and not future.done()]
        for future in waiting:
            future.set_exception(error)
        if not waiting:
            _log.error("the work of a round ended", exc_info=error)

    def _ends(self, outcome: Outcome) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    def _found(self, number: int, result: object) -> None:
        if (future := self._futures.get(number)) is not None and not future.done():
            future.set_result(result)

    async def _waited_for(self, number: int, event: _Event, given_up: _Event) -> Any:
        """What comes of an event, unless whoever waits for it gives up."""
        future = self._futures[number] = asyncio.get_running_loop().create_future()
        try:
            self._tell(event)
            return await future
        finally:
            del self._futures[number]
            self._tell(given_up)

    # ------------------------------------------------------------- answering

    async def answer(self, request: pb.RoundRequest) -> pb.RoundReply:
        """What is known about a round; waits up to `request.wait_s` for something the caller does not know."""
        call = next(self._numbers)
        question = ev.Question(
            round=request.round,
            hold_s=request.wait_s if request.wait_s > 0 else 0.0,
            has_publication=request.has_publication,
            has_roster=request.has_roster_sha256.hex(),
            has_share=request.has_share,
            wants_chain=request.wants_chain,
        )
        self._requests[call] = request
        try:
            reply: pb.RoundReply = await self._waited_for(call, ev.Asked(call, question), ev.HungUp(call))
            return reply
        finally:
            del self._requests[call]

    def _answer(self, answer: ev.Answer[pb.Signed]) -> None:
        request = self._requests[answer.call]
        reply = pb.RoundReply(
            current_round=answer.round,
            inner_steps_done=self.inner_steps_done,
            participating=answer.participating,
            away=answer.away,
        )
        if answer.last is not None and answer.last.name == request.has_last_sha256.hex():
            reply.same_last = True
        elif answer.last is not None:
            reply.last_roster.CopyFrom(answer.last.signed)
        if request.wants_chain:
            reply.chain.CopyFrom(self.chains.shows(request.chain_known))
        if answer.publication is not None:
            reply.publication.CopyFrom(self._own[request.round].snapshot.signed)
        if answer.roster is not None:
            reply.roster.CopyFrom(answer.roster.signed)
        if answer.share:
            reply.share.CopyFrom(self._shares[request.round].snapshot.signed)
        self._found(answer.call, reply)

    # ------------------------------------------------------------- moving on

    def begin(self, *, guest: bool) -> None:
        """A round begins; nobody waits for that of a guest."""
        self._tell(ev.Begun(guest))

    def leave(self) -> None:
        """This peer has said goodbye."""
        self._tell(ev.Left())

    def come_back(self) -> None:
        """It is here again."""
        self._tell(ev.CameBack())

    def peers_changed(self) -> None:
        """Somebody came, left or was lost."""
        self._tell(ev.PeersChanged())

    async def wait_for_round(self, round: int, limit_s: float) -> None:
        """Until this peer's state is of `round` or later, or `limit_s` have passed."""
        ends_s = swarm_time() + limit_s
        while self.current_round < round and swarm_time() < ends_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), ends_s - swarm_time())

    def advance(self, progress: Progress) -> None:
        """The outer step is done, or another's state was taken: this peer is in round `progress.round` now."""
        last = None
        if digest := progress.roster_sha256:
            last = self._pending.get(digest, self.engine.last)
            assert last is not None and last.roster.digest == digest, "a state without its roster"
            self.chains.move_to(last.roster, last.signed, self._manifests.get(digest, ()))
        self._pending.clear()
        self._manifests.clear()
        self.inner_steps_done = 0
        self.store.forget_before(progress.round)
        self._tell(ev.Advanced(progress.round, last))
        self._own = {round: held for round, held in self._own.items() if self.engine.knows(round)}
        self._shares = {round: held for round, held in self._shares.items() if self.engine.knows(round)}
        self._moved.set()
        self._moved = asyncio.Event()

    def know_roster(self, roster: Roster, signed: pb.Signed) -> None:
        """A roster that `advance` may name: of a state that was pulled, or read from an archive."""
        self._pending[roster.digest] = ev.SignedRoster(roster, signed, payload_sha256(signed))

    def forget_peer(self, peer: str) -> None:
        """A peer that has long been gone."""
        self.engine.hearsay.forget(peer)
        self._last_signed.pop(peer, None)

    def stood_still(self, *, forgives: bool = True) -> None:
        """This process did not run until now. See `StoodStill`."""
        self._tell(ev.StoodStill(forgives))

    # ------------------------------------------------------------- finishing a round

    async def finish(self, round: int, publication: Held, started_s: float) -> Outcome:
        """Publish, agree on a roster and merge it; returns the mean, or the state of those who went on without us."""
        self._publications = {publication.snapshot.sha256: publication}
        self._own[round] = publication
        self.store.add(publication)
        self._outcome = asyncio.get_running_loop().create_future()
        try:
            self._tell(ev.Ended(round, publication_of(publication.snapshot), started_s))
            return await self._outcome
        finally:
            self._tell(ev.GivenUp())
            await end_tasks([*self._bytes, *([] if self._merging is None else [self._merging])])
            self._publications, self._merging, self._mean, self._outcome = {}, None, None, None

    async def _merge(self, one: _SignedRoster, before: asyncio.Task[None] | None) -> None:
        """Average what the roster names, when the merge `before` has been given up."""
        if before is not None:
            await end_tasks([before])
        roster = one.roster
        offers = ((entry.peer, self._publications.get(entry.snapshot)) for entry in roster.entries)
        held = {peer: offer for peer, offer in offers if offer is not None}

        def share_ready(share: Held) -> None:
            self._shares[roster.round] = share
            self._tell(ev.Shared(roster.digest))

        event: _Event
        try:
            mean = await self._merger(share_ready, bytes.fromhex(one.name)).merge(roster, held)
            self._mean, event = Merged(roster=roster, mean=mean), ev.Merged(roster.digest)
            self._pending[roster.digest] = one
            self._manifests[roster.digest] = [each.snapshot.signed for each in held.values()]
        except UnobtainableError as error:
            _log.info("round %d: %s", roster.round, error)
            event = ev.NotMerged(roster.digest, error.peers)
        finally:  # given up too: the next merge may want the same
            for each in held.values():
                if each.snapshot.sha256 not in self._publications:
                    self._publications[each.snapshot.sha256] = each
                    self._tell(ev.Found(publication_of(each.snapshot)))
                if each.complete:
                    self._tell(ev.Brought(each.snapshot.sha256))
        self._tell(event)

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

    async def _bring(self, bring: ev.Bring) -> None:
        sha256 = bring.publication.snapshot
        held = self._publications[sha256]
        event: _Event = ev.Brought(sha256)
        try:
            await self._merger().pull(held, range(held.snapshot.num_chunks), bring.sources)
        except UnreachableError:
            event = ev.NotBrought(sha256)
        self._tell(event)

    # ------------------------------------------------------------- asking

    async def _ask(self, ask: ev.Ask) -> None:
        question = ask.question
        request = pb.RoundRequest(
            round=question.round,
            has_publication=question.has_publication,
            has_roster_sha256=bytes.fromhex(question.has_roster),
            has_share=question.has_share,
            has_last_sha256=self._last_known(ask.peer),
            wants_chain=question.wants_chain,
            wait_s=question.hold_s,
        )
        if question.wants_chain:
            request.chain_known.extend(self.chains.known())
        event: _Event
        try:
            reply = await self.calls.round(ask.peer, request)
            event = ev.Answered(ask.number, await self._reply_untrusted(ask, reply))
        except BadBytesError as error:
            self.refused(ask.peer, error)
            event = ev.Refused(ask.number)
        except PeerError as error:
            _log.debug("asking %s about round %d: %s", ask.peer, question.round, error)
            event = ev.Failed(ask.number)
        self._tasks.pop(ask.number, None)
        self._tell(event)
        offer = event.reply.publication if isinstance(event, ev.Answered) else None
        if offer is not None and not self.engine.is_announced(offer):  # anyone can make any number of them
            self._publications.pop(offer.snapshot, None)

    async def _reply_untrusted(self, ask: ev.Ask, reply: pb.RoundReply) -> ev.Reply[pb.Signed, pb.ChainLink]:
        """What a peer says of itself and of a round, its signatures checked."""
        peer, question = ask.peer, ask.question
        last, offer, shown = None, None, None
        if reply.HasField("last_roster"):
            last = self._roster_untrusted(reply.last_roster)
        if reply.HasField("publication") and not question.has_publication:
            kind = pb.SNAPSHOT_KIND_PSEUDO_GRADIENT
            snapshot = manifest_untrusted(reply.publication, self.settings.run_sha256, kind, self.settings.specs)
            check_publication(snapshot, peer, question.round, self.settings.max_tokens)
            offer = publication_of(snapshot)
            if offer.base == self.engine.base:
                self._publications.setdefault(snapshot.sha256, empty_held(snapshot))
        roster = self._roster_untrusted(reply.roster) if reply.HasField("roster") else None
        head = self.engine.hearsay.last_of(peer) if reply.same_last else None if last is None else last.roster
        ours = self.chains.chain
        if question.wants_chain and reply.HasField("chain") and head is not None and head.digest not in ours:
            shown = await asyncio.to_thread(chain_untrusted, reply.chain, ours, self.settings)
        if last is not None and not reply.same_last:
            self._last_signed[peer] = last.roster, last.name
        told = Told(round=reply.current_round, last=head, participating=reply.participating)
        return ev.Reply(told, reply.inner_steps_done, reply.away, last, offer, roster, shown)

    def _last_known(self, peer: str) -> bytes:
        """The name of what this peer said last that it had applied."""
        roster, name = self._last_signed.get(peer, (None, ""))
        return bytes.fromhex(name) if roster is not None and self.engine.hearsay.last_of(peer) == roster else b""

    def _roster_untrusted(self, signed: pb.Signed) -> _SignedRoster:
        """Checked once, then known by the hash of what was signed and by whom."""
        name = payload_sha256(signed)
        key = name + signed.author.hex() + signed.signature.hex()
        if (roster := self._checked.get(key)) is None:
            roster = roster_untrusted(signed, self.settings.run_sha256, self.settings.max_tokens)
            self._checked[key] = roster
            num_entries = sum(len(kept.entries) for kept in self._checked.values())
            while len(self._checked) > _MAX_CHECKED or num_entries > _MAX_CHECKED_ENTRIES:
                num_entries -= len(self._checked.pop(next(iter(self._checked))).entries)
        return ev.SignedRoster(roster, signed, name)

    # ------------------------------------------------------------- states

    async def _fetch(self, fetch: ev.Fetch) -> None:
        event: _Event = ev.NotFetched(fetch.number)
        try:
            state = await self._offered_untrusted(fetch.source, fetch.min_round)
            if state is not None:
                self._offered[fetch.number] = state
                while len(self._offered) > _MAX_OFFERED:
                    del self._offered[next(iter(self._offered))]
                signed = state.signed_roster
                event = ev.Offered(fetch.number, ev.SignedRoster(state.roster, signed, payload_sha256(signed)))
        except PeerError as error:
            self._merger().blame(fetch.source, error)
        self._tasks.pop(fetch.number, None)
        self._tell(event)

    async def _offered_untrusted(self, source: str, min_round: int) -> NewState | None:
        """The state that a peer has; None if it has none."""
        reply = await self.calls.state(source, min_round)
        if not reply.HasField("manifest"):
            return None
        roster = self._roster_untrusted(reply.roster).roster
        return offered_state_untrusted(self._merger(), reply, source, min_round, roster)

    async def _take(self, number: int) -> None:
        event: _Event = ev.Taken(number)
        state = self._offered[number]
        try:
            await self._take_bytes(state)
        except PeerError as error:
            self._merger().blame(state.from_peer, error)
            self._offered.pop(number, None)  # what came of it takes memory
            event = ev.NotFetched(number)
        self._tasks.pop(number, None)
        self._tell(event)

    async def _take_bytes(self, state: NewState) -> None:
        await take_state(self._merger(), state)

    async def ask_now(self, peers: Sequence[str]) -> dict[str, Told]:
        """What these peers tell of themselves now; those that do not answer are missing."""
        search = next(self._numbers)
        told: dict[str, Told] = await self._waited_for(search, ev.Survey(search, tuple(peers)), ev.GivenUp(search))
        return told

    async def holds(self, told: Mapping[str, Told]) -> bool:
        """Whether our own chain holds against those of whoever has just `told` what they applied last: each is asked
        how it came there before any is judged."""
        is_ours, _ = await self._seek(ev.Seek(next(self._numbers), told, fetches=False))
        return is_ours

    async def fetch_told_state(self, told: Mapping[str, Told], reason: str, above_tokens: int = 0) -> NewState | None:
        """The state that holds, from whoever has it of those who have just `told` what they have, if it counts more
        than `above_tokens` tokens. None if nobody has such a one, or nobody delivered."""
        _, state = await self._seek(ev.Seek(next(self._numbers), told, above_tokens))
        return None if state is None else dataclasses.replace(state, reason=reason)

    async def _seek(self, seek: ev.Seek) -> tuple[bool, NewState | None]:
        found: tuple[bool, NewState | None] = await self._waited_for(seek.search, seek, ev.GivenUp(seek.search))
        return found

    async def fetch_newest_state(self, peers: Sequence[str], reason: str, above_tokens: int = 0) -> NewState | None:
        """The same from these peers, asked now."""
        return await self.fetch_told_state(await self.ask_now(peers), reason, above_tokens)
