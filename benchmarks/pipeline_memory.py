"""Measure the memory of a pipeline's volunteers by the number of stages, and training under a memory limit.

    python benchmarks/pipeline_memory.py examples/pipeline.toml

Real volunteers, one per stage with one thread each, train a model that is large compared with the program (25 M
parameters), cut into 2, 4 and 8 stages and uncut, until each has merged or ended two rounds. Measured is the peak
memory of a volunteer's process (`VmHWM`), of stages with blocks only, if there are any. The constant part is measured
with a model of hardly any parameters. Bar: the rest falls as one over the number of stages, within 15 %.

Then every volunteer's data memory (`RLIMIT_DATA`: writable memory) is limited to halfway between the peaks of four
stages and of the whole model: the four stages train, and the whole model does not.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from cold_start import read_run

from swarmtrain.errors import RunTimeError
from swarmtrain.events import RoundEvent
from swarmtrain.peer.local.swarm import LocalSwarm

LARGE = [
    "model.width=512",
    "model.num_layers=8",
    "inner.batch_sequences=8",
    "inner.microbatch_sequences=1",
    "merge.inner_steps=4",
    "run.total_tokens=1_000_000_000",
    "data.held_out_bytes=65_536",
]
TINY = [*LARGE, "model.width=32"]
ROUNDS = 2
LIMIT_S = 240.0
MIB = 1 << 20


@dataclass
class Seen:
    """Peak memory of volunteers, in bytes, and the rounds that they ended."""

    resident: dict[str, int] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    def look(self, name: str, pid: int) -> None:
        """Read its process's memory, if the process exists."""
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        found = {
            key: int(rest.split()[0]) << 10
            for key, _, rest in (line.partition(":") for line in text.split("\n"))
            if key in ("VmHWM", "VmData")
        }
        if len(found) == 2:
            self.resident[name] = found["VmHWM"]
            self.data[name] = max(self.data.get(name, 0), found["VmData"])


def trained(run_file: Path, changes: Sequence[str], num_stages: int, data_bytes: int = 0) -> Seen:
    """Train with one volunteer per stage until each has ended two rounds, or all have stopped."""
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        run = read_run(run_file, [*changes, f"pipeline.stages={num_stages}", 'pipeline.balance="none"'], 0)
        path = Path(folder) / "run.toml"
        path.write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True)))
        swarm = LocalSwarm(Path(folder))
        try:
            company = ["--wait-for", str(num_stages)]
            swarm.start("bootstrap", ["bootstrap", str(path), *swarm.place("bootstrap", limited=False), *company])
            invite, _ = swarm.wait_for_invite()
            volunteers = [f"volunteer-{number}" for number in range(num_stages)]
            for number, name in enumerate(volunteers):
                stage = [f"--first-stages={number}"] if num_stages > 1 else []
                swarm.start(name, ["join", invite.invite, *swarm.place(name, limited=True), *stage, "--threads=1"])
                if data_bytes:
                    resource.prlimit(swarm.children[name].process.pid, resource.RLIMIT_DATA, (data_bytes, data_bytes))
            until_s = time.monotonic() + LIMIT_S
            while time.monotonic() < until_s and not all(seen.rounds.get(name, 0) >= ROUNDS for name in volunteers):
                for event in swarm.events(0.5):
                    if isinstance(event, RoundEvent):
                        seen.rounds[event.name] = seen.rounds.get(event.name, 0) + 1
                    if isinstance(event, RoundEvent) or time.monotonic() > until_s:
                        break
                for name in volunteers:
                    child = swarm.children[name]
                    seen.look(name, child.process.pid)
                    if child.process.poll() is not None and not seen.problem:
                        lines = child.log.read_text(errors="replace").strip().splitlines()
                        said = child.error.message if child.error is not None else lines[-1] if lines else "nothing"
                        seen.problem = f"{name} ended with status {child.process.returncode}: {said}"
                if seen.problem:
                    break
        except RunTimeError as error:
            seen.problem = seen.problem or str(error)
        finally:
            swarm.stop()
    return seen


def of_blocks(values: dict[str, int], num_stages: int) -> float:
    """Return the mean over the inner stages, whose parameters are exactly blocks; without inner stages, over all."""
    chosen = [
        values[f"volunteer-{number}"] for number in range(num_stages) if num_stages < 3 or 0 < number < num_stages - 1
    ]
    return statistics.mean(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    parser.add_argument("--stages", default="2,4,8")
    given = parser.parse_args()
    counts = [int(count) for count in given.stages.split(",")]
    tiny = trained(given.run_file, [*TINY, *given.set], 2)
    constant = of_blocks(tiny.resident, 2)
    print(f"constant: {constant / MIB:.0f} MiB {tiny.problem}", flush=True)
    data: dict[int, int] = {}
    first = 0.0
    for count in [*counts, 1]:
        seen = trained(given.run_file, [*LARGE, *given.set], count)
        resident, data[count] = of_blocks(seen.resident, count), max(seen.data.values())
        beyond = (resident - constant) * count
        if count == 1:
            print(
                f"not cut: {resident / MIB:.0f} MiB, {beyond / MIB:.0f} beyond, data {data[1] / MIB:.0f} {seen.problem}"
            )
            continue
        first = first or beyond
        print(
            f"{count} stages: {resident / MIB:.0f} MiB, {(resident - constant) / MIB:.0f} beyond the constant, times "
            f"{count}: {beyond / first:.3f} of the first row's (1 +- 0.15); data at most {data[count] / MIB:.0f} MiB; "
            f"rounds {min(seen.rounds.values(), default=0)} {seen.problem}",
            flush=True,
        )
    limit = (data[4] + data[1]) // 2
    for count in (4, 1):
        seen = trained(given.run_file, [*LARGE, *given.set], count, limit)
        rounds = min((seen.rounds.get(f"volunteer-{number}", 0) for number in range(count)), default=0)
        what = seen.problem or "all went on"
        print(f"data limited to {limit / MIB:.0f} MiB, {count} stages: {rounds} rounds of each; {what}", flush=True)


if __name__ == "__main__":
    main()
