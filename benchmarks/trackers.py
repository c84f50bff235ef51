"""Draw curves of a real swarm in all trackers over a kill and a restart, read them back, and measure what that costs.

    pip install tensorboard wandb trackio
    python benchmarks/trackers.py --dir /tmp/curves

A bootstrap and two volunteers train a small run with `--report-to tensorboard,wandb,trackio`; W&B has no login, so that
it falls back to its offline mode. After some rounds one volunteer is killed and started again. For each peer and
tracker it prints how many points of `train/loss` there are, whether all steps rise, and whether the losses are those of
the `round` events. Then it prints what the trainer's thread and the recorder's pay for an event, by their processor
time, beside a status of a thousand peers, and the memory of each tracker's process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from swarmtrain.events import RoundEvent
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.trackers.recorder import CurveRecorder
from swarmtrain.v1 import control_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
RUN = """
[run]
name = "curves"
total_tokens = 1_000_000_000

[model]
context_tokens = 64
num_layers = 2
width = 64
num_heads = 2

[data]
source = "python-stdlib"
held_out_bytes = 16_384

[inner]
batch_sequences = 8

[merge]
method = "gossip"
min_peers = 1
inner_steps = 20

[evaluation]
every_rounds = 2
"""
LIMIT_S = 600.0


class Peer:
    """Process of a peer, and its events."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.events = folder, []
        self._news = threading.Condition()
        with (folder.parent / f"{folder.name}.errors").open("ab") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "swarmtrain.cli",
                    *arguments,
                    "--json",
                    "--name",
                    folder.name,
                    "--dir",
                    str(folder),
                ],
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    events: list[dict[str, Any]]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()

    def of(self, event: str) -> list[dict[str, Any]]:
        return [each for each in list(self.events) if each["event"] == event]

    def wait(self, event: str, number: int = 1) -> dict[str, Any]:
        """Wait until there are so many of these events; return the last."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.of(event)) >= number, LIMIT_S), f"{self.folder.name}: {event}"
            return self.of(event)[-1]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(LIMIT_S)


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a peer's curves as TensorBoard does: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the offline runs in a peer's folder, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, _records(path.read_bytes())):
            if record.WhichOneof("record_type") != "history":
                continue
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num or row["_step"]
            for name, value in row.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((step, value))
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log of LevelDB behind a header of 7 bytes: blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def trackio(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a peer's run in Trackio's database."""
    found: dict[str, list[tuple[int, float]]] = {}
    name = f"{folder.name}-{json.loads((folder / 'trackers.json').read_text())['id']}"
    with sqlite3.connect(folder.parent / "trackio" / "curves.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,))
        for step, metrics in rows.fetchall():
            for curve, value in json.loads(metrics).items():
                found.setdefault(curve, []).append((step, value))
    return found


def train(folder: Path) -> None:
    """Train, kill, start again, and print what each tracker has."""
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    run, every = folder / "run.toml", ("--report-to", "tensorboard,wandb,trackio")
    run.write_text(RUN)
    bootstrap = Peer(folder / "bootstrap", "bootstrap", str(run), "--listen", "127.0.0.1:0", *every)
    invite = bootstrap.wait("invite")["invite"]
    alone = ("--threads", "1", "--listen", "127.0.0.1:0", "--on-battery")
    anna = Peer(folder / "anna", "join", invite, *alone, *every)
    ben = Peer(folder / "ben", "join", invite, *alone, *every)
    for peer in (anna, ben):
        peer.wait("tracker", 3)
        peer.wait("round", len(peer.of("round")) + 10)
    memory(anna)
    anna.process.kill()
    anna.process.wait()
    again = Peer(folder / "anna", "join", invite, *alone)
    again.wait("tracker", 3)
    again.wait("round", len(again.of("round")) + 10)
    for peer in (again, ben, bootstrap):
        peer.end()
    time.sleep(1.0)
    print("| peer | tracker | points of train/loss | of eval/loss | curves | steps rise | losses are those told |")
    print("|---|---|---|---|---|---|---|")
    for name, lives in (("anna, killed and back", (anna, again)), ("ben", (ben,)), ("bootstrap", (bootstrap,))):
        told = [each["loss"] for life in lives for each in life.of("round")]
        for read in (tensorboard, wandb, trackio):
            curves = read(lives[0].folder)
            rise = all(a < b for points in curves.values() for (a, _), (b, _) in pairwise(points))
            drawn = [value for _, value in curves["train/loss"]]  # some trackers keep them in 32 bits
            num_same = sum(any(abs(loss - value) < 1e-6 for value in drawn) for loss in told)
            same = f"{num_same} of {len(told)}" if told else "-"
            counts = [len(curves.get(curve, [])) for curve in ("train/loss", "eval/loss")]
            print(f"| {name} | {read.__name__} | {counts[0]} | {counts[1]} | {len(curves)} | {rise} | {same} |")
    print()
    for peer in (anna, again, ben, bootstrap):
        warnings = [each["code"] for each in peer.of("warning")]
        print(f"{peer.folder.name}: {len(peer.of('tracker'))} trackers, warnings {warnings}")


def memory(peer: Peer) -> None:
    """Print the memory of each process below a peer that is a tracker's."""
    for process in psutil.Process(peer.process.pid).children(recursive=True):
        words = process.cmdline()
        if any("trackers" in word for word in words) or "wandb" in words[0]:
            size = process.memory_full_info().pss / 1e6
            print(f"{' '.join(words[-2:])[-60:]}: {size:.0f} MB, {sum(process.cpu_times()[:2]):.1f} s of a processor")
    print(flush=True)


def cost() -> None:
    """Print the processor time that an event costs the thread that emits it, and the recorder's."""
    board = StatusBoard("volunteer", 0.0)
    peers = [pb.SwarmPeer(peer=f"12D3Koo{number:045d}", name=f"v-{number}", present=True) for number in range(1000)]
    board.add_looker(lambda status: status.peers.extend(peers))
    given: dict[str, Any] = {"inner_steps": 20, "tokens": 1000, "loss": 2.5, "first_loss": 3.0, "learning_rate": 0.1}
    given |= {"seconds": 8.0, "merge_s": 1.5, "stall_s": 0.5, "bytes_sent": 1, "bytes_received": 1}
    events = [RoundEvent(**given, round=n, run_tokens=1000 * n, partners=("P",), weights=(1,)) for n in range(500)]
    recorder = CurveRecorder(Path("/nonexistent"), board, (), lambda kind, peer: None)  # type: ignore[arg-type,return-value]
    began_s = time.thread_time()
    for event in events:
        recorder.take(event)
    print(f"the thread that emits: {(time.thread_time() - began_s) / len(events) * 1e6:.1f} us an event")
    from swarmtrain.peer.trackers.points import Curves, Position

    curves, began_s = Curves(Position()), time.thread_time()
    for event in events:
        curves.of_event(event, board.status(), 0.0)
    print(f"the recorder, with 1,000 peers: {(time.thread_time() - began_s) / len(events) * 1e6:.0f} us an event")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args().dir.absolute()
    folder.mkdir(parents=True)
    cost()
    train(folder)


if __name__ == "__main__":
    main()
