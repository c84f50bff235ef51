"""Run synchronous rounds over the network: ask, pull, sign and merge as `protocol.rounds.engine` commands.

`RoundRunner`, in the network thread, passes events to the engine and its commands to other modules: questions to
`questions.py`, answers to `answers.py`, a round's publications and merges to `round_end.py`, states to
`state_fetch.py`. Those check all bytes of other peers before the engine sees them. The engine alone decides what they
mean and what is done about them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import InitVar, dataclass, field
from typing import Any, TypeAlias, assert_never

from swarmtrain.errors import BadBytesError, UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity
from swarmtrain.network.rounds.answers import RoundAnswers, question_of
from swarmtrain.network.rounds.chains import ChainStore, NextRosters
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import Average, Merger, RoundSettings, ShareOwners
from swarmtrain.network.rounds.questions import RoundQuestions
from swarmtrain.network.rounds.roster import CheckedRosters, named, publication_of, sign_roster
from swarmtrain.network.rounds.round_end import EndedRound, Outcome
from swarmtrain.network.rounds.state_fetch import (
    JoinedState,
    PeerStates,
    RequestedStates,
    StateSearch,
    StateSource,
)
from swarmtrain.network.snapshots.store import HeldSnapshot
from swarmtrain.network.tasks import Awaited
from swarmtrain.protocol.membership.membership import Membership, MembershipChange
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.engine import RoundEngine, RoundRules
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)

_Event: TypeAlias = ev.Event[pb.Signed, pb.ChainLink]
_InEnded: TypeAlias = (
    ev.FetchPublication | ev.MergeRoster[pb.Signed] | ev.CancelMerge | ev.FinishRound[pb.Signed] | ev.AdoptState
)


@dataclass
class RoundRunner:
    """Plays this peer's part in all rounds: answers other peers and finishes its own rounds."""

    identity: Identity
    downloads: Downloads
    membership: Membership
    settings: RoundSettings
    average: InitVar[Average]
    report: Callable[[MembershipChange], None] = lambda change: None
    trains: InitVar[bool] = True
    """True if this peer's own weights count for the chain that it is on; false for an archive."""
    chains: ChainStore = field(default_factory=ChainStore)
    states: InitVar[StateSource | None] = None
    """Source of other peers' states; None: the network."""
    own_link: Callable[[], LinkRates] = LinkRates
    """Returns this peer's own link, as it is measured by now."""

    def __post_init__(self, average: Average, trains: bool, states: StateSource | None) -> None:
        settings, chains, downloads, membership = self.settings, self.chains, self.downloads, self.membership
        rules = RoundRules(
            share_above=settings.share_above,
            round_limit_s=settings.round_limit_s,
            silence_s=settings.silence_s,
            num_chunks=settings.groups.num_chunks,
            body_bytes=settings.groups.total_bytes,
            max_wait_s=settings.max_wait_s,
            target=settings.target,
        )
        self.engine: RoundEngine[pb.Signed, pb.ChainLink] = RoundEngine(
            membership, chains, rules, random.Random(), trains=trains
        )
        self.inner_steps_done = 0
        self._awaited: Awaited[_Event] = Awaited(self._tell)
        self.search = StateSearch(self._awaited)
        rosters = CheckedRosters(settings.run_sha256, settings.max_tokens, settings.groups.num_chunks)
        self._questions = RoundQuestions(downloads, settings, chains, rosters, self.engine.hearsay.last_of)
        self._answers = RoundAnswers(chains)
        owners = ShareOwners(
            last_known=self._questions.last_known,
            averaging_times=self.engine.averaging_times,
            limit_s=self.engine.merge_limit_s,
            judged=lambda owner, in_time: self._tell(ev.ShareJudged(owner, in_time)),
        )
        self._merger = Merger(self.identity, downloads, membership, settings, average, owners)
        self._states = RequestedStates(states or PeerStates(downloads, settings, rosters))
        self._next = NextRosters(chains)
        self._ended: EndedRound | None = None
        """Round whose end is under way."""
        self._requests: dict[int, pb.RoundRequest] = {}
        """Requests of other peers, by the numbers of `_awaited`."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """Running requests to other peers, by the engine's numbers."""
        self._timer: asyncio.TimerHandle | None = None
        self._moved = asyncio.Event()

    # ------------------------------------------------------------- what others look at

    @property
    def current_round(self) -> int:
        """Round that this peer is in."""
        return self.engine.round

    @property
    def last(self) -> tuple[Roster, pb.Signed] | None:
        """Roster that this peer applied last, with its signed message; None before the first."""
        last = self.engine.last
        return None if last is None else (last.roster, last.signed)

    @property
    def away(self) -> bool:
        """True if this peer has said goodbye. See `RoundEngine`."""
        return self.engine.away

    @property
    def wanted(self) -> bool:
        """True if another peer has ended this peer's present round and asked for its publication. See `RoundEngine`."""
        return self.engine.wanted

    @property
    def is_overtaken(self) -> bool:
        """True if others have shown, while this peer trains, that they have gone on. Any thread may ask."""
        return self.engine.is_overtaken

    @property
    def wanted_by(self) -> dict[str, float]:
        """Volunteers that have ended this peer's present round, and the swarm time at which each first asked for its
        publication. See `RoundEngine`."""
        return dict(self.engine.wanted_by)

    @property
    def waiting_for(self) -> str:
        """Reason why the engine waits; empty if it does not. See `RoundEngine`."""
        return self.engine.waiting_for

    @property
    def waiting_until_s(self) -> float:
        """Swarm time until which this peer may wait; 0 when there is no such time."""
        return self.engine.waiting_until_s

    @property
    def listening_since_s(self) -> float:
        """Swarm time since which this process has run without a gap."""
        return self.engine.listening_since_s

    @property
    def gap_s(self) -> float:
        """Seconds by which a timer must fire late to show that the process was suspended."""
        return self.engine.rules.gap_s

    # ------------------------------------------------------------- driving

    def _tell(self, event: _Event) -> None:
        """Pass an event to the engine, carry out its commands, and set the next timer."""
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
            # The timer fired late: this process was suspended, so the others were not silent (decision 35).
            if swarm_time() - planned_s > self.gap_s:
                self.was_suspended()
            self._tell(ev.RoundTimerFired())
        except Exception as error:  # without this a waiting task would wait for ever
            _log.exception("an error of this peer disturbed a round")
            self._failed(error)

    def _do(self, command: ev.Command[pb.Signed]) -> None:
        """Carry out one command of the engine."""
        match command:
            case ev.AskRoundQuestion():
                self._begin(command.number, self._ask(command))
            case ev.DropRoundQuestion():
                if (task := self._tasks.pop(command.number, None)) is not None:
                    task.cancel()
                self._states.drop(command.number)
                if command.failed:
                    error = UnreachableError(f"it has not answered for {self.settings.silence_s:g} s")
                    self.downloads.calls.on_failure(command.peer, error)
            case ev.AnswerRoundQuestion():
                reply = self._answers.reply(command, self._requests[command.call], self.inner_steps_done)
                self._awaited.found(command.call, reply)
            case ev.SignRoster():
                roster, reason = command.roster, command.reason
                signed = sign_roster(self.identity, self.settings.run_sha256, roster)
                _log.info("round %d: signed a roster of %d: %s", roster.round, len(roster.entries), reason)
                self._tell(ev.RosterSigned(named(roster, signed)))
            case ev.FetchPublication() | ev.MergeRoster() | ev.CancelMerge() | ev.FinishRound() | ev.AdoptState():
                assert self._ended is not None
                self._do_in(self._ended, command)
            case ev.RequestState() | ev.DownloadState():
                self._begin(command.number, self._state(command))
            case ev.PeersSurveyed():
                self._awaited.found(command.search, dict(command.advertised))
            case ev.StateSearched():
                state = None if command.number is None else self._states.pop(command.number)
                self._awaited.found(command.search, (command.is_ours, state))
            case ev.JoinDecided():
                state = None if command.number is None else self._states.pop(command.number)
                joined = JoinedState(begins=command.begins, state=state, advertised=dict(command.advertised))
                self._awaited.found(command.search, joined)
            case ev.NamePeer():
                self.downloads.refused(command.peer, BadBytesError(command.detail, code=command.code))
            case ev.ReportChange():
                self.report(command.change)
            case _:
                assert_never(command)

    def _do_in(self, ended: EndedRound, command: _InEnded) -> None:
        match command:
            case ev.FetchPublication():
                ended.fetch(command)
            case ev.MergeRoster():
                ended.merge(command.roster)
            case ev.CancelMerge():
                ended.give_up_merge()
            case ev.FinishRound():
                ended.finish(command.roster.roster)
            case ev.AdoptState():
                ended.ends(dataclasses.replace(self._states.pop(command.number), reason=command.reason))

    def _begin(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        """Start `work` in a task that `DropRoundQuestion` can cancel."""
        task = self._tasks[number] = asyncio.create_task(work)
        task.add_done_callback(self._work_ended)

    async def _ask(self, ask: ev.AskRoundQuestion) -> None:
        said = await self._questions.ask(ask)
        self._tasks.pop(ask.number, None)
        self._tell(said.event)
        offer = said.publication
        if offer is not None and self._ended is not None and self.engine.is_announced(publication_of(offer)):
            self._ended.announced(offer)  # only this round's: anyone can make any number of others

    async def _state(self, command: ev.RequestState | ev.DownloadState) -> None:
        event: _Event
        try:
            if isinstance(command, ev.RequestState):
                event = await self._states.fetch(command)
            else:
                event = await self._states.take(command.number)
        except Exception:  # an error of our own: there are other peers to ask
            _log.exception("fetching a state failed")
            self._states.drop(command.number)
            event = ev.StateNotFetched(command.number)
        self._tasks.pop(command.number, None)
        self._tell(event)

    def _work_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """Pass an error on to every task that waits for a result, because no result will come."""
        is_told = self._awaited.fail(error)
        if self._ended is not None:
            is_told = self._ended.fail(error) or is_told
        if not is_told:
            _log.error("an error of this peer disturbed a round", exc_info=error)

    # ------------------------------------------------------------- others' questions

    async def answer(self, request: pb.RoundRequest, caller: str = "") -> pb.RoundReply:
        """Answer a question of peer `caller` about a round; hold the answer for up to `request.wait_s` seconds
        until it has something new for the caller."""
        call = self._awaited.next_number()
        self._requests[call] = request
        try:
            asked = ev.QuestionReceived(call, question_of(request), caller)
            reply: pb.RoundReply = await self._awaited.result(call, asked, ev.QuestionDropped(call))
            return reply
        finally:
            del self._requests[call]

    # ------------------------------------------------------------- moving on

    def begin(self, *, is_late_joiner: bool) -> None:
        """Begin a round. Nobody waits for the round of a late joiner."""
        self._tell(ev.RoundBegun(is_late_joiner))

    def leave(self) -> None:
        """Report to the engine that this peer has said goodbye."""
        self._tell(ev.Left())

    def come_back(self) -> None:
        """Report to the engine that this peer is back."""
        self._tell(ev.CameBack())

    def peers_changed(self) -> None:
        """Report to the engine that a peer joined, left or was lost."""
        self._tell(ev.MembersChanged())

    def was_suspended(self, *, forgives: bool = True) -> None:
        """Report to the engine that this process was suspended until now. See `ProcessSuspended`."""
        self._tell(ev.ProcessSuspended(forgives))

    def forget_peer(self, peer: str) -> None:
        """Forget a peer that has been gone for long."""
        self.engine.hearsay.forget(peer)
        self._questions.forget(peer)

    async def wait_for_round(self, round: int, limit_s: float) -> None:
        """Wait until this peer's state is of `round` or later, for `limit_s` at most."""
        ends_s = swarm_time() + limit_s
        while self.current_round < round and swarm_time() < ends_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), ends_s - swarm_time())

    async def finish(self, round: int, publication: HeldSnapshot, started_s: float) -> Outcome:
        """Publish this peer's pseudo-gradient of `round`, agree on a roster and merge it.

        Returns the mean, or the state of the other peers if they merged without this one.
        """
        ended = self._ended = EndedRound(publication, self._merger, self._answers, self._next, self._tell)
        self._answers.published(round, publication)
        self.downloads.store.add(publication)
        try:
            self._tell(ev.LinkMeasured(self.own_link()))
            self._tell(ev.InnerStepsDone(round, publication_of(publication.snapshot), started_s))
            return await ended.outcome
        finally:
            self._tell(ev.RoundAbandoned())
            await ended.stop()
            if self._ended is ended:
                self._ended = None

    def know_roster(self, roster: Roster, signed: pb.Signed) -> None:
        """Keep a roster that `advance` may name: that of a pulled state, or one from an archive."""
        self._next.taken(roster, signed)

    def advance(self, progress: Progress) -> None:
        """Enter round `progress.round`, after an outer step or with another peer's state."""
        digest = progress.roster_sha256
        last = self._next.apply(digest, self.engine.last) if digest else None
        self._next.forget()
        self.inner_steps_done = 0
        self.downloads.store.forget_before(progress.round)
        self._tell(ev.RoundAdvanced(progress.round, last))
        self._answers.forget(self.engine.knows)
        self._moved.set()
        self._moved = asyncio.Event()
