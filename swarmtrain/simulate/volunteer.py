"""A simulated volunteer: the product's decisions, with digests for weights and a timer for training.

It mirrors the synchronous rounds of a real peer: train, publish, ask about the round, `decide`, sign or apply or
catch up, train again. Its weights are a hash chain over the rosters it applied, so that "everyone's weights are
bit-identical" is an equality of digests. The chain is kept apart from `Roster.base`: a roster applied to the wrong
weights shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

from swarmtrain.protocol.chains import Chain, ChainLink, ChainView, chain_view, flaw
from swarmtrain.protocol.lifecycle import Membership, PeerInfo
from swarmtrain.protocol.rosters import (
    Apply,
    CatchUp,
    Publication,
    Roster,
    RoundView,
    Sign,
    Standing,
    Told,
    Wait,
    better_roster,
    decide,
    idled,
    is_silent,
    joining_steps,
    peers_to_ask,
    pulls_whole,
    round_steps,
    standings,
)
from swarmtrain.protocol.signers import Signers
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.messages import (
    Link,
    Phase,
    RoundReply,
    RoundRequest,
    RoundState,
    Settings,
    State,
    hash_of,
    rotated,
)
from swarmtrain.simulate.network import End, Machine, Place
from swarmtrain.simulate.transfers import Carrier, Transfers

__all__ = ["Surroundings", "Volunteer"]


class Question(Protocol):
    """A question under way."""

    def give_up(self) -> None:
        """Who asked does not want to know any more."""


class Surroundings(Carrier, Protocol):
    """What is around a volunteer: what carries its bytes and questions, and takes note of what it does."""

    settings: Settings
    waits_s: list[tuple[str, int, float]]
    presences: list[tuple[PeerInfo, float, int]]

    @property
    def peers(self) -> Mapping[str, Volunteer]:
        """By name, itself among them."""

    def side(self, peer: Place) -> int:
        """Which side of the partition it is on; 0 if there is none."""

    def tell(self, src: End, dst: Machine, call: Callable[..., object], *args: Any) -> None:
        """A message without an answer."""

    def call(self, src: Volunteer, dst_name: str, request: RoundRequest, done: Callable[[Any], None]) -> Question:
        """Ask; `done(reply)` comes once, with None if the call failed."""

    def record(
        self, kind: Literal["signed", "applied", "adopted"], peer: Volunteer, roster: Roster | None = None
    ) -> None:
        """Add to the log."""


class Volunteer(Transfers):
    """One simulated peer. The world delivers to it; it answers and asks."""

    world: Surroundings

    def __init__(self, world: Surroundings, name: str, steps_per_s: float, link: Link) -> None:
        super().__init__()
        self.world, self.name, self.steps_per_s, self.link = world, name, steps_per_s, link
        self.settings = world.settings
        self.alive, self.frozen = True, False
        self.phase = Phase.JOINING
        self.membership = Membership(me=name)
        self.round = 0
        self.last: Roster | None = None
        self.chain = Chain()
        self.digest = hash_of("weights of the run's seed")
        self.history: tuple[Roster, ...] = ()
        self.digest_at: dict[int, str] = {}
        self.checkpoints: tuple[State, ...] = ()
        """Of the last rounds' beginnings."""
        self.steps = 0
        self.guest = False
        self.signs = True
        self._signers = Signers()
        self._now = RoundState(world.clock.now)
        self._kept: dict[int, dict[tuple[str, int, str], Roster]] = {}
        self._published: dict[int, Publication] = {}
        self._soon: Timer | None = None
        self._told: dict[str, tuple[float, Told]] = {}
        self._shown: dict[str, Chain] = {}
        """What each peer showed last of its chain."""
        self._asking: dict[str, Question] = {}
        self._retry_at_s: dict[str, float] = {}
        self._version = 1
        self._waiting: dict[Any, RoundRequest] = {}
        self._wake: Timer | None = None
        self._training: Timer | None = None
        self._training_from_s = self._training_ends_s = 0.0
        self._fetching = False
        self._looks = 0
        self._presence_read = 0
        self._backlog: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._frozen_at_s = self._listening_since_s = world.clock.now

    # ------------------------------------------------------------------ the process

    @property
    def running(self) -> bool:
        """Neither gone nor frozen."""
        return self.alive and not self.frozen

    @property
    def ended_s(self) -> float:
        """When its inner steps of the present round ended; infinity before."""
        return self._now.ended_s

    @property
    def inner_steps_done(self) -> int:
        """Of the present round, as told to others; a round cut short by joining counts from its full length."""
        if self.phase is Phase.JOINING:
            return 0
        skipped = self.settings.inner_steps - self.steps if self.guest else 0
        left_s = max(0.0, self._training_ends_s - self.world.clock.now) if self.phase is Phase.TRAINING else 0.0
        return skipped + max(0, self.steps - math.ceil(left_s * self.steps_per_s))

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Everything that reaches this process comes through here."""
        if self.frozen:
            self._backlog.append((call, args))
        elif self.alive:
            call(*args)

    def _later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        return self.world.clock.call_later(delay_s, self.deliver, call, *args)

    def die(self) -> None:
        """The process ends; whoever waits for an answer sees the connection break."""
        self.alive = self.frozen = False
        for call in self._waiting:
            call.refuse()
        self._waiting.clear()
        self._backlog.clear()

    def leave(self) -> None:
        """Say goodbye, and end."""
        for info in self.membership.live():
            other = self.world.peers[info.peer]
            self.world.tell(self, other, other.heard_goodbye, self._presence())
        self.die()

    def freeze(self) -> None:
        """The process is stopped."""
        self.frozen, self._frozen_at_s = True, self.world.clock.now

    def thaw(self) -> None:
        """The process goes on; a gap as long as this it notices itself."""
        self.frozen = False
        now = self.world.clock.now
        self._training_ends_s += now - self._frozen_at_s
        self._now.frozen_s += max(0.0, now - max(self._frozen_at_s, self._now.ended_s))
        if now - self._frozen_at_s > self.settings.silence_s / 4:
            self._listening_since_s = now
            self.membership.resume(now)
            self._read_presences()
        backlog, self._backlog = self._backlog, []
        for call, args in backlog:
            self.deliver(call, *args)

    # ------------------------------------------------------------------ joining, presence

    def begin(self) -> None:
        """Look who is there, take their state, train."""
        self._read_presences()
        others = [info.peer for info in self.membership.volunteers()][:16]
        replies: dict[str, RoundReply | None] = {}

        def done(peer: str, reply: RoundReply | None) -> None:
            replies[peer] = reply
            if reply is not None:
                self._heard(peer, reply)
            if len(replies) == len(others):
                self._choose_state([peer for peer in others if replies[peer] is not None and peer in self._told])

        for peer in others:
            self.world.call(self, peer, self._question(0.0), partial(done, peer))
        if not others:
            self._choose_state([])

    def _chains(self, since_s: float, of: Chain | None = None) -> ChainView:
        """What is known of the chains, and of one that came with a state."""
        chains = [*self._shown.values(), *([] if of is None else [of])]
        return chain_view(
            self.chain,
            {chain.digest: chain for chain in chains},
            {peer: self._told.get(peer) for peer in self.membership.heard_at_s()},
            since_s=since_s,
            me=self.name,
            is_away=self.phase is Phase.JOINING or self._listening_since_s > self._now.started_s,
        )

    def _choose_state(self, sources: list[str]) -> None:
        heads = [last for peer in sources if (last := self._told[peer][1].last) is not None]
        best = self._chains(self._now.started_s).best_of(heads)
        if best is not None:
            holders = [peer for peer in sources if (r := self._told[peer][1].last) and r.digest == best.digest]
            rest = [peer for peer in sources if peer not in holders]
            self._fetch_state([*rotated(holders, self.name), *rest][:4], self._choose_state_failed)
        else:
            self._announce_training(self._others_done(self.round))

    def _choose_state_failed(self) -> None:
        self._announce_training([])

    def _announce_training(self, others_done: list[int]) -> None:
        self._train(joining_steps(self.settings.inner_steps, others_done)[0])
        self._renew()
        self._later(self.settings.read_presence_s, self._reread)
        for info in self.membership.live():
            other = self.world.peers[info.peer]
            self.world.tell(self, other, other.heard_hello, self._presence())

    def _presence(self) -> PeerInfo:
        return PeerInfo(
            peer=self.name,
            stamp=self.world.clock.now,
            training=self.phase is not Phase.JOINING,
            round=self.round,
            inner_steps_done=self.inner_steps_done,
            steps_per_s=self.steps_per_s,
        )

    def _renew(self) -> None:
        expires_s = self.world.clock.now + self.settings.presence_ttl_s
        self.world.presences.append((self._presence(), expires_s, self.world.side(self)))
        self._later(self.settings.presence_ttl_s / 3, self._renew)

    def _read_presences(self) -> None:
        now, side = self.world.clock.now, self.world.side(self)
        news = self.world.presences[self._presence_read :]
        self._presence_read = len(self.world.presences)
        for info, expires_s, their_side in news:
            if (side == their_side or 0 in (side, their_side)) and expires_s >= now:
                self.membership.saw_presence(info, expires_s, now)
        self.membership.expire(now)

    def _reread(self) -> None:
        self._read_presences()
        self._later(self.settings.read_presence_s, self._reread)
        self._evaluate()

    def heard_hello(self, info: PeerInfo) -> None:
        """A peer that joins says so to everyone it knows."""
        now = self.world.clock.now
        self.membership.saw_presence(info, now + self.settings.presence_ttl_s, now)
        self._evaluate_soon()

    def heard_goodbye(self, info: PeerInfo) -> None:
        """A peer that leaves says so."""
        self.membership.left(info.peer, self.world.clock.now)
        self._evaluate()

    # ------------------------------------------------------------------ a round

    def _train(self, steps: int) -> None:
        """The next round begins, with `steps` inner steps; fewer than a whole round's make a guest."""
        now = self.world.clock.now
        self.phase, self.guest = Phase.TRAINING, steps < self.settings.inner_steps
        self.steps = max(1, min(steps, math.floor(self.settings.round_limit_s * self.steps_per_s)))
        self._kept[self.round] = {}
        self._kept.pop(self.round - self.settings.kept_rounds - 1, None)
        self._store = {what: r for what, r in self._store.items() if abs(self.round - r) <= 1}
        self._published = {r: offer for r, offer in self._published.items() if abs(self.round - r) <= 1}
        self._now = RoundState(now)
        self.checkpoints = (*self.checkpoints[-3:], self._state())
        self.digest_at[self.round] = self.digest
        self._training_from_s, self._training_ends_s = now, now + self.steps / self.steps_per_s
        self._training = self._later(self._training_ends_s - now, self._trained)
        self._news()
        self.world.reached(self, "started")

    def _trained(self) -> None:
        now = self.world.clock.now
        if self.phase is not Phase.TRAINING or now < self._training_ends_s - 1e-9:
            if self.phase is Phase.TRAINING:
                self._later(self._training_ends_s - now, self._trained)
            return
        self.phase = Phase.MERGING
        offer = Publication(
            peer=self.name,
            snapshot=hash_of(f"{self.name} {self.round} {self.digest} {now}"),
            tokens=self.steps * self.settings.tokens_per_step,
            inner_steps=self.steps,
            base=self._base,
        )
        self._published[self.round] = self._now.announced[self.name] = offer
        self._store[offer.snapshot] = self.round
        self._now.ended_s = now
        self.world.reached(self, "ended")
        if self.running:
            self._news()
            self._evaluate()

    @property
    def _base(self) -> str:
        return "" if self.last is None else self.last.digest

    def _view(self) -> RoundView:
        r = self._now
        heard_at_s = self.membership.heard_at_s()
        distrusted = r.distrusted.intersection(heard_at_s)
        found = standings(
            self.last,
            self.round,
            {peer: self._told.get(peer) for peer in heard_at_s.keys() - distrusted},
            since_s=r.started_s,
            undeliverable=r.undeliverable,
            holds=self._chains(r.started_s).holds,
        )
        return RoundView(
            me=self.name,
            round=self.round,
            ended_at_s=r.ended_s,
            deadline_s=r.started_s + self.settings.round_limit_s,
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
            announced=r.announced,
            held=frozenset(peer for peer, offer in r.announced.items() if offer.snapshot in self._store),
            rosters=tuple(r.rosters.values()),
            heard_at_s=heard_at_s,
            asked_at_s=r.asked_at_s,
            answered_at_s=r.answered_at_s,
            listening_since_s=self._listening_since_s,
            unobtainable=frozenset(r.unobtainable),
            idle=self._signers.idle(self.round),
        )

    def _evaluate(self) -> None:
        """Something is new, or a time has come: decide, and do it."""
        if self.phase is not Phase.MERGING or self._fetching or not self.running:
            return
        if self._wake is not None:
            self._wake.cancel()
        self._looks += 1
        now, view, look = self.world.clock.now, self._view(), self._looks
        wanted = peers_to_ask(view, now)
        self._give_up_asking(view, set(self._asking).difference(wanted))
        for peer in wanted:
            self._ask(peer)
        if pulls_whole(view):
            for offer in list(view.announced.values()):
                if offer.base == view.base and offer.peer not in view.held | view.unobtainable:
                    self._pull_whole(offer)
        if self._looks != look:  # one of those pulls has nobody to ask: that is known, and decided on, by now
            return
        decision = decide(view, now)
        if isinstance(decision, Wait):
            self._wake = self._later(max(decision.until_s - now, 1e-6), self._evaluate)
        elif isinstance(decision, Sign) and self.signs:
            self._sign(decision)
        elif isinstance(decision, Apply):
            self._apply(decision.roster)
        elif isinstance(decision, CatchUp):
            self._fetch_state(rotated(decision.sources, self.name)[:4], self._caught_up_failed)

    def _sign(self, decision: Sign) -> None:
        roster = Roster(
            round=self.round,
            signer=self.name,
            entries=decision.entries,
            attempt=decision.attempt,
            base=self._base,
            base_tokens=0 if self.last is None else self.last.total_tokens,
        )
        self._keep(roster)
        self.world.record("signed", self, roster)
        self.world.reached(self, "signed")
        if self.running:
            self._news()
        if self.running:
            self._evaluate()

    def _keep(self, roster: Roster) -> bool:
        key = (roster.signer, roster.attempt, roster.digest)
        if roster.round != self.round or roster.base != self._base or key in self._now.rosters:
            return False
        self._now.rosters[key] = self._kept[self.round][key] = roster
        self._now.unobtainable.difference_update(roster.peers)
        return True

    def _advance(self, roster: Roster) -> None:
        """The outer step, and the next round."""
        now = self.world.clock.now
        self._round_over()
        entries = " ".join(f"{e.peer}:{e.snapshot}:{e.tokens}" for e in roster.entries)
        self.digest = hash_of(f"{self.digest} {roster.round} {entries}")
        self.history = (*self.history, roster)
        self.last = roster
        shown = {entry.peer: entry.tokens for entry in roster.entries}
        self.chain = self.chain.extended(ChainLink(roster=roster, shown=shown))
        self._waited(self.round, now - self._now.ended_s)
        self.world.record("applied", self, roster)
        self.round += 1
        self._train(round_steps(self.settings.inner_steps, self._others_done(self.round))[0])

    def _waited(self, round: int, wait_s: float) -> None:
        self.world.waits_s.append((self.name, round, wait_s - self._now.frozen_s))

    # ------------------------------------------------------------------ asking and answering

    def _question(self, hold_s: float, known: int = 0) -> RoundRequest:
        return RoundRequest(src=self.name, round=self.round, known=known, hold_s=hold_s)

    def _ask(self, peer: str) -> None:
        now = self.world.clock.now
        if peer in self._asking or now < self._retry_at_s.get(peer, 0.0):
            return
        self._now.asked_at_s.setdefault(peer, now)
        deaf = self._now.answered_at_s.get(peer, now) < self._listening_since_s
        question = self._question(0.0 if deaf else self.settings.hold_s, self._now.known.get(peer, 0))
        self._asking[peer] = self.world.call(self, peer, question, lambda reply: self._asked_about(peer, reply, now))

    def _round_over(self) -> None:
        """Judge the others by it."""
        view = self._view()
        self._give_up_asking(view, list(self._asking))
        signed = {roster.signer for roster in view.rosters}
        self._signers.round_over(self.round, idled(view, self.world.clock.now), signed)

    def _give_up_asking(self, view: RoundView, peers: Iterable[str]) -> None:
        """Hang up on `peers`; a question that was never answered has failed."""
        for peer in sorted(peers):
            self._asking.pop(peer).give_up()
            if is_silent(view, peer, self.world.clock.now):
                self.membership.call_failed(peer, self.world.clock.now, "it has not answered")

    def _asked_about(self, peer: str, reply: RoundReply | None, asked_s: float) -> None:
        self._asking.pop(peer, None)
        if reply is None:
            self.membership.call_failed(peer, self.world.clock.now, "calls to it failed")
            self._retry_at_s[peer] = self.world.clock.now + self.settings.retry_s
            self._later(self.settings.retry_s, self._evaluate)
        else:
            self._now.answered_at_s[peer] = asked_s
            self._heard(peer, reply)
        self._evaluate_soon()

    def _evaluate_soon(self) -> None:
        """Once for all the news of one moment."""
        if self._soon is None or not self._soon.pending:
            self._soon = self._later(0.0, self._evaluate)

    def _heard(self, peer: str, reply: RoundReply) -> None:
        now = self.world.clock.now
        if flaw(reply.chain, self.chain):  # its answer is refused: it is asked again, but not waited for
            self.membership.heard(peer, now)
            self._now.distrusted.add(peer)
            self._retry_at_s[peer] = now + self.settings.hold_s
            return
        self.membership.heard(peer, now, round=reply.told.round, inner_steps_done=reply.inner_steps_done)
        self._told[peer] = (now, reply.told)
        self._shown.pop(peer, None)
        if reply.chain.digest not in self.chain:
            self._shown[peer] = reply.chain
        if reply.asked != self.round or self.phase is not Phase.MERGING:
            return
        self._now.known[peer] = reply.version
        if reply.publication is not None and reply.publication.base == self._base:
            self._now.announced[peer] = reply.publication
        for roster in (reply.roster, reply.told.last):  # whoever has applied one hands it out, whatever others it knows
            if roster is not None and self._keep(roster):
                self._news()

    def asked(self, request: RoundRequest, call: Any) -> None:
        """Another peer asks about a round: answered at once if it lacks something, else held."""
        self.membership.heard(request.src, self.world.clock.now)
        if request.known < self._version or request.hold_s == 0:
            self._answer(request, call)
        else:
            self._waiting[call] = request
            self._later(request.hold_s, self._release, call)

    def _release(self, call: Any) -> None:
        if (request := self._waiting.pop(call, None)) is not None:
            self._answer(request, call)

    def _answer(self, request: RoundRequest, call: Any) -> None:
        roster = better_roster(list(self._kept.get(request.round, {}).values()))
        call.answer(
            RoundReply(
                asked=request.round,
                version=self._version,
                told=Told(round=self.round, last=self.last, participating=not self.guest),
                inner_steps_done=self.inner_steps_done,
                publication=self._published.get(request.round),
                roster=roster,
                chain=self.chain,
            )
        )
        if roster is not None and roster.signer == self.name and request.round == self.round:
            self.world.reached(self, "told_one")

    def _news(self) -> None:
        self._version += 1
        while self._waiting and self.running:
            call = next(iter(self._waiting))
            self._answer(self._waiting.pop(call), call)

    # ------------------------------------------------------------------ catching up

    def restore(self, saved: State) -> None:
        """Go on from a checkpoint, in a process that knows nothing else."""
        self.round, self.last, self.digest, self.history = saved.round, saved.last, saved.digest, saved.history
        self.chain = saved.chain

    def _state(self) -> State:
        return State(round=self.round, last=self.last, digest=self.digest, history=self.history, chain=self.chain)

    def _fetch_state(self, sources: list[str], failed: Callable[[], None]) -> None:
        self._fetching = True

        def next_source(i: int, state: State | None) -> None:
            if state is not None:
                self._adopt(state, sources[i])
            elif i + 1 < len(sources):
                self._now.undeliverable.add(sources[i]) if i >= 0 else None
                pull(i + 1)
            else:
                self._now.undeliverable.update(sources)
                self._fetching = False
                failed()

        def pull(i: int) -> None:
            done = lambda state: next_source(i, state)  # noqa: E731
            self.world.pull(self, sources[i], "state", self.settings.state_bytes, done)

        next_source(-1, None)

    def _caught_up_failed(self) -> None:
        self._evaluate()

    def _adopt(self, state: State, source: str) -> None:
        """Others' weights hold: take them, and ask once more how far their round is by now."""
        self._fetching = False
        chains = self._chains(self._now.started_s, state.chain)
        if not chains.holds(state.last) and not (self.phase is Phase.JOINING and self.last is None):
            self._now.undeliverable.add(source)
            self._choose_state_failed() if self.phase is Phase.JOINING else self._evaluate()
            return
        self._round_over()
        waited_s = self.world.clock.now - self._now.ended_s
        old_round = self.round
        self.restore(state)
        self._kept = {}
        for round in [r for r in self.digest_at if r >= self.round]:
            del self.digest_at[round]
        joining = self.phase is Phase.JOINING
        if not joining:
            self.phase = Phase.CATCHING_UP
            self._waited(old_round, waited_s)
        self.world.record("adopted", self, state.last)
        self._fetching = True
        self.world.call(self, source, self._question(0.0), lambda reply: self._go_on(source, joining, reply))

    def _go_on(self, source: str, joining: bool, reply: RoundReply | None) -> None:
        self._fetching = False
        if reply is not None:
            self._heard(source, reply)
        others_done = self._others_done(self.round)
        if reply is not None and reply.told.round != self.round:
            others_done.append(self.settings.inner_steps)
        others_done = others_done or [1]
        if joining:
            self._announce_training(others_done)
        else:
            self._train(joining_steps(self.settings.inner_steps, others_done)[0])

    def _others_done(self, round: int) -> list[int]:
        infos = self.membership.volunteers()
        return [info.inner_steps_done for info in infos if info.round == round]
