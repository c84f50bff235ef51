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
twice, as shares and as averages, after the slowest has trained; in gossip what the partners' weights and gradients
weigh, of as few and as late in the round as `membership.pulls` says. `--failing` breaks a share of the pulls.
`--hang 0:20:60` stops volunteer 0 from second 20 on for 60: a synchronous round passes it over after `merge.silence_s`.

Each method runs with every momentum of one grid. The table gives means over the seeds and, against paced DiLoCo's best
momentum, the mean ratio within seeds with its standard error. `--more-tokens 1.1` trains gossip that much longer, to
compare times at one loss.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from cold_start import Text, Volunteer, read_run
from torch import Tensor
from virtual_gossip import gossip
from virtual_setting import Hang, Result, Setting

from swarmtrain.algorithm.outer import (
    DelayedNesterov,
    OuterState,
    flatten,
    outer_step,
    unflatten_into,
    weighted_mean,
)
from swarmtrain.algorithm.quantize import decode, encode, encoded_size_bytes
from swarmtrain.peer.server_exchange import lead
from swarmtrain.simulate.clock import Clock

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
