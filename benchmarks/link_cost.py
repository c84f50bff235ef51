"""Measure how much slower inner steps are while the peer sends and receives at a given rate.

    python benchmarks/link_cost.py
    python benchmarks/link_cost.py --mbit 100 --model medium
    python benchmarks/link_cost.py --one-core

One process is a peer: the trainer takes a run file's inner steps in its thread, and the network thread serves a
snapshot and pulls another one, checked by its hashes, over and over, limited to `--mbit` each way as by `--up` and
`--down`. A second process serves and pulls the other way; it and its daemon are pinned to the last core. The peer may
use all cores, that one too; with `--one-core` it, its network thread and its daemon share the first one. Rounds with
and without traffic alternate; the first of each is left out.

Prints the median step with and without traffic and their ratio in neighbouring rounds; the same of the trainer thread's
processor time, which shows caches and hardly any other program; how long that thread was blocked (neither ran nor
waited for a processor: Python's lock); the rates reached; and the network's processor time. Work after a publication
has arrived (decoding, merging) is not counted. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import publishable_data, training_batches, training_data
from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.network.daemon import owned_process_args
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.network.node import NetworkThread, Node, NodeSettings
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.store import (
    Body,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_chunks,
    pull_manifest,
)
from swarmtrain.network.tasks import end_tasks
from swarmtrain.peer.merging.updates import Averaged, LocalUpdate
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.session import Session, Start
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
MIB = 1024 * 1024
SETTLE_S = 0.5
SPECS = (TensorSpec("theta", (32 * 256 * 1024,)),)
"""Snapshot of 32 MiB: a transfer takes under three seconds at 100 Mbit/s, and begins again."""
SIZES = {
    "example": {},
    "medium": {"num_layers": 6, "width": 384, "num_heads": 6, "context_tokens": 256},
}


@dataclass
class Peer:
    """Node, the snapshot that it serves, and its calls."""

    node: Node
    sha256: str
    calls: PeerCalls

    @classmethod
    async def start(cls, directory: Path, mbit: float) -> Peer:
        """Start on loopback, limited to `mbit` each way; 0: no limit."""
        directory.mkdir(exist_ok=True)
        key_path = directory / "identity.key"
        settings = NodeSettings(directory=directory, listen=("/ip4/127.0.0.1/tcp/0",))
        node = await Node.start(settings, load_or_create_identity(key_path), key_path)
        node.traffic.up.bytes_per_s = node.traffic.down.bytes_per_s = mbit * BYTES_PER_S_OF_MBIT
        manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_STATE)
        body = Body([bytearray(os.urandom(SPECS[0].size_bytes))])
        store = SnapshotStore(up=node.traffic.up)
        store.add(held := build_snapshot(node.identity, manifest, SPECS, body))
        await node.serve(service_type()(None, store, {}, node), namespace_of(RUN))
        return cls(node, held.snapshot.sha256, PeerCalls(node, RUN))

    async def pull_for_ever(self, source: str, sha256: str) -> None:
        """Pull a snapshot again and again."""
        signed = await pull_manifest(source, sha256, self.calls.open_pull, PullLimits())
        held = empty_held(manifest_untrusted(signed, RUN, pb.SNAPSHOT_KIND_STATE, SPECS))
        while True:
            held.have.clear()
            chunks = range(held.snapshot.num_chunks)
            await pull_chunks(held, chunks, [source], self.calls.open_pull, PullLimits(), lambda *_: None)

    async def where(self) -> str:
        """Return what the other process needs: PeerID, address, the snapshot's name."""
        return f"{self.node.identity.peer_id} {(await self.node.addresses())[0]} {self.sha256}"

    async def know(self, where: str) -> tuple[str, str]:
        """Dial the peer described by `where`; return its PeerID and its snapshot's name."""
        peer, address, sha256 = where.split()
        await self.node.connect(peer, [address])
        return peer, sha256


async def be_the_other(directory: Path) -> None:
    """Serve, and pull what the first input line names between each two lines after it."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    peer = await Peer.start(directory, 0)
    print(await peer.where(), flush=True)
    source, sha256 = await peer.know((await asyncio.to_thread(sys.stdin.readline)).strip())
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        pulling = asyncio.create_task(peer.pull_for_ever(source, sha256))
        await asyncio.to_thread(sys.stdin.readline)
        await end_tasks([pulling])
        print("stopped", flush=True)
    await peer.node.stop()


# ---------------------------------------------------------------- the peer


class Other:
    """Handle of the other process."""

    def __init__(self, directory: Path) -> None:
        command = owned_process_args([sys.executable, __file__, "--other", str(directory)])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        """Read its next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, words: str) -> None:
        """Send it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Close its input, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Took:
    """Time of one step of the trainer's thread: by the clock, running, and blocked (neither running nor ready)."""

    wall_s: float
    ran_s: float
    still_s: float


def schedule_s() -> tuple[float, float]:
    """Return the seconds that this thread has run, and has waited for a processor."""
    words = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return 1e-9 * int(words[0]), 1e-9 * int(words[1])


def processor_s(processes: list[psutil.Process]) -> float:
    """Return the processor seconds of `processes` so far."""
    return sum(time.clock_gettime((~process.pid << 3) | 2) for process in processes)


@dataclass
class Link:
    """Switch of the traffic, used from the trainer's thread."""

    network: NetworkThread
    peer: Peer
    other: Other
    source: tuple[str, str]
    _pulling: Any = None

    @classmethod
    def start(cls, network: NetworkThread, folder: Path, mbit: float) -> Link:
        """Start both ends and introduce them to each other."""
        peer, other = network.run(Peer.start(folder / "peer", mbit), 60), Other(folder / "other")
        source = network.run(peer.know(other.line()), 20)
        other.tell(network.run(peer.where(), 5))
        assert other.line() == "ready"
        return cls(network, peer, other, source)

    def begin(self) -> None:
        """Begin traffic both ways."""
        self.other.tell("go")
        self._pulling = self.network.submit(self.peer.pull_for_ever(*self.source))

    def end(self) -> None:
        """End the traffic."""
        self._pulling.cancel()
        self.other.tell("stop")
        assert self.other.line() == "stopped"

    def counted(self) -> tuple[float, float, float, float, float]:
        """Return counts so far: seconds, bytes sent and received, processor seconds of this process and its daemon."""
        daemon = [psutil.Process(self.peer.node._p2p._child.pid)]
        traffic = self.peer.node.traffic
        sent, received = float(traffic.sent_bytes), float(traffic.received_bytes)
        return time.monotonic(), sent, received, time.process_time(), processor_s(daemon)


@dataclass
class Rounds:
    """Exchange of the trainer without partners; every other round has traffic."""

    link: Link
    num_steps: int
    rounds: list[list[Took]] = field(default_factory=list)
    costs: list[tuple[float, ...]] = field(default_factory=list)
    """Differences over each round with traffic: of `Link.counted`, and of this thread's running time."""
    _before: tuple[float, ...] = ()
    _own: LocalUpdate | None = None

    @property
    def has_traffic(self) -> bool:
        """True if the current round has traffic."""
        return len(self.rounds) % 2 == 0

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        self.rounds.append([])
        if self.has_traffic:
            self.link.begin()
        time.sleep(SETTLE_S)
        self._before = (*self.link.counted(), schedule_s()[0])
        return Start(inner_steps=self.num_steps, num_peers=1)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Time the step inside."""
        began_s, (ran_s, queued_s) = time.perf_counter(), schedule_s()
        yield
        wall_s, (ran_then_s, queued_then_s) = time.perf_counter() - began_s, schedule_s()
        ran_s, queued_s = ran_then_s - ran_s, queued_then_s - queued_s
        self.rounds[-1].append(Took(wall_s, ran_s, max(0.0, wall_s - ran_s - queued_s)))

    def step_done(self, inner_steps_done: int) -> None:
        pass

    def publish(self, contribution: LocalUpdate) -> None:
        self._own = contribution
        if self.has_traffic:
            now = (*self.link.counted(), schedule_s()[0])
            self.costs.append(tuple(after - before for after, before in zip(now, self._before, strict=True)))
            self.link.end()

    def collect(self) -> Averaged:
        assert self._own is not None
        mean = self._own.gradient
        return Averaged(gradient=mean, partners=("peer",), weights=(self._own.tokens,), signer="peer", roster_sha256="")


def session_of(arguments: argparse.Namespace, exchange: Rounds) -> tuple[ModelLoop, Session]:
    """Return the loop of the run file, with a model of the size asked for, and its session."""
    values = tomllib.loads(arguments.run_file.read_text())
    values["model"].update(SIZES[arguments.model])
    values["run"]["total_tokens"] = 10**12
    run = RunFile.model_validate(values)
    published = publishable_data(run, arguments.run_file.parent)
    held_out = published.held_out.text
    data = training_data(run, arguments.run_file.parent, held_out, published.tokenizer_bytes, None)
    batches = training_batches(run, data, PeerPlace(run_sha256=RUN, peer_id="peer"))
    model = build_model(run.model, run.run.seed)
    stop_after = 2 * (arguments.pairs + 1)
    loop = ModelLoop(run, model, batches, exchange.timed)
    return loop, Session(
        run=run,
        parameters=loop.parameters,
        loop=loop,
        exchange=exchange,
        report=lambda report: None,
        should_stop=lambda: len(exchange.rounds) > stop_after,
    )


def median_ratio(rounds: list[list[Took]], what: str) -> tuple[float, float, float]:
    """Return the medians with and without traffic in ms, and the median ratio of neighbouring rounds."""
    medians = [1e3 * statistics.median(getattr(took, what) for took in steps) for steps in rounds]
    without, with_traffic = medians[0::2], medians[1::2]
    ratio = statistics.median(a / b for a, b in zip(with_traffic, without, strict=True))
    return statistics.median(with_traffic), statistics.median(without), ratio


def tell(exchange: Rounds, num_pairs: int, mbit: float) -> None:
    """Print the results."""
    rounds = exchange.rounds[2 : 2 * num_pairs + 2]
    for what, words in (("wall_s", "by the clock"), ("ran_s", "processor time of the trainer's thread")):
        busy, quiet, ratio = median_ratio(rounds, what)
        print(f"inner step, {words}: {busy:.2f} ms with traffic, {quiet:.2f} ms without ({ratio:.3f} of it)")
    still = [1e3 * statistics.mean(took.still_s for steps in rounds[odd::2] for took in steps) for odd in (1, 0)]
    print(f"stood still, mean of a step: {still[0]:.3f} ms with traffic, {still[1]:.3f} ms without")
    took_s, sent, received, process_s, daemon_s, trainer_s = (
        sum(costs) for costs in zip(*exchange.costs[1 : num_pairs + 1], strict=True)
    )
    mbit_of = 1 / (took_s * BYTES_PER_S_OF_MBIT)
    print(f"sent {sent * mbit_of:.1f} and received {received * mbit_of:.1f} of {mbit:g} Mbit/s", end="; ")
    network, daemon = (process_s - trainer_s) / took_s, daemon_s / took_s
    print(f"the network's threads took {network:.1%} of a core, the daemon {daemon:.1%}")


def measure(arguments: argparse.Namespace) -> None:
    """Train with alternating traffic."""
    torch.set_num_threads(1)
    if arguments.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    network = NetworkThread()
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        link = Link.start(network, Path(folder), arguments.mbit)
        try:
            exchange = Rounds(link, arguments.steps)
            loop, session = session_of(arguments, exchange)
            print(f"{num_parameters(loop.run.model):,} parameters, one thread", flush=True)
            loop.train(session)
            tell(exchange, arguments.pairs, arguments.mbit)
        finally:
            link.other.end()
            network.run(link.peer.node.stop(), 10)
            network.stop()


def main() -> None:
    """Start the other process, and measure here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", type=Path, nargs="?", default=Path("examples/stdlib-gpt.toml"))
    parser.add_argument("--model", choices=SIZES, default="example", help="the run file's, or a bigger one")
    parser.add_argument("--mbit", type=float, default=100.0, help="each way; 0: as fast as it goes")
    parser.add_argument("--steps", type=int, default=150, help="inner steps in a round")
    parser.add_argument("--pairs", type=int, default=10, help="rounds with traffic, and as many without")
    parser.add_argument("--one-core", action="store_true", help="the whole peer on one core")
    parser.add_argument("--other", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.other:
        asyncio.run(be_the_other(arguments.other))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
