"""Measure a pipeline that starts unbalanced and loses volunteers, relative to a balanced one's speed.

    python benchmarks/pipeline_swarm.py examples/pipeline.toml
    python benchmarks/pipeline_swarm.py examples/pipeline.toml --scenarios even,uneven

Starts a bootstrap and six volunteers of three stages as real processes, each `--slowdown` times slower than this
machine could be, so that six of them do not compete for two cores, and reads the throughput of the last stage from
their `stage_throughput` events. Choose a slowdown and a model (`--set model.width=256`) for which computing dominates.
Scenarios:

- even: two volunteers per stage, nobody moves: the baseline;
- uneven: 4-1-1, nobody moves: the test is void unless this is at most 60 % of the baseline;
- balanced: 4-1-1 with the rule of the run file: at least 80 % within a minute of the first move being possible;
- killed: after that two volunteers of one stage are killed: at least 75 % of the ideal for those four, who then share
  three stages (two thirds of the even speed).

"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tomli_w
from run_files import read_run

from swarmtrain.events import AssignedEvent, Event, MovedEvent, StageThroughputEvent
from swarmtrain.peer.local.swarm import LocalSwarm

EVEN, UNEVEN = (0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 1, 2)
EVERY_S = 10.0


class Rate(NamedTuple):
    """Throughput of a volunteer's stage over some seconds, reported at their end."""

    since_s: float
    at_s: float
    name: str
    stage: int
    tokens_per_s: float


class Watched:
    """Swarm of volunteers that hold stages, and their reports."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self.swarm = swarm
        self.holds: dict[str, tuple[int, ...]] = {}
        self.rates: list[Rate] = []
        self.moves: list[MovedEvent] = []

    def watch(self, seconds: float) -> None:
        """Read events for `seconds`."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for event in self.swarm.events(min(1.0, until_s - time.monotonic())):
                self._take(event)
                if time.monotonic() >= until_s:
                    return

    def watch_until_trained(self, num_peers: int) -> None:
        """Read events until all peers have reported a throughput."""
        while len({told.name for told in self.rates}) < num_peers:
            self.watch(1.0)

    def _take(self, event: Event) -> None:
        if isinstance(event, AssignedEvent):
            self.holds[event.name] = event.stages
        elif isinstance(event, MovedEvent):
            self.holds[event.name] = event.after
            self.moves.append(event)
            print(f"    {event.name}: {event.before} -> {event.after} in {event.seconds:.1f} s: {event.reason}")
        elif isinstance(event, StageThroughputEvent):
            since_s = max((told.at_s for told in self.rates if told.name == event.name), default=event.time - EVERY_S)
            for stage in event.stages:
                self.rates.append(Rate(since_s, event.time, event.name, stage, event.tokens_per_s))

    def tokens_per_s(self, stage: int, since_s: float, until_s: float) -> float:
        """Return a stage's throughput in a time that ended at least `EVERY_S` ago.

        Each peer reports the last ten seconds; only the part within the time counts.
        """
        within = [
            told.tokens_per_s * max(0.0, min(told.at_s, until_s) - max(told.since_s, since_s))
            for told in self.rates
            if told.stage == stage
        ]
        return sum(within) / (until_s - since_s)

    def measure(self, stage: int, seconds: float) -> float:
        """Measure a stage's throughput from now on."""
        since_s = time.time()
        self.watch(seconds + EVERY_S + 1.0)
        return self.tokens_per_s(stage, since_s, since_s + seconds)


@dataclass(frozen=True, kw_only=True)
class Odd:
    """Volunteer that differs from the others."""

    number: int
    slower: float = 1.0
    """Factor by which it is slower."""
    program: tuple[str, ...] = ("-m", "swarmtrain.cli")
    """Program that it runs."""


@contextmanager
def started(
    run_file: Path, stages: Sequence[int], slowdown: float, changes: list[str], odd: Odd | None = None
) -> Iterator[Watched]:
    """Start volunteers that hold these stages at first."""
    with tempfile.TemporaryDirectory() as folder:
        run = read_run(run_file, changes, 0)
        path = Path(folder) / "run.toml"
        path.write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True)))
        swarm = LocalSwarm(Path(folder))
        try:
            company = ["--wait-for", str(len(stages))]
            swarm.start("bootstrap", ["bootstrap", str(path), *swarm.place("bootstrap", limited=False), *company])
            invite, _ = swarm.wait_for_invite()
            for number, stage in enumerate(stages):
                name = f"volunteer-{number}"
                this = odd if odd is not None and odd.number == number else Odd(number=number)
                options = [f"--first-stages={stage}", f"--slowdown={slowdown * this.slower:g}", "--threads=1"]
                arguments = ["join", invite.invite, *swarm.place(name, limited=True), *options]
                swarm.start(name, arguments, this.program)
            yield Watched(swarm)
        finally:
            for child in swarm.children.values():
                child.process.send_signal(signal.SIGKILL)
            swarm.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--slowdown", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of measurement, after the settling time")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds of settling time")
    parser.add_argument("--scenarios", default="even,uneven,balanced")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    given = parser.parse_args()
    forever = ["run.total_tokens=1_000_000_000", *given.set]
    last, even = read_run(given.run_file, given.set, 0).pipeline.stages - 1, 0.0
    for scenario in given.scenarios.split(","):
        stages = EVEN if scenario == "even" else UNEVEN
        balance = [] if scenario == "balanced" else ['pipeline.balance="none"']
        with started(given.run_file, stages, given.slowdown, [*forever, *balance]) as watched:
            watched.watch_until_trained(len(stages))
            watched.watch(60.0 if scenario == "balanced" else given.settle)
            even = report(watched, scenario, given.seconds, last, even)
            if scenario == "balanced":
                kill_two(watched)
                watched.watch(60.0)
                report(watched, "killed", given.seconds, last, 2 / 3 * even)


def kill_two(watched: Watched) -> None:
    """Kill the two volunteers of the first stage after the driver's that two hold."""
    stage = next(s for s in (1, 2) if sum(s in held for held in watched.holds.values()) >= 2)
    names = [name for name, held in watched.holds.items() if stage in held][:2]
    print(f"    killing {', '.join(names)} of stage {stage}")
    for name in names:
        watched.swarm.children[name].process.send_signal(signal.SIGKILL)
        del watched.holds[name]


def report(watched: Watched, scenario: str, seconds: float, last: int, even: float) -> float:
    """Measure for `seconds` and print; return the even scenario's speed, which is this one's if it comes first."""
    rate = watched.measure(last, seconds)
    held = " ".join(",".join(map(str, stages)) for stages in sorted(watched.holds.values()))
    print(f"{scenario:>9}: {rate:7.0f} tokens/s, {rate / (even or rate):.2f} of the ideal; held: {held}", flush=True)
    return even or rate


if __name__ == "__main__":
    main()
