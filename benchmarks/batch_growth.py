"""Loss of a large batch that grows beside fixed ones, and the gradient's noise scale, on one process without a wire.

What all volunteers compute is computed here by one, so that a run takes as long as its tokens. Prints one JSON object
for each run, and with `--noise` one for each measurement of the noise scale (arXiv 1812.06162, appendix A.1) within it.

    python benchmarks/batch_growth.py --seed 9 --targets auto,1536 --first 1024 --tokens 153600
    python benchmarks/batch_growth.py --seed 9 --targets 1024 --tokens 153600 --noise
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from swarmtrain.algorithm.common_step import NUM_MOMENTS, norm_of
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.peer.merging.common_steps import common_optimizer, common_step
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.learner import Learner, Text

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_SEQUENCES = 8
"""Sequences of an inner step."""
_SMALL = 192
"""Inner steps from which the noise scale is measured: the gradients of each, and of all."""
_SHARES = 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99
"""Shares of the run at which it is measured."""
_PROBE = 77
"""Number of the volunteer whose data it is measured on."""


def run_of(seed: int, tokens: int, learning_rate: float, target: str, first: int) -> RunFile:
    """Return the run of `large-batch.toml` with a target of "auto", after a first batch of so many tokens, or of a
    number of tokens."""
    table = tomllib.loads((EXAMPLES / "stdlib-gpt.toml").read_text())
    step_tokens = _SEQUENCES * table["model"]["context_tokens"]
    table["run"] |= {"seed": seed, "total_tokens": tokens}
    table["inner"] |= {"learning_rate": learning_rate, "batch_sequences": _SEQUENCES}
    table["data"]["shards"] = 0
    size = {"target_tokens": "auto", "inner_steps": first // step_tokens}
    table["merge"] = {"method": "batch", **(size if target == "auto" else {"target_tokens": int(target)})}
    return RunFile.model_validate(table)


def noise_at(prober: Learner, state: OuterState, number: int) -> dict[str, float]:
    """Measure the noise scale of the weights, in tokens, from batches of one and of many inner steps; and what the
    moments after step `number` would say, a share of the tokens of the batch that they are of."""
    run, size = prober.text.run, state.theta.numel()
    prober.enter(state.theta)
    small, total = 0.0, torch.zeros(size)
    for _ in range(_SMALL):
        prober.step(0.0)
        gradient, _ = prober.loop.mean_gradient()
        small += norm_of(gradient) ** 2 / _SMALL
        total += gradient / _SMALL
    few, many = run.tokens_per_step, run.tokens_per_step * _SMALL
    large = norm_of(total) ** 2
    squared = (many * large - few * small) / (many - few)
    variance = (small - large) / (1 / few - 1 / many)
    beta1, beta2 = run.inner.beta1, run.inner.beta2
    first = norm_of(state.momentum[:size]) ** 2 / (1 - beta1**number) ** 2
    second = float(state.momentum[size:].double().sum()) / (1 - beta2**number)
    least = (1 - beta1) * (1 + beta1**number) / ((1 + beta1) * (1 - beta1**number))
    return {
        "noise_tokens": round(variance / squared),
        "squared_gradient": squared,
        "variance_of_a_token": variance,
        "first_moment": first,
        "second_moment": second,
        "squared_gradient_by_moments": (first - least * second) / (1 - least),
    }


def train(run: RunFile, measures: bool) -> dict[str, Any]:
    """Train a run of large batches; return its held-out loss and its steps."""
    text = Text.of(run, EXAMPLES)
    learner, prober = Learner(text, 0), Learner(text, _PROBE) if measures else None
    optimizer = common_optimizer(run, learner.loop.parameters.shapes)
    theta, target = learner.reached, run.batch_target
    state, total = OuterState(theta, torch.zeros(NUM_MOMENTS * theta.numel())), run.run.total_tokens
    tokens, steps, counted, due = 0, 0, 0, [share * total for share in _SHARES]
    while tokens < total:
        learner.enter(state.theta)
        for _ in range(max(1, round(target.at(tokens) / run.tokens_per_step))):
            learner.step(tokens / total)
        gradient, counted = learner.loop.mean_gradient()
        state = optimizer.step(state, gradient, common_step(run, steps, tokens))
        tokens, steps = tokens + counted, steps + 1
        if prober is not None and due and tokens >= due[0]:
            due = [each for each in due if each > tokens]
            print(json.dumps({"tokens": tokens, "batch": counted, **noise_at(prober, state, steps)}), flush=True)
    return {"nats_per_byte": round(text.held_out_loss(state.theta), 4), "steps": steps, "last_batch": counted}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="auto", help='targets, "auto" or tokens (default: %(default)s)')
    parser.add_argument("--first", type=int, default=1024, help='tokens of the first batch with "auto"')
    parser.add_argument("--tokens", type=int, default=153_600, help="tokens of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--noise", action="store_true", help="measure the noise scale")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for target in given.targets.split(","):
        began_s = time.perf_counter()
        found = train(run_of(given.seed, given.tokens, given.learning_rate, target, given.first), given.noise)
        told = {"target": target, "seed": given.seed, "tokens": given.tokens, **found}
        print(json.dumps({**told, "seconds": round(time.perf_counter() - began_s, 1)}), flush=True)


if __name__ == "__main__":
    main()
