"""What rebalancing is worth to a pipeline whose peers are unequal and come and go, in virtual time.

    python benchmarks/balance.py --seeds 0,1,2,3,4

The setting is that of SWARM (arXiv 2301.11913): preemptible machines, each of which holds one of four stages. Here a
machine is on for two hours on average and off for forty minutes, memorylessly; a third of the preemptions says goodbye,
a third breaks connections, a third is silent. So many machines that 16, 32 or 64 are on at a time, on average. Their
speeds are spread evenly from 1 to 10 ("uniform"), or lognormal (sigma 0.8). To fetch a stage takes 20 to 120 s, in
which its peer serves the old one. Records are up to five seconds old, differ between those who look, and a silent peer
is missed after 30 s.

What is measured: tokens of finished microbatches in the hours after the first ten minutes, as a share of the ideal.
The ideal counts every machine that is on, from its first second to its last, loading or not, and the best that any
assignment of one stage to each of them could do: an upper bound (`best_bottleneck`), which no assignment quite reaches.
Beside it, in brackets, the share that the slowest stage could have done as the stages were held; the rest is lost on
the way, in queues and to the dead.

The rules are the product's own code. A joiner goes to the slowest stage under all of them but the first. SWARM's own
rule is given what suits it: queues without a limit, which are what it looks at (with BUSY its share is no higher, and
mostly much lower), and the choice of peers that does better with those.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from dataclasses import replace
from functools import partial

from swarmtrain.membership.routing import Router
from swarmtrain.simulate.pipeline import (
    Machine,
    PipelineSettings,
    PipelineWorld,
    best_bottleneck,
    lives,
    unequal_machines,
)

WARM_UP_S = 600.0
_ITS_QUEUES = PipelineSettings(balance="queues", queue=1_000_000, router=partial(Router, variant="least-completion"))
RULES = {
    "none, joiners by chance": PipelineSettings(balance="none", placed=False),
    "none": PipelineSettings(balance="none"),
    "SWARM's, every 300 s": replace(_ITS_QUEUES, balance_every_s=300.0),
    "SWARM's, every 60 s": replace(_ITS_QUEUES, balance_every_s=60.0),
    "ours, every 10 s": PipelineSettings(),
}
PILES = ((4, 1, 1), (8, 2, 2), (3, 3, 1, 1), (6, 0, 0))


def swarm(settings: PipelineSettings, size: int, spread: str, seed: int, options: argparse.Namespace) -> PipelineWorld:
    """A swarm that has lived through its hours. The same machines are on at the same times under every rule."""
    rng = random.Random(seed)
    share_on = options.on_s / (options.on_s + options.off_s)
    machines = unequal_machines(round(size / share_on), rng, spread=spread)
    world = PipelineWorld(settings, seed=seed)
    end_s = WARM_UP_S + 3600 * options.hours
    lives(world, machines, end_s, on_s=options.on_s, off_s=options.off_s, rng=rng)
    world.run_until(WARM_UP_S)
    world.measure_from_here()
    world.run_until(end_s)
    return world


def resolved(counts: tuple[int, ...], settings: PipelineSettings) -> str:
    """Equal machines that begin so many a stage: how long until the slowest stage can do as much as the best, and what
    passes through then."""
    costs = tuple(1 / len(counts) for _ in counts)
    world = PipelineWorld(replace(settings, rule=replace(settings.rule, costs=costs)))
    number = 0
    for stage, count in enumerate(counts):
        for _ in range(count):
            world.join(Machine(name=f"p{number:03d}", tokens_per_s=500.0, most_stages=2), (stage,))
            number += 1
    most = number // len(counts) * 500.0 * len(counts)
    while world.clock.now < 1800 and min(world.rates()) < most - 1e-6:
        world.run_until(world.clock.now + 1)
    took_s, moves = world.clock.now, sum(moment.kind == "moves" for moment in world.log)
    world.measure_from_here()
    world.run_until(world.clock.now + 600)
    ideal = best_bottleneck([500.0] * number, costs)
    held = "-".join(map(str, world.holders()))
    return f"{held} after {took_s:.0f} s and {moves} moves; then {world.tokens_per_s / ideal:.0%} of the ideal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default="16,32,64", help="machines that are on, on average; default 16,32,64")
    parser.add_argument("--spreads", default="uniform,lognormal", help="of their speeds; default uniform,lognormal")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--hours", type=float, default=1.0, help="measured; default 1")
    parser.add_argument("--on-s", type=float, default=7200.0, help="a machine's session on average; default 7200")
    parser.add_argument("--off-s", type=float, default=2400.0, help="between two sessions; default 2400")
    options = parser.parse_args()
    print("started        becomes")
    for counts in PILES:
        print(f"{'-'.join(map(str, counts)):13}  {resolved(counts, PipelineSettings())}", flush=True)
    worlds: dict[tuple[str, int, str], list[PipelineWorld]] = {}
    for spread in options.spreads.split(","):
        for size in map(int, options.sizes.split(",")):
            for seed in map(int, options.seeds.split(",")):
                for name, settings in RULES.items():
                    world = swarm(settings, size, spread, seed, options)
                    worlds.setdefault((spread, size, name), []).append(world)
                    moves = sum(peer.mover.num_moves for peer in [*world.peers.values(), *world.ghosts.values()])
                    done = f"{world.share:.3f} ({world.share_of_assignment:.3f})  {moves} moves"
                    print(f"{spread:9}  {size:2}  seed {seed}  {name:23}  {done}", flush=True)
    show(worlds)


def show(worlds: dict[tuple[str, int, str], list[PipelineWorld]]) -> None:
    """Means over the seeds, in percent of the ideal."""
    columns = list(dict.fromkeys((spread, size) for spread, size, _ in worlds))
    print("\n% of ideal               " + "  ".join(f"{spread} {size}".center(18) for spread, size in columns))
    for name in RULES:
        cells = [_cell(worlds[(*column, name)]) for column in columns]
        print(f"{name:23}  " + "  ".join(cells))


def _cell(worlds: list[PipelineWorld]) -> str:
    """Mean and standard error, and what the stages could have done."""
    shares = [100 * world.share for world in worlds]
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
    assigned = 100 * statistics.mean(world.share_of_assignment for world in worlds)
    return f"{statistics.mean(shares):4.1f} +- {error:3.1f} ({assigned:4.1f})"


if __name__ == "__main__":
    main()
