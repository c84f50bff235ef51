"""Gossip in virtual time: the product's decisions, merges and formats, with real models, on a clock that only counts.

What a volunteer does in threads and over sockets happens here in events: its inner steps at the moments when it
publishes, its pulls when `membership.pulls` says, its merge at the round's end.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from swarmtrain.algorithm.gossip import Arrival, Layout, layout_of, prepare, variance_corrected_mean
from swarmtrain.algorithm.pacing import fewest_inner_steps
from swarmtrain.algorithm.quantize import Format, decode, encode, encoded_size_bytes
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import BadBytesError
from swarmtrain.membership.partners import Candidate, Difference, Ledger, Mark, Partners, median_round
from swarmtrain.membership.pulls import PullTimes, Section, SectionBytes, plan_pulls
from swarmtrain.network.refusals import rule_of
from swarmtrain.peer.robustness import Robustness
from swarmtrain.peer.trainer import Contribution, Gathered, Merged, Start
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.learning.churn import schedule
from swarmtrain.simulate.learning.setting import Outcome, Recorder, Setting
from swarmtrain.simulate.learning.wire import Wire

__all__ = ["Peer", "Published", "World"]

_APART = ("trimmed", "flag")
"""Rules that need each partner's pseudo-gradient, and not their mean."""


@dataclass
class Published:
    """A round's weights or its pseudo-gradient so far, which travels as the run file says."""

    mark: Mark
    vector: Tensor


class Peer:
    """A volunteer that merges at its own pace."""

    def __init__(self, world: World, number: int) -> None:
        setting = world.setting
        self.world, self.number, self.name = world, number, f"p{number}"
        self.learner = setting.learner(number)
        self.trainer = self.learner.trainer
        section = setting.run.merge
        self.ledger = Ledger(section.max_staleness_rounds, section.publications_per_round)
        self.partners = Partners(self.ledger, variant=section.partners)
        met = not setting.own_weights
        self.robustness = Robustness(section.robust, world.layout, world.told, met=met)
        self.rng = random.Random(f"{setting.run.run.seed} {number}")
        self.rounds_done = self.rounds_fresh = 0
        self.newest: Published | None = None
        """Its gradient's."""
        self.weights: Published | None = None
        self.merged: dict[str, Tensor] = {}
        self.arrived: dict[tuple[Section, str], tuple[Published, Arrival]] = {}
        self.asked, self.coming = set[tuple[Section, str]](), set[tuple[Section, str]]()
        self.due: Counter[Section] = Counter()
        self.times = PullTimes()
        self.times.assume(setting.bytes_per_s)
        self.times.merged(setting.rtt_s)
        self.tokens_before = 0
        self.start = Start(inner_steps=1, num_peers=1)
        self.done = 0
        self.is_here, self.is_over = True, False
        self.num_lives = 0
        """How often it has gone. What it had begun before then, comes to nothing."""
        self.began_s = math.inf
        """When its round did."""

    @property
    def round(self) -> int:
        """The one it is in, or begins."""
        return self.trainer.progress.round

    def begin(self) -> None:
        """A round."""
        setting, clock, theta = self.world.setting, self.world.clock, self.trainer.state.theta
        section, self.began_s = setting.run.merge, clock.now
        is_known = bool(self.learner.losses)  # how fast it is
        steps = setting.steps_of_round(self.number) if is_known else fewest_inner_steps(section.inner_steps)
        self.start = Start(inner_steps=steps, num_peers=1, num_parts=section.publications_per_round)
        self.done, self.tokens_before = 0, self.world.tokens
        self.learner.enter(theta)
        self.weights = Published(Mark(self.round, 0, 0), theta)
        step_s = setting.step_s[self.number]
        for moment in self.start.publish_after:
            self.call_at(self.done_s(moment * step_s), self.train_to, moment)
        ends_s, sizes = clock.now + steps * step_s, self.world.section_bytes
        pulls = plan_pulls(len(self.world.live) - 1, clock.now, ends_s, sizes, self.times, section.num_partners)
        self.asked.clear()
        self.due.clear()
        for what, at_s in ("weights", pulls.weights_at_s), ("gradient", pulls.gradients_at_s):
            for when_s in at_s:
                self.call_at(self.done_s(when_s - clock.now), self.pull, self.round, what)
        self.call_at(self.done_s(steps * step_s), self.end)

    def call_at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """On the world's clock, unless it has gone by then."""
        self.world.clock.call_at(when_s, self._if_here, self.num_lives, call, *args)

    def _if_here(self, num_lives: int, call: Callable[..., None], *args: Any) -> None:
        if num_lives == self.num_lives:
            call(*args)

    def done_s(self, work_s: float) -> float:
        """When it does what it would do in so long, if it did not stand still meanwhile."""
        return self.world.setting.done_s(self.number, self.world.clock.now, work_s)

    def train_to(self, moment: int) -> None:
        """Inner steps up to `moment` of the round, then a publication."""
        world = self.world
        step_tokens, total_tokens = world.setting.run.tokens_per_step, world.setting.total_tokens
        everybodys = world.setting.steps_of_everybody(self.number)
        for step in range(moment - self.done):
            self.learner.step((self.tokens_before + step * everybodys * step_tokens) / total_tokens)
        world.tokens += (moment - self.done) * step_tokens
        world.inner_steps += moment - self.done
        self.tokens_before = world.tokens
        self.done = moment
        gradient = self.trainer.state.theta - self.learner.reached
        self.robustness.learn(gradient, moment * step_tokens)
        mark = Mark(self.round, self.start.part_after(moment), moment * step_tokens)
        self.newest = Published(mark, gradient)

    # ------------------------------------------------------------- pulls

    def pull(self, round: int, section: Section) -> None:
        """One more of the round's pulls is due."""
        if round == self.round:
            self.due[section] += 1
            self.fill(section)

    def fill(self, section: Section) -> None:
        """Pull until as many are here or on their way as are due; one that fails is replaced at once."""
        world, setting = self.world, self.world.setting
        while sum(what == section for what, _ in self.arrived.keys() | self.coming) < self.due[section]:
            name = self.choose(section)
            if name is None:
                return
            self.asked.add((section, name))
            author = world.by_name[name]
            published = author.newest if section == "gradient" else author.weights
            assert published is not None
            fails = self.rng.random() < setting.failing
            if not self.is_of_use(section, name, published.mark):
                continue
            self.coming.add((section, name))
            if world.is_hanging(name):  # it says nothing until the round is over
                continue
            size_bytes = world.section_bytes.weights if section == "weights" else world.section_bytes.gradient
            if fails:
                size_bytes = int(self.rng.random() * size_bytes)
            arrives_s = world.wire.arrives_s(world.clock.now, name, self.name, size_bytes, self.rng)
            if fails:
                self.call_at(arrives_s, self.break_off, section, name)
            else:
                self.call_at(arrives_s, self.arrive, section, name, published, author.num_lives)

    def choose(self, section: Section) -> str | None:
        """Whose to pull, as a volunteer chooses."""
        others = [peer for peer in self.world.live if peer is not self]
        candidates = [
            Candidate(peer=peer.name, round=mark.round, part=mark.part, tokens=mark.tokens)
            for peer in others
            if peer.newest is not None and (mark := peer.newest.mark)
        ]
        taken = self.asked | self.coming | self.arrived.keys()
        name, _ = self.partners.choose(
            candidates,
            exclude={self.name, *(name for what, name in taken if what == section)},
            reference_round=median_round([self.round, *(peer.round for peer in others)]),
            now=self.world.clock.now,
            rng=self.rng,
            first=self.first(section),
        )
        return name

    def first(self, section: Section) -> set[str]:
        """Whom to ask before others."""
        with_weights = {name for what, name in self.arrived.keys() | self.coming if what == "weights"}
        rounds = {peer.name: peer.round for peer in self.world.live if peer is not self}
        return self.partners.first(section, rounds, with_weights, median_round([self.round, *rounds.values()]))

    def is_of_use(self, section: Section, name: str, mark: Mark) -> bool:
        """Whether that section of a publication can be merged."""
        return self.ledger.may_enter(section, name, mark, self.world.reference_round)

    def break_off(self, section: Section, name: str) -> None:
        """A transfer ends midway: another's in its place."""
        self.coming.discard((section, name))
        self.fill(section)

    def arrive(self, section: Section, name: str, published: Published, num_lives: int) -> None:
        """Take it, or if it is refused or its author has gone meanwhile, another's in its place."""
        if self.world.by_name[name].num_lives != num_lives:
            self.break_off(section, name)
            return
        self.coming.discard((section, name))
        try:
            self.take_untrusted(section, name, published)
        except BadBytesError as error:
            self.partners.back_off.failed(name, self.world.clock.now, str(error))
            self.world.told(name, Incident(rule_of(str(error)), str(error)))
            self.fill(section)

    def take_untrusted(self, section: Section, name: str, published: Published) -> None:
        """Decode it, and take of it what is new. BadBytesError if that must not be."""
        if not self.is_of_use(section, name, published.mark):
            return
        world, formats = self.world, self.world.setting.run.merge
        form = formats.theta_format if section == "weights" else formats.gradient_format
        vector = world.on_the_wire(published.vector, form)
        if not bool(vector.isfinite().all()):
            raise BadBytesError("a publication that is not finite")
        if section == "weights":
            arrival = Arrival(vector, vector, 0)
        else:
            news = self.ledger.news(name, published.mark, world.reference_round)
            new = vector - self.merged[name] if isinstance(news, Difference) else vector
            arrival = Arrival(None, new, news.tokens)
        arrival = self.robustness.accept(name, arrival, self.trainer.state.theta)
        self.arrived[section, name] = (Published(published.mark, vector), arrival)

    # ------------------------------------------------------------- the merge

    def end(self) -> None:
        """Merge what is here; on to the next round."""
        world, section = self.world, self.world.setting.run.merge
        self.arrived = {  # it may have stood still, and all of that be too old
            (section, name): kept
            for (section, name), kept in self.arrived.items()
            if self.is_of_use(section, name, kept[0].mark)
        }
        reference = world.reference_round
        arrivals = [arrival for _, arrival in self.arrived.values()]
        prepared = prepare(self.trainer.state.theta, arrivals, world.layout)
        if prepared.displacement is not None:
            self.robustness.merged(prepared.displacement)
        gathered = Gathered(
            prepared=prepared,
            merged=tuple(self._merged(name, kept, arrival) for (_, name), (kept, arrival) in self.arrived.items()),
            run_tokens=world.tokens,
            peer_tokens={},
            apart=tuple(arrival for arrival in arrivals if arrival.tokens) if section.robust in _APART else (),
        )
        self.trainer.merge(gathered, self._contribution())
        for (what, name), (published, _) in self.arrived.items():
            if what == "weights":
                self.ledger.weights_merged(name, published.mark.round)
            else:
                self.ledger.merged(name, published.mark, reference)
                self.merged[name] = published.vector
        self.merged = {name: kept for name, kept in self.merged.items() if name in self.ledger.held}
        self.rounds_done += 1
        self.rounds_fresh += any(what == "gradient" for what, _ in self.arrived)
        self.arrived.clear()
        for name in {name for _, name in self.coming if world.is_hanging(name)}:
            self.partners.back_off.failed(name, world.clock.now, "it says nothing")
        self.coming = {(what, name) for what, name in self.coming if not world.is_hanging(name)}
        world.merged(self)
        if world.tokens < world.setting.total_tokens:
            self.begin()
        else:
            self.is_over = True
            world.finished(self)

    def _merged(self, name: str, published: Published, arrival: Arrival) -> Merged:
        mark = published.mark
        return Merged(
            peer=name,
            round=mark.round,
            part=mark.part,
            tokens=round(arrival.tokens),
            staleness_rounds=self.round - mark.round,
            pull_s=0.0,
        )

    def _contribution(self) -> Contribution:
        tokens = self.start.inner_steps * self.world.setting.run.tokens_per_step
        return Contribution(
            round=self.round,
            part=self.start.num_parts,
            theta=self.trainer.state.theta,
            reached=self.learner.reached,
            tokens=tokens,
            inner_steps=self.start.inner_steps,
            own_tokens=self.trainer.own_tokens + tokens,
            base="",
        )


@dataclass
class World:
    """Everyone, and the clock."""

    setting: Setting
    clock: Clock = field(default_factory=Clock)
    tokens: int = 0
    inner_steps: int = 0
    tokens_lost: int = 0
    finished_s: float = 0.0
    layout: Layout = field(init=False)
    peers: list[Peer] = field(init=False)
    by_name: dict[str, Peer] = field(init=False)

    def __post_init__(self) -> None:
        shapes = self.setting.learner(0).shapes
        self.layout = layout_of(shapes)
        if not self.setting.corrected:
            self.layout = replace(self.layout, corrected=(False,) * len(shapes))
        self._sizes = [math.prod(shape) for shape in shapes]
        self.peers = [self.peer(number) for number in range(self.setting.num_peers)]
        self.by_name = {peer.name: peer for peer in self.peers}
        self._recorder, self.wire = Recorder(self.setting), Wire(self.setting)

    @property
    def section_bytes(self) -> SectionBytes:
        """What a publication's weights and pseudo-gradient weigh as they travel."""
        section = self.setting.run.merge
        weights, gradient = (
            encoded_size_bytes(it, self._sizes) for it in (section.theta_format, section.gradient_format)
        )
        return SectionBytes(weights=weights, gradient=gradient)

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

    def on_the_wire(self, vector: Tensor, form: Format) -> Tensor:
        """What arrives of it."""
        return decode(encode(vector.contiguous(), form, self._sizes), form, self._sizes)

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
