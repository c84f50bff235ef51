"""Measure what the merges of a large model cost its trainer.

    python benchmarks/merge_cost.py                # 57 million parameters, four fragments, one thread

Runs in one process without a network, for each fragment: the difference to the weights reached, the merge of what was
prepared beforehand, and the new weights copied into the model. Prints milliseconds of the thread's processor time,
which other programs do not stretch, and the share of a round of 50 s that all fragments take. The bar is 0.5 % by the
clock; this is the part of it that does not depend on other programs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import PartnerUpdate, gossip_merge, layout_of, prepare
from swarmtrain.algorithm.outer import OuterConstants, OuterState, flatten, unflatten_into
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.merging.updates import LentWeights
from swarmtrain.run import RunFile

CONSTANTS = OuterConstants(learning_rate=0.7, momentum=0.8)
ROUND_S = 50.0


class Merges:
    """Merges of one fragment, one after the other, each with a partner's weights and another's gradient."""

    def __init__(self, fragment: Fragment, parameters: Sequence[Tensor]) -> None:
        self.fragment, self.model = fragment, fragment.pick(parameters)
        theta = memory.empty(fragment.layout.size).copy_(flatten(self.model))
        self.state = OuterState(theta, memory.zeros_like(theta).fill_(1e-3))
        self.arrivals = [
            PartnerUpdate(theta + 1e-3, theta, 0),
            PartnerUpdate(None, 1e-3 * torch.randn(len(theta)), 5000),
        ]

    def costs_ms(self) -> tuple[list[float], float]:
        """Return the processor time of each part, and the clock time of all, in ms."""
        prepared = prepare(self.state, self.arrivals, self.fragment.layout, CONSTANTS.learning_rate)
        lent, began_s, moments = LentWeights(self.state.theta, self.model), time.perf_counter(), [time.thread_time()]
        gradient = lent.gradient()
        moments.append(time.thread_time())
        self.state = gossip_merge(self.state, prepared, gradient, 5000, CONSTANTS)
        moments.append(time.thread_time())
        unflatten_into(self.state.theta, self.model)
        moments.append(time.thread_time())
        clock_ms = 1e3 * (time.perf_counter() - began_s)
        return [1e3 * (after - before) for before, after in itertools.pairwise(moments)], clock_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--fragments", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", type=int, default=9, help="merges of each fragment")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = {"context_tokens": 64, "width": options.width, "num_layers": options.layers, "num_heads": 8}
    sections = {"run": {"total_tokens": 10**9}, "model": model, "data": {"source": "text", "paths": ("x",)}}
    parameters = list(build_model(RunFile.model_validate(sections).model, 0).parameters())
    fragments = fragments_of(layout_of([tuple(one.shape) for one in parameters]), options.fragments)
    print(f"{sum(one.numel() for one in parameters) / 1e6:.1f} million parameters, {len(fragments)} fragments, in all:")
    found = []
    for fragment in fragments:
        merges = Merges(fragment, parameters)
        found.append([merges.costs_ms() for _ in range(options.times)][1:])
    for name, of in (("median", statistics.median), ("least", min)):
        parts = [sum(of([busy[part] for busy, _ in each]) for each in found) for part in range(3)]
        clock_ms = sum(of([clock for _, clock in each]) for each in found)
        told = ", ".join(
            f"{what} {ms:.0f}" for what, ms in zip(("difference", "merge", "into the model"), parts, strict=True)
        )
        print(
            f"{name}: {told}, together {sum(parts):.0f} ms, {sum(parts) / 1e3 / ROUND_S:.2%} of {ROUND_S:.0f} s; "
            f"by the clock {clock_ms:.0f} ms"
        )


if __name__ == "__main__":
    main()
