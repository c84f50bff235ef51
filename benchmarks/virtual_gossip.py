"""Gossip in virtual time: peers with real models, text, merges and formats, on a clock that is only counted."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from cold_start import Volunteer
from torch import Tensor
from virtual_setting import Result, Setting

from swarmtrain.algorithm.gossip import (
    Arrival,
    Layout,
    Prepared,
    gossip_merge,
    layout_of,
    prepare,
    variance_corrected_mean,
)
from swarmtrain.algorithm.outer import (
    OuterState,
    flatten,
    outer_step,
    unflatten_into,
)
from swarmtrain.algorithm.pacing import fewest_inner_steps
from swarmtrain.algorithm.quantize import Format, decode, encode, encoded_size_bytes
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import BadBytesError
from swarmtrain.membership.partners import (
    Candidate,
    Difference,
    Ledger,
    Mark,
    Partners,
    median_round,
)
from swarmtrain.membership.pulls import PullTimes, Section, SectionBytes, plan_pulls
from swarmtrain.network.refusals import rule_of
from swarmtrain.peer.robustness import Robustness, robust_mean
from swarmtrain.peer.trainer import Start
from swarmtrain.simulate.clock import Clock


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
        self.volunteer = Volunteer(setting.text, number, _own_seed(setting, number) if setting.own_weights else None)
        theta = flatten(self.volunteer.parameters)
        self.state = OuterState(theta, torch.zeros_like(theta))
        section = setting.run.merge
        self.ledger = Ledger(section.max_staleness_rounds, section.publications_per_round)
        self.partners = Partners(self.ledger, variant=section.partners)
        met = not setting.own_weights
        self.robustness = Robustness(section.robust, world.layout, world.told, met=met)
        self.rng = random.Random(f"{setting.run.run.seed} {number}")
        self.round = self.rounds_fresh = 0
        self.newest: Published | None = None
        """Its gradient's."""
        self.weights: Published | None = None
        self.merged: dict[str, Tensor] = {}
        self.arrived: dict[tuple[Section, str], tuple[Published, Arrival]] = {}
        self.asked, self.coming = set[tuple[Section, str]](), set[tuple[Section, str]]()
        self.due: Counter[Section] = Counter()
        self.times = PullTimes()
        self.times.assume(setting.link_bytes_per_s)
        self.times.merged(setting.rtt_s)
        self.down_free_s = self.up_free_s = 0.0
        self.tokens_before = 0
        self.start = Start(inner_steps=1, num_peers=1)
        self.done = 0

    def begin(self) -> None:
        """A round."""
        setting, clock = self.world.setting, self.world.clock
        section = setting.run.merge
        steps = setting.paced(self.number) if self.round else fewest_inner_steps(section.inner_steps)
        self.start = Start(inner_steps=steps, num_peers=1, num_parts=section.publications_per_round)
        self.done, self.tokens_before = 0, self.world.tokens
        unflatten_into(self.state.theta, self.volunteer.parameters)
        self.weights = Published(Mark(self.round, 0, 0), self.state.theta)
        step_s = setting.step_s[self.number]
        for moment in self.start.publish_after:
            clock.call_at(self.awake_s(clock.now + moment * step_s), self.train_to, moment)
        ends_s, sizes = clock.now + steps * step_s, self.world.section_bytes
        pulls = plan_pulls(len(setting.step_s) - 1, clock.now, ends_s, sizes, self.times, section.num_partners)
        self.asked.clear()
        self.due.clear()
        for what, at_s in ("weights", pulls.weights_at_s), ("gradient", pulls.gradients_at_s):
            for when_s in at_s:
                clock.call_at(self.awake_s(when_s), self.pull, self.round, what)
        clock.call_at(self.awake_s(ends_s), self.end)

    def awake_s(self, when_s: float) -> float:
        """When it does what it would do at `when_s`, if it stands still at that time."""
        hang = self.world.setting.hang
        if hang is None or not hang.is_on(self.number, when_s):
            return when_s
        return when_s + hang.for_s  # what comes within its standing still is late by all of it: one round's events

    def train_to(self, moment: int) -> None:
        """Inner steps up to `moment` of the round, then a publication."""
        world = self.world
        run, step_tokens = world.setting.run, world.setting.run.tokens_per_step
        everybodys = world.steps_of_everybody(self.number)
        for step in range(moment - self.done):
            self.volunteer.step((self.tokens_before + step * everybodys * step_tokens) / run.run.total_tokens)
        world.tokens += (moment - self.done) * step_tokens
        self.tokens_before = world.tokens
        self.done = moment
        gradient = self.state.theta - flatten(self.volunteer.parameters)
        self.robustness.learn(gradient, moment * step_tokens)
        mark = Mark(self.round, self.start.part_after(moment), moment * step_tokens)
        self.newest = Published(mark, gradient)

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
            if self.rng.random() < setting.failing or not self.is_of_use(section, name, published.mark):
                continue
            self.coming.add((section, name))
            if not world.is_hanging(name):  # else it says nothing until the round is over
                world.clock.call_at(self.arrives_s(section, name), self.arrive, section, name, published)

    def choose(self, section: Section) -> str | None:
        """Whose to pull, as a volunteer chooses."""
        others = [peer for peer in self.world.peers if peer is not self]
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
        rounds = {peer.name: peer.round for peer in self.world.peers if peer is not self}
        return self.partners.first(section, rounds, with_weights, median_round([self.round, *rounds.values()]))

    def is_of_use(self, section: Section, name: str, mark: Mark) -> bool:
        """Whether that section of a publication can be merged."""
        return self.ledger.may_enter(section, name, mark, median_round(peer.round for peer in self.world.peers))

    def arrives_s(self, section: Section, name: str) -> float:
        """When it is here: links carry one transfer after the other, the author's up and the own one down."""
        setting, author, sizes = self.world.setting, self.world.by_name[name], self.world.section_bytes
        size_bytes = sizes.weights if section == "weights" else sizes.gradient
        asked_s, takes_s = self.world.clock.now + setting.rtt_s, size_bytes / setting.link_bytes_per_s
        self.down_free_s = max(asked_s, self.down_free_s) + takes_s
        author.up_free_s = max(asked_s, author.up_free_s) + takes_s
        return max(self.down_free_s, author.up_free_s)

    def arrive(self, section: Section, name: str, published: Published) -> None:
        """Take it, or if it is refused, another's in its place."""
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
        vector = world.on_the_wire(
            published.vector, formats.theta_format if section == "weights" else formats.gradient_format
        )
        if not bool(torch.isfinite(vector).all()):
            raise BadBytesError("a publication that is not finite")
        if section == "weights":
            arrival = Arrival(vector, vector, 0)
        else:
            news = self.ledger.news(name, published.mark, median_round(peer.round for peer in world.peers))
            new = vector - self.merged[name] if isinstance(news, Difference) else vector
            arrival = Arrival(None, new, news.tokens)
        arrival = self.robustness.accept(name, arrival, self.state.theta)
        self.arrived[section, name] = (Published(published.mark, vector), arrival)

    def end(self) -> None:
        """Merge what is here; on to the next round."""
        self.arrived = {  # it may have stood still, and all of that be too old
            (section, name): kept
            for (section, name), kept in self.arrived.items()
            if self.is_of_use(section, name, kept[0].mark)
        }
        world, tokens = self.world, self.start.inner_steps * self.world.setting.run.tokens_per_step
        reference = median_round(peer.round for peer in world.peers)
        prepared = prepare(self.state.theta, [arrival for _, arrival in self.arrived.values()], world.layout)
        if prepared.displacement is not None:
            self.robustness.merged(prepared.displacement)
        self.state = self.merge(prepared, self.state.theta - flatten(self.volunteer.parameters), tokens)
        for (section, name), (published, _) in self.arrived.items():
            if section == "weights":
                self.ledger.weights_merged(name, published.mark.round)
            else:
                self.ledger.merged(name, published.mark, reference)
                self.merged[name] = published.vector
        self.merged = {name: kept for name, kept in self.merged.items() if name in self.ledger.held}
        self.rounds_fresh += any(section == "gradient" for section, _ in self.arrived)
        self.arrived.clear()
        self.coming = {(section, name) for section, name in self.coming if not world.is_hanging(name)}
        self.round += 1
        if world.tokens < world.setting.run.run.total_tokens:
            self.begin()
        else:
            world.finished_s = max(world.finished_s, world.clock.now)

    def merge(self, prepared: Prepared, gradient: Tensor, tokens: int) -> OuterState:
        """The state after the round, as `Trainer` makes it."""
        section, constants = self.world.setting.run.merge, self.world.setting.constants(self.round)
        partners = [arrival for _, arrival in self.arrived.values() if arrival.tokens]
        apart = [gradient, *(arrival.gradient for arrival in partners)]
        weights = [tokens, *(arrival.tokens for arrival in partners)]
        if (mean := robust_mean(section.robust, apart, weights)) is not None:
            return outer_step(OuterState(prepared.theta_mean, self.state.momentum), mean, constants)
        return gossip_merge(self.state, prepared, gradient, tokens, constants)


def _own_seed(setting: Setting, number: int) -> int:
    return 1000 * (1 + setting.run.run.seed) + number


@dataclass
class World:
    """Everyone, and the clock."""

    setting: Setting
    clock: Clock = field(default_factory=Clock)
    tokens: int = 0
    finished_s: float = 0.0
    layout: Layout = field(init=False)
    peers: list[Peer] = field(init=False)
    by_name: dict[str, Peer] = field(init=False)

    def __post_init__(self) -> None:
        shapes = [tuple(p.shape) for p in Volunteer(self.setting.text, 0).parameters]
        self.layout = layout_of(shapes)
        if not self.setting.corrected:
            self.layout = replace(self.layout, corrected=(False,) * len(shapes))
        self._sizes = [math.prod(shape) for shape in shapes]
        self.peers = [self.peer(number) for number in range(len(self.setting.step_s))]
        self.by_name = {peer.name: peer for peer in self.peers}

    @property
    def section_bytes(self) -> SectionBytes:
        """What a publication's weights and pseudo-gradient weigh as they travel."""
        section = self.setting.run.merge
        weights, gradient = (
            encoded_size_bytes(it, self._sizes) for it in (section.theta_format, section.gradient_format)
        )
        return SectionBytes(weights=weights, gradient=gradient)

    def is_hanging(self, name: str) -> bool:
        """Whether this peer stands still now."""
        hang = self.setting.hang
        return hang is not None and hang.is_on(self.by_name[name].number, self.clock.now)

    def peer(self, number: int) -> Peer:
        """A new one."""
        return Peer(self, number)

    def told(self, peer: str, incident: Incident) -> None:
        """What `peer` published was cut or refused."""

    def steps_of_everybody(self, number: int) -> float:
        """Inner steps that all take together while peer `number` takes one: how fast the schedule advances."""
        return sum(1 / step_s for step_s in self.setting.step_s) * self.setting.step_s[number]

    def on_the_wire(self, vector: Tensor, form: Format) -> Tensor:
        """What arrives of it."""
        return decode(encode(vector.contiguous(), form, self._sizes), form, self._sizes)


def gossip(setting: Setting) -> Result:
    """Nobody waits."""
    world = World(setting)
    for peer in world.peers:  # nobody presses the button in the same moment
        world.clock.call_at(peer.rng.random() * setting.paced(peer.number) * setting.step_s[peer.number], peer.begin)
    while world.clock.step():
        pass
    theta = variance_corrected_mean([peer.state.theta for peer in world.peers], world.layout).mean
    model, parameters = world.peers[0].volunteer.model, world.peers[0].volunteer.parameters
    unflatten_into(theta, parameters)
    fresh = sum(peer.rounds_fresh for peer in world.peers) / sum(peer.round for peer in world.peers)
    return Result(setting.text.held_out_loss(model), world.finished_s, world.tokens, fresh)
