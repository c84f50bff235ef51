"""Measure how fast a snapshot is pulled over loopback, and what it costs the sender.

    python benchmarks/snapshot_transfer.py [--mebibytes 128] [--repeats 5] [--memory-mebibytes 400]

Compares with a bare hivemind stream with messages of the same size, and with hivemind's `load_state_from_peers`. Each
way is a pair of processes; they alternate in one run, so that the machine's load affects all. Memory for the snapshot
is allocated beforehand. Prints MB/s and ratios, and the processor time per MiB in both processes and their daemons,
which other programs disturb less. Then, with the bigger snapshot, prints how much the sender and its daemon grow while
one peer reads and while four read. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from child_process import Child

from swarmtrain.network.daemon import hivemind_module
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import Node, NodeSettings
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.store import (
    Body,
    PullLimits,
    Snapshot,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_chunks,
    pull_manifest,
)
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
BARE = "benchmark.bare"
PREFIX = "benchmark"
MIB = 1024 * 1024


def specs(mebibytes: int) -> tuple[TensorSpec, ...]:
    """Return the specs of one tensor of `mebibytes`."""
    return (TensorSpec("theta", (mebibytes * 256 * 1024,)),)


async def start(directory: Path) -> Node:
    """Start a node on loopback."""
    directory.mkdir(exist_ok=True)
    key_path = directory / "identity.key"
    settings = NodeSettings(directory=directory, listen=("/ip4/127.0.0.1/tcp/0",))
    return await Node.start(settings, load_or_create_identity(key_path), key_path)


# ---------------------------------------------------------------- the processes that send


async def serve(directory: Path, mebibytes: int) -> None:
    """Run our sender: print PeerID, address and the snapshot's name, then serve until the input closes."""
    node = await start(directory)
    content = bytearray(os.urandom(MIB)) * mebibytes
    manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_STATE)
    held = build_snapshot(node.identity, manifest, specs(mebibytes), Body([content]))
    store = SnapshotStore(max_readers=8)  # four of them for one peer
    store.add(held)
    await node.serve(service_type()(None, store, {}, node), namespace_of(RUN))

    async def bare(request: pb.PullRequest, context: Any) -> AsyncIterator[pb.PullReply]:
        data = bytes(CHUNK_BYTES)
        for chunk in range(request.num_chunks):
            yield pb.PullReply(chunk=chunk, data=data)
        await asyncio.sleep(2)  # let the reader hang up first: otherwise the last bytes may be lost

    await node._p2p.add_protobuf_handler(BARE, bare, pb.PullRequest, stream_output=True)
    print(node.identity.peer_id, (await node.addresses())[0], held.snapshot.sha256, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.stop()


def hivemind_averager(mebibytes: int, peers: list[str]) -> tuple[Any, Any]:
    """Return a hivemind averager that holds one tensor, and its DHT."""
    import hivemind
    import torch

    dht = hivemind.DHT(host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=peers, start=True)
    tensor = torch.rand(mebibytes * 256 * 1024)
    averager = hivemind.DecentralizedAverager([tensor], dht, prefix=PREFIX, start=True, target_group_size=2)
    return averager, dht


def serve_averager(mebibytes: int) -> None:
    """Run hivemind's sender: print its address, then serve until the input closes."""
    averager, dht = hivemind_averager(mebibytes, [])
    print(dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.read()
    averager.shutdown()
    dht.shutdown()


def load_averager(mebibytes: int, peer: str) -> None:
    """Load a state by hivemind for each line of the input, and print how many seconds it took."""
    averager, dht = hivemind_averager(mebibytes, [peer])
    print("ready", flush=True)
    for _ in sys.stdin:
        began_s = time.perf_counter()
        loaded = averager.load_state_from_peers(timeout=120)
        assert loaded is not None and loaded[1][0].numel() == mebibytes * 256 * 1024
        print(time.perf_counter() - began_s, flush=True)
    averager.shutdown()
    dht.shutdown()


# ---------------------------------------------------------------- the process that measures


def used_s(processes: list[psutil.Process]) -> float:
    """Return the processor seconds of these so far, by each one's kernel clock, which is finer than `/proc`."""
    return sum(time.clock_gettime((~process.pid << 3) | 2) for process in processes)


def status_bytes(process: psutil.Process, key: str) -> int:
    """Read a size from `/proc/PID/status`, in bytes."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@dataclass
class Receiver:
    """Receiver of our own snapshots."""

    node: Node
    peer: str
    snapshot: Snapshot
    calls: PeerCalls

    @classmethod
    async def connect(cls, directory: Path, where: str, mebibytes: int) -> Receiver:
        """Start a node, and fetch the manifest from `where`."""
        peer, address, name = where.split()
        node = await start(directory)
        await node.connect(peer, [address])
        calls = PeerCalls(node, RUN)
        signed = await pull_manifest(peer, name, calls.open_pull, PullLimits())
        return cls(node, peer, manifest_untrusted(signed, RUN, pb.SNAPSHOT_KIND_STATE, specs(mebibytes)), calls)

    def room(self) -> Callable[[], Awaitable[None]]:
        """Return a function that pulls the snapshot into the same memory each time."""
        held = empty_held(self.snapshot)

        async def pull() -> None:
            held.have.clear()
            chunks = range(self.snapshot.num_chunks)
            await pull_chunks(held, chunks, [self.peer], self.calls.open_pull, PullLimits(), lambda *_: None)
            assert held.complete

        return pull

    async def bare(self) -> None:
        """Pull the same bytes as a bare stream."""
        peer_id = hivemind_module("p2p.p2p_daemon_bindings.datastructures").PeerID.from_base58(self.peer)
        request, size = pb.PullRequest(num_chunks=self.snapshot.num_chunks), 0
        replies = await self.node._p2p.iterate_protobuf_handler(peer_id, BARE, request, pb.PullReply)
        async with contextlib.aclosing(replies):
            while size < self.snapshot.manifest.total_bytes:
                size += len((await anext(replies)).data)


async def measure_speed(folder: Path, mebibytes: int, repeats: int, stack: ExitStack) -> None:
    """Measure all three ways in turn, repeatedly."""
    sender = Child(__file__, ["--serve", str(folder / "sender"), "--mebibytes", str(mebibytes)], stack)
    receiver = await Receiver.connect(folder / "receiver", sender.line(), mebibytes)
    averager = Child(__file__, ["--serve-averager", "--mebibytes", str(mebibytes)], stack)
    loader = Child(__file__, ["--load-averager", averager.line(), "--mebibytes", str(mebibytes)], stack)
    assert loader.line() == "ready"

    async def load() -> None:
        await asyncio.to_thread(loader.line, "load")

    ours = [*sender.family(), psutil.Process(), *psutil.Process(receiver.node._p2p._child.pid).children(recursive=True)]
    ours.append(psutil.Process(receiver.node._p2p._child.pid))
    theirs = [*averager.family(), *loader.family()]
    ways: dict[str, Callable[[], Awaitable[None]]] = {"bare": receiver.bare, "pull": receiver.room(), "load": load}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    costs: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way, run in ways.items():
            processes = theirs if way == "load" else ours
            began_s, before_s = time.perf_counter(), used_s(processes)
            await run()
            rates[way].append(mebibytes * MIB / 1e6 / (time.perf_counter() - began_s))
            costs[way].append((used_s(processes) - before_s) * 1e3 / mebibytes)
    rate = {way: statistics.median(found[1:]) for way, found in rates.items()}  # the first warms up
    cost = {way: statistics.median(found[1:]) for way, found in costs.items()}
    pull = rate["pull"]
    print(f"bare stream {rate['bare']:.0f} MB/s, {cost['bare']:.2f} ms of processor a MiB")
    print(f"snapshot {pull:.0f} MB/s ({pull / rate['bare']:.2f} of the bare stream), {cost['pull']:.2f} ms a MiB")
    print(f"load_state_from_peers {rate['load']:.0f} MB/s (the snapshot {pull / rate['load']:.1f} times that)", end="")
    print(f", {cost['load']:.2f} ms a MiB")
    await receiver.node.stop()


async def measure_memory(folder: Path, mebibytes: int, stack: ExitStack) -> None:
    """Measure how much the sender and its daemon grow while others read."""
    sender = Child(__file__, ["--serve", str(folder / "sender"), "--mebibytes", str(mebibytes)], stack)
    receiver = await Receiver.connect(folder / "receiver", sender.line(), mebibytes)
    family = sender.family()
    before_bytes = [status_bytes(process, "VmRSS") for process in family]
    for number in (1, 4):
        for process in family:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets the peak
        await asyncio.gather(*(receiver.room()() for _ in range(number)))
        peaks = [status_bytes(process, "VmHWM") for process in family]
        grown = [(peak - before) / 1e6 for peak, before in zip(peaks, before_bytes, strict=True)]
        words = " + ".join(f"{extra:.0f}" for extra in grown)
        print(f"{mebibytes} MiB sent to {number}: {sum(grown):.0f} MB more ({words}: process and daemon)")
    await receiver.node.stop()


async def measure(arguments: argparse.Namespace) -> None:
    """Measure speed, then memory."""
    with tempfile.TemporaryDirectory(prefix="st-") as folder, ExitStack() as stack:
        await measure_speed(Path(folder), arguments.mebibytes, arguments.repeats, stack)
    with tempfile.TemporaryDirectory(prefix="st-") as folder, ExitStack() as stack:
        await measure_memory(Path(folder), arguments.memory_mebibytes, stack)


def main() -> None:
    """Start the senders, and measure here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-mebibytes", type=int, default=400)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve-averager", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load-averager", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve, arguments.mebibytes))
    elif arguments.serve_averager:
        serve_averager(arguments.mebibytes)
    elif arguments.load_averager:
        load_averager(arguments.mebibytes, arguments.load_averager)
    else:
        asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
