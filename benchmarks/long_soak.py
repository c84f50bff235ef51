"""Run six volunteers with churn behind links for an hour: does anything grow, and is every logged error explained?

    python benchmarks/long_soak.py
    python benchmarks/long_soak.py --minutes 10 --warm-up-minutes 2 --json samples.jsonl

Starts `swarmtrain local` with links like the internet's. Once a minute, one of volunteers 3 to 6 is killed, leaves or
hangs, and comes back; the bootstrap and volunteers 1 and 2 run throughout. Of these, and of the process that emulates
the links, it samples memory (with the daemon, and without), threads, open files, files kept on the disk and DHT
records. After the warm-up it fits a straight line to each: the rise per hour and its uncertainty (two standard errors,
of means over two minutes). At the end it ends the swarm, as by Ctrl-C.

Warnings and errors of all log files are listed with their counts; numbers within them are masked.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import tomli_w
from run_files import read_run

from swarmtrain.cli.peers import LocalPeer, PeerPhase, look
from swarmtrain.network.daemon import owned_process_args

FACTORS = "16,20,24,16,20,24"
STEADY = ("bootstrap", "volunteer-1", "volunteer-2")
STRUCK = ("volunteer-3", "volunteer-4", "volunteer-5", "volunteer-6")
DEEDS = ("kill", "leave", "kill", "hang")
LINKS = {"rtt_ms": 80, "up_mbit": 20, "down_mbit": 100, "jitter_ms": 20, "loss_percent": 0.1}
EVERY_S, AWAY_S, SAMPLE_S, MEAN_S = 60.0, 15.0, 15.0, 120.0
COLUMNS = ("memory, MiB", "threads", "files", "without its daemon, MiB", "disk, MiB", "DHT records")
Sample = tuple[float, ...]


def rehearsal(minutes: float) -> str:
    """Return the rehearsal file."""
    turns = zip(itertools.cycle(STRUCK), itertools.cycle(DEEDS), range(1, int(minutes)))
    faults = [{"at_s": number * EVERY_S, "do": do, "who": [who], "for_s": AWAY_S} for who, do, number in turns]
    return tomli_w.dumps({"links": LINKS, "faults": faults})


def of_processes(*family: psutil.Process) -> tuple[float, float, float]:
    """Return the MiB, threads and open files of all `family` processes."""
    return (
        sum(one.memory_info().rss for one in family) / 2**20,
        float(sum(one.num_threads() for one in family)),
        float(sum(one.num_fds() for one in family)),
    )


def sample(folder: Path) -> Sample:
    """Sample one peer and its daemon."""
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    process = psutil.Process(int((folder / "peer.pid").read_text()))
    seen = look(LocalPeer(folder=folder))
    if seen.phase is not PeerPhase.RUNNING:
        raise ValueError("it does not answer")
    alone = process.memory_info().rss / 2**20
    return (*of_processes(process, *process.children()), alone, kept, float(seen.status.dht_records))


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit a line to means over `MEAN_S`; return the rise per hour, and two standard errors of it."""
    bins = [
        list(group) for _, group in itertools.groupby(zip(times, values, strict=True), lambda one: one[0] // MEAN_S)
    ]
    x = [statistics.fmean(time_s for time_s, _ in one) / 3600 for one in bins]
    y = [statistics.fmean(value for _, value in one) for one in bins]
    rise, start = statistics.linear_regression(x, y)
    rest = sum((b - start - rise * a) ** 2 for a, b in zip(x, y, strict=True)) / max(1, len(x) - 2)
    return rise, 2 * (rest / sum((a - statistics.fmean(x)) ** 2 for a in x)) ** 0.5


def complaints(folder: Path) -> collections.Counter[str]:
    """Count warnings, errors and tracebacks in the log files."""
    found: collections.Counter[str] = collections.Counter()
    for path in sorted([*folder.glob("*/peer.log*"), *folder.glob("*.log")]):
        for line in path.read_text(errors="replace").splitlines():
            if re.search(r"\b(warning|error|critical)\b|Traceback", line):
                text = re.sub(r"^[-\d]+ [\d:.]+ |\b12D3Koo\w+|\bQm\w{30,}|\d+(\.\d+)?", "#", line)
                found[text[:200]] += 1
    return found


def watch(swarm: Path, process: subprocess.Popen[bytes], seconds: float, into: Path | None) -> dict[str, list[Sample]]:
    """Sample the peers that run throughout: (time in s, the values of `COLUMNS`)."""
    found: dict[str, list[Sample]] = {name: [] for name in (*STEADY, "links")}
    began_s = time.monotonic()
    while (now_s := time.monotonic() - began_s) < seconds:
        for name, rows in found.items():
            try:
                row = of_processes(psutil.Process(process.pid)) if name == "links" else sample(swarm / name)
            except (OSError, psutil.Error, ValueError) as error:
                print(f"{now_s:.0f} s: {name} could not be looked at: {error}", file=sys.stderr)
                continue
            rows.append((now_s, *row))
            if into is not None:
                with into.open("a") as file:
                    file.write(json.dumps({"name": name, "time_s": round(now_s, 1), "sample": row}) + "\n")
        assert process.poll() is None, "the swarm has ended"
        time.sleep(SAMPLE_S)
    return found


def rows(found: dict[str, list[Sample]], warm_up_s: float) -> Iterator[str]:
    """Yield the rows of the table."""
    yield f"| | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, samples in found.items():
        late = [one for one in samples if one[0] >= warm_up_s]
        times, *columns = zip(*late, strict=True)
        cells = []
        for values in columns:
            rise, error = slope(times, values)
            cells.append(f"{values[0]:.0f} to {values[-1]:.0f}: {rise:+.1f} +- {error:.1f} an hour")
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path, nargs="?", default=Path("examples/stdlib-gpt.toml"))
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--warm-up-minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a line for each sample")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the swarm's files stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long-soak-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = read_run(given.run_file, ["run.total_tokens=1000000000000"], 0)
        (folder / "run.toml").write_text(tomli_w.dumps(run.model_dump(exclude_unset=True, exclude_none=True)))
        (folder / "faults.toml").write_text(rehearsal(given.minutes))
        words = ["local", str(folder / "run.toml"), "--peers", "6", "--slowdown", FACTORS, "--json"]
        words += ["--faults", str(folder / "faults.toml"), "--dir", str(folder / "swarm")]
        with (folder / "events.jsonl").open("wb") as events, (folder / "errors").open("wb") as errors:
            command = owned_process_args([sys.executable, "-m", "swarmtrain.cli", *words])
            process = subprocess.Popen(command, stdout=events, stderr=errors, stdin=subprocess.DEVNULL)
            try:
                found = watch(folder / "swarm", process, 60 * given.minutes, given.json)
            finally:
                process.send_signal(signal.SIGINT)
                code = process.wait(60)
        print("\n".join(rows(found, 60 * given.warm_up_minutes)))
        told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if '"round"' in line]
        merged = [event for event in told if event["event"] == "round"]
        stall = sum(event["stall_s"] for event in merged) / sum(event["seconds"] for event in merged)
        print(f"\n{len(merged)} rounds of all, stall {stall:.2%}; it ended with code {code}")
        for text, number in complaints(folder / "swarm").most_common():
            print(f"{number:6} {text}")


if __name__ == "__main__":
    main()
