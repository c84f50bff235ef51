"""A simulated swarm of asynchronous gossip: every peer trains alone, publishes parts, pulls late and never waits.

The peers run the product's own decisions: gossip's engine, plans of merges, pacing, data coverage, lifecycle. This
module carries out what the engine commands: when an answer or a publication's bytes arrive, which peer is frozen, what
is lost. The model is one number per fragment (`simulate.systems.gossip_model`), so that a thousand peers live for
minutes in a second or two. The record of a simulation is in `GossipSwarm.rounds`, `entered` and `incidents`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from swarmtrain.algorithm.pacing import round_inner_steps
from swarmtrain.methods.method import GradientFormat
from swarmtrain.protocol.gossip.advertised import AdvertisedFragments
from swarmtrain.protocol.gossip.engine import GossipEngine
from swarmtrain.protocol.gossip.engine import GossipSettings as EngineSettings
from swarmtrain.protocol.gossip.fragments import publishes_every
from swarmtrain.protocol.gossip.merge_plans import MergePlanner, TrainersRound
from swarmtrain.protocol.gossip.messages import (
    AskPartner,
    ConsensusTaken,
    DecodePublication,
    DownloadPublication,
    FetchConsensus,
    FindRoute,
    GossipCommand,
    GossipEvent,
    MergeDue,
    MergeFragment,
    MergePrepared,
    MergesPlanned,
    PartnerReplied,
    PartnersChanged,
    PeerCalled,
    PrepareMerge,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullFailure,
    PullTimerFired,
    ReportFailure,
)
from swarmtrain.protocol.gossip.partners import is_too_old, median_round
from swarmtrain.protocol.gossip.pulls import round_ends_s
from swarmtrain.protocol.membership.membership import Membership, PeerInfo, PeerState
from swarmtrain.protocol.tokens.shards import Coverage
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.systems.gossip_model import FragmentSchedule, GossipModel, Value, schedule_of
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.network import PullRefusal, SimulatedNetwork, kept_until
from swarmtrain.simulate.systems.publications import (
    GRADIENT,
    GROUPS,
    AdvertisedRecord,
    ConsensusSnapshot,
    Entered,
    OfGuest,
    PublicationQuery,
    RoundRecord,
    SimulatedCheckpoint,
    SimulatedGossipSettings,
    SimulatedPublication,
)

_STATE_BYTES = 8
"""Bytes of a parameter in a state: its weight and its momentum."""
_FORMAT: GradientFormat = "int2"
"""Format that pseudo-gradients are labelled with. Their sizes come from the settings, whatever the format."""
_WOKE = PullTimerFired()

NOTHING = PullRefusal("nothing is published yet")
BUSY = PullRefusal("BUSY")
AWAY = PullRefusal("no guest of this host")


_Command: TypeAlias = GossipCommand[SimulatedPublication, Value, bool]
_Event: TypeAlias = GossipEvent[SimulatedPublication, Value, bool]


@dataclass(slots=True)
class _Round:
    """State that is forgotten when the next round begins."""

    started_s: float
    steps: int
    schedule: FragmentSchedule
    num_over: int = 0
    """Number of fragments merged so far in this round."""
    num_merged: int = 0
    staleness_rounds: int = 0
    bytes_down: int = 0
    waits_since_s: float | None = None
    """Time at which the peer's inner steps were done, if it is too far behind and fetches another's weights; else
    None."""


class GossipPeer:
    """Simulated volunteer of gossip. It makes the product's decisions, on the links and the clock of the swarm."""

    def __init__(self, swarm: GossipSwarm, name: str, speed: float, theta: float, link: SimulatedLink) -> None:
        s = self.settings = swarm.settings
        self.swarm, self.name, self.steps_per_s, self.link = swarm, name, speed, link
        self.alive, self.frozen = True, False
        self.model = GossipModel(name, s, theta)
        self.round, self.bytes_up = 0, 0
        self.membership = Membership(me=name)
        self.coverage = Coverage(me=name, num_shards=s.num_shards) if s.num_shards else None
        self.shard = -1
        self._rng = random.Random(f"{swarm.seed} {name}")
        self.engine: GossipEngine[SimulatedPublication, Value, bool] = GossipEngine(
            name, swarm.engine_settings, self._rng, self._rng, swarm.tellings
        )
        self._planner = MergePlanner(s.num_fragments)
        self._now = _Round(math.inf, s.inner_steps, self.model.schedule)
        self._last_tokens = 0
        """Tokens that the peer trained in its previous round."""
        self._others: list[PeerInfo] = []
        """Records of live peers, as read last."""
        self._ends_s: list[float | None] = []
        self._has_looked = False
        """True if the peer has read presences since it last planned its merges."""
        self._forgets_s = 0.0
        self._events: list[_Event] | None = None
        """Events for the engine, which is deciding now; None while it is idle."""
        self._timer: Timer | None = None
        self.checkpoints: list[SimulatedCheckpoint] = []
        self._frozen_at_s = 0.0
        self._backlog: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    # ------------------------------------------------------------------ the process

    @property
    def running(self) -> bool:
        """True if the process is neither gone nor frozen."""
        return self.alive and not self.frozen

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call` in this process. Everything that reaches the process passes through here."""
        if self.frozen:
            self._backlog.append((call, args))
        elif self.alive:
            call(*args)

    def die(self) -> None:
        """End the process. Its presence stays until it expires."""
        # Renewals are made when somebody looks; the last one must be made while it still runs.
        self.renew()
        self.alive = self.frozen = False

    def leave(self) -> None:
        """Withdraw the presence, then end the process."""
        self.die()
        self.swarm.board.pop(self.name, None)

    def freeze(self) -> None:
        """Stop the process, as SIGSTOP does."""
        self.renew()
        self.frozen, self._frozen_at_s = True, self.swarm.clock.now

    def thaw(self) -> None:
        """Let the process continue where it was."""
        now = self.swarm.clock.now
        self.frozen = False
        # As if the round had begun so much later: no step was taken meanwhile.
        self._now.started_s += now - self._frozen_at_s
        self.membership.resume(now)
        if self.name in self.swarm.board:
            self._announce(now)
        backlog, self._backlog = self._backlog, []
        for call, args in backlog:
            self.deliver(call, *args)
        if self._is_training and (plans := self._planner.steps_done(self.steps_done, now)) is not None:
            self._plan(plans)

    def begin(self) -> None:
        """Fetch the weights of a live peer, if there is one, then train."""
        self._begin(self.swarm.clock.now)

    def _begin(self, came_s: float) -> None:
        self._look_around()
        if self._others:
            self._take_state(partial(self._adopt, came_s))
        else:
            self.start()

    def _take_state(self, done: Callable[[str, Any], None]) -> None:
        least = median_round(info.round for info in self._others) - self.settings.max_staleness_rounds
        peer = self._rng.choice([info.peer for info in self._others if info.round >= least])
        self.swarm.pull(self, peer, "state", self.settings.state_bytes, partial(done, peer))

    def _adopt(self, came_s: float, peer: str, state: Any) -> None:
        if isinstance(state, ConsensusSnapshot):
            self._go_on_with(state, peer, came_s)
            return
        if state is None:
            self.membership.call_failed(peer, self.swarm.clock.now, "unreachable")
        self._begin(came_s)

    def _go_on_with(self, state: ConsensusSnapshot, peer: str, since_s: float) -> None:
        """Replace this peer's weights by another peer's."""
        self.round = max(self.round, state.round)
        self._tell(ConsensusTaken(self.round, [state.places], {peer: state.round}))
        self.model.take(state)
        self.swarm.took_state(self, peer, self.swarm.clock.now - since_s)
        self.start()

    # ------------------------------------------------------------------ training

    @property
    def theta(self) -> float:
        """Mean of the fragments' weights."""
        return self.model.theta

    @property
    def _is_training(self) -> bool:
        return self._now.started_s < math.inf and self._now.num_over < self.settings.num_fragments

    @property
    def steps_done(self) -> int:
        """Inner steps that the peer has done in this round."""
        return self._steps_done_at(self._frozen_at_s if self.frozen else self.swarm.clock.now)

    def _steps_done_at(self, at_s: float) -> int:
        # 1e-9: a step that ends at this very moment is done, whatever the rounding of its time.
        return min(self._now.steps, math.floor(max(0.0, at_s - self._now.started_s) * self.steps_per_s + 1e-9))

    @property
    def steps_unpublished(self) -> int:
        """Inner steps of this round that were done since somebody last asked for its publications; 0 before the
        round."""
        return self.steps_done - self.model.told_steps

    def start(self) -> None:
        """Begin to train, with weights that were not merged here."""
        self.model.restart()
        self._start_round(all_begin=True)

    def _start_round(self, all_begin: bool = False) -> None:
        s, now = self.settings, self.swarm.clock.now
        if not self._others:  # else what was read for the pulls will do
            self._look_around()
        steps = round_inner_steps(
            self.steps_per_s,
            [one.steps_per_s for one in self._others],
            s.inner_steps,
            paced=s.pacing,
            limit_s=s.round_limit_s,
            others_end_in_s=[None if end_s is None else end_s - now for end_s in self._ends_s],
        )
        every = publishes_every(s.num_parts, s.num_fragments, steps / self.steps_per_s, s.state_bytes // _STATE_BYTES)
        self._now = _Round(now, steps, schedule_of(steps, s.num_parts, s.num_fragments, every))
        self.model.begin_round(self.round, self._now.schedule, all_begin=all_begin)
        if self.coverage is not None:
            busy = self.coverage.busy(one.peer for one in self._others)
            tokens = steps * s.tokens_per_step
            self.shard, _ = self.coverage.choose(self.round, self.swarm.seed, busy=busy, round_tokens=tokens)
        self._announce(now)
        of = TrainersRound(
            number=self.round, inner_steps=steps, merge_after=self._now.schedule.merge_after, gradient_format=_FORMAT,
            steps_per_s=self.steps_per_s,
        )  # fmt: skip
        self._plan(self._planner.round_began(of, now, all_begin=all_begin))
        self._train_on()

    def _plan(self, plans: Any) -> None:
        self._has_looked = False
        self._tell(MergesPlanned(self.round, plans))

    def _train_on(self) -> None:
        """Schedule the next fragment's merge."""
        r = self._now
        due_s = r.started_s + r.schedule.merge_after[r.num_over] / self.steps_per_s
        self.swarm.clock.call_at(due_s, self.deliver, self._due, r)

    def _due(self, r: _Round) -> None:
        if self.steps_done < r.schedule.merge_after[r.num_over]:  # it stood still meanwhile
            self._train_on()
        else:
            self._tell(MergeDue(self.round, r.num_over))

    def _merge(self, command: MergeFragment[SimulatedPublication, Value, bool]) -> None:
        r, number = self._now, command.fragment
        self._publish(number)  # its whole round, from the weights that it began with
        reference = median_round([self.round, *(info.round for info in self._others)]) if command.pulled else 0
        for one in command.pulled:
            r.staleness_rounds = max(r.staleness_rounds, reference - one.version.round)
            r.num_merged += one.group == GRADIENT
        self.model.merge(number, command.pulled)
        self._merged(number)

    def _merged(self, number: int) -> None:
        r, now = self._now, self.swarm.clock.now
        r.num_over += 1
        plans = self._planner.merged(number, now)
        if r.num_over == self.settings.num_fragments:
            self._end_round(r)
            return
        self.model.publish_weights(number, self.round + 1)
        if plans is not None:
            self._plan(plans)
        self._train_on()

    def _end_round(self, r: _Round) -> None:
        self._over(r)
        self.round += 1
        self._save()
        self._start_round()

    def _save(self) -> None:
        if self.settings.keeps_past:
            of, rows = self.model, self.engine.rows()
            saved = SimulatedCheckpoint(of.thetas, of.momenta, self.round, rows, list(of.entered), list(of.came))
            self.checkpoints = [*self.checkpoints[-2:], saved]

    def _over(self, r: _Round) -> None:
        """Record the end of the round: its inner steps are done, and all fragments are merged."""
        ended_s = self.swarm.clock.now if r.waits_since_s is None else r.waits_since_s
        self._last_tokens = r.steps * self.settings.tokens_per_step
        if self.coverage is not None:
            self.coverage.trained(self.shard, self._last_tokens)
        self.swarm.round_over(RoundRecord(
            peer=self.name, round=self.round, started_s=r.started_s, ended_s=ended_s, steps=r.steps,
            partners=r.num_merged / self.settings.num_fragments, staleness_rounds=r.staleness_rounds,
            bytes_down=r.bytes_down, waited=r.waits_since_s is not None,
        ))  # fmt: skip

    def resume(self, saved: SimulatedCheckpoint) -> None:
        """Continue from a checkpoint, in a process that has nothing else."""
        self.model.resume(saved)
        self.round = saved.round
        self.engine.load(saved.ledger)
        self._look_around()
        if is_too_old(self.round, [info.round for info in self._others], self.settings.max_staleness_rounds):
            self._begin(self.swarm.clock.now)
        else:
            self.start()

    def _catch_up(self) -> None:
        self._now.waits_since_s = self.swarm.clock.now
        self._look_around()
        if self._others:
            self._take_state(self._caught_up)
        else:
            self._tell(MergeDue(self.round, self.settings.num_fragments - 1, may_catch_up=False))

    def _caught_up(self, peer: str, state: Any) -> None:
        since_s = self._now.waits_since_s
        if since_s is None or not isinstance(state, ConsensusSnapshot):
            self._tell(MergeDue(self.round, self.settings.num_fragments - 1, may_catch_up=False))
            return
        self._over(self._now)
        self.round += 1
        self._go_on_with(state, peer, since_s)
        self._save()

    # ------------------------------------------------------------------ publishing

    def _publish(self, number: int) -> SimulatedPublication | None:
        return self.model.publish(number, self.steps_done, self.coverage)

    def provide(self, what: Any) -> Any:
        """Return the state for a joiner, the newest publication's manifest, or the bytes of one of the last two."""
        if isinstance(what, PublicationQuery):
            if what.group == GRADIENT:
                return self._publish(what.fragment) or NOTHING
            return self.model.weights(what.fragment) or NOTHING
        if isinstance(what, SimulatedPublication):
            if self.swarm.links.num_out(self.name) >= self.settings.max_readers:
                return BUSY
            if not self.model.has(what):
                return None
            self.bytes_up += self.settings.group_bytes(what.group)
            return what
        if what != "state":
            return AWAY
        if self._now.started_s == math.inf:
            return NOTHING
        self.bytes_up += self.settings.state_bytes
        return self._state()

    def _state(self) -> ConsensusSnapshot:
        """Return this peer's weights as a joiner takes them. They contain the peer's own rounds too."""
        of, places = self.model, self.engine.places(self.round - 1)
        return ConsensusSnapshot(of.thetas, of.momenta, self.round, places, [*of.entered, *of.came])

    def _announce(self, at_s: float) -> None:
        """Store the presence record as of `at_s`: the round's start, or a renewal a third of the lifetime later."""
        s, done, part, tokens = self.settings, self._steps_done_at(at_s), 0, self._last_tokens
        if (passed := self._now.schedule.passed(done)) is not None:
            part, tokens = passed[1], passed[0] * s.tokens_per_step
        info = self._describe(PeerInfo(
            peer=self.name, stamp=at_s, training=True, round=self.round, part=part, part_tokens=tokens,
            inner_steps=self._now.steps, inner_steps_done=done, steps_per_s=self.steps_per_s, addresses=(self.name,),
            adapter_groups=s.adapter_groups,
        ))  # fmt: skip
        ends_s = round_ends_s(at_s, info.inner_steps, info.inner_steps_done, info.steps_per_s)
        self.swarm.board[self.name] = AdvertisedRecord(info, at_s + s.presence_ttl_s, ends_s)

    def renew(self) -> None:
        """Update the peer's record to its present progress. Renewals are no events: they are made when somebody
        looks."""
        known = self.swarm.board.get(self.name)
        every_s = self.settings.presence_ttl_s / 3
        if known is not None and self.running and (gone_s := self.swarm.clock.now - known.info.stamp) >= every_s:
            self._announce(known.info.stamp + gone_s // every_s * every_s)

    def _describe(self, info: PeerInfo) -> PeerInfo:
        """Change the record as a subclass needs. The default changes nothing."""
        return info

    # ------------------------------------------------------------------ pulling

    def _look_around(self) -> None:
        """Read a sample of the presences in the DHT."""
        now, board, membership = self.swarm.clock.now, self.swarm.board, self.membership
        names, every_s = self.swarm.names, self.settings.presence_ttl_s / 3
        if len(names) > self.settings.sample:
            names = self._rng.sample(names, self.settings.sample)
        self._others, self._ends_s, self._has_looked = [], [], True
        for name in sorted(names):
            seen = board.get(name)
            if seen is None or name == self.name:
                continue
            if now - seen.info.stamp >= every_s and name in self.swarm.peers:
                self.swarm.peers[name].renew()
                seen = board[name]
            membership.saw_presence(seen.info, seen.expires_s, now)
            if seen.expires_s >= now and membership.state(name) is PeerState.LIVE:
                self._others.append(seen.info)
                self._ends_s.append(seen.round_ends_s)
        membership.expire(now)
        if now >= self._forgets_s:  # now and then: it goes through all that it knows
            membership.forget(now - self.settings.forget_after_s)
            self._forgets_s = now + self.settings.forget_after_s / 2
        self._tell(PartnersChanged(self._others))

    def _tell(self, event: _Event) -> None:
        """Pass an event to the engine, and carry out its commands."""
        if self._events is not None:  # it follows from a command, or comes in the same moment
            self._events.append(event)
            return
        now, engine = self.swarm.clock.now, self.engine
        events, does = [event], self._does
        self._events = events
        for each in events:
            for command in engine.receive(each, now):
                does(command)
            if each is events[-1] and (wake_s := engine.wake_at()) is not None and wake_s <= now:
                self._wakes()
        self._events = None
        if wake_s is not None:
            self._timer = self.swarm.clock.call_by(self._timer, wake_s, self.deliver, self._woke)

    def _woke(self) -> None:
        wake_s = self.engine.wake_at()
        if wake_s is None:
            return
        if wake_s > self.swarm.clock.now:
            self._timer = self.swarm.clock.call_at(wake_s, self.deliver, self._woke)
        else:
            self._wakes()

    def _wakes(self) -> None:
        if not self._has_looked:
            self._look_around()
        self._tell(_WOKE)

    def _does(self, command: _Command) -> None:
        match command:
            case AskPartner():
                self._ask(command)
            case DownloadPublication():
                self._fetch(command.source, command.held.peer, command.held, partial(self._came, command))
            case DecodePublication():
                self._decode(command)
            case PrepareMerge():
                self._tell(MergePrepared(command.number, True))
            case MergeFragment():
                self._merge(command)
            case FetchConsensus():
                self._catch_up()
            case FindRoute():
                self._route(command)
            case ReportFailure():
                self.swarm.incidents.append((self.name, command.peer, command.failure.reason))

    def _route(self, route: FindRoute) -> None:
        raise NotImplementedError("nobody is hidden here")

    def _ask(self, ask: AskPartner) -> None:
        source = self.swarm.peers.get(ask.source)
        is_heard = source is not None and source.engine.is_left_alone(self.name) and source.running
        if source is not None and is_heard and self.swarm.connected(self, source):
            source._tell(PeerCalled(self.name))
        asked = self.swarm.asked[ask.fragment][ask.group]
        self._fetch(ask.source, ask.author, asked, partial(self._replied, ask))

    def _fetch(
        self, source: str, author: str, what: PublicationQuery | SimulatedPublication, done: Callable[[Any], None]
    ) -> None:
        """Fetch a publication or its manifest, from its author or from one of the author's hosts."""
        num_bytes = self.settings.group_bytes(what.group) if isinstance(what, SimulatedPublication) else 0
        self._pull(source, author, what, num_bytes, done)

    def _pull(
        self,
        source: str,
        author: str,
        what: PublicationQuery | SimulatedPublication,
        num_bytes: int,
        done: Callable[[Any], None],
    ) -> None:
        self.swarm.pull(self, source, what if source == author else OfGuest(author, what), num_bytes, done)

    def _replied(self, ask: AskPartner, found: SimulatedPublication | PullRefusal | None) -> None:
        if found is NOTHING:
            self._tell(PartnerReplied(ask.pull))
        elif isinstance(found, SimulatedPublication) and not found.is_forged:
            self._tell(PartnerReplied(ask.pull, found.version, found))
        else:
            self._failed(ask.pull, ask.source, found, is_silent=True)

    def _came(
        self, download: DownloadPublication[SimulatedPublication], found: SimulatedPublication | PullRefusal | None
    ) -> None:
        now, held = self.swarm.clock.now, download.held
        if isinstance(found, SimulatedPublication) and found == held:
            num_bytes = self.settings.group_bytes(held.group)
            self._now.bytes_down += num_bytes
            self.membership.heard(download.source, now)
            for _ in range(1 + self.swarm.comes_twice()):
                self._tell(PublicationDownloaded(download.pull, num_bytes))
        else:
            self._failed(download.pull, download.source, found)

    def _failed(self, pull: int, source: str, found: Any, *, is_silent: bool = False) -> None:
        if found is None:
            self.membership.call_failed(source, self.swarm.clock.now, "unreachable")
            failure = PullFailure("unreachable", "silent" if is_silent else "failed")
        elif found is AWAY or found is BUSY:
            failure = PullFailure(found.reason, "away" if found is AWAY else "busy")
        else:
            failure = PullFailure("it is not what its author has signed", is_incident=True)
        self._tell(PullFailed(pull, failure))

    def _decode(self, decode: DecodePublication[SimulatedPublication]) -> None:
        held, earlier = decode.held, decode.earlier
        if not held.is_finite:
            self._tell(PullFailed(decode.pull, PullFailure("it is not finite", is_incident=True, is_authors=True)))
            return
        if self.coverage is not None:
            self.coverage.merge(held.rows, decode.author, lambda _, tokens: tokens)
        value = held.gradient if decode.group == GRADIENT else held.theta
        value = value if earlier is None else value - earlier.gradient
        self._tell(PublicationDecoded(decode.pull, Value(value, decode.news.tokens)))


class GossipSwarm(SimulatedNetwork[GossipPeer]):
    """Simulated swarm that gossips: peers, links, faults, and the record of what happened."""

    def __init__(
        self, settings: SimulatedGossipSettings | None = None, *, link: SimulatedLink | None = None, seed: int = 0
    ) -> None:
        self.settings = settings or SimulatedGossipSettings()
        super().__init__(link or SimulatedLink(), self.settings.stall_limit_s, seed)
        self.seed = seed
        self.engine_settings = _engine_settings(self.settings)
        self.tellings = AdvertisedFragments(self.settings.num_fragments, self.settings.num_parts)
        self.asked = [
            {group: PublicationQuery(group, fragment) for group in GROUPS}
            for fragment in range(self.settings.num_fragments)
        ]
        """All possible queries, by fragment and tensor group."""
        self.board: dict[str, AdvertisedRecord] = {}
        """Presence records stored in the DHT, by PeerID."""
        self.names: list[str] = []
        self._places: dict[str, int] = {}
        self.rounds: list[RoundRecord] = []
        self.incidents: list[tuple[str, str, str]] = []

    def round_over(self, record: RoundRecord) -> None:
        """Record the end of a peer's round."""
        self.rounds.append(record)

    def took_state(self, peer: GossipPeer, of: str, waited_s: float) -> None:
        """Hook, called when a peer that joined or fell behind has another's state after `waited_s`, and trains."""

    def forget(self, name: str) -> None:
        """Let the peer's presence expire, then remove the peer."""

        def drop() -> None:
            self.board.pop(name, None)
            at = self._places.pop(name)
            last = self.names.pop()
            if last != name:
                self.names[at], self._places[last] = last, at

        self.clock.call_later(self.settings.presence_ttl_s, drop)
        self.clock.call_later(2 * self.settings.presence_ttl_s, self.peers.pop, name)

    def join(
        self, name: str, *, steps_per_s: float = 10.0, theta: float = 0.0, link: SimulatedLink | None = None
    ) -> GossipPeer:
        """Add a volunteer now. It takes the weights of a live peer; if there is none, it starts from `theta`."""
        peer = self._add(name, steps_per_s, theta, link)
        peer.deliver(peer.begin)
        return peer

    def found(
        self, name: str, *, steps_per_s: float = 10.0, theta: float = 0.0, link: SimulatedLink | None = None
    ) -> GossipPeer:
        """Add a founding volunteer now. It starts from its own `theta` even if others are present."""
        peer = self._add(name, steps_per_s, theta, link)
        peer.deliver(peer.start)
        return peer

    def restart(self, name: str) -> None:
        """Kill a peer, and restart it at once from its third newest checkpoint, as after a torn disk."""
        self.kill(name)
        self.come_back(name, checkpoint=0)

    def come_back(self, name: str, checkpoint: int = -1) -> GossipPeer:
        """Restart a dead peer from one of its last three checkpoints (-1 is the newest), if it has any."""
        old = self.peers[name]
        assert not old.alive, f"{name} has not died"
        new = self.peers[name] = self._make(name, old.steps_per_s, old.theta, old.link)
        new.model.target = old.model.target
        if old.checkpoints:
            new.checkpoints = [*kept_until(old.checkpoints, checkpoint)]
            new.deliver(new.resume, new.checkpoints[-1])
        else:
            new.deliver(new.begin)
        return new

    def _make(self, name: str, steps_per_s: float, theta: float, link: SimulatedLink) -> GossipPeer:
        return GossipPeer(self, name, steps_per_s, theta, link)

    def _add(self, name: str, steps_per_s: float, theta: float, link: SimulatedLink | None) -> GossipPeer:
        assert name not in self.peers, f"{name} has been here already: a process that returns is a new peer"
        peer = self.peers[name] = self._make(name, steps_per_s, theta, link or self._link)
        self._places[name] = len(self.names)
        self.names.append(name)
        return peer

    @property
    def entered(self) -> list[Entered]:
        """Publications that entered the weights, with their inner steps."""
        return [entry for peer in self.peers.values() for entry in peer.model.entered]

    def spread(self) -> float:
        """Return the error of consensus: the greatest difference between two running peers' weights."""
        running = self.running()
        weights = ([peer.model.fragments[i].theta for peer in running] for i in range(self.settings.num_fragments))
        return max(max(of_fragment) - min(of_fragment) for of_fragment in weights)


def _engine_settings(settings: SimulatedGossipSettings) -> EngineSettings:
    return EngineSettings(
        groups=GROUPS,
        sizes=[{_FORMAT: settings.fragment_sizes}] * settings.num_fragments,
        wanted=settings.wanted,
        num_parts=settings.num_parts,
        max_staleness_rounds=settings.max_staleness_rounds,
        variant=settings.variant,
    )
