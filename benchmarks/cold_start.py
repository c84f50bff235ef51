"""Compare how a run file learns from a cold start: alone, as a swarm, and with gradients averaged at every step.

    python benchmarks/cold_start.py examples/diloco.toml --set merge.min_peers=3
    python benchmarks/cold_start.py examples/diloco.toml --set merge.min_peers=3 --set merge.inner_steps=10

One process takes the volunteers' inner steps one after the other, with a real volunteer's functions, so the losses are
those of a synchronous swarm without its network. Three ways, with equally many inner steps of each volunteer:

- lone: one volunteer, nobody else;
- swarm: DiLoCo as the run file says, `min_peers` volunteers that share `total_tokens`;
- parallel: those volunteers average their gradients at every step, at H / 2 times the bytes or more.

`--shards N` gives each volunteer of the swarm a shard of the data for each round, the least seen one, as with
`merge.method = "gossip"`; `--blocks` makes a shard's blocks longer, up to one piece of the corpus. `--set` takes any
key of the run file; the table at the end is what `docs/lab-log.md` keeps. The seed also
picks the held-out text, so compare ways within a seed, and settings at the same seeds.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import tomllib
from pathlib import Path

import torch

from swarmtrain.algorithm.outer import (
    OuterConstants,
    OuterState,
    flatten,
    momentum_at,
    outer_step,
    weighted_mean,
)
from swarmtrain.data import batches as batches_module
from swarmtrain.data.batches import Batches
from swarmtrain.model.gpt import GPT
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.protocol.tokens.shards import Coverage
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.learner import Learner, Text


def cut(volunteers: list[Learner], num_shards: int) -> list[Coverage]:
    """Cut the volunteers' data into shards; return each one's view of their coverage, which is complete here."""
    names = [f"volunteer {number}" for number in range(len(volunteers))]
    for volunteer in volunteers:
        assert isinstance(volunteer.loop.batches, Batches)
        volunteer.loop.batches.cut(num_shards)
    return [Coverage(me=name, num_shards=num_shards) for name in names]


def train_lone(text: Text, num_steps: int) -> GPT:
    volunteer = Learner(text, 0)
    for step in range(num_steps):
        volunteer.step(step / num_steps)
    return volunteer.loop.model


def train_parallel(text: Text, num_steps: int) -> GPT:
    """Train with large batches: each step on the mean gradient of all volunteers' batches."""
    num_peers = text.run.merge.min_peers
    first = Learner(text, 0)
    sources = [first.loop.batches, *(text.batches(number) for number in range(1, num_peers))]
    for step in range(num_steps):
        for source in sources:
            (first.loop.model.loss(source.next_batch()) / num_peers).backward()  # type: ignore[no-untyped-call]
        first.loop.inner.step(step / num_steps)
    return first.loop.model


def take_shards(volunteers: list[Learner], coverages: list[Coverage], round: int, tokens: int) -> None:
    """Let the volunteers choose shards for a round of `tokens`, and tell each other."""
    names = [coverage.me for coverage in coverages]
    for volunteer, coverage in zip(volunteers, coverages, strict=True):
        shard, _ = coverage.choose(round, 0, busy=coverage.busy(names), round_tokens=tokens)
        volunteer.loop.batches.use_shard(shard)
        coverage.trained(shard, tokens)
    for coverage in coverages:
        for other in coverages:
            coverage.merge(other.rows_to_send(1), other.me, lambda _, tokens: tokens)


def train_swarm(text: Text, num_steps: int, num_shards: int = 0) -> GPT:
    """Train by synchronous DiLoCo: rounds of H inner steps, then one outer step on the mean pseudo-gradient."""
    merge = text.run.merge
    volunteers = [Learner(text, number) for number in range(merge.min_peers)]
    coverages = cut(volunteers, num_shards) if num_shards else []
    theta = volunteers[0].reached
    state = OuterState(theta, torch.zeros_like(theta))
    for round, start in enumerate(range(0, num_steps, merge.inner_steps)):
        steps = range(start, min(start + merge.inner_steps, num_steps))
        gradients = []
        if coverages:
            take_shards(volunteers, coverages, round, len(steps) * text.run.tokens_per_step)
        for volunteer in volunteers:
            volunteer.enter(state.theta)
            for step in steps:
                volunteer.step(step / num_steps)
            gradients.append(state.theta - volunteer.reached)
        momentum = momentum_at(round, merge.outer_momentum, merge.momentum_ramp_rounds)
        constants = OuterConstants(learning_rate=merge.outer_learning_rate, momentum=momentum)
        state = outer_step(state, weighted_mean(gradients, [len(steps)] * len(gradients)), constants)
    volunteers[0].enter(state.theta)
    return volunteers[0].loop.model


WAYS = {"lone": train_lone, "swarm": train_swarm, "parallel": train_parallel}


def read_run(path: Path, changes: list[str], seed: int) -> RunFile:
    """Read the run file with `section.key=value` changes, values as in TOML."""
    values = tomllib.loads(path.read_text())
    for change in [*changes, f"run.seed={seed}"]:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = tomllib.loads(f"value = {value}")["value"]
    return RunFile.model_validate(values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a run file alone, as a swarm and in parallel; print losses.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--seeds", default="0", help="comma-separated; default 0")
    parser.add_argument("--ways", default="lone,swarm,parallel", help="comma-separated; default all three")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; default 1, as a volunteer of the demo")
    parser.add_argument("--shards", type=int, default=0, help="of the swarm's data; default 0: none")
    parser.add_argument("--blocks", type=int, help="length of a shard's blocks, in sequences; default as in a real run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.blocks:
        batches_module._BLOCK_SEQUENCES, batches_module._BLOCKS_A_SHARD = options.blocks, 1
    ways = WAYS | {"swarm": functools.partial(train_swarm, num_shards=options.shards)}
    losses: dict[str, list[float]] = {way: [] for way in options.ways.split(",")}
    for seed in map(int, options.seeds.split(",")):
        run = read_run(options.run_file, options.set, seed)
        text = Text.of(run, options.run_file.parent)
        num_steps = math.ceil(run.run.total_tokens / run.tokens_per_step / run.merge.min_peers)
        for way, each in losses.items():
            start_s = time.process_time()
            model = ways[way](text, num_steps)
            num_computed = num_steps * (1 if way == "lone" else run.merge.min_peers)
            step_ms = 1000 * (time.process_time() - start_s) / num_computed
            each.append(text.held_out_loss(flatten(model.parameters())))
            print(f"seed {seed}  {way:8}  {each[-1]:.4f} nats/byte  {step_ms:.1f} ms of processor per step", flush=True)
    print(f"\n{num_parameters(run.model):,} parameters, {run.merge.min_peers} volunteers, {num_steps} inner steps each")
    for way, each in losses.items():
        mean = sum(each) / len(each)
        note = (
            f"  {100 * (1 - mean / (sum(losses['lone']) / len(each))):+.1f} % better than alone"
            if "lone" in losses
            else ""
        )
        print(f"{way:8}  {mean:.4f}  (from {min(each):.4f} to {max(each):.4f}){note}")


if __name__ == "__main__":
    main()
