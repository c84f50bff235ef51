"""Measure the processor time that a round costs a volunteer besides its inner steps, part by part.

    python benchmarks/round_costs.py                    # 124 million parameters, a partner: 5 GB of memory
    python benchmarks/round_costs.py --steps 5          # what a step costs in the loop of `join`, and in a plain one

Calls the functions that a volunteer calls, in one process, on one thread and without a network, on tensors of the
run file's model, as often as a round of `examples/gpt-124m.toml` does: it publishes eight times, and merges each of
four fragments once, with the weights of one partner and the pseudo-gradient of another (or of the same one). The inner
steps are left out; the pseudo-gradients are random numbers. The checkpoint is written to a temporary folder (`--dir`).

Prints seconds of processor time a round, those of the system (page faults, reading and writing) apart, and page faults.
Each part is measured `--times` times, of which the least counts: other programs take away the cache, and so stretch
processor time too. The trainer itself computes what is marked so, and waits meanwhile; the rest runs in other threads.

`--steps` instead takes inner steps of 512 tokens, in the loop that `join` has and in a plain one, each in a process of
its own, and prints the same of each step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.gossip import PartnerUpdate, PreparedMerge, gossip_merge, prepare
from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.algorithm.outer import OuterConstants, OuterState
from swarmtrain.data.batches import Batches
from swarmtrain.methods.method import GradientFormat
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.network.codec import PublicationCodec, VectorCodec, tensor_specs
from swarmtrain.network.identity import new_identity
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, build_snapshot, empty_held
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint, save
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.lifecycle.process import keeping_freed_memory, trim_heap, use_few_arenas
from swarmtrain.peer.merging.consensus import fragments_of_specs
from swarmtrain.peer.merging.robustness import Naming, Robustness
from swarmtrain.peer.training.loop import ModelLoop, inner_constants
from swarmtrain.peer.training.parameters import HostParameters
from swarmtrain.peer.training.session import LocalCheckpoint
from swarmtrain.protocol.gossip.fragments import published, publishes_every
from swarmtrain.protocol.gossip.partners import Full
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import CHUNK_BYTES, RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "gpt-124m.toml"
RUN_SHA256 = "ab" * 32
CONTEXT = 512
WARM_UP_STEPS = 2
_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """Processor time of the process, its system's share of it, and page faults."""

    seconds: float
    system_s: float
    faults: int

    @classmethod
    def so_far(cls) -> Cost:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.process_time(), used.ru_stime, used.ru_minflt)  # `used` counts whole ticks

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.seconds - other.seconds, self.system_s - other.system_s, self.faults - other.faults)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.system_s + other.system_s, self.faults + other.faults)

    def times(self, number: int) -> Cost:
        return Cost(number * self.seconds, number * self.system_s, number * self.faults)

    def __str__(self) -> str:
        return f"{self.seconds:8.2f}  {self.system_s:8.2f}  {self.faults:9,}"


class Costs:
    """Costs of the parts of a round, in the order in which they were first measured."""

    def __init__(self) -> None:
        self._once: dict[tuple[str, int], Cost] = {}

    def measure(self, part: str, work: Callable[[], _T], fragment: int = 0) -> _T:
        """Do some work of a part, once for each fragment that has some; of several times the least counts."""
        before = Cost.so_far()
        result = work()
        cost, key = Cost.so_far() - before, (part, fragment)
        self._once[key] = min(cost, self._once.get(key, cost), key=lambda one: one.seconds)
        return result

    def total(self, part: str) -> Cost:
        """Return the cost of a part, of all fragments together."""
        return sum((cost for (of, _), cost in self._once.items() if of == part), Cost(0.0, 0.0, 0))

    @property
    def parts(self) -> list[str]:
        """Parts in the order in which they were first measured."""
        return list(dict.fromkeys(part for part, _ in self._once))


DIFFERENCE, LEARNT = "own gradient: difference to the weights", "own gradient: lengths learnt"
A_PUBLICATION = (DIFFERENCE, LEARNT)
"""Parts that come with each publication; the others come once a round."""


# ---------------------------------------------------------------- parts of a round


class FragmentRound:
    """What a round does with one fragment of the model, and what comes of a partner."""

    def __init__(self, number: int, fragment: Fragment, parameters: HostParameters, run: RunFile) -> None:
        merge, named = run.merge, parameters.named
        specs = fragment.pick(tensor_specs(named.items()))
        groups = groups_of(specs, merge.theta_format, merge.gradient_formats, merge.publications_per_round)
        self.number, self.fragment, self.parameters, self.tokens = number, fragment, parameters, run.round_tokens
        self.codec = PublicationCodec(groups)
        self.format: GradientFormat = merge.gradient_formats[-1]  # of few peers the finest
        self.robustness = Robustness(merge.robust, fragment.layout, Naming(lambda peer, incident: None))
        self.constants = OuterConstants(learning_rate=merge.outer_learning_rate, momentum=merge.outer_momentum)
        self.identity, self.partner = new_identity(bytes(32)), new_identity(bytes([1]) * 32)
        reached = [tensor.detach().reshape(-1) for tensor in fragment.pick(list(named.values()))]
        noise = memory.empty(fragment.layout.size).normal_(std=1e-3)
        theta = torch.cat(reached, out=memory.empty_like(noise)).add_(noise)
        self.state = OuterState(theta, memory.zeros_like(theta).fill_(1e-4))
        weights, gradient = self.codec.weights, self.codec.gradient.of[self.format]
        self.publications = [
            ("weights", self._snapshot(weights, weights.encode(theta + noise))),
            ("gradient", self._snapshot(gradient, gradient.encode(noise))),
        ]

    def _snapshot(self, codec: VectorCodec, data: memoryview) -> HeldSnapshot:
        manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN_SHA256), kind=pb.SNAPSHOT_KIND_PUBLICATION)
        return build_snapshot(self.identity, manifest, codec.tensors, Body([data]))

    def measure(self, costs: Costs, round: int) -> None:
        """Do once what a round does."""
        gradient = self._publish(costs, round)
        arrivals = list[Callable[[], PartnerUpdate]]()
        for name, held in self.publications:
            arrivals.append(self._take(costs, round, name, held))
            which = "both" if len(arrivals) > 1 else "the weights alone"  # anew whenever something has arrived
            prepared = costs.measure(f"merge prepared: {which}", partial(self._prepared, arrivals), self.number)
        merged = partial(gossip_merge, self.state, prepared, gradient, self.tokens, self.constants)
        self.state = costs.measure("outer step (trainer)", merged, self.number)
        entered = partial(self.parameters.write, self.state.theta, self.fragment)
        costs.measure("into the model (trainer)", entered, self.number)

    def _publish(self, costs: Costs, round: int) -> Tensor:
        """Do what publications need, once; return the pseudo-gradient (Q,)."""
        codec, theta, tokens = self.codec, self.state.theta, self.tokens
        lent = self.parameters.lend(self.fragment, theta)
        gradient = costs.measure(DIFFERENCE, lent.gradient, self.number)
        self.parameters.take_back()
        costs.measure(LEARNT, lambda: self.robustness.learn(gradient, tokens), self.number)
        codec.gradient.over(round - 1)
        for name, of, encode in (
            ("weights", codec.weights, lambda: codec.weights.encode(theta)),
            (
                "gradient",
                codec.gradient.of[self.format],
                lambda: codec.gradient.encode_sum(gradient, self.format, round),
            ),
        ):
            data = costs.measure(f"own {name}: encoded", encode, self.number)
            costs.measure(f"own {name}: hashed", partial(self._snapshot, of, data), self.number)
        return gradient

    def _take(self, costs: Costs, round: int, name: str, held: HeldSnapshot) -> Callable[[], PartnerUpdate]:
        """Take a partner's publication in; return the function that decodes it."""
        here, theta = empty_held(held.snapshot), self.state.theta
        costs.measure(f"partner's {name}: sent and received", lambda: through_socket(held, here), self.number)
        costs.measure(f"partner's {name}: hashes checked", lambda: accept_chunks(here), self.number)
        news = Full(self.tokens if name == "gradient" else 0, "nothing of it was merged")
        decode = partial(self.codec.arrival_untrusted, name, here, news, None)
        arrival = costs.measure(f"partner's {name}: decoded", decode, self.number)
        judge = partial(self.robustness.accept, self.partner.peer_id, arrival, theta, round)
        costs.measure(f"partner's {name}: judged", judge, self.number)
        return decode

    def _prepared(self, decoding: Sequence[Callable[[], PartnerUpdate]]) -> PreparedMerge:
        arrivals, rate = (decode() for decode in decoding), self.constants.learning_rate
        return prepare(self.state, arrivals, self.fragment.layout, rate, may_write=True)


def through_socket(held: HeldSnapshot, here: HeldSnapshot) -> None:
    """Send all chunks through a socket, and read each into its place."""
    sender, reader = socket.socketpair()
    with sender, reader:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * CHUNK_BYTES)
        for chunk in range(held.snapshot.num_chunks):
            sender.sendmsg(held.body.views(chunk * CHUNK_BYTES, held.chunk_size(chunk)))
            reader.recv_into(here.room(chunk), 0, socket.MSG_WAITALL)


def accept_chunks(here: HeldSnapshot) -> None:
    """Compare all chunks with their hashes."""
    assert all(here.accept(chunk) for chunk in range(here.snapshot.num_chunks))


def keep(costs: Costs, folder: CheckpointFolder, states: Sequence[OuterState], optimizer: InnerOptimizer) -> None:
    """Write a round's checkpoint, of the state and of lent moments, and give back the heap's free memory."""
    theta, momentum = (torch.cat([getattr(state, name) for state in states]) for name in ("theta", "momentum"))
    own = LocalCheckpoint(batches=1, young_steps=None, moments=optimizer.lend_moments(), own_tokens=1, steps_per_s=1.0)
    state, progress = OuterState(theta, momentum), Progress(round=1, run_tokens=1, peer_tokens={"a": 1})
    kept = Checkpoint(state=state, progress=progress, roster=None, signed_roster=None, own=own)
    costs.measure("checkpoint", lambda: save(folder, kept))
    costs.measure("free memory given back", trim_heap)


def num_publications(run: RunFile, round_s: float, num_parameters: int) -> int:
    """Return how often a peer publishes in a round that lasts `round_s` seconds."""
    merge = run.merge
    every = publishes_every(merge.publications_per_round, merge.num_fragments, round_s, num_parameters)
    return len(published(merge.inner_steps, merge.publications_per_round, merge.num_fragments, every))


def measure_round(run: RunFile, options: argparse.Namespace) -> None:
    model = build_model(run.model, 0)
    parameters = HostParameters(model.trained_parameters())
    optimizer = InnerOptimizer(parameters.named.items(), inner_constants(run))
    for moments in optimizer.moment_tensors():
        moments.fill_(1e-3)
    size, costs = sum(tensor.numel() for tensor in parameters.named.values()), Costs()
    number = num_publications(run, options.round_s, size)
    fragments = fragments_of_specs(tensor_specs(parameters.named.items()), run.merge.num_fragments)
    states = list[OuterState]()
    for index, fragment in enumerate(fragments):
        one = FragmentRound(index, fragment, parameters, run)
        for round in range(options.times):
            one.measure(costs, round)
        states.append(one.state)
    with tempfile.TemporaryDirectory(prefix="round-costs-", dir=options.dir) as folder:
        for _ in range(options.times):
            keep(costs, CheckpointFolder(Path(folder), RUN_SHA256, "peer", keep=1), states, optimizer)
    print(
        f"{size / 1e6:.2f} million parameters, {len(fragments)} fragments, {number} publications in a round of "
        f"{options.round_s:g} s; weights in {run.merge.theta_format}, gradients in {run.merge.gradient_formats[-1]}"
    )
    print(f"\n{'part':44}{'seconds':>8}  {'system':>8}  {'faults':>9}")
    total = Cost(0.0, 0.0, 0)
    for part in costs.parts:
        times = number if part in A_PUBLICATION else 1
        cost = costs.total(part).times(times)
        total += cost
        print(f"{part + (f', {times} times' if times > 1 else ''):44}{cost}", flush=True)
    print(f"{'a round':44}{total}")


# ---------------------------------------------------------------- steps


def measure_steps(run: RunFile, options: argparse.Namespace) -> None:
    """Take inner steps, and print what each costs."""
    with contextlib.ExitStack() as settings:
        if options.kind == "join":
            use_few_arenas()
            settings.enter_context(keeping_freed_memory())
        _take_steps(run, options)


def _take_steps(run: RunFile, options: argparse.Namespace) -> None:
    model, tokens = build_model(run.model, 0), np.random.default_rng(0).integers(run.model.vocabulary_size, size=10**6)
    batches = Batches(
        tokens, context_tokens=run.model.context_tokens, batch_sequences=1, run_sha256=RUN_SHA256, peer_id="peer"
    )
    step = plain_step(run, model, batches) if options.kind == "plain" else joined_step(run, model, batches)
    for _ in range(WARM_UP_STEPS):
        step()
    for _ in range(options.steps):
        before = Cost.so_far()
        step()
        print(f"{options.kind:44}{Cost.so_far() - before}", flush=True)
    print(f"{'':44}peak of memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB", flush=True)


def plain_step(run: RunFile, model: GPT, batches: Batches) -> Callable[[], object]:
    """Return a function that takes a step as `inner_loop.py`'s plain loop does."""
    parameters, inner = list(model.parameters()), run.inner
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": inner.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = inner.beta1, inner.beta2
    optimizer = torch.optim.AdamW(groups, lr=inner.learning_rate, betas=betas, fused=True)

    def step() -> None:
        model.loss(batches.next_batch()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, inner.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def joined_step(run: RunFile, model: GPT, batches: Batches) -> Callable[[], object]:
    """Return a function that takes a step as a volunteer does."""
    loop = ModelLoop(run, model, batches)
    return lambda: loop.take_step(0.5)


def run_of(options: argparse.Namespace) -> RunFile:
    """Return the run file, with steps of 512 tokens, and with another model if one was asked for."""
    told = tomllib.loads(EXAMPLE.read_text())
    told["inner"] |= {"batch_sequences": 1, "microbatch_sequences": 0}
    told["model"] |= {"context_tokens": CONTEXT, "width": options.width, "num_layers": options.layers}
    return RunFile.model_validate(told)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="times that each part is measured; default 3")
    parser.add_argument("--round-s", type=float, default=1000.0, help="how long a round lasts; default 1000")
    parser.add_argument("--width", type=int, default=768, help="of the model; a multiple of 12")
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--dir", help="where the checkpoints lie meanwhile")
    parser.add_argument("--steps", type=int, default=0, help="take so many inner steps instead")
    parser.add_argument("--kind", choices=("plain", "join"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    run = run_of(options)
    if options.kind:
        measure_steps(run, options)
    elif options.steps:
        print(f"{'a step':44}{'seconds':>8}  {'system':>8}  {'faults':>9}", flush=True)
        for kind in ("plain", "join"):
            words = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
            subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    else:
        use_few_arenas()
        measure_round(run, options)


if __name__ == "__main__":
    main()
