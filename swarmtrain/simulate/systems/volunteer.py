"""A simulated volunteer of synchronous rounds: the product's `RoundEngine`, with digests for weights.

It trains by a timer and carries out the engine's commands on the world's clock and links. Its weights are a hash chain
over the rosters it applied, so "everyone's weights are bit-identical" means that digests are equal. The chain is
separate from `Roster.base`, so a roster that is applied to the wrong weights shows.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Chain, ChainLink, Chains, ShownChain
from swarmtrain.protocol.rounds.engine import RoundEngine, RoundRules
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication, steps_of_round
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.systems.messages import JoinState, Phase, Settings, SimulatedLink, hash_of
from swarmtrain.simulate.systems.presence import Directory, SimulatedPresence
from swarmtrain.simulate.systems.transfers import Carrier, Transfers

Reply: TypeAlias = ev.PeerReply[None, None]
_Event: TypeAlias = ev.Event[None, None]

_SAMPLE, _TRY_AGAIN_S = 16, 1.0
_JOINS, _LOOKS = 0, 1
"""Numbers of this peer's two searches: which state to begin with, and which rounds the others are in."""


def named(roster: Roster) -> ev.SignedRoster[None]:
    """Return the roster as if it were signed."""
    return ev.SignedRoster(roster, None, f"{roster.signer} {roster.attempt} {roster.digest}")


class OpenQuestion(Protocol):
    """Question to another peer that is under way."""

    def give_up(self) -> None:
        """Drop the question: the asker no longer wants the answer."""


class Surroundings(Carrier, Directory, Protocol):
    """Simulated world, as a volunteer sees it: it carries bytes and questions, and records what the volunteer does."""

    settings: Settings
    waits_s: list[tuple[str, int, float]]

    @property
    def peers(self) -> Mapping[str, SimulatedVolunteer]:
        """All peers by name, this one included."""

    def call(
        self, src: SimulatedVolunteer, dst_name: str, question: ev.RoundQuestion, done: Callable[[Any], None]
    ) -> OpenQuestion:
        """Ask a peer; `done(reply)` is called once, with None if the call failed."""

    def record(
        self, kind: Literal["signed", "applied", "adopted"], peer: SimulatedVolunteer, roster: Roster | None = None
    ) -> None:
        """Add an event to the log."""


class SimulatedVolunteer:
    """Simulated volunteer of synchronous rounds. The world delivers messages to it; it answers and asks."""

    world: Surroundings

    def __init__(self, world: Surroundings, name: str, steps_per_s: float, link: SimulatedLink) -> None:
        self.world, self.name, self.steps_per_s, self.link = world, name, steps_per_s, link
        s = self.settings = world.settings
        self.alive, self.frozen = True, False
        self.phase = Phase.JOINING
        self.membership = Membership(me=name)
        rules = RoundRules(
            share_above=s.share_above,
            round_limit_s=s.round_limit_s,
            silence_s=s.silence_s,
            max_wait_s=s.max_wait_s,
            hold_s=s.hold_s,
            retry_s=s.retry_s,
            look_s=s.look_s,
            num_chunks=s.num_chunks if s.transfers_share_links and s.by_bandwidth else 0,
            body_bytes=s.publication_bytes,
            target=s.target,
        )
        chains: Chains[None] = Chains()
        self.engine: RoundEngine[None, None] = RoundEngine(self.membership, chains, rules, random.Random(name))
        self.engine.receive(ev.LinkMeasured(link.rates), world.clock.now)
        self.transfers = Transfers(self, world)
        self.presence = SimulatedPresence(self, world)
        self.digest = hash_of("weights of the run's seed")
        self.history: tuple[Roster, ...] = ()
        self.digest_at: dict[int, str] = {}
        self.checkpoints: tuple[JoinState, ...] = ()
        """States at the beginnings of the last rounds, to restart from."""
        self.steps = 0
        self.signs = True
        self.ended_s = math.inf
        """Time at which the peer's inner steps of this round ended; infinity before that."""
        self._frozen_s = 0.0
        """Seconds for which this process was frozen since `ended_s`."""
        self._timer: Timer | None = None
        self._calls: dict[int, Any] = {}
        self._num_calls = itertools.count()
        self._asking: dict[int, OpenQuestion] = {}
        self._offered: dict[int, tuple[str, JoinState]] = {}
        self._started_s = self._training_ends_s = self._frozen_at_s = world.clock.now
        self._backlog: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    # ------------------------------------------------------------------ the process

    @property
    def running(self) -> bool:
        """True if the process is neither gone nor frozen."""
        return self.alive and not self.frozen

    @property
    def round(self) -> int:
        """Round that the peer is in."""
        return self.engine.round

    @property
    def last(self) -> Roster | None:
        """Roster that the peer applied last."""
        return None if self.engine.last is None else self.engine.last.roster

    @property
    def chain(self) -> Chain:
        """Chain of the rosters that the peer has applied."""
        return self.engine.chains.chain

    @property
    def is_late_joiner(self) -> bool:
        """True if nobody waits for this peer's round, because it joined late."""
        return self.engine.is_late_joiner

    @property
    def inner_steps_done(self) -> int:
        """Inner steps of this round, as advertised to others.

        A late joiner's short round counts as if it had begun with the others: the steps it skipped are included.
        """
        if self.phase not in (Phase.TRAINING, Phase.MERGING):
            return 0
        skipped = self.settings.inner_steps - self.steps if self.is_late_joiner else 0
        left_s = max(0.0, self._training_ends_s - self.world.clock.now) if self.phase is Phase.TRAINING else 0.0
        return skipped + max(0, self.steps - math.ceil(left_s * self.steps_per_s))

    def provide(self, what: str) -> Any:
        """Return the state, or the bytes named `what`, for a pull; None if they are not here."""
        if what != "state":
            return self.transfers.provide(what)
        return None if self.phase is Phase.JOINING else self._state()

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call` in this process. Everything that reaches the process passes through here."""
        if self.frozen:
            self._backlog.append((call, args))
        elif self.alive:
            call(*args)

    def later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run something in this process after a delay; never if the process is gone by then."""
        return self.world.clock.call_later(delay_s, self.deliver, call, *args)

    def die(self) -> None:
        """End the process. Peers that wait for its answer see the connection break."""
        self.alive = self.frozen = False
        for call in self._calls.values():
            call.refuse()
        self._calls.clear()
        self._backlog.clear()

    def leave(self) -> None:
        """Say goodbye, then end the process."""
        self.presence.say_goodbye()
        self.die()

    def freeze(self) -> None:
        """Stop the process, as SIGSTOP does."""
        self.frozen, self._frozen_at_s = True, self.world.clock.now

    def thaw(self) -> None:
        """Let the process continue. It notices a long gap by itself."""
        self.frozen = False
        now = self.world.clock.now
        self._training_ends_s += now - self._frozen_at_s
        self._frozen_s += max(0.0, now - max(self._frozen_at_s, self.ended_s))
        if now - self._frozen_at_s > self.engine.rules.gap_s:
            self.tell(ev.ProcessSuspended())
            self.presence.read()
        backlog, self._backlog = self._backlog, []
        for call, args in backlog:
            self.deliver(call, *args)

    # ------------------------------------------------------------------ driving the engine

    def tell(self, event: _Event) -> None:
        """Pass an event to the engine, and carry out its commands."""
        for command in self.engine.receive(event, self.world.clock.now):
            self.deliver(self._do, command)
        wake_s, timer = self.engine.wake_at(), self._timer
        if timer is not None and timer.pending and timer.when_s == wake_s:
            return
        if timer is not None:
            timer.cancel()
        self._timer = None
        if wake_s is not None:
            self._timer = self.later(wake_s - self.world.clock.now, self.tell, ev.RoundTimerFired())

    def _do(self, command: ev.Command[None]) -> None:
        match command:
            case ev.AskRoundQuestion(number=number):
                done = partial(self._answered, number, command.peer)
                self._asking[number] = self.world.call(self, command.peer, command.question, done)
            case ev.DropRoundQuestion(number=number):
                if (question := self._asking.pop(number, None)) is not None:
                    question.give_up()
                if command.failed:
                    self.membership.call_failed(command.peer, self.world.clock.now, "it has not answered")
            case ev.AnswerRoundQuestion():
                call = self._calls.pop(command.call)
                call.answer(self._reply(command, call.asker))
                if (one := command.roster) is not None and one.roster.signer == self.name:
                    self.world.reached(self, "told_one")
            case ev.FetchPublication():
                self.transfers.fetch(command.publication, command.sources)
            case ev.SignRoster():
                if self.signs:
                    self.world.record("signed", self, command.roster)
                    self.world.reached(self, "signed")
                    self.deliver(self.tell, ev.RosterSigned(named(command.roster)))
            case ev.MergeRoster():
                self.transfers.merge(command.roster.roster)
            case ev.CancelMerge():
                self.transfers.give_up_merge()
            case ev.FinishRound():
                self._advance(command.roster.roster)
            case ev.RequestState(source=source):
                self.world.pull(self, source, "state", self.settings.state_bytes, partial(self._fetched, command))
            case ev.DownloadState(number=number):
                self.tell(ev.StateDownloaded(number))
            case ev.AdoptState(number=number):
                self._adopt(*self._offered.pop(number))
            case ev.PeersSurveyed(search=search):
                self._surveyed(search)
            case ev.JoinDecided(begins=begins, number=number):
                self._joined(begins, number)

    def _answered(self, number: int, peer: str, reply: Reply | None) -> None:
        self._asking.pop(number, None)
        if reply is None:
            self.membership.call_failed(peer, self.world.clock.now, "calls to it failed")
        self.tell(ev.QuestionFailed(number) if reply is None else ev.QuestionAnswered(number, reply))

    def asked(self, question: ev.RoundQuestion, call: Any) -> None:
        """Receive another peer's question about a round; the engine answers it at once or holds it."""
        number = next(self._num_calls)
        self._calls[number] = call
        self.tell(ev.QuestionReceived(number, question, call.asker))

    def _reply(self, answer: ev.AnswerRoundQuestion[None], asker: str) -> Reply:
        last = None if answer.last is None else answer.last.roster
        return ev.PeerReply(
            advertised=AdvertisedRound(round=answer.round, last=last, participating=answer.participating),
            inner_steps_done=self.inner_steps_done,
            last=answer.last,
            publication=answer.publication,
            roster=answer.roster,
            shown=ShownChain(self.chain) if answer.question.wants_chain and self.chain.links else None,
        )

    def _fetched(self, fetch: ev.RequestState, state: JoinState | None) -> None:
        if state is None or state.last is None or state.round < fetch.min_round:
            self.tell(ev.StateNotFetched(fetch.number))
        else:
            self._offered[fetch.number] = fetch.source, state
            self.tell(ev.StateOffered(fetch.number, named(state.last)))

    # ------------------------------------------------------------------ joining, presence

    def begin(self) -> None:
        """Ask who is present, take the state that holds, and train."""
        self.presence.read()
        others = [info.peer for info in self.membership.volunteers()][:_SAMPLE]
        self.tell(ev.Join(_JOINS, tuple(others)))

    def begin_with(self, others: Iterable[PeerInfo]) -> None:
        """Begin the run's first round together with `others`, which this peer has waited for."""
        now = self.world.clock.now
        for info in others:
            self.membership.saw_presence(info, now + self.settings.presence_ttl_s, now)
        self.tell(ev.Join(_JOINS, ()))

    def _joined(self, begins: ev.JoinsWith, number: int | None) -> None:
        if number is not None:
            self._adopt(*self._offered.pop(number))
        elif begins is ev.JoinsWith.OWN:
            self._begin_late()
        else:  # who has nothing is started again
            self.later(_TRY_AGAIN_S, self.begin)

    def _surveyed(self, search: int) -> None:
        """Go on after other peers have said where they are."""
        self._begin_late()

    def _begin_late(self) -> None:
        joins = self.phase is Phase.JOINING
        self._train(fresh=True)
        if not joins:
            return
        self.presence.announce()

    def info(self) -> PeerInfo:
        """Return this peer's presence record."""
        return PeerInfo(
            peer=self.name,
            stamp=self.world.clock.now,
            training=self.phase is not Phase.JOINING,
            round=self.round,
            inner_steps_done=self.inner_steps_done,
            steps_per_s=self.steps_per_s,
            link=self.link.rates,
        )

    # ------------------------------------------------------------------ a round

    def _train(self, *, fresh: bool) -> None:
        """Begin the next round. A late joiner's round has fewer inner steps than a whole one."""
        s, now = self.settings, self.world.clock.now
        others = [(info.round, info.inner_steps_done) for info in self.membership.volunteers()]
        steps, _ = steps_of_round(s.inner_steps, self.round, others, fresh=fresh)
        taken = max(1, min(steps, math.floor(s.round_limit_s * self.steps_per_s)))
        self._begin_round(taken, now + taken / self.steps_per_s, is_late_joiner=steps < s.inner_steps)

    def _begin_round(self, steps: int, ends_s: float, *, is_late_joiner: bool) -> None:
        """Train until `ends_s`; the round then has so many steps."""
        self.phase, self.steps = Phase.TRAINING, steps
        self.transfers.forget_old()
        self.ended_s, self._frozen_s = math.inf, 0.0
        self.checkpoints = (*self.checkpoints[-3:], self._state())
        self.digest_at[self.round] = self.digest
        self._started_s = self.world.clock.now
        self._trains_until(ends_s)
        self.tell(ev.RoundBegun(is_late_joiner=is_late_joiner))
        self.world.reached(self, "started")

    def _trains_until(self, ends_s: float) -> None:
        self._training_ends_s = ends_s
        self.later(ends_s - self.world.clock.now, self._trained)

    def _trained(self) -> None:
        now = self.world.clock.now
        if self.phase is not Phase.TRAINING or now < self._training_ends_s - 1e-9:
            # `thaw` has put the end off by the time that the process was frozen.
            if self.phase is Phase.TRAINING:
                self.later(self._training_ends_s - now, self._trained)
            return
        self._steps_done()

    def _steps_done(self) -> None:
        """End the round: its steps are done."""
        self._publish()

    def _publish(self) -> None:
        now = self.world.clock.now
        self.phase, self.ended_s = Phase.MERGING, now
        offer = RoundPublication(
            peer=self.name,
            snapshot=hash_of(f"{self.name} {self.round} {self.digest} {now}"),
            tokens=self.steps * self.settings.tokens_per_step,
            inner_steps=self.steps,
            base=self.engine.base,
        )
        self.transfers.published(offer.snapshot)
        self.world.reached(self, "ended")
        self.deliver(self.tell, ev.InnerStepsDone(self.round, offer, self._started_s))

    def _advance(self, roster: Roster) -> None:
        """Take the outer step and begin the next round."""
        self.phase = Phase.MERGED
        entries = " ".join(f"{e.peer}:{e.snapshot}:{e.tokens}" for e in roster.entries)
        self.digest = hash_of(f"{self.digest} {roster.round} {entries}")
        self.history = (*self.history, roster)
        self._waited()
        shown = {entry.peer: entry.tokens for entry in roster.entries}
        self.world.record("applied", self, roster)
        self._move(self.round + 1, ChainLink(roster=roster, shown=shown))
        self._train(fresh=False)

    def _move(self, round: int, link: ChainLink) -> None:
        self.engine.chains.move(link)
        self.tell(ev.RoundAdvanced(round, named(link.roster)))

    def _waited(self) -> None:
        wait_s = self.world.clock.now - self.ended_s - self._frozen_s
        self.world.waits_s.append((self.name, self.round, wait_s))

    # ------------------------------------------------------------------ states

    def restore(self, saved: JoinState) -> None:
        """Continue from a checkpoint, in a process that has nothing else."""
        if saved.last is not None:
            self.engine.chains.keep(ShownChain(saved.chain))
        self._take(saved)

    def _take(self, state: JoinState) -> None:
        self.digest, self.history = state.digest, state.history
        if state.last is not None:
            self._move(state.round, ChainLink(roster=state.last))

    def _state(self) -> JoinState:
        return JoinState(round=self.round, last=self.last, digest=self.digest, history=self.history, chain=self.chain)

    def _adopt(self, source: str, state: JoinState) -> None:
        """Adopt another peer's weights, because they hold, and ask again for the progress of the round under way."""
        if self.phase is not Phase.JOINING:
            self.phase = Phase.CATCHING_UP
            self._waited()
        self._take(state)
        for round in [r for r in self.digest_at if r >= self.round]:
            del self.digest_at[round]
        self.world.record("adopted", self, state.last)
        self.tell(ev.StateAdopted(_LOOKS, source))
