"""Gossip in lockstep, without clock or wire: the cost of means over few partners, and of pulls that miss a round's end.

    python benchmarks/lockstep.py --partners 3                   # DiLoCo is --partners 15, of sixteen
    python benchmarks/lockstep.py --partners 11 --weights 1
    python benchmarks/lockstep.py --partners 15 --share 0.75     # others' last quarter of each round is lost
    python benchmarks/lockstep.py --partners 15 --share 0.75 --late    # ... or merged a round later
    python benchmarks/lockstep.py --partners 15 --share 0.75 --fragments 2

With fragments (Streaming DiLoCo, arXiv 2501.18512) the tensors are in groups that are merged one after the other, each
once a round: a fragment's transfers take a part of the time, so that it loses less. Three to five minutes of a core
each. The tables are in docs/decisions/0043-rounds-in-step.md and docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import variance_corrected_mean
from swarmtrain.algorithm.outer import OuterConstants, OuterState, outer_step, weighted_mean
from swarmtrain.peer.merging.consensus import layout_of_specs
from swarmtrain.run import load_run
from swarmtrain.simulate.learning.learner import Learner, Text
from swarmtrain.simulate.learning.setting import Setting

EXAMPLE = Path(__file__).parent.parent / "examples" / "stdlib-gpt.toml"


def where(fragment: Fragment) -> Tensor:
    """Return the indices of its numbers in the flat vector."""
    return torch.cat([torch.arange(place.start, place.stop) for place in fragment.places])


def reached(learner: Learner, steps: range, pulled: int, done: float, share: float, a_round: int) -> tuple[Tensor, ...]:
    """Take `steps` of a round; return weights (P,) before step `pulled`, from which others get no work, and at the end.

    The run is at `done`, from 0 to 1, and advances by `share` in the round.
    """
    early = learner.reached if pulled == steps.start else None
    for step in steps:
        learner.step(done + share * step / a_round)
        if step + 1 == pulled:
            early = learner.reached
    assert early is not None
    return early, learner.reached


def play(args: argparse.Namespace, setting: Setting) -> tuple[float, float]:
    """Play the run; return the held-out loss of the mean of all weights, and the mean of the individual losses."""
    everyone, steps_of = range(setting.num_peers), [setting.steps_of_round(n) for n in range(setting.num_peers)]
    learners = [setting.learner(n) for n in everyone]
    layout, rng = layout_of_specs(learners[0].specs), random.Random(args.seed)
    constants = OuterConstants(learning_rate=args.learning_rate, momentum=args.momentum)
    theta = learners[0].reached
    thetas, momenta = [theta.clone() for _ in everyone], [torch.zeros_like(theta) for _ in everyone]
    tails, tokens = [torch.zeros_like(theta) for _ in everyone], 0
    fragments = [(where(each), each.layout) for each in fragments_of(layout, args.fragments)]
    a_round = sum(steps_of) * setting.run.tokens_per_step
    while tokens < setting.total_tokens:
        for k, (numbers, fragment_layout) in enumerate(fragments):
            sent, own, now = [], [], []
            for n in everyone:
                steps = range(steps_of[n] * k // len(fragments), steps_of[n] * (k + 1) // len(fragments))
                lost = math.ceil((1 - args.share) / len(fragments) * steps_of[n])
                pulled = max(steps.start + (k == 0), steps.stop - lost)
                # to its knowledge, all do the same
                ahead = setting.num_peers * steps_of[n] * setting.run.tokens_per_step
                done = tokens / setting.total_tokens, ahead / setting.total_tokens
                early, whole = reached(learners[n], steps, pulled, *done, steps_of[n])
                now.append(whole)
                sent.append((thetas[n] - early)[numbers] + tails[n][numbers])
                own.append((thetas[n] - whole)[numbers])
                if args.late:
                    tails[n] = early - whole
            merged = []
            for n in everyone:
                partners = rng.sample([one for one in everyone if one != n], args.partners)
                theirs = [thetas[one][numbers] for one in [n, *partners[: args.weights]]]
                mean = variance_corrected_mean(theirs, fragment_layout).mean
                weights = [steps_of[n], *(max(1, round(args.share * steps_of[one])) for one in partners)]
                gradient = weighted_mean([own[n], *(sent[one] for one in partners)], weights)
                merged.append(outer_step(OuterState(mean, momenta[n][numbers]), gradient, constants))
            for n, state in enumerate(merged):
                thetas[n][numbers], momenta[n][numbers] = state.theta, state.momentum
                now[n][numbers] = state.theta
                learners[n].enter(now[n])
        tokens += a_round
    return setting.text.held_out_loss(variance_corrected_mean(thetas, layout).mean), setting.own_loss(thetas)


def main() -> None:
    """Run the command line described in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=16, help="of two speeds, 1 and 2")
    parser.add_argument("--partners", type=int, default=3, help="whose pseudo-gradients each merges")
    parser.add_argument("--weights", type=int, default=64, help="of how many of them the weights too")
    parser.add_argument("--share", type=float, default=1.0, help="of others' rounds, that is merged")
    parser.add_argument("--late", action="store_true", help="the rest is merged a round later")
    parser.add_argument("--fragments", type=int, default=1, help="groups of tensors, which are merged in turn")
    parser.add_argument("--momentum", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=1_638_400)
    parser.add_argument("--round-steps", type=int, default=256, help="inner steps of a round of all, were they equal")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.late and args.fragments > 1:
        parser.error("--late: of whole rounds only")
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
