"""Gossip in virtual time: the product's decisions, merges and formats, with real models, on a clock that only counts.

What a volunteer does in threads and over sockets happens here in events: its inner steps at the moments when it
publishes, its pulls when `protocol.pulls` says, its merge at the round's end.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import Arrival, Layout, prepare, variance_corrected_mean
from swarmtrain.algorithm.pacing import first_inner_steps
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import BadBytesError
from swarmtrain.network.bringing import ATTEMPTS
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.refusals import rule_of
from swarmtrain.network.sections import sections_of
from swarmtrain.network.snapshots import TensorSpec
from swarmtrain.peer.consensus import layout_of_specs
from swarmtrain.peer.robustness import Naming, apart
from swarmtrain.peer.session import Start
from swarmtrain.peer.updates import Contribution, Gathered
from swarmtrain.protocol.fragments import publishes_every
from swarmtrain.protocol.partners import BackOff, Candidate, Difference, Mark, View, median_round
from swarmtrain.protocol.pulls import (
    PullTimes,
    Section,
    SectionBytes,
    Wanted,
    ahead_rounds,
    expected_step_s,
    gradient_format,
    is_moved,
    plan_pulls,
    total_bytes,
)
from swarmtrain.protocol.shards import Coverage, Row
from swarmtrain.run import GradientFormat
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.learning.churn import catches_up, schedule
from swarmtrain.simulate.learning.lane import Arrived, Lane, Published, Pull
from swarmtrain.simulate.learning.setting import Outcome, Recorder, Setting
from swarmtrain.simulate.learning.wire import Wire

__all__ = ["Peer", "World"]


_ROUNDING_S = 1e-9


class Peer:
    """A volunteer that merges at its own pace."""

    def __init__(self, world: World, number: int) -> None:
        setting = world.setting
        self.world, self.number, self.name = world, number, f"p{number}"
        self.learner = setting.learner(number)
        self.trainer = self.learner.replica
        self.rng = random.Random(f"{setting.run.run.seed} {number}")
        self.rounds_done, self.rounds_fresh = 0, 0.0
        num_shards = self.learner.loop.batches.num_shards
        self.coverage = Coverage(self.name, num_shards) if num_shards else None
        self.times = PullTimes()
        self.times.assume(min(setting.link_of(self.name)))
        self.times.merged(setting.rtt_s)
        self.start = Start(inner_steps=1, num_peers=1)
        self.done = self.run_tokens = 0
        self.is_here, self.is_over = True, False
        self.knows_speed = self.is_sure = False
        """From the end of its first round on, and from the start of the second."""
        self.step_s = setting.step_s[number]
        """As it was in its last round."""
        self.num_lives = 0
        """How often it has gone. What it had begun before then, comes to nothing."""
        self.began_s = math.inf
        """When its round did."""
        self.own: Contribution
        """What its round has brought so far."""
        self.naming = Naming(world.told)
        self.lanes = [self.lane(fragment) for fragment in range(len(world.fragments))]
        self.forget()

    def lane(self, number: int) -> Lane:
        """A new one."""
        return Lane(self, number)

    def forget(self) -> None:
        """All that its process holds and no checkpoint keeps."""
        self.back_off = BackOff()
        self.trainer.state = self.trainer.state
        for lane in self.lanes:
            lane.forget(self.back_off)

    @property
    def round(self) -> int:
        """The one it is in, or begins."""
        return self.trainer.progress.round

    def begin(self) -> None:
        """A round."""
        setting, clock = self.world.setting, self.world.clock
        self.began_s, self.is_sure = clock.now, self.knows_speed
        self.enter(self._next_start(), self.world.tokens)
        step_s = setting.step_s[self.number]
        for moment in self.start.publish_after:
            self.call_at(self.done_s(moment * step_s), self.publish, moment)
        for moment in sorted(set(self.start.merge_after))[:-1]:
            self.call_at(self.done_s(moment * step_s), self.end_of_some, moment)
        self.plan_pulls()
        self.call_at(self.done_s(self.start.inner_steps * step_s), self.end)

    def plan_pulls(self) -> None:
        """When to pull for the next merge of each fragment, as far as that is known by now."""
        now, others, wanted = self.world.clock.now, len(self.world.live) - 1, self.world.wanted
        merge_after = self.start.merge_after
        until_s = min((self.at_s(moment) for moment in merge_after if moment > self.done), default=math.inf)
        if self.world.setting.pace.deviation:
            until_s = math.inf  # that merge may come later than reckoned
        for lane in self.lanes:
            moment = merge_after[lane.number]
            together = [one for one in self.lanes if merge_after[one.number] == moment]
            lane.sizes_due = sizes = total_bytes(one.sizes[self.start.gradient_format] for one in together)
            lane.merges_s = self.at_s(moment + (self.start.inner_steps if lane.round > self.round else 0))
            lane.plan = plan_pulls(others, lane.began_s, lane.merges_s, sizes, self.times, wanted)
            for what, due_s in ("weights", lane.plan.weights_at_s), ("gradient", lane.plan.gradients_at_s):
                for when_s in due_s:
                    if when_s <= until_s:
                        self.call_at(self.due_s(max(0.0, when_s - now)), self.fill, lane, what)

    def at_s(self, moment: int) -> float:
        """When it will have taken so many steps of its round, as it expects."""
        now = self.world.clock.now
        return now + (moment - self.done) * expected_step_s(self.step_s, now - self.began_s, self.done)

    def call_at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """On the world's clock, unless it has gone by then."""
        self.world.clock.call_at(when_s, self._if_here, self.num_lives, call, *args)

    def _if_here(self, num_lives: int, call: Callable[..., None], *args: Any) -> None:
        if num_lives == self.num_lives:
            call(*args)

    def _next_start(self) -> Start:
        """How its next round begins: as one that does not know its speed before it has had a round."""
        setting, section = self.world.setting, self.world.setting.run.merge
        others, most = [peer for peer in self.world.live if peer is not self], section.publications_per_round
        steps, everybodys, round_s = first_inner_steps(section.inner_steps, paced=section.pacing), 0.0, 0.0
        if self.knows_speed:
            ends_s = [peer.ends_in_s() for peer in self.world.peers if peer is not self]
            speeds = [1 / peer.step_s for peer in self.world.peers]
            steps = setting.steps_of_round(self.number, ends_s, speeds)
            everybodys = setting.steps_of_everybody(self.number, speeds)
            round_s = steps * self.step_s
        shard = None
        if self.coverage is not None:
            names = [peer.name for peer in others]
            shard, _ = self.coverage.begin(self.round, setting.run.run.seed, names, setting.run.round_tokens)
        return Start(
            inner_steps=steps,
            num_peers=1 + sum(peer.number < setting.num_counted for peer in others),
            shard=shard,
            num_parts=most,
            every=publishes_every(most, len(self.lanes), round_s, self.world.layout.size),
            run_steps_a_step=everybodys,
            num_fragments=len(self.lanes),
            gradient_format=self.gradient_format(len(others), round_s),
        )

    def gradient_format(self, others: int, round_s: float) -> GradientFormat:
        """That in which it publishes pseudo-gradients in a round that lasts so long, beside so many others."""
        return gradient_format(self.world.sizes, others, round_s, self.times.bytes_per_s, self.world.wanted)

    def ends_in_s(self) -> float | None:
        """In how many seconds its round ends, as it tells; None until it knows its speed, and while it is away."""
        if not (self.is_here and self.knows_speed):
            return None
        setting, now = self.world.setting, self.world.clock.now
        if not setting.pace.deviation:
            return self.began_s + self.start.inner_steps * self.step_s - now
        done = setting.steps_between(self.number, self.began_s, now)
        return (self.start.inner_steps - done) * self.step_s

    def enter(self, start: Start, run_tokens: int) -> None:
        """A round begins; the run has so many tokens by now."""
        self.start, self.done, self.run_tokens = start, 0, run_tokens
        if start.shard is not None:
            self.learner.loop.batches.use_shard(start.shard)
        self.trainer.begin(start.num_parts)
        for lane in self.lanes:
            if lane.weights is None or lane is self.lanes[-1]:
                lane.begins(self.round, self.trainer.state_of(lane.number).theta, self.began_s)

    def done_s(self, work_s: float) -> float:
        """When it has done what takes it so long at its own speed."""
        return self.world.setting.done_s(self.number, self.world.clock.now, work_s)

    def due_s(self, wait_s: float) -> float:
        """When it does what it would do in so long, if it did not hang meanwhile."""
        return self.world.setting.due_s(self.number, self.world.clock.now, wait_s)

    def train_to(self, moment: int) -> None:
        """Inner steps up to `moment` of the round, then a publication."""
        world, step_tokens = self.world, self.world.setting.run.tokens_per_step
        for step in range(self.done, moment):
            self.learner.step(self.start.run_tokens(self.run_tokens, step, step_tokens) / world.setting.total_tokens)
        world.tokens += (moment - self.done) * step_tokens
        world.inner_steps += moment - self.done
        if self.coverage is not None and self.start.shard is not None:
            self.coverage.trained(self.start.shard, (moment - self.done) * step_tokens)
        self.done = moment
        self.own = self.trainer.contribution(self.start.part_after(moment), moment, moment * step_tokens)
        for lane, of in zip(self.lanes, self.own.fragment_rounds, strict=True):
            gradient = self.own.gradient_of(lane.number)
            lane.robustness.learn(gradient, of.tokens)
            mark = Mark(of.round, of.part, of.tokens)
            lane.newest = Published(mark, gradient, self.start.gradient_format)

    def publish(self, moment: int) -> None:
        """Train to that moment of the round, and publish; pulls are planned anew if merges come at other times."""
        self.train_to(moment)
        if moment in self.start.merge_after or not self.knows_speed:
            return
        due = min((lane for lane in self.lanes if lane.round == self.round), key=lambda lane: lane.merges_s)
        way_s = self.start.inner_steps * self.step_s / len(self.lanes)
        if is_moved(due.merges_s, self.at_s(self.start.merge_after[due.number]), way_s):
            self.plan_pulls()

    def serve(self, lane: Lane, section: Section, published: Published) -> None:
        """That section of its publications was asked for: the first time it is encoded, for everybody."""
        if published.sent is not None:
            return
        if self.coverage is not None:
            published.rows = self.coverage.rows_to_send()
        if section == "weights":
            published.sent = lane.codec.weights.decode(lane.codec.weights.encode(published.vector))
        else:
            gradients, mark, format = lane.codec.gradient, published.mark, published.format
            assert format is not None
            encoded = gradients.encode_sum(published.vector, format, mark.round, mark.part)
            published.sent = gradients.of[format].decode(encoded)

    # ------------------------------------------------------------- pulls

    def fill(self, lane: Lane, section: Section) -> None:
        """Pull until as many are here or on their way as are due; a slow one does not count."""
        world, setting, clock = self.world, self.world.setting, self.world.clock
        if lane.plan is None:
            return
        num_due, slow_s = (
            lane.plan.num_due(section, clock.now + _ROUNDING_S),
            self.times.slow_after_s(lane.sizes_due, world.wanted),
        )
        while lane.pulls.is_wanted(section, num_due, lane.arrived, slow_s, clock.now):
            name = self.choose(lane, section)
            if name is None:
                return
            author = world.by_name[name]
            theirs = author.lanes[lane.number]
            published = theirs.newest if section == "gradient" else theirs.weights
            assert published is not None
            author.serve(theirs, section, published)
            if not world.is_hanging(name):
                author.back_off.called(self.name, clock.now)
            if lane.pulled_for_s is None:
                lane.pulled_for_s = lane.merges_s
            asked = lane.pulls.begin(section, name, clock.now)
            if not self.is_of_use(lane, section, name, published.mark):
                round_s = self.start.inner_steps * self.step_s / len(self.lanes)
                again_s = lane.pulls.nothing_new(asked, clock.now, round_s)
                self.call_at(self.due_s(again_s), self.fill, lane, section)
                continue
            pull = Pull(lane, asked, published, author.num_lives)
            self.call_at(self.due_s(slow_s), self.fill, lane, section)
            if world.is_hanging(name):  # it says nothing
                self.call_at(clock.now + setting.run.network.call_limit_s, self.break_off, pull, "no answer", True)
            else:
                self.bring(pull, lane.size_bytes(published), ATTEMPTS)

    def bring(self, pull: Pull, left_bytes: int, attempts: int) -> None:
        """The bytes come; where the transfer breaks off, it is asked for the rest, so many times in all."""
        world = self.world
        if world.by_name[pull.asked.peer].num_lives != pull.life:
            self.break_off(pull, "it has gone")
            return
        breaks = self.rng.random() < world.setting.failing
        come_bytes = int(self.rng.random() * left_bytes) if breaks else left_bytes
        arrives_s = world.wire.arrives_s(world.clock.now, pull.asked.peer, self.name, come_bytes, self.rng)
        if not breaks:
            self.call_at(arrives_s, self.arrive, pull)
        elif attempts > 1:
            self.call_at(arrives_s, self.bring, pull, left_bytes - come_bytes, attempts - 1)
        else:
            self.call_at(arrives_s, self.break_off, pull, "its transfers break off")

    def choose(self, lane: Lane, section: Section) -> str | None:
        """Whose to pull, as a volunteer chooses."""
        others = {peer.name: peer.lanes[lane.number] for peer in self.world.live if peer is not self}
        candidates = [
            Candidate(peer=name, round=mark.round, part=mark.part, tokens=mark.tokens)
            for name, theirs in others.items()
            if theirs.newest is not None and (mark := theirs.newest.mark)
        ]
        here, now = lane.arrived, self.world.clock.now
        view = View(
            candidates=candidates,
            rounds={name: theirs.round for name, theirs in others.items()},
            own_round=lane.round,
            with_weights=lane.pulls.coming("weights", here),
            exclude={self.name, *lane.pulls.not_now(section, here, now)},
        )
        return lane.partners.next(section, view, now, self.rng)[0]

    def is_of_use(self, lane: Lane, section: Section, name: str, mark: Mark) -> bool:
        """Whether that section of a publication can be merged."""
        return lane.ledger.may_enter(section, name, mark, self.world.reference_round)

    def break_off(self, pull: Pull, reason: str, mute: bool = False) -> None:
        """Nothing comes of it: who was asked is left alone for a while, and another is asked instead."""
        pull.lane.pulls.fail(pull.asked, self.world.clock.now, reason, mute)
        self.fill(pull.lane, pull.asked.section)

    def arrive(self, pull: Pull) -> None:
        """Take it, or if it is refused or its author has gone meanwhile, another's in its place."""
        world, name, lane = self.world, pull.asked.peer, pull.lane
        if world.by_name[name].num_lives != pull.life:
            self.break_off(pull, "it has gone")
            return
        try:
            self.take_untrusted(lane, pull.asked.section, name, pull.published)
        except BadBytesError as error:
            world.told(name, Incident(rule_of(str(error)), str(error)))
            self.break_off(pull, str(error))
        else:
            lane.pulls.end(pull.asked)
            lane.pulls.answered(name)

    def take_untrusted(self, lane: Lane, section: Section, name: str, published: Published) -> None:
        """Take of it what is new. BadBytesError if that must not be."""
        if (arrival := self.new_untrusted(lane, section, name, published)) is not None:
            self.keep_untrusted(lane, section, name, published, arrival)
            self.hear_rows(name, published.rows)

    def hear_rows(self, name: str, rows: Sequence[Row]) -> None:
        """What another tells of who has seen which data, if those are the same."""
        part_of, other = self.world.setting.text.part_of, self.world.by_name[name]
        if self.coverage is not None and part_of(self.number) == part_of(other.number):
            self.coverage.merge(rows, name, lambda _, tokens: tokens)

    def new_untrusted(self, lane: Lane, section: Section, name: str, published: Published) -> Arrival | None:
        """What is new of it, None if nothing is. BadBytesError if it is nonsense."""
        if not self.is_of_use(lane, section, name, published.mark):
            return None
        vector = published.sent
        assert vector is not None
        if not bool(vector.isfinite().all()):
            raise BadBytesError("a publication that is not finite")
        if section == "weights":
            return Arrival(vector, vector, 0)
        news = lane.ledger.news(name, published.mark, self.world.reference_round)
        return Arrival(None, vector - lane.merged[name] if isinstance(news, Difference) else vector, news.tokens)

    def keep_untrusted(self, lane: Lane, section: Section, name: str, published: Published, arrival: Arrival) -> None:
        """Keep what the run's rule lets enter a merge. BadBytesError if that is nothing."""
        theta = self.trainer.state_of(lane.number).theta
        accepted = lane.robustness.accept(name, arrival, theta, published.mark.round)
        lane.arrived[section, name] = (published, accepted)

    # ------------------------------------------------------------- the merge

    def end_of_some(self, moment: int) -> None:
        """Merge what is here of the fragments whose time has come."""
        now, due = self.world.clock.now, [n for n, after in enumerate(self.start.merge_after) if after == moment]
        first = self.lanes[due[0]]
        if self.is_sure:
            expected_s = first.merges_s if first.pulled_for_s is None else first.pulled_for_s
            self.times.round_ended(expected_s - first.began_s, now - first.began_s)
        for lane, merged_after in zip(self.lanes, self.start.merge_after, strict=True):
            if merged_after == moment:
                self.merge(lane, self.ready(lane))
                if lane is not self.lanes[-1]:
                    lane.begins(self.round + 1, self.trainer.state_of(lane.number).theta, self.world.clock.now)
        if moment < self.start.inner_steps:
            self.plan_pulls()

    def end(self) -> None:
        """Merge the last fragments, or take the others' weights if its own are too old for them; on to a new round."""
        world, self.knows_speed = self.world, True
        if world.setting.pace.deviation:
            took_s = world.setting.awake_s(self.number, self.began_s, world.clock.now)
            self.step_s = took_s / self.start.inner_steps
        if catches_up(self):
            return
        self.end_of_some(self.start.inner_steps)
        self.rounds_done += 1
        world.merged(self)
        self.begin_or_end()

    def begin_or_end(self) -> None:
        """The next round, unless the run has had its tokens."""
        if self.world.tokens < self.world.setting.total_tokens:
            self.begin()
        else:
            self.is_over = True
            for lane in self.lanes:
                lane.plan = None
            self.world.finished(self)

    def ready(self, lane: Lane) -> Arrived:
        """What enters the merge: all that is here. If some of that is too old by now, since this peer stood still, the
        rest enters the next one."""
        here, reference = lane.arrived, self.world.reference_round
        stays = lane.ledger.stays_of_use
        lane.arrived = {key: each for key, each in here.items() if stays(*key, each[0].mark, reference)}
        return here if len(lane.arrived) == len(here) else {}

    def merge(self, lane: Lane, ready: Arrived) -> None:
        """The end of a fragment's round, with what entered it."""
        world, rate = self.world, self.world.setting.run.merge.outer_learning_rate
        arrivals = [replace(each, ahead_rounds=self.ahead_rounds(lane, of)) for of, each in ready.values()]
        prepared = prepare(self.trainer.state_of(lane.number), arrivals, lane.fragment.layout, rate)
        if prepared.displacement is not None:
            lane.robustness.merged(prepared.displacement)
        gathered = Gathered(
            prepared=prepared,
            merged=(),
            run_tokens=world.tokens,
            peer_tokens={},
            apart=apart(lane.robustness.rule, arrivals),
        )
        reference = world.reference_round
        for (what, name), (published, _) in ready.items():
            if what == "weights":
                lane.ledger.weights_merged(name, published.mark.round)
            else:
                assert published.sent is not None
                lane.ledger.merged(name, published.mark, reference)
                lane.merged[name] = published.sent
        lane.merged = {name: kept for name, kept in lane.merged.items() if name in lane.ledger.held}
        lane.arrived = {key: each for key, each in lane.arrived.items() if key not in ready}
        self.rounds_fresh += any(what == "gradient" for what, _ in ready) / len(self.lanes)
        self.trainer.merge(gathered, self.own, lane.number)

    def ahead_rounds(self, lane: Lane, published: Published) -> float:
        """By how much of the fragment's round that ends its author's began later."""
        return ahead_rounds(published.began_s, lane.began_s, lane.merges_s)


@dataclass
class World:
    """Everyone, and the clock."""

    setting: Setting
    clock: Clock = field(default_factory=Clock)
    tokens: int = 0
    inner_steps: int = 0
    tokens_lost: int = 0
    finished_s: float = 0.0
    specs: tuple[TensorSpec, ...] = field(init=False)
    layout: Layout = field(init=False)
    fragments: tuple[Fragment, ...] = field(init=False)
    sizes: Mapping[GradientFormat, SectionBytes] = field(init=False)
    """Of the whole model, by the format of pseudo-gradients."""
    wanted: Wanted = field(init=False)
    """Of how many partners a round pulls them, if links carry it."""
    peers: list[Peer] = field(init=False)
    by_name: dict[str, Peer] = field(init=False)

    def __post_init__(self) -> None:
        self.specs = self.setting.learner(0).specs
        self.layout = layout_of_specs(self.specs)
        if not self.setting.corrected:
            self.layout = replace(self.layout, corrected=(False,) * len(self.specs))
        self.fragments = fragments_of(self.layout, self.setting.run.merge.num_fragments)
        section = self.setting.run.merge
        self.sizes = PublicationCodec(sections_of(self.specs, section.theta_format, section.gradient_formats)).sizes()
        self.wanted = Wanted(section.num_partners, section.num_weights)
        self.peers = [self.peer(number) for number in range(self.setting.num_peers)]
        self.by_name = {peer.name: peer for peer in self.peers}
        self._recorder, self.wire = Recorder(self.setting), Wire(self.setting)

    def codec(self, fragment: int) -> PublicationCodec:
        """A peer's own of a fragment: what it has lost in one publication it adds to the next."""
        section, specs = self.setting.run.merge, tuple(self.fragments[fragment].pick(self.specs))
        return PublicationCodec(sections_of(specs, section.theta_format, section.gradient_formats))

    @property
    def reference_round(self) -> int:
        """The median of everybody's."""
        return median_round(peer.round for peer in self.live)

    @property
    def live(self) -> list[Peer]:
        """Those whom the others believe to be there."""
        gone, now_s = self.setting.is_gone, self.clock.now
        return [peer for peer in self.peers if peer.is_here and not gone(peer.number, now_s)]

    @property
    def answering(self) -> list[Peer]:
        """The honest ones who can be asked for their weights; all of them if nobody can."""
        found = [peer for peer in self.honest if peer.is_here and not self.is_hanging(peer.name)]
        return found or self.honest

    def is_hanging(self, name: str) -> bool:
        """Whether this peer stands still now."""
        return self.setting.is_hanging(self.by_name[name].number, self.clock.now)

    def peer(self, number: int) -> Peer:
        """A new one."""
        return Peer(self, number)

    def told(self, peer: str, incident: Incident) -> None:
        """What `peer` published was cut or refused."""

    def merged(self, peer: Peer) -> None:
        """A round of `peer` is over."""
        self._recorder.see(self.tokens, self.clock.now, self.consensus)

    def finished(self, peer: Peer) -> None:
        """The last round of `peer` is over."""
        self.finished_s = max(self.finished_s, self.clock.now)

    @property
    def honest(self) -> list[Peer]:
        """Those whose weights are the swarm's."""
        return self.peers[: self.setting.num_honest]

    def consensus(self) -> Tensor:
        """The variance-corrected mean of the weights of all who answer, (P,)."""
        return variance_corrected_mean([peer.trainer.state.theta for peer in self.answering], self.layout).mean

    def run(self) -> None:
        """To the end of the run."""
        for peer in self.peers:  # nobody presses the button in the same moment
            a_round_s = self.setting.steps_of_round(peer.number) * self.setting.step_s[peer.number]
            peer.call_at(peer.rng.random() * a_round_s, peer.begin)
        schedule(self)
        while self.clock.step():
            if (self.setting.away or self.setting.hangs) and self.is_over:
                break

    @property
    def is_over(self) -> bool:
        """Whether nobody who is there has still to end the run."""
        if self.tokens < self.setting.total_tokens:
            return False
        stuck, now_s = self.setting.is_stuck, self.clock.now
        return all(peer.is_over or not peer.is_here or stuck(peer.number, now_s) for peer in self.peers)

    def outcome(self) -> Outcome:
        """What came of it."""
        rounds = sum(peer.rounds_done for peer in self.honest)
        return Outcome(
            held_out_loss=self.setting.text.held_out_loss(self.consensus()),
            own_loss=self.setting.own_loss([peer.trainer.state.theta for peer in self.answering]),
            virtual_time_s=self.finished_s,
            tokens=self.tokens,
            inner_steps=self.inner_steps,
            sent_bytes=self.wire.sent_bytes,
            tokens_lost=self.tokens_lost,
            fresh_share=sum(peer.rounds_fresh for peer in self.honest) / max(1, rounds),
            curve=tuple(self._recorder.points),
        )
