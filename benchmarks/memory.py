"""Compare a volunteer's memory and traffic with a plain loop's, and with what `check` estimates.

    python benchmarks/memory.py                  # 0.5, 10 and 57 million parameters
    python benchmarks/memory.py --size 57 --rounds 4 --peers 2

Starts `swarmtrain local`, a bootstrap and volunteers as real processes on this machine, with small batches, so that
rounds are short, and samples the memory of each volunteer together with its network daemon, as proportional set size
(shared memory counts in proportion). Beside it runs a plain loop of the same model, batch and AdamW (torch.optim.AdamW,
fused) in its own process. Estimates are those of `swarmtrain check`.

Columns, in MB: `plain`, the loop's peak; `median` and `peak` of the worst volunteer; `estimate`; and the same as
multiples of the fp32 weights. For each volunteer's rounds: the most bytes sent and received, the means, and the
estimate, archive included. Bars: the estimate is never below the peak, at most 10 % above it, and the peak at 57
million parameters at most 12 times the fp32 weights.

`--timeline` prints the first volunteer's samples with its activity at each moment, to find out what a peak consists of.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from swarmtrain.events import EvalEvent, RoundEvent, WarningEvent, parse_event
from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.network.daemon import owned_process_args
from swarmtrain.peer.estimate import estimate
from swarmtrain.run import load_run

SIZES = {  # width, layers, heads
    "0.5": (128, 2, 4),
    "10": (320, 8, 5),
    "57": (512, 18, 8),
}
TEXT_BYTES = 4_000_000
EVERY_S, FILES_EVERY_S = 0.1, 5.0
AFTER_S, END_S = 3.0, 60.0


def run_text(size: str, options: argparse.Namespace) -> str:
    width, layers, heads = SIZES[size]
    step_tokens = options.batch * options.context
    total = options.rounds * options.steps * step_tokens * options.peers
    text = f"""
[run]
name = "memory"
total_tokens = {total}
[model]
context_tokens = {options.context}
width = {width}
num_layers = {layers}
num_heads = {heads}
feed_forward_ratio = 2.667
[data]
source = "text"
paths = ["text.txt"]
held_out_bytes = 32768
[inner]
batch_sequences = {options.batch}
learning_rate = 1e-3
[merge]
inner_steps = {options.steps}
min_peers = {options.peers}
[evaluation]
batch_sequences = 4
"""
    for change in options.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        text = (
            text.replace(f"[{section}]\n", f"[{section}]\n{name} = {value}\n")
            if f"[{section}]" in text
            else (f"{text}\n[{section}]\n{name} = {value}\n")
        )
    return text


def write_text(path: Path) -> None:
    """Write as much text of Python's own library as is needed."""
    size = 0
    with path.open("wb") as out:
        for source in sorted(Path(os.__file__).parent.glob("*.py")):
            data = source.read_bytes()
            out.write(data)
            size += len(data)
            if size > TEXT_BYTES:
                return


# ---------------------------------------------------------------- a plain loop


def plain(run_file: Path, num_steps: int = 6) -> None:
    """Run the plain loop; prints its peak in bytes."""
    import torch

    run = load_run(run_file)
    model = build_model(run.model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(num_steps):
        batch = torch.randint(0, 256, (run.inner.batch_sequences, run.model.context_tokens + 1))
        for part in torch.split(batch, run.microbatch_sequences):
            (model.loss(part) * (len(part) / len(batch))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(peak_of(os.getpid()))


def peak_of(pid: int) -> int:
    """Return the largest resident set that a process has had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------- a swarm


@dataclass
class Peer:
    """Memory that one peer has used, and what it has reported."""

    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """Samples: time, memory of the process, memory of its daemon."""
    rounds: list[RoundEvent] = field(default_factory=list)

    @property
    def totals(self) -> list[int]:
        return [process + daemon for _, process, daemon in self.samples]


_files: dict[int, tuple[float, int]] = {}


def pss_of(pid: int) -> int:
    """Return its private memory and its share of mapped files, which are read only now and then, as that takes long."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    own = sum(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem") if key in status)
    looked_s, shared = _files.get(pid, (0.0, 0))
    if time.monotonic() > looked_s + FILES_EVERY_S:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        shared = sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss_File:"))
        _files[pid] = time.monotonic(), shared
    return own + shared


def sample(root: psutil.Process, peers: dict[str, Peer]) -> None:
    """Sample every peer below `root`, with its daemon."""
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
            if "--name" not in words or "swarmtrain.cli" not in words:
                continue
            name = words[words.index("--name") + 1]
            own = pss_of(process.pid)
            daemons = sum(pss_of(child.pid) for child in process.children(recursive=True))
            peers.setdefault(name, Peer()).samples.append((time.time(), own, daemons))


def watch(process: subprocess.Popen[bytes], peers: dict[str, Peer], ended: threading.Event) -> None:
    root = psutil.Process(process.pid)
    while not ended.wait(EVERY_S):
        with contextlib.suppress(psutil.Error):
            sample(root, peers)


def swarm(run_file: Path, options: argparse.Namespace) -> dict[str, Peer]:
    """Train a swarm to its end."""
    peers: dict[str, Peer] = {}
    measured: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.dir) as folder:
        words = ["local", str(run_file), "--peers", str(options.peers), "--json", "--dir", f"{folder}/swarm"]
        words += ["--data", str(run_file.parent), "--threads", "1"]
        command = [sys.executable, "-m", "swarmtrain.cli", *words]
        with (Path(folder) / "errors").open("wb") as errors:
            process = subprocess.Popen(
                owned_process_args(command), stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
            )
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(process, peers, ended))
        watcher.start()
        limit = threading.Timer(options.limit_s, process.terminate)
        limit.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    event = parse_event(line)
                    if isinstance(event, RoundEvent):
                        peers.setdefault(event.name, Peer()).rounds.append(event)
                    elif isinstance(event, EvalEvent) and event.own_loss is not None:
                        measured.add(event.name)
                        if len(measured) == options.peers:  # the rest is only waiting for the peers to leave
                            time.sleep(AFTER_S)
                            break
                    elif isinstance(event, WarningEvent):
                        print(f"  {event.name}: warning: {event.message}", file=sys.stderr)
            if len(measured) < options.peers and process.wait() and limit.is_alive():
                sys.exit(f"error: status {process.returncode}: {(Path(folder) / 'errors').read_text()[-2000:]}")
        finally:
            limit.cancel()
            ended.set()
            watcher.join()
            process.terminate()
            process.wait(END_S)
    return peers


def show(size: str, run_file: Path, options: argparse.Namespace) -> None:
    run = load_run(run_file)
    parameters = num_parameters(run.model)
    weights = 4 * parameters
    loop = 0
    if not options.no_plain:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        told = subprocess.run(
            [sys.executable, __file__, "--plain", str(run_file)], capture_output=True, check=True, env=environment
        )
        loop = int(told.stdout)
    peers = swarm(run_file, options)
    volunteers = {name: peer for name, peer in peers.items() if name.startswith("volunteer")}
    cost = estimate(run, parameters, options.peers)
    median = max(statistics.median(one.totals) for one in volunteers.values())
    peak = max(max(one.totals) for one in volunteers.values())
    mb = 1e6
    print(
        f"\n{parameters / 1e6:.2f} million parameters, fp32 weights {weights / mb:.1f} MB, {options.peers} volunteers"
    )
    print(f"{'':14}{'plain':>9}{'median':>9}{'peak':>9}{'estimate':>10}")
    print(f"{'MB':14}{loop / mb:9.0f}{median / mb:9.0f}{peak / mb:9.0f}{cost.memory_bytes / mb:10.0f}")
    row = (loop / weights, median / weights, peak / weights, cost.memory_bytes / weights)
    print(f"{'x fp32':14}{row[0]:9.1f}{row[1]:9.1f}{row[2]:9.1f}{row[3]:10.1f}")
    print(f"estimate over peak: {cost.memory_bytes / peak:.3f}")
    for name, one in sorted(peers.items()):
        daemon = max(daemon for _, _, daemon in one.samples) / mb
        own = max(own for _, own, _ in one.samples) / mb
        rounds = " ".join(f"{event.bytes_sent / mb:.1f}/{event.bytes_received / mb:.1f}" for event in one.rounds)
        stall = sum(event.stall_s for event in one.rounds) / max(sum(event.seconds for event in one.rounds), 1e-9)
        seconds = statistics.median([event.seconds for event in one.rounds]) if one.rounds else 0
        print(
            f"  {name:12} process {own:6.0f}, daemon {daemon:4.0f}; rounds of {seconds:.1f} s, stall {stall:.2%}, "
            f"MB sent/received a round: {rounds}"
        )
    if options.timeline:
        first = volunteers["volunteer-1"]
        start_s = first.samples[0][0]
        marks = [(event.time - start_s, event.round) for event in first.rounds]
        print(f"  rounds end at {', '.join(f'{s:.1f}' for s, _ in marks)} s")
        step = max(1, len(first.samples) // 150)
        for at in range(0, len(first.samples), step):
            chunk = first.samples[at : at + step]
            own, daemon = max(own for _, own, _ in chunk), max(daemon for _, _, daemon in chunk)
            print(f"  {chunk[0][0] - start_s:6.1f} s  {own / mb:7.0f} {daemon / mb:5.0f}")
    print(f"  estimated: up to {cost.bytes_sent_per_round / mb:.1f} MB sent a round", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", action="append", choices=[*SIZES], help="million parameters; may be repeated")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="inner steps of a round")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--limit-s", type=float, default=600.0, help="tell what was seen by then; default 600")
    parser.add_argument("--dir", help="where the swarm's folders lie meanwhile")
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain loop out")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(options.plain)
        return
    for size in options.size or SIZES:
        with tempfile.TemporaryDirectory(prefix="memory-") as folder:
            write_text(Path(folder) / "text.txt")
            run_file = Path(folder) / "run.toml"
            run_file.write_text(run_text(size, options))
            show(size, run_file, options)


if __name__ == "__main__":
    main()
