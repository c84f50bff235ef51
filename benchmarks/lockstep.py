"""Gossip in lockstep, without clock or wire: what means over few partners cost, and what pulls that miss a round's end.

    python benchmarks/lockstep.py --partners 3                   # DiLoCo is --partners 15, of sixteen
    python benchmarks/lockstep.py --partners 11 --weights 1
    python benchmarks/lockstep.py --partners 15 --share 0.75     # others' last quarter of each round is lost
    python benchmarks/lockstep.py --partners 15 --share 0.75 --late    # ... or merged a round later

Three minutes of a core each. The table is in docs/decisions/0043-rounds-in-step.md.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import variance_corrected_mean
from swarmtrain.algorithm.outer import OuterConstants, OuterState, outer_step, weighted_mean
from swarmtrain.peer.consensus import layout_of_specs
from swarmtrain.run import load_run
from swarmtrain.simulate.learning.learner import Learner, Text
from swarmtrain.simulate.learning.setting import Setting

EXAMPLE = Path(__file__).parent.parent / "examples" / "stdlib-gpt.toml"


def trained(
    learner: Learner, theta: Tensor, steps: int, pulled: int, done: float, share: float
) -> tuple[Tensor, Tensor]:
    """(P,) each: the pseudo-gradient after `pulled` steps, which others get, and after all of them. The run is at
    `done`, from 0 to 1, and goes on by `share`."""
    learner.enter(theta)
    early = theta
    for step in range(steps):
        learner.step(done + share * step / steps)
        if step + 1 == pulled:
            early = theta - learner.reached
    return early, theta - learner.reached


def play(args: argparse.Namespace, setting: Setting) -> tuple[float, float]:
    """The held-out loss of everybody's mean, and the mean of their own."""
    everyone, steps_of = range(setting.num_peers), [setting.steps_of_round(n) for n in range(setting.num_peers)]
    learners = [setting.learner(n) for n in everyone]
    layout, rng = layout_of_specs(learners[0].specs), random.Random(args.seed)
    constants = OuterConstants(learning_rate=args.learning_rate, momentum=args.momentum)
    theta = learners[0].reached
    states = [OuterState(theta, torch.zeros_like(theta)) for _ in everyone]
    tails, tokens = [torch.zeros_like(theta) for _ in everyone], 0
    pulled = [max(1, round(args.share * steps)) for steps in steps_of]
    a_round = sum(steps_of) * setting.run.tokens_per_step
    while tokens < setting.total_tokens:
        found = []
        for n in everyone:
            ahead = setting.num_peers * steps_of[n] * setting.run.tokens_per_step  # as far as it knows all do the same
            done = tokens / setting.total_tokens, ahead / setting.total_tokens
            found.append(trained(learners[n], states[n].theta, steps_of[n], pulled[n], *done))
        sent = [early + tail for (early, _), tail in zip(found, tails, strict=True)]
        merged = []
        for n in everyone:
            partners = rng.sample([one for one in everyone if one != n], args.partners)
            mean = variance_corrected_mean([states[one].theta for one in [n, *partners[: args.weights]]], layout).mean
            gradients = [found[n][1], *(sent[one] for one in partners)]
            gradient = weighted_mean(gradients, [steps_of[n], *(pulled[one] for one in partners)])
            merged.append(outer_step(OuterState(mean, states[n].momentum), gradient, constants))
        states, tokens = merged, tokens + a_round
        if args.late:
            tails = [whole - early for early, whole in found]
    thetas = [state.theta for state in states]
    return setting.text.held_out_loss(variance_corrected_mean(thetas, layout).mean), setting.own_loss(thetas)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=16, help="of two speeds, 1 and 2")
    parser.add_argument("--partners", type=int, default=3, help="whose pseudo-gradients each merges")
    parser.add_argument("--weights", type=int, default=64, help="of how many of them the weights too")
    parser.add_argument("--share", type=float, default=1.0, help="of others' rounds, that is merged")
    parser.add_argument("--late", action="store_true", help="the rest is merged a round later")
    parser.add_argument("--momentum", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=1_638_400)
    parser.add_argument("--round-steps", type=int, default=256, help="inner steps of a round of all, were they equal")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = load_run(EXAMPLE)
    merge = {"method": "diloco", "pacing": True, "inner_steps": args.round_steps // args.peers}
    run = run.model_copy(
        update={
            "run": run.run.model_copy(update={"total_tokens": args.tokens, "seed": args.seed}),
            "merge": run.merge.model_copy(update=merge),
            "data": run.data.model_copy(update={"shards": 0}),
        }
    )
    torch.set_num_threads(1)
    setting = Setting(text=Text.of(run, EXAMPLE.parent), step_s=tuple(0.2 * (1 + n % 2) for n in range(args.peers)))
    loss, own_loss = play(args, setting)
    print(f"{loss:.4f} nats/byte, own {own_loss:.4f}")


if __name__ == "__main__":
    main()
