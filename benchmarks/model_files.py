"""Measure how fast a model's files come from peers over loopback, and how little memory that takes.

    python benchmarks/model_files.py [--mebibytes 1024] [--sources 1]

Senders and the receiver are processes with daemons of their own. Prints the time to hash the files for the list, MB/s
of the fetch, and by how much each process and its daemon grow at most while the files come in; then ends a second fetch
in the middle and prints how long the next one takes to find what is on the disk. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from child_process import Child

from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.model_files.fetch import PeerFetch
from swarmtrain.network.node import Node, NodeSettings
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.store import PullLimits, SnapshotStore
from swarmtrain.network.tasks import end_tasks
from swarmtrain.peer.model_files.fetcher import Disk
from swarmtrain.peer.model_files.file_hashes import FileHashes
from swarmtrain.peer.model_files.model_folder import ModelFolder, pinned_list
from swarmtrain.protocol.pinned_files.file_list import PinnedFiles

RUN = "ab" * 32
MIB = 1024 * 1024
NAMES = ("config.json", "model.safetensors")


async def start(directory: Path) -> Node:
    """Start a node on loopback."""
    directory.mkdir(exist_ok=True)
    key_path = directory / "identity.key"
    settings = NodeSettings(directory=directory, listen=("/ip4/127.0.0.1/tcp/0",))
    return await Node.start(settings, load_or_create_identity(key_path), key_path)


def pinned(model: Path) -> PinnedFiles:
    """Return the list of the files, hashed once for all processes."""
    return pinned_list(model, NAMES, FileHashes(model.parent / "models" / "hashes"), lambda num_bytes: None)


async def serve(directory: Path, model: Path) -> None:
    """Serve the files until the input closes; print PeerID and address."""
    node, folder = await start(directory), ModelFolder(model.parent, pinned(model))
    with folder.locked(lambda: None):
        assert all(folder.link(file, model / file.name) for file in folder.files.files)
    node.served_files = folder.served_files()
    await node.serve(service_type()(None, SnapshotStore(max_readers=8), {}, node), namespace_of(RUN))
    print(node.identity.peer_id, (await node.addresses())[0], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.stop()


async def fetch(directory: Path, model: Path, sources: list[str]) -> None:
    """Fetch the files, and print the seconds; with each line of the input once more, as it says."""
    node, files = await start(directory), pinned(model)
    peers = [source.split("=")[0] for source in sources]
    for source in sources:
        await node.connect(source.split("=")[0], [source.split("=")[1]])
    print("ready", node._p2p._child.pid, flush=True)
    for line in sys.stdin:
        share = float(line)
        folder = ModelFolder(directory / "cache", files)
        began_s = time.perf_counter()
        with folder.locked(lambda: None):
            for file in files.files:
                if share < 1:
                    folder.has(file)
            fetching = fetch_of(node, files, folder, peers)
            task = asyncio.create_task(fetching.run())
            listed_s = 0.0
            while not task.done() and (share == 1 or fetching.here_bytes < share * files.total_bytes):
                await asyncio.wait([task], timeout=0.02)
                if not listed_s and fetching.num_sources:
                    listed_s = time.perf_counter() - began_s
            await end_tasks([task])
        print(time.perf_counter() - began_s, listed_s, fetching.here_bytes, flush=True)
    await node.stop()


def fetch_of(node: Node, files: PinnedFiles, folder: ModelFolder, peers: list[str]) -> PeerFetch:
    """Return a fetch from these peers."""

    async def find() -> list[str]:
        return peers

    def blame(peer: str, error: Any) -> None:
        raise AssertionError(f"{peer}: {error}")

    calls = PeerCalls(node, RUN)
    return PeerFetch(files=files.files, disk=Disk(folder), calls=calls, limits=PullLimits(), blame=blame, find=find)


# ---------------------------------------------------------------- the process that measures


def status_bytes(process: psutil.Process, key: str) -> int:
    """Read a size from `/proc/PID/status`, in bytes."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> None:
    """Start the processes, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--sources", type=int, default=1)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fetch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("peers", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve, arguments.model))
    elif arguments.fetch:
        asyncio.run(fetch(arguments.fetch, arguments.model, arguments.peers))
    else:
        measure(arguments.mebibytes, arguments.sources)


def measure(mebibytes: int, num_sources: int) -> None:
    """Print what a fetch takes."""
    with tempfile.TemporaryDirectory(prefix="st-") as name, ExitStack() as stack:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_bytes(b"{}")
        with (model / "model.safetensors").open("wb") as file:
            for _ in range(mebibytes):
                file.write(os.urandom(MIB))
        began_s = time.perf_counter()
        pinned(model)
        print(f"hashed {mebibytes} MiB in {time.perf_counter() - began_s:.2f} s")
        shared = ["--model", str(model)]
        senders = [
            Child(__file__, ["--serve", str(folder / f"sender-{number}"), *shared], stack)
            for number in range(num_sources)
        ]
        where = ["=".join(sender.line().split()) for sender in senders]
        receiver = Child(__file__, ["--fetch", str(folder / "receiver"), *shared, *where], stack)
        receiver.line()
        families = {"sender": senders[0].family(), "receiver": receiver.family()}
        before = {process.pid: status_bytes(process, "VmRSS") for family in families.values() for process in family}
        for process in (process for family in families.values() for process in family):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets the peak
        seconds = float(receiver.line("1").split()[0])
        print(f"fetched from {num_sources} in {seconds:.1f} s: {mebibytes * MIB / 1e6 / seconds:.0f} MB/s")
        for who, family in families.items():
            grown = [(status_bytes(process, "VmHWM") - before[process.pid]) / 1e6 for process in family]
            words = " + ".join(f"{extra:.0f}" for extra in grown)
            print(f"{who} grew by {sum(grown):.0f} MB at most ({words}: process and daemon)")
        for path in (folder / "receiver" / "cache" / "models").glob("*/model.safetensors"):
            path.unlink()
        receiver.line("0.5")
        seconds, listed_s, _ = map(float, receiver.line("1").split())
        print(f"ended in the middle and begun again: {listed_s:.2f} s to check what is here, {seconds:.1f} s in all")


if __name__ == "__main__":
    main()
