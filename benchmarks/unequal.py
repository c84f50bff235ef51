"""How well do unequal peers learn together, by method: in virtual time, with real models, text, merges and formats.

    python benchmarks/unequal.py examples/stdlib-gpt.toml --set run.total_tokens=1_024_000
    python benchmarks/unequal.py examples/stdlib-gpt.toml --methods gossip --momenta 0.5,0.8 --seeds 0,1,2

Volunteers differ in speed (`--slowdowns`, times one inner step of `--step-ms`). One process takes their inner steps in
the order of virtual time, with the functions a real volunteer uses, so the losses are those of a swarm, and the times
those of one whose machines are as quick as said, whatever this one is. Methods, from a cold start, on equal tokens:

- diloco: synchronous rounds of H steps; every round takes as long as the slowest;
- diloco-paced: the same with H_i by speed (`merge.pacing`);
- server: delayed Nesterov on one peer's weights, which workers pull late in their rounds, waiting for nothing;
- server-waiting: the same as published (arXiv 2401.09135): a worker waits for the weights that have its gradient;
- gossip: publish, pull, merge without waiting, what travels being encoded and decoded, clips included;
- gossip-own: the same from different random initial weights of each peer (`merge.init = "own"`);
- gossip-own-plain: the same with plain averaging in place of the variance-corrected one.

With `--link-mbit` (up and down) and `--rtt-ms` what travels takes time: in a synchronous round the fp32 pseudo-gradient
twice, as shares and as averages, after the slowest has trained; in gossip what the partners' publications weigh, late
in the round, from as few partners as half a round carries. `--failing` breaks a share of the pulls. `--hang 0:20:60`
stops volunteer 0 from second 20 on for 60: a synchronous round passes it over after `merge.silence_s`.

Each method runs with every momentum of one grid. The table gives means over the seeds and, against paced DiLoCo's best
momentum, the mean ratio within seeds with its standard error. `--more-tokens 1.1` trains gossip that much longer, to
compare times at one loss.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from cold_start import Text, Volunteer, read_run
from torch import Tensor

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
    DelayedNesterov,
    OuterConstants,
    OuterState,
    flatten,
    momentum_at,
    outer_step,
    unflatten_into,
    weighted_mean,
)
from swarmtrain.algorithm.pacing import fewest_inner_steps, paced_inner_steps, reference_speed
from swarmtrain.algorithm.quantize import Format, decode, encode, encoded_size_bytes
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import BadBytesError
from swarmtrain.membership.partners import (
    Candidate,
    Difference,
    Ledger,
    Mark,
    Nothing,
    Partners,
    Whole,
    median_round,
    num_partners,
)
from swarmtrain.network.refusals import rule_of
from swarmtrain.peer.robustness import Robustness, robust_mean
from swarmtrain.peer.server_exchange import lead
from swarmtrain.peer.trainer import Start
from swarmtrain.run import RunFile
from swarmtrain.simulate.clock import Clock


@dataclass(frozen=True)
class Hang:
    """A volunteer that stands still for a while."""

    number: int
    from_s: float
    for_s: float

    @staticmethod
    def of(text: str) -> Hang:
        """NUMBER:FROM:SECONDS."""
        number, from_s, for_s = text.split(":")
        return Hang(int(number), float(from_s), float(for_s))

    def is_on(self, number: int, now_s: float) -> bool:
        """Whether volunteer `number` stands still now."""
        return number == self.number and self.from_s <= now_s < self.from_s + self.for_s


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is made of: seconds an inner step of each volunteer, and the wire's share."""

    text: Text
    step_s: tuple[float, ...]
    link_bytes_per_s: float
    """Of everybody, in each direction; infinite: nothing takes time."""
    rtt_s: float
    failing: float
    """The share of pulls that bring nothing."""
    momentum: float
    hang: Hang | None = None
    own_weights: bool = False
    corrected: bool = True

    @property
    def run(self) -> RunFile:
        """The run file."""
        return self.text.run

    def constants(self, round: int) -> OuterConstants:
        """Of the outer step."""
        section = self.run.merge
        momentum = momentum_at(round, self.momentum, section.momentum_ramp_rounds)
        return OuterConstants(learning_rate=section.outer_learning_rate, momentum=momentum)

    def exchange_s(self, num_volunteers: int, num_parameters: int) -> float:
        """A synchronous round's: everybody's shares of the pseudo-gradient to their hosts, then the averages back."""
        share = (num_volunteers - 1) / num_volunteers
        return 2 * (share * 4 * num_parameters / self.link_bytes_per_s + self.rtt_s)

    def paced(self, number: int) -> int:
        """H_i."""
        speeds = [1 / step_s for step_s in self.step_s]
        return paced_inner_steps(speeds[number], reference_speed(speeds), self.run.merge.inner_steps)


@dataclass(frozen=True)
class Result:
    """What came of it: nats per byte, virtual seconds, the share of rounds that merged somebody."""

    loss: float
    seconds: float
    tokens: int
    fresh: float = 1.0


# ---------------------------------------------------------------- synchronous


def diloco(setting: Setting, *, pacing: bool) -> Result:
    """Rounds with a barrier."""
    run, text, hang = setting.run, setting.text, setting.hang
    everyone = [Volunteer(text, number) for number in range(len(setting.step_s))]
    steps = [setting.paced(n) if pacing else run.merge.inner_steps for n in range(len(everyone))]
    theta = flatten(everyone[0].parameters)
    state, now_s, tokens, round = OuterState(theta, torch.zeros_like(theta)), 0.0, 0, 0
    exchange_s = setting.exchange_s(len(everyone), len(theta))
    away: set[int] = set()
    while tokens < run.run.total_tokens:
        here = [n for n in range(len(everyone)) if n not in away]
        ends_s = now_s + max(steps[n] * setting.step_s[n] for n in here)
        hanging = {n for n in here if hang is not None and hang.is_on(n, ends_s)}
        here = [n for n in here if n not in hanging]
        a_round = sum(steps[n] for n in here) * run.tokens_per_step
        gradients = []
        for number in here:
            volunteer = everyone[number]
            unflatten_into(state.theta, volunteer.parameters)
            for step in range(steps[number]):
                volunteer.step((tokens + a_round * step / steps[number]) / run.run.total_tokens)
            gradients.append(state.theta - flatten(volunteer.parameters))
        state = outer_step(state, weighted_mean(gradients, [steps[n] for n in here]), setting.constants(round))
        tokens, round = tokens + a_round, round + 1
        now_s = ends_s + exchange_s + (run.merge.silence_s if hanging else 0.0)
        away = {n for n in away | hanging if hang is not None and hang.is_on(n, now_s)}
    unflatten_into(state.theta, everyone[0].parameters)
    return Result(text.held_out_loss(everyone[0].model), now_s, tokens)


# ---------------------------------------------------------------- gossip


@dataclass
class Published:
    """A publication as it travels."""

    mark: Mark
    theta: Tensor
    gradient: Tensor


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
        self.merged: dict[str, Tensor] = {}
        self.arrived: dict[str, tuple[Published, Arrival]] = {}
        self.wanted, self.asked, self.failed = 0, set[str](), set[str]()
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
        step_s = setting.step_s[self.number]
        for moment in self.start.publish_after:
            clock.call_at(self.awake_s(clock.now + moment * step_s), self.train_to, moment)
        round_s = steps * step_s
        one_bytes, rate = self.world.publication_bytes, setting.link_bytes_per_s
        carried = None if math.isinf(rate) else rate
        self.wanted, _ = num_partners(len(setting.step_s) - 1, one_bytes, carried, round_s, section.num_partners)
        self.asked, self.failed = set(), set()
        pulled_s = setting.rtt_s + self.wanted * one_bytes / rate
        pull_s = max(clock.now, clock.now + round_s - 2 * pulled_s)
        clock.call_at(self.awake_s(pull_s), self.pull)
        clock.call_at(self.awake_s(clock.now + round_s), self.end)

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
        self.newest = Published(mark, world.on_the_wire(self.state.theta, run.merge.theta_format), gradient)

    def pull(self) -> None:
        """From as many partners as are wanted; one that fails is replaced at once."""
        world, setting, asked = self.world, self.world.setting, self.asked
        others = [peer for peer in world.peers if peer is not self]
        rounds = [peer.round for peer in others]
        candidates = [
            Candidate(peer=peer.name, round=mark.round, part=mark.part, tokens=mark.tokens)
            for peer in others
            if peer.newest is not None and (mark := peer.newest.mark)
        ]
        while len(self.arrived) + len(asked - self.arrived.keys() - self.failed) < self.wanted:
            name, _ = self.partners.choose(
                candidates,
                exclude={self.name, *asked, *self.arrived},
                reference_round=median_round([self.round, *rounds]),
                now=world.clock.now,
                rng=self.rng,
            )
            if name is None:
                return
            if self.rng.random() < setting.failing:
                candidates = [one for one in candidates if one.peer != name]
                continue
            asked.add(name)
            published = world.by_name[name].newest
            assert published is not None
            if world.is_hanging(name):
                continue  # it says nothing until the round is over
            transfer_s = setting.rtt_s + self.wanted * world.publication_bytes / setting.link_bytes_per_s
            if transfer_s:
                world.clock.call_later(transfer_s, self.arrive, name, published)
            else:  # before the round's end, which is an event of the same moment
                self.arrive(name, published)

    def arrive(self, name: str, published: Published) -> None:
        """Take it, or if it is refused, another's in its place."""
        try:
            self.take_untrusted(name, published)
        except BadBytesError as error:
            self.partners.back_off.failed(name, self.world.clock.now, str(error))
            self.world.told(name, Incident(rule_of(str(error)), str(error)))
            self.failed.add(name)
            self.pull()

    def take_untrusted(self, name: str, published: Published) -> None:
        """Decode it, and take of it what is new. BadBytesError if that must not be."""
        world = self.world
        reference = median_round(peer.round for peer in world.peers)
        news = self.ledger.news(name, published.mark, reference)
        if isinstance(news, Nothing):
            return
        gradient = world.on_the_wire(published.gradient, world.setting.run.merge.gradient_format)
        theta, tokens, whole = published.theta, news.tokens, gradient
        if not bool(torch.isfinite(theta).all() and torch.isfinite(gradient).all()):
            raise BadBytesError("a publication that is not finite")
        if isinstance(news, Difference):
            gradient = gradient - self.merged[name]
        elif not isinstance(news, Whole):
            tokens = 0
        arrival = self.robustness.accept(name, Arrival(theta, gradient, tokens), self.state.theta)
        self.arrived[name] = (Published(published.mark, theta, whole), arrival)

    def end(self) -> None:
        """Merge what is here; on to the next round."""
        world, tokens = self.world, self.start.inner_steps * self.world.setting.run.tokens_per_step
        reference = median_round(peer.round for peer in world.peers)
        prepared = prepare(self.state.theta, [arrival for _, arrival in self.arrived.values()], world.layout)
        if self.arrived:
            self.robustness.merged(prepared.displacement)
        self.state = self.merge(prepared, self.state.theta - flatten(self.volunteer.parameters), tokens)
        for name, (published, _) in self.arrived.items():
            self.ledger.merged(name, published.mark, reference)
            self.merged[name] = published.gradient
        self.merged = {name: kept for name, kept in self.merged.items() if name in self.ledger.held}
        self.rounds_fresh += bool(self.arrived)
        self.arrived.clear()
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
    def publication_bytes(self) -> int:
        """What a publication weighs: weights and pseudo-gradient as they travel."""
        section = self.setting.run.merge
        return sum(encoded_size_bytes(form, self._sizes) for form in (section.theta_format, section.gradient_format))

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
    for peer in world.peers:
        peer.begin()
    while world.clock.step():
        pass
    theta = variance_corrected_mean([peer.state.theta for peer in world.peers], world.layout).mean
    model, parameters = world.peers[0].volunteer.model, world.peers[0].volunteer.parameters
    unflatten_into(theta, parameters)
    fresh = sum(peer.rounds_fresh for peer in world.peers) / sum(peer.round for peer in world.peers)
    return Result(setting.text.held_out_loss(model), world.finished_s, world.tokens, fresh)


# ---------------------------------------------------------------- a server


class Worker:
    """A volunteer of a server. Waiting, as published, it goes on from the weights that its gradient has entered; else
    from the newest that it pulled late in its round, less each of its gradients that those lack."""

    def __init__(self, served: Served, number: int) -> None:
        self.served, self.number = served, number
        self.volunteer = Volunteer(served.setting.text, number)
        self.theta = flatten(self.volunteer.parameters)
        self.round = 0
        self.pieces: dict[int, Tensor] = {}
        self.came: tuple[Tensor, frozenset[int]] | None = None

    def begin(self) -> None:
        """A round."""
        served, setting = self.served, self.served.setting
        self.began_tokens = served.tokens
        self.steps = setting.paced(self.number)
        unflatten_into(self.theta, self.volunteer.parameters)
        ends_s = served.clock.now + self.steps * setting.step_s[self.number]
        if not served.waiting:
            served.clock.call_at(ends_s - 2 * served.pull_s, self.pull)
        served.clock.call_at(ends_s, self.end)

    def pull(self) -> None:
        """The server's weights, with the rounds of this worker that they have."""
        served = self.served
        entered = frozenset(served.entered[self.number])
        served.clock.call_later(served.pull_s, setattr, self, "came", (served.weights(), entered))

    def end(self) -> None:
        """Train what the round took, hand it in, and go on."""
        served, setting = self.served, self.served.setting
        step_tokens, total = setting.run.tokens_per_step, setting.run.run.total_tokens
        everybodys = sum(1 / step_s for step_s in setting.step_s) * setting.step_s[self.number]
        for step in range(self.steps):
            self.volunteer.step((self.began_tokens + step * everybodys * step_tokens) / total)
        served.tokens += self.steps * step_tokens
        reached = flatten(self.volunteer.parameters)
        self.pieces[self.round] = self.theta - reached
        served.clock.call_later(served.hand_in_s, served.take, self, self.round)
        self.round += 1
        if served.waiting:
            return
        self.theta = reached
        if self.came is not None:
            theta, entered = self.came
            self.came, self.pieces = None, {r: g for r, g in self.pieces.items() if r not in entered}
            self.theta = lead(theta, list(self.pieces.values()))
        self.go_on()

    def go_on(self) -> None:
        """While the run lasts."""
        if self.served.tokens < self.served.setting.run.run.total_tokens:
            self.begin()
        else:
            self.served.finished_s = max(self.served.finished_s, self.served.clock.now)


class Served:
    """The server, its workers and the clock."""

    def __init__(self, setting: Setting, *, waiting: bool) -> None:
        self.setting, self.waiting, self.clock = setting, waiting, Clock()
        self.tokens, self.refreshes, self.finished_s = 0, 0, 0.0
        self.workers = [Worker(self, number) for number in range(len(setting.step_s))]
        theta, section = self.workers[0].theta, setting.run.merge
        self.sizes = [p.numel() for p in self.workers[0].volunteer.parameters]
        state = OuterState(theta, torch.zeros_like(theta))
        self.outer = DelayedNesterov(state, setting.constants(0), len(self.workers), section.momentum_share)
        self.entered: list[set[int]] = [set() for _ in self.workers]
        rate, formats = setting.link_bytes_per_s, (section.theta_format, section.gradient_format)
        self.pull_s, self.hand_in_s = (setting.rtt_s + encoded_size_bytes(f, self.sizes) / rate for f in formats)

    def weights(self) -> Tensor:
        """As they travel."""
        form = self.setting.run.merge.theta_format
        return decode(encode(self.outer.state.theta.contiguous(), form, self.sizes), form, self.sizes)

    def take(self, worker: Worker, round: int) -> None:
        """A gradient has arrived."""
        form = self.setting.run.merge.gradient_format
        self.outer.arrive(decode(encode(worker.pieces[round].contiguous(), form, self.sizes), form, self.sizes))
        self.entered[worker.number].add(round)
        if not self.outer.buffer.arrivals:
            self.refreshes += 1
            self.outer.constants = self.setting.constants(self.refreshes)
        if self.waiting:
            worker.pieces.clear()
            self.clock.call_later(self.pull_s, self.answer, worker)

    def answer(self, worker: Worker) -> None:
        """A worker that waits has the weights."""
        worker.theta = self.weights()
        worker.go_on()


def server(setting: Setting, *, waiting: bool) -> Result:
    """Asynchronous Local-SGD."""
    served = Served(setting, waiting=waiting)
    for worker in served.workers:
        worker.begin()
    while served.clock.step():
        pass
    volunteer = served.workers[0].volunteer
    unflatten_into(served.outer.state.theta, volunteer.parameters)
    return Result(setting.text.held_out_loss(volunteer.model), served.finished_s, served.tokens)


METHODS: dict[str, Callable[[Setting], Result]] = {
    "diloco": lambda setting: diloco(setting, pacing=False),
    "diloco-paced": lambda setting: diloco(setting, pacing=True),
    "gossip": gossip,
    "server": lambda setting: server(setting, waiting=False),
    "server-waiting": lambda setting: server(setting, waiting=True),
    "gossip-own": lambda setting: gossip(replace(setting, own_weights=True)),
    "gossip-own-plain": lambda setting: gossip(replace(setting, own_weights=True, corrected=False)),
}


# ---------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--seeds", default="0", help="comma-separated; default 0")
    parser.add_argument(
        "--methods", default="diloco,diloco-paced,gossip", help="NAME or NAME:MOMENTUM, comma-separated"
    )
    parser.add_argument("--momenta", default="0.5", help="the grid of outer momenta, comma-separated; default 0.5")
    parser.add_argument("--slowdowns", default="2,2.6,5.2,11.4", help="of each volunteer; default 2,2.6,5.2,11.4")
    parser.add_argument("--step-ms", type=float, default=10.0, help="an inner step without slowdown; default 10")
    parser.add_argument("--link-mbit", type=float, default=math.inf, help="of each, up and down; default: no limit")
    parser.add_argument("--rtt-ms", type=float, default=0.0, help="from one to another and back; default 0")
    parser.add_argument("--hang", type=Hang.of, metavar="NUMBER:FROM:SECONDS", help="a volunteer stands still")
    parser.add_argument("--more-tokens", type=float, default=1.0, help="for gossip, times so many; default 1")
    parser.add_argument("--failing", type=float, default=0.0, help="the share of pulls that fail; default 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    momenta = [float(momentum) for momentum in options.momenta.split(",")]
    results: dict[tuple[str, float], list[Result]] = {}
    for seed in seeds:
        for method, _, chosen in (text.partition(":") for text in options.methods.split(",")):
            changes = [*options.set, f'merge.method="{method.split("-")[0]}"', "merge.pacing=false"]
            run = read_run(options.run_file, changes, seed)
            if method.startswith("gossip"):
                total_tokens = round(run.run.total_tokens * options.more_tokens)
                run = run.model_copy(update={"run": run.run.model_copy(update={"total_tokens": total_tokens})})
            text = Text.of(run, options.run_file.parent)
            for momentum in [float(chosen)] if chosen else momenta:
                setting = Setting(
                    text=text,
                    step_s=tuple(float(s) * options.step_ms / 1000 for s in options.slowdowns.split(",")),
                    link_bytes_per_s=options.link_mbit * 1e6 / 8,
                    rtt_s=options.rtt_ms / 1000,
                    failing=options.failing,
                    momentum=momentum,
                    hang=options.hang,
                )
                result = METHODS[method](setting)
                results.setdefault((method, momentum), []).append(result)
                print(
                    f"seed {seed}  {method:16} momentum {momentum:.2f}  {result.loss:.4f} nats/byte  "
                    f"{result.seconds:.0f} virtual s  {result.tokens:,} tokens  "
                    f"{result.fresh:.0%} of rounds merged somebody",
                    flush=True,
                )
    show(results)


def show(results: dict[tuple[str, float], list[Result]]) -> None:
    """Each method with its best momentum, against paced DiLoCo's best if it is there."""
    best: dict[str, tuple[float, list[Result]]] = {}
    for (method, momentum), each in results.items():
        loss = statistics.mean(result.loss for result in each)
        if method not in best or loss < statistics.mean(result.loss for result in best[method][1]):
            best[method] = (momentum, each)
    print("\nmethod            momentum  loss    virtual s  to paced DiLoCo")
    reference = best.get("diloco-paced", next(iter(best.values())))[1]
    for method, (momentum, each) in best.items():
        ratios = [one.loss / other.loss for one, other in zip(each, reference, strict=True)]
        error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        seconds = statistics.mean(result.seconds for result in each)
        loss = statistics.mean(result.loss for result in each)
        ratio = f"{statistics.mean(ratios):.4f} +- {error:.4f}"
        print(f"{method:16}  {momentum:8.2f}  {loss:.4f}  {seconds:9.0f}  {ratio}")


if __name__ == "__main__":
    main()
