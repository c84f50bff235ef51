"""How fast a snapshot is pulled over loopback, against a bare stream of hivemind's with messages of the same size.

    python benchmarks/snapshot_transfer.py [--mebibytes 128] [--repeats 5]

Two processes; both ways alternate in one run, so that the machine's load falls on both. Room for the snapshot is made
beforehand. Prints MB/s and the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from swarmtrain.network.daemon import hivemind_module
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import Node, NodeSettings
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots import (
    CHUNK_BYTES,
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
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
BARE = "benchmark.bare"


def specs(mebibytes: int) -> tuple[TensorSpec, ...]:
    """One tensor of so many MiB."""
    return (TensorSpec("theta", (mebibytes * 256 * 1024,)),)


async def start(directory: Path) -> Node:
    """A node on loopback."""
    key_path = directory / "identity.key"
    settings = NodeSettings(directory=directory, listen=("/ip4/127.0.0.1/tcp/0",))
    return await Node.start(settings, load_or_create_identity(key_path), key_path)


async def serve(directory: Path, mebibytes: int) -> None:
    """The sending process: prints PeerID, address and the snapshot's name, then serves until its input closes."""
    node = await start(directory)
    content = bytearray(mebibytes << 20)
    manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_STATE)
    held = build_snapshot(node.identity, manifest, specs(mebibytes), Body([content]))
    store = SnapshotStore()
    store.add(held)
    await node.serve(service_type()(None, store, {}, node), namespace_of(RUN))

    async def bare(request: pb.PullRequest, context: Any) -> AsyncIterator[pb.PullReply]:
        data = bytes(CHUNK_BYTES)
        for chunk in range(request.num_chunks):
            yield pb.PullReply(chunk=chunk, data=data)

    await node._p2p.add_protobuf_handler(BARE, bare, pb.PullRequest, stream_output=True)
    print(node.identity.peer_id, (await node.addresses())[0], held.snapshot.sha256, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.stop()


async def measure(directory: Path, where: list[str], mebibytes: int, repeats: int) -> None:
    """The receiving process."""
    peer, address, name = where
    node = await start(directory)
    await node.connect(peer, [address])
    calls, limits = PeerCalls(node, RUN), PullLimits()
    signed = await pull_manifest(peer, name, calls.open_pull, limits)
    snapshot = manifest_untrusted(signed, RUN, pb.SNAPSHOT_KIND_STATE, specs(mebibytes))
    peer_id = hivemind_module("p2p.p2p_daemon_bindings.datastructures").PeerID.from_base58(peer)

    held = empty_held(snapshot)

    async def pulled() -> None:
        held.have.clear()
        await pull_chunks(held, range(snapshot.num_chunks), [peer], calls.open_pull, limits, lambda *_: None)
        assert held.complete

    async def bare() -> None:
        request = pb.PullRequest(num_chunks=snapshot.num_chunks)
        size = 0
        async for message in await node._p2p.iterate_protobuf_handler(peer_id, BARE, request, pb.PullReply):
            size += len(message.data)
        assert size == mebibytes << 20

    rates: dict[str, list[float]] = {"bare": [], "pull": []}
    for way in [bare, pulled] * (repeats + 1):
        began_s = time.perf_counter()
        await way()
        rates["bare" if way is bare else "pull"].append((mebibytes << 20) / 1e6 / (time.perf_counter() - began_s))
    bare_rate, pull_rate = (statistics.median(rates[way][1:]) for way in ("bare", "pull"))  # the first warms up
    print(f"bare stream {bare_rate:.0f} MB/s, snapshot {pull_rate:.0f} MB/s, ratio {pull_rate / bare_rate:.2f}")
    await node.stop()


def main() -> None:
    """Start the sender, measure here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve, arguments.mebibytes))
        return
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        for name in ("sender", "receiver"):
            (Path(folder) / name).mkdir()
        command = [sys.executable, __file__, "--serve", f"{folder}/sender", "--mebibytes", str(arguments.mebibytes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
            assert sender.stdout is not None
            where = sender.stdout.readline().split()
            asyncio.run(measure(Path(folder) / "receiver", where, arguments.mebibytes, arguments.repeats))


if __name__ == "__main__":
    main()
