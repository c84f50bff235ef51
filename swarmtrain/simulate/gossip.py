"""A simulated swarm of asynchronous gossip: every peer trains alone, publishes parts, pulls late and never waits.

The peers run the product's own decisions (partners, ledger, pacing, data coverage, lifecycle). The model is one number,
so that a thousand peers live for minutes in a second or two: an inner step moves it by `inner_rate` of the way to the
peer's own `target`, the merge is the one of `algorithm/gossip.py` with a single weight. Publications are made when
somebody asks for them, as in the product. What happened is in `GossipSwarm.rounds`, `entered` and `incidents`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from swarmtrain.algorithm.pacing import round_inner_steps
from swarmtrain.protocol.fragments import publishes_every
from swarmtrain.protocol.lifecycle import Membership, PeerInfo, PeerState
from swarmtrain.protocol.partners import (
    Candidate,
    Difference,
    Ledger,
    Mark,
    Nothing,
    Partners,
    Place,
    agreed_places,
    left_behind,
    median_round,
)
from swarmtrain.protocol.pulls import BytesBegun, PullTimes, Section, plan_pulls, round_ends_s
from swarmtrain.protocol.shards import Coverage
from swarmtrain.simulate.messages import Link
from swarmtrain.simulate.network import Network, Refused, kept_until
from swarmtrain.simulate.publications import GossipSettings, Presence, Publication, RoundRecord

__all__ = ["GossipPeer", "GossipSettings", "GossipSwarm", "Publication", "RoundRecord"]

_STATE_BYTES = 8
"""Of a parameter: its weight and its momentum."""


@dataclass
class _Round:
    """What is forgotten when the next round begins."""

    started_s: float
    steps: int
    every: int = 1
    asked: dict[Section, list[str]] = field(default_factory=lambda: {"weights": [], "gradient": []})
    due: dict[Section, int] = field(default_factory=lambda: {"weights": 0, "gradient": 0})
    bytes_down: int = 0


@dataclass(slots=True)
class _Pull:
    """One of a round's pulls; another partner is asked while it brings nothing."""

    of: _Round
    section: Section
    began_s: float


@dataclass(frozen=True)
class _Checkpoint:
    """Weights, and what was merged into them: they belong together. `entered` is for the tests."""

    theta: float
    momentum: float
    round: int
    ledger: list[list[str | int]]
    entered: list[tuple[str, str, int, int, int]]
    came: list[_Entered]


_Entered = tuple[str, int, int, int]
"""(whose, of which round, from token, to token)"""


@dataclass(frozen=True)
class _State:
    """What a joiner takes: weights, and up to where each peer is in them. `entered` is for the tests."""

    theta: float
    momentum: float
    round: int
    places: dict[str, Place]
    entered: list[_Entered]


class GossipPeer:
    """One volunteer. Its decisions are the product's; its links and its clock are the swarm's."""

    def __init__(self, swarm: GossipSwarm, name: str, speed: float, theta: float, link: Link) -> None:
        s = self.settings = swarm.settings
        self.swarm, self.name, self.steps_per_s, self.link = swarm, name, speed, link
        self.alive, self.frozen = True, False
        self.theta, self.target, self.momentum = theta, theta, 0.0
        self.round, self.bytes_up = 0, 0
        self.membership = Membership(me=name)
        self.partners = Partners(Ledger(s.max_staleness_rounds, s.num_parts, s.wanted.gradients), variant=s.variant)
        self.coverage = Coverage(me=name, num_shards=s.num_shards) if s.num_shards else None
        self.shard = -1
        self._rng = random.Random(f"{swarm.seed} {name}")
        self._now = _Round(math.inf, s.inner_steps)
        self._arrived: list[Publication] = []
        self._gradients: dict[str, float] = {}
        self._published: list[Publication] = []
        self._weights: list[Publication] = []
        """That the last two rounds began with."""
        self._times = PullTimes()
        self._coming: dict[Section, int] = {"weights": 0, "gradient": 0}
        self._sampled: list[Candidate] = []
        self._rounds_sampled: list[int] = []
        self._ends_sampled_s: list[float | None] = []
        self._reference = (-1, -1)
        self._new_weights: set[str] | None = None
        """Of whom among those the weights are new; until somebody wants to know, None."""
        self._forgets_s = 0.0
        self.entered: list[tuple[str, str, int, int, int]] = []
        self.came: list[_Entered] = []
        """What had entered the weights that it took from others; and its own rounds."""
        self.checkpoints: list[_Checkpoint] = []
        self._frozen_at_s = 0.0
        self._backlog: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    # ------------------------------------------------------------------ the process

    @property
    def running(self) -> bool:
        """Neither gone nor frozen."""
        return self.alive and not self.frozen

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Everything that reaches this process comes through here."""
        if self.frozen:
            self._backlog.append((call, args))
        elif self.alive:
            call(*args)

    def die(self) -> None:
        """The process ends; its presence stays until it expires."""
        self.renew()
        self.alive = self.frozen = False

    def leave(self) -> None:
        """Take the presence back, and end."""
        self.die()
        self.swarm.board.pop(self.name, None)

    def freeze(self) -> None:
        """The process is stopped."""
        self.renew()
        self.frozen, self._frozen_at_s = True, self.swarm.clock.now

    def thaw(self) -> None:
        """It goes on where it was."""
        self.frozen = False
        self._now.started_s += self.swarm.clock.now - self._frozen_at_s
        self.membership.resume(self.swarm.clock.now)
        if self.name in self.swarm.board:
            self._announce(self.swarm.clock.now)
        backlog, self._backlog = self._backlog, []
        for call, args in backlog:
            self.deliver(call, *args)

    def begin(self) -> None:
        """Take the weights of somebody who lives, if there is anybody, and train."""
        self._begin(self.swarm.clock.now)

    def _begin(self, came_s: float) -> None:
        self._look_around()
        others = [one.peer for one in self._sampled]
        if others:
            peer, num_bytes = self._rng.choice(others), self.settings.state_bytes
            self.swarm.pull(self, peer, "state", num_bytes, partial(self._adopt, came_s, peer))
        else:
            self._start_round()

    def _adopt(self, came_s: float, peer: str, state: Any) -> None:
        if not isinstance(state, _State):
            self._failed(peer, state)
            self._begin(came_s)
            return
        self.theta, self.momentum, self.round = state.theta, state.momentum, state.round
        rounds = {one.peer: one.round for one in self._sampled} | {peer: state.round}
        places = agreed_places([state.places], rounds, state.round, self.settings.max_staleness_rounds)
        self.partners.ledger.bring(places)
        self.came = list(state.entered)
        self.swarm.begun(self, self.swarm.clock.now - came_s)
        self._start_round()

    # ------------------------------------------------------------------ training

    @property
    def steps_done(self) -> int:
        """Of the present round."""
        return self._steps_done_at(self._frozen_at_s if self.frozen else self.swarm.clock.now)

    def _steps_done_at(self, at_s: float) -> int:
        return min(self._now.steps, math.floor(max(0.0, at_s - self._now.started_s) * self.steps_per_s + 1e-9))

    @property
    def steps_unpublished(self) -> int:
        """Of the present round, those done since somebody asked for its publication last; none before it has begun."""
        published = sum(newest.mark.tokens for newest in self._published[-1:] if newest.mark.round == self.round)
        return self.steps_done - published // self.settings.tokens_per_step

    def _start_round(self) -> None:
        s, now = self.settings, self.swarm.clock.now
        if not self._sampled:  # else what was read for the pull will do
            self._look_around()
        steps = round_inner_steps(
            self.steps_per_s,
            [one.steps_per_s for one in self._sampled],
            s.inner_steps,
            paced=s.pacing,
            limit_s=s.round_limit_s,
            others_end_in_s=[None if end_s is None else end_s - now for end_s in self._ends_sampled_s],
        )
        every = publishes_every(s.num_parts, 1, steps / self.steps_per_s, s.state_bytes // _STATE_BYTES)
        self._now = _Round(now, steps, every)
        self._weights = [*self._weights[-1:], Publication(self.name, Mark(self.round, 0, 0), self.theta, 0.0)]
        if self.coverage is not None:
            busy = self.coverage.busy(one.peer for one in self._sampled)
            tokens = steps * s.tokens_per_step
            self.shard, _ = self.coverage.choose(self.round, self.swarm.seed, busy=busy, round_tokens=tokens)
        self._announce(now)
        end_s = now + steps / self.steps_per_s
        pulls = plan_pulls(len(self._sampled), now, end_s, s.sizes, self._times, s.wanted)
        for section, at_s in ("weights", pulls.weights_at_s), ("gradient", pulls.gradients_at_s):
            for when_s in at_s:
                self.swarm.clock.call_at(when_s, self.deliver, self._pull, self._now, section)
        self.swarm.clock.call_at(end_s, self.deliver, self._end_round, self._now)

    def _gradient(self, steps: int) -> float:
        """theta less the weight after so many inner steps."""
        return (self.theta - self.target) * (1.0 - (1.0 - self.settings.inner_rate) ** steps)

    def _end_round(self, r: _Round) -> None:
        s, now = self.settings, self.swarm.clock.now
        if self.steps_done < r.steps:  # it stood still meanwhile
            due_s = r.started_s + r.steps / self.steps_per_s
            self.swarm.clock.call_at(due_s, self.deliver, self._end_round, r)
            return
        self._publish()
        if self.coverage is not None:
            self.coverage.trained(self.shard, r.steps * s.tokens_per_step)
        round, reference_round = self.round, self._reference_round()
        num_merged, oldest = self._merge(reference_round)
        self._times.round_ended(r.steps / self.steps_per_s, now - r.started_s)
        self.swarm.round_over(RoundRecord(
            peer=self.name, round=round, started_s=r.started_s, ended_s=now, steps=r.steps, partners=num_merged,
            staleness_rounds=oldest, bytes_down=r.bytes_down,
        ))  # fmt: skip
        if s.keeps_past:
            self.came.append((self.name, round, 0, r.steps * s.tokens_per_step))
        self.round += 1
        if s.keeps_past:
            rows, entered = self.partners.ledger.rows(), list(self.entered)
            saved = _Checkpoint(self.theta, self.momentum, self.round, rows, entered, list(self.came))
            self.checkpoints = [*self.checkpoints[-2:], saved]
        self._start_round()

    def resume(self, saved: _Checkpoint) -> None:
        """Go on from a checkpoint, in a process that knows nothing else."""
        self.theta, self.momentum, self.round = saved.theta, saved.momentum, saved.round
        self.entered = list(saved.entered)  # what was merged later is gone with the weights it entered
        self.came = list(saved.came)
        self.partners.ledger.load(saved.ledger)
        self._start_round()

    def _merge(self, reference_round: int) -> tuple[int, int]:
        """Section 5: the mean of the weights, the token-weighted mean of the pseudo-gradients, one Nesterov step.

        Who has fallen too far behind the median takes the others' weights without its own."""
        s, ledger = self.settings, self.partners.ledger
        own_tokens = self._now.steps * s.tokens_per_step
        behind = left_behind(self.round, self._rounds_sampled, s.max_staleness_rounds)
        thetas, gradients, num_merged, oldest = [self.theta], [(self._gradient(self._now.steps), own_tokens)], 0, 0
        for one in self._arrived:
            if not ledger.may_enter(one.section, one.peer, one.mark, reference_round):
                continue
            oldest = max(oldest, reference_round - one.mark.round)
            if one.section == "weights":
                thetas.append(one.theta)
                ledger.weights_merged(one.peer, one.mark.round)
                continue
            new = ledger.news(one.peer, one.mark, reference_round)
            since, earlier = (new.since.tokens, self._gradients[one.peer]) if isinstance(new, Difference) else (0, 0.0)
            num_merged += 1
            gradients.append((one.gradient - earlier, new.tokens))
            if s.keeps_past:
                self.entered.append((self.name, one.peer, one.mark.round, since, one.mark.tokens))
            ledger.merged(one.peer, one.mark, reference_round)
            self._gradients[one.peer] = one.gradient
            if self.coverage is not None:
                self.coverage.merge(one.rows, one.peer, lambda _, tokens: tokens)
        held = ledger.held
        self._gradients = {peer: g for peer, g in self._gradients.items() if peer in held}
        self._arrived.clear()
        mean = sum(g * tokens for g, tokens in gradients) / sum(tokens for _, tokens in gradients)
        self.momentum = s.outer_momentum * self.momentum + mean
        step = s.outer_learning_rate * (mean + s.outer_momentum * self.momentum)
        if behind and len(thetas) > 1:
            thetas, self.round = thetas[1:], reference_round - 1
        self.theta = sum(thetas) / len(thetas) - step
        return num_merged, oldest

    # ------------------------------------------------------------------ publishing

    def _publish(self) -> Publication | None:
        """The newest publication; made now if its moment has passed."""
        newest = self._published[-1] if self._published else None
        mark = self._mark_at(self.steps_done)
        if mark is not None and (newest is None or newest.mark != mark):
            rows = () if self.coverage is None else tuple(self.coverage.rows_to_send())
            gradient = self._gradient(mark.tokens // self.settings.tokens_per_step)
            newest = Publication(self.name, mark, self.theta, gradient, rows)
            self._published = [*self._published[-1:], newest]
        return newest

    def _mark_at(self, steps_done: int) -> Mark | None:
        """What is published of the present round once so many steps are done; None before the first part."""
        steps, every, num_parts = self._now.steps, self._now.every, self.settings.num_parts
        part = steps_done * num_parts // steps
        part -= (part - num_parts) % every  # counted back from the end
        tokens = -(-steps * part // num_parts) * self.settings.tokens_per_step
        return Mark(self.round, part, tokens) if part > 0 else None

    def provide(self, what: str) -> Any:
        """The state for a joiner, the manifest of the newest publication, or the bytes of one of the last two."""
        s = self.settings
        if what == "state":
            self.bytes_up += s.state_bytes
            return self._state()
        if what == "manifest weights":
            return self._weights[-1] if self._weights else Refused("its first round has not begun")
        if what == "manifest gradient":
            return self._publish() or Refused("nothing is published yet")
        if self.swarm.links.num_out(self.name) >= s.max_readers:
            return Refused("BUSY")
        found = next((one for one in self._published + self._weights if what == one.body), None)
        if found is not None:
            self.bytes_up += s.section_bytes(found.section)
        return found

    def _state(self) -> _State:
        """Its own rounds are in its weights too."""
        places = self.partners.ledger.places()
        if self.round:
            places[self.name] = self.round - 1, self.settings.num_parts
        merged = [(whose, round, since, until) for _, whose, round, since, until in self.entered]
        return _State(self.theta, self.momentum, self.round, places, [*merged, *self.came])

    def _announce(self, at_s: float) -> None:
        """The presence record as it was at `at_s`: a round's start, or a third of its lifetime after the last one."""
        s = self.settings
        steps = self._steps_done_at(at_s)
        info = self._describe(PeerInfo(
            peer=self.name, stamp=at_s, training=True, round=self.round, inner_steps=self._now.steps,
            inner_steps_done=steps, steps_per_s=self.steps_per_s, addresses=(self.name,),
        ))  # fmt: skip
        mark = self._mark_at(steps)
        if mark is None:
            mark = self._published[-1].mark if self._published else Mark(self.round, 0, 0)
        candidate = Candidate(
            peer=self.name, round=mark.round, part=mark.part, tokens=mark.tokens,
            inner_steps_done=info.inner_steps_done, steps_per_s=info.steps_per_s,
        )  # fmt: skip
        ends_s = round_ends_s(at_s, info.inner_steps, info.inner_steps_done, info.steps_per_s)
        self.swarm.board[self.name] = Presence(info, at_s + s.presence_ttl_s, candidate, ends_s)

    def renew(self) -> None:
        """Bring its record to where it is by now. Renewals are not events: they are made up for when somebody looks."""
        known = self.swarm.board.get(self.name)
        every_s = self.settings.presence_ttl_s / 3
        if known is not None and self.running and (gone_s := self.swarm.clock.now - known.info.stamp) >= every_s:
            self._announce(known.info.stamp + gone_s // every_s * every_s)

    def _describe(self, info: PeerInfo) -> PeerInfo:
        """What else it says of itself."""
        return info

    # ------------------------------------------------------------------ pulling

    def _look_around(self) -> None:
        """Read a sample of the presences."""
        now, board, membership = self.swarm.clock.now, self.swarm.board, self.membership
        names, every_s = self.swarm.names, self.settings.presence_ttl_s / 3
        if len(names) > self.settings.sample:
            names = self._rng.sample(names, self.settings.sample)
        self._sampled, self._ends_sampled_s = [], []
        for name in names:
            seen = board.get(name)
            if seen is None or name == self.name:
                continue
            if now - seen.info.stamp >= every_s and name in self.swarm.peers:
                self.swarm.peers[name].renew()
                seen = board[name]
            membership.saw_presence(seen.info, seen.expires_s, now)
            if seen.expires_s >= now and membership.state(name) is PeerState.LIVE:
                self._sampled.append(seen.candidate)
                self._ends_sampled_s.append(seen.round_ends_s)
        self._rounds_sampled, self._reference = [one.round for one in self._sampled], (-1, -1)
        self._new_weights = None
        membership.expire(now)
        if now >= self._forgets_s:  # now and then: it goes through all that it knows
            membership.forget(now - self.settings.forget_after_s)
            self._forgets_s = now + self.settings.forget_after_s / 2

    def _reference_round(self) -> int:
        if self._reference[0] != self.round:
            self._reference = (self.round, median_round([self.round, *self._rounds_sampled]))
        return self._reference[1]

    def _pull(self, r: _Round, section: Section) -> None:
        if r is not self._now:
            return
        if not any(r.due.values()):
            self._look_around()
        r.due[section] += 1
        here = sum(one.section == section for one in self._arrived)
        if here + self._coming[section] < r.due[section]:
            self._coming[section] += 1
            self._ask(_Pull(r, section, self.swarm.clock.now))

    def _ask(self, pull: _Pull) -> None:
        """Ask one partner; another one when this one gives nothing, while time is left."""
        r, section, peer = pull.of, pull.section, None
        if r is self._now:
            peer, _ = self.partners.choose(
                self._sampled,
                exclude=r.asked[section],
                first=self._first(section),
                reference_round=self._reference_round(),
                now=self.swarm.clock.now,
                rng=self._rng,
            )
        if peer is None:
            self._coming[section] -= 1
        else:
            r.asked[section].append(peer)
            self._fetch(peer, f"manifest {section}", 0, partial(self._manifest, pull, peer))

    def _first(self, section: Section) -> set[str]:
        if section == "gradient":
            with_weights = {one.peer for one in self._arrived if one.section == "weights"}
            return self.partners.first(section, {}, with_weights, self._reference_round())
        if self._new_weights is None:  # nothing is merged between a look around and the last one who is asked
            rounds = {one.peer: one.round for one in self._sampled}
            self._new_weights = self.partners.first(section, rounds, (), self._reference_round())
        return self._new_weights

    def _manifest(self, pull: _Pull, peer: str, found: Publication | Refused | None) -> None:
        if not isinstance(found, Publication):
            self._failed(peer, found, found is None)
            self._ask(pull)
            return
        reference_round = self._reference_round()
        if not self.partners.ledger.may_enter(pull.section, peer, found.mark, reference_round):
            new = self.partners.ledger.news(peer, found.mark, reference_round)
            if isinstance(new, Nothing) and new.turned_back:
                self.swarm.incidents.append((self.name, peer, new.reason))
            self._ask(pull)
            return
        now = self.swarm.clock.now
        begun = self._times.bytes_begin(now)
        num_bytes = self.settings.section_bytes(pull.section)
        self._fetch(peer, found.body, num_bytes, partial(self._body, pull, peer, now, begun))

    def _fetch(self, peer: str, what: str, num_bytes: float, done: Callable[[Any], None]) -> None:
        """Pull `what` of a partner's."""
        partner = self.swarm.peers.get(peer)
        if partner is not None and partner.running and self.swarm.connected(self, partner):
            partner.partners.back_off.called(self.name, self.swarm.clock.now)
        self.swarm.pull(self, peer, what, num_bytes, done)

    def _body(
        self, pull: _Pull, peer: str, began_s: float, begun: BytesBegun, found: Publication | Refused | None
    ) -> None:
        now, size_bytes = self.swarm.clock.now, self.settings.section_bytes(pull.section)
        if not isinstance(found, Publication) or not found.is_finite:
            self._failed(peer, found if isinstance(found, Refused) else None)
            self._ask(pull)
            return
        self._coming[pull.section] -= 1
        self._times.bytes_end(begun, now, size_bytes)
        self._times.merged(began_s - pull.began_s)
        self.partners.back_off.answered(peer)
        self.membership.heard(peer, now)
        self._now.bytes_down += size_bytes
        self._arrived += [found] * (1 + self.swarm.comes_twice())  # if its round is over, it enters the next merge

    def _failed(self, peer: str, answer: Refused | None, mute: bool = False) -> None:
        now = self.swarm.clock.now
        if isinstance(answer, Refused):
            self.partners.back_off.busy(peer, now)
        else:
            self.partners.back_off.failed(peer, now, "unreachable", mute)
            self.membership.call_failed(peer, now, "unreachable")


class GossipSwarm(Network[GossipPeer]):
    """The swarm: peers, links, faults, and what happened."""

    def __init__(self, settings: GossipSettings | None = None, *, link: Link | None = None, seed: int = 0) -> None:
        self.settings = settings or GossipSettings()
        super().__init__(link or Link(), self.settings.stall_limit_s, seed)
        self.seed = seed
        self.board: dict[str, Presence] = {}
        """What the DHT was given."""
        self.names: list[str] = []
        self._places: dict[str, int] = {}
        self.rounds: list[RoundRecord] = []
        self.incidents: list[tuple[str, str, str]] = []

    def round_over(self, record: RoundRecord) -> None:
        """A peer's round has ended."""
        self.rounds.append(record)

    def begun(self, peer: GossipPeer, waited_s: float) -> None:
        """One that came has a state, after so long, and trains."""

    def forget(self, name: str) -> None:
        """Its presence runs out, and nothing is kept of it."""

        def drop() -> None:
            self.board.pop(name, None)
            at = self._places.pop(name)
            last = self.names.pop()
            if last != name:
                self.names[at], self._places[last] = last, at

        self.clock.call_later(self.settings.presence_ttl_s, drop)
        self.clock.call_later(2 * self.settings.presence_ttl_s, self.peers.pop, name)

    def join(self, name: str, *, steps_per_s: float = 10.0, theta: float = 0.0, link: Link | None = None) -> GossipPeer:
        """A volunteer comes now; if anybody is there it takes their weights, else it has `theta`."""
        peer = self._add(name, steps_per_s, theta, link)
        peer.deliver(peer.begin)
        return peer

    def found(
        self, name: str, *, steps_per_s: float = 10.0, theta: float = 0.0, link: Link | None = None
    ) -> GossipPeer:
        """A founding volunteer comes now: it starts from its own `theta`, whoever is there."""
        peer = self._add(name, steps_per_s, theta, link)
        peer.deliver(peer._start_round)
        return peer

    def restart(self, name: str) -> None:
        """Its process dies, and comes back at once from the last but two of its checkpoints, as after a torn disk."""
        self.kill(name)
        self.come_back(name, checkpoint=0)

    def come_back(self, name: str, checkpoint: int = -1) -> GossipPeer:
        """One that died is started again, from one of its last three checkpoints (-1 is the newest) if it has any."""
        old = self.peers[name]
        assert not old.alive, f"{name} has not died"
        new = self.peers[name] = self._make(name, old.steps_per_s, old.theta, old.link)
        new.target = old.target
        if old.checkpoints:
            new.checkpoints = [*kept_until(old.checkpoints, checkpoint)]
            new.deliver(new.resume, new.checkpoints[-1])
        else:
            new.deliver(new.begin)
        return new

    def _make(self, name: str, steps_per_s: float, theta: float, link: Link) -> GossipPeer:
        return GossipPeer(self, name, steps_per_s, theta, link)

    def _add(self, name: str, steps_per_s: float, theta: float, link: Link | None) -> GossipPeer:
        assert name not in self.peers, f"{name} has been here already: a process that returns is a new peer"
        peer = self.peers[name] = self._make(name, steps_per_s, theta, link or self._link)
        self._places[name] = len(self.names)
        self.names.append(name)
        return peer

    @property
    def entered(self) -> list[tuple[str, str, int, int, int]]:
        """(who merged, whose, of which round, from token, to token): the inner steps that entered the weights."""
        return [entry for peer in self.peers.values() for entry in peer.entered]

    def spread(self) -> float:
        """The consensus problem's error: the greatest difference between two running peers' weights."""
        weights = [peer.theta for peer in self.running()]
        return max(weights) - min(weights)
