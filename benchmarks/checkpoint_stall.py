"""Measure how long a checkpoint stalls the trainer, and how much slower its steps are while it is written.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --parameters 20 --threads 2

Matrices with 100 M parameters take AdamW steps in a loop, with a volunteer's optimizer and real matrix products.
Stretches of steps without a checkpoint alternate with stretches during which a volunteer's writer writes one. Three
costs are told apart:

- the pause: copying the moments (`copy`), and the rest of handing the checkpoint over;
- the stall: how long the trainer's thread was blocked by the writer, for example on Python's lock. Linux reports how
  long each thread ran and how long it was ready and waited for a processor; the rest of the time it was blocked. With
  one thread this does not depend on other programs on the machine; several threads also wait for one another;
- slower steps: the writer's own processor time, which costs nothing while a core is free, and how much longer the steps
  took by the clock, which includes other work on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer
from swarmtrain.algorithm.outer import OuterState, flatten
from swarmtrain.network.identity import new_identity
from swarmtrain.network.rounds.roster import sign_roster
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.checkpoints.writer import Checkpointer
from swarmtrain.peer.training.session import LocalCheckpoint
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.protocol.tokens.progress import Progress

RUN_SHA256 = "5e" * 32
LIMIT_S = 600.0


@dataclass(frozen=True)
class Took:
    """Time by the clock, and the part of it in which this thread neither ran nor waited for a processor, in seconds."""

    wall_s: float
    still_s: float


def busy_or_queued_s(thread: int | None = None, fields: int = 2) -> float:
    """Return the seconds that a thread (default: this one) has run and waited for a processor."""
    path = Path(f"/proc/self/task/{thread or threading.get_native_id()}/schedstat")
    return 1e-9 * sum(int(word) for word in path.read_text().split()[:fields])


class Steps:
    """Matrices of one width, and an AdamW step over all of them."""

    def __init__(self, num_parameters: int, batch: int) -> None:
        layers = 16
        width = round((num_parameters / layers) ** 0.5)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        constants = InnerConstants(
            learning_rate=1e-4,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            gradient_clip=1.0,
            warmup_fraction=0.0,
            floor_fraction=0.1,
        )
        self.inner = InnerOptimizer(self.model.named_parameters(), constants)
        self.batch = torch.randn(batch, width)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> Took:
        """Take one inner step."""
        began_s, busy_s = time.perf_counter(), busy_or_queued_s()
        (self.model(self.batch) - self.batch).square().mean().backward()
        self.inner.step(0.5)
        wall_s = time.perf_counter() - began_s
        return Took(wall_s, wall_s - (busy_or_queued_s() - busy_s))


@dataclass
class Cost:
    """Cost of one checkpoint: seconds, and the steps taken while it was written."""

    copy_s: float
    rest_s: float
    num_steps: int
    steps_s: float
    still_s: float
    written_s: float
    processor_s: float
    size_bytes: int


def checkpoint(steps: Steps, state: OuterState, writer: Checkpointer, number: int, template: Checkpoint) -> Cost:
    """Offer a checkpoint as the trainer does, and train on until it is on the disk."""
    assert writer._thread is not None and writer._thread.native_id is not None
    processor_s = busy_or_queued_s(writer._thread.native_id, 1)
    began_s = time.perf_counter()
    room = writer.room(steps.num_parameters)
    copying_s = time.perf_counter()
    moments = steps.inner.copy_moments(room)
    copied_s = time.perf_counter()
    own = LocalCheckpoint(batches=number, own_tokens=0, young_steps=None, steps_per_s=1.0, moments=moments)
    writer.offer(
        Checkpoint(
            state=state,
            progress=template.progress,
            roster=template.roster,
            signed_roster=template.signed_roster,
            own=own,
        )
    )
    done_s = time.perf_counter()
    taken: list[Took] = []
    while not writer.flush(0.0):
        taken.append(steps.step())
        if sum(took.wall_s for took in taken) > LIMIT_S:
            raise SystemExit("the checkpoint was not written in time; see the log of the writer")
    assert writer.last is not None
    return Cost(
        copy_s=copied_s - copying_s,
        rest_s=done_s - copied_s + copying_s - began_s,
        num_steps=len(taken),
        steps_s=sum(took.wall_s for took in taken),
        still_s=sum(took.still_s for took in taken),
        written_s=writer.last.seconds,
        processor_s=busy_or_queued_s(writer._thread.native_id, 1) - processor_s,
        size_bytes=writer.last.size_bytes,
    )


def a_template(state: OuterState) -> Checkpoint:
    """Return a checkpoint with some roster."""
    identity = new_identity()
    entry = RoundPublication(peer=identity.peer_id, snapshot="11" * 32, tokens=1, inner_steps=1)
    roster = Roster(round=0, signer=identity.peer_id, entries=(entry,))
    progress = Progress().after(roster.peers, [1], roster.digest)
    signed = sign_roster(identity, RUN_SHA256, roster)
    return Checkpoint(state=state, progress=progress, roster=roster, signed_roster=signed)


def stretch(steps: Steps, num_steps: int) -> Took:
    """Measure the average step without a checkpoint."""
    taken = [steps.step() for _ in range(num_steps)]
    return Took(statistics.mean(took.wall_s for took in taken), statistics.mean(took.still_s for took in taken))


def run(steps: Steps, folder: Path, repeats: int, num_steps: int) -> None:
    """Alternate stretches, and print the results."""
    theta: Tensor = flatten(steps.model.parameters())
    state = OuterState(theta, torch.zeros_like(theta))
    template = a_template(state)
    writer = Checkpointer(CheckpointFolder(folder / "checkpoints", RUN_SHA256, "benchmark"), lambda event: print(event))
    writer.prepare(steps.num_parameters)
    stretch(steps, 3)
    plain, costs = [stretch(steps, num_steps)], []
    for number in range(repeats):
        costs.append(checkpoint(steps, state, writer, number, template))
        plain.append(stretch(steps, max(num_steps, costs[-1].num_steps)))
    writer.close(LIMIT_S)
    report(plain, costs)


def report(plain: list[Took], costs: list[Cost]) -> None:
    """Print a line for each checkpoint, and their summary."""
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads of {os.cpu_count()} processors")
    print("step alone  copy  hand over  steps meanwhile   stall  slower in all  written in  writer's processor time")
    stalls, slower = [], []
    for before, cost, after in zip(plain, costs, plain[1:], strict=False):
        alone_s = (before.wall_s + after.wall_s) / 2
        stalls.append(cost.still_s - cost.num_steps * (before.still_s + after.still_s) / 2)
        slower.append(cost.steps_s - cost.num_steps * alone_s)
        print(
            f"{1e3 * alone_s:7.0f} ms{1e3 * cost.copy_s:4.0f} ms{1e3 * cost.rest_s:6.2f} ms{cost.num_steps:15d}"
            f"{1e3 * stalls[-1]:10.1f} ms{1e3 * slower[-1]:9.0f} ms{cost.written_s:9.1f} s{cost.processor_s:16.1f} s"
        )
    sizes = sum(cost.size_bytes for cost in costs)
    beyond = [stall + cost.rest_s for stall, cost in zip(stalls, costs, strict=True)]
    print(f"copy of the moments, median        {1e3 * statistics.median(c.copy_s for c in costs):8.1f} ms")
    print(f"stall beyond it, median            {1e3 * statistics.median(beyond):8.1f} ms   (required: at most 50)")
    print(f"stall beyond it, most              {1e3 * max(beyond):8.1f} ms")
    print(f"steps slower by the clock, median  {1e3 * statistics.median(slower):8.0f} ms a checkpoint")
    print(f"writer                             {1e-6 * sizes / sum(c.written_s for c in costs):8.0f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=100, help="millions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="rows a step")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints")
    parser.add_argument("--steps", type=int, default=6, help="steps of a stretch without one, at least")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a temporary folder if not given")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    steps = Steps(round(1e6 * chosen.parameters), chosen.batch)
    print(f"{1e-6 * steps.num_parameters:.0f} M parameters")
    with tempfile.TemporaryDirectory(dir=chosen.dir) as folder:
        run(steps, Path(folder), chosen.repeats, chosen.steps)


if __name__ == "__main__":
    main()
