"""Measure the stall of a real swarm's trainers, the freshness of what they merge, and the traffic.

    python benchmarks/stall.py examples/stdlib-gpt.toml
    python benchmarks/stall.py examples/stdlib-gpt.toml --rtt 100 --link 10 --fail-pulls 5
    python benchmarks/stall.py examples/stdlib-gpt.toml --methods gossip --swarm 4x24 --swarm 16x24

Starts `swarmtrain local`: a bootstrap and volunteers as real processes over real sockets, unequal (`--swarm`, the
factor of each; `NxF` for N of factor F) and behind emulated links (`--link` in Mbit/s each way), and reads their
events. For the factors to hold, the sum of 1/F over the volunteers must leave some of the cores for their network
threads and daemons; a volunteer whose factor did not hold is named. Methods, on equal tokens:

- gossip: nobody waits (bars below);
- diloco-paced: synchronous rounds with H_i by speed, in which all wait for the slowest link: the baseline.

For each volunteer, over its rounds after the first, which is short and in which nobody has published yet:

- stall: the sum of `stall_s` (the trainer not computing because of network or merge: measured around its two calls and
  the merge) over the time by the clock, and the worst round's; `between` is the time outside all rounds (reporting);
- fresh: the share of rounds that merged a partner's pseudo-gradient, or a part of one, that had not been merged before;
- bytes received a parameter, partner (of whom weights or pseudo-gradient were merged) and round. Counted is
  `bytes_received`: every message as it is serialised, so manifests, presence and progress records, greetings, and pulls
  that came too late to be merged. It excludes what libp2p adds to a message;
- all bytes on the volunteers' links, including libp2p's own traffic, DHT records and the first weights;
- received and sent in a round. Sent includes the whole states that the bootstrap archives once in
  `network.archive_every_s`, and last weights.

Bars, for every volunteer: stall at most 1 % of its time (aim 0.1 %), fresh in 95 % of its rounds, 2.1 bytes with both
formats int8.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from run_files import read_run

from swarmtrain.events import DoneEvent, Event, LinkEvent, RoundEvent, StartedEvent, WarningEvent, parse_event
from swarmtrain.network.daemon import owned_process_args
from swarmtrain.protocol.limits import parse_slowdown
from swarmtrain.run import RunFile

METHODS = {
    "gossip": ['merge.method="gossip"', "merge.pacing=true"],
    "diloco-paced": ['merge.method="diloco"', "merge.pacing=true"],
}
MOST_STALL, AIM_STALL, LEAST_FRESH, MOST_BYTES = 0.01, 0.001, 0.95, 2.1
END_S = 30.0


@dataclass
class Volunteer:
    """Reports of one volunteer."""

    name: str
    factor: float
    started_s: float = 0.0
    rounds: list[RoundEvent] = field(default_factory=list)
    link: LinkEvent | None = None
    too_busy: bool = False

    @property
    def merged(self) -> list[RoundEvent]:
        """Rounds after the first."""
        return self.rounds[1:]

    @property
    def wall_s(self) -> float:
        """Seconds of these rounds, and between them."""
        return self.rounds[-1].time - self.rounds[0].time

    @property
    def stall(self) -> float:
        return sum(event.stall_s for event in self.merged) / self.wall_s

    @property
    def worst_stall_s(self) -> float:
        return max(event.stall_s for event in self.merged)

    @property
    def between(self) -> float:
        return 1 - sum(event.seconds for event in self.merged) / self.wall_s

    @property
    def fresh(self) -> float:
        return statistics.mean(any(event.weights) for event in self.merged)

    @property
    def num_pulled(self) -> int:
        return sum(tokens > 0 for event in self.merged for tokens in event.weights)

    @property
    def received_bytes(self) -> int:
        return sum(event.bytes_received for event in self.merged)

    @property
    def sent_bytes(self) -> int:
        return sum(event.bytes_sent for event in self.merged)


@dataclass(frozen=True)
class Result:
    """Result of a swarm."""

    volunteers: list[Volunteer]
    num_parameters: int
    run_tokens: int
    held_out_loss: float
    wall_s: float
    """Seconds from the first inner step to the last merge."""

    @property
    def bytes_of_a_publication(self) -> float:
        """Bytes received per parameter, merged partner and round."""
        partners = sum(len(event.partners) for one in self.volunteers for event in one.merged)
        return (
            sum(one.received_bytes for one in self.volunteers) / (partners * self.num_parameters) if partners else 0.0
        )

    def a_round(self, bytes_of: str) -> float:
        """Return the mean over the volunteers' rounds, in bytes."""
        rounds = sum(len(one.merged) for one in self.volunteers)
        return float(sum(getattr(one, bytes_of) for one in self.volunteers) / rounds)


# ---------------------------------------------------------------- a swarm


def factors_of(text: str) -> tuple[float, ...]:
    """Parse factors such as "2,2.6,5.2" or "16x24"."""
    number, times, factor = text.partition("x")
    if times:
        return int(number) * (parse_slowdown(factor),)
    return tuple(parse_slowdown(part) for part in text.split(","))


def train(run: RunFile, factors: Sequence[float], links: Sequence[str], data: Path) -> Result:
    """Train a swarm to its end."""
    with tempfile.TemporaryDirectory(prefix="stall-") as folder:
        run_file = Path(folder) / "run.toml"
        run_file.write_text(tomli_w.dumps(run.model_dump(exclude_unset=True, exclude_none=True)))
        words = ["local", str(run_file), "--peers", str(len(factors)), "--slowdown", ",".join(map(str, factors))]
        words += [*links, "--data", str(data), "--json", "--dir", str(Path(folder) / "swarm")]
        named = {f"volunteer-{number}": Volunteer(f"volunteer-{number}", f) for number, f in enumerate(factors, 1)}
        num_parameters, last = 0, None
        for event in told_by([sys.executable, "-m", "swarmtrain.cli", *words], Path(folder) / "errors"):
            one = named.get(event.name)
            if isinstance(event, DoneEvent) and event.held_out_loss is not None:
                last = event
            if one is None:
                continue
            if isinstance(event, StartedEvent):
                one.started_s, num_parameters = event.time, event.num_parameters
            elif isinstance(event, RoundEvent):
                one.rounds.append(event)
            elif isinstance(event, LinkEvent):
                one.link = event
            elif isinstance(event, WarningEvent):
                one.too_busy = one.too_busy or "--slowdown" in event.message
                print(f"  {one.name}: warning: {event.message}", file=sys.stderr)
    volunteers = list(named.values())
    assert last is not None and last.held_out_loss is not None, "the run has an end"
    if short := [one.name for one in volunteers if len(one.rounds) < 3]:
        sys.exit(f"error: {', '.join(short)} had fewer than three rounds; give the run more --tokens")
    wall_s = max(one.rounds[-1].time for one in volunteers) - min(one.started_s for one in volunteers)
    return Result(volunteers, num_parameters, last.run_tokens, last.held_out_loss, wall_s)


def told_by(command: Sequence[str], errors: Path) -> Iterator[Event]:
    """Yield a command's events until it ends. It ends with this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with errors.open("wb") as said:
        process = subprocess.Popen(
            owned_process_args(command), stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL, env=environment
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                yield parse_event(line)
        if process.wait():
            sys.exit(f"error: the swarm ended with status {process.returncode}:\n{errors.read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait(END_S)
        process.stdout.close()


# ---------------------------------------------------------------- the tables


def show(title: str, result: Result) -> None:
    """Print a row for each volunteer."""
    print(f"\n{title}: {result.run_tokens:,} tokens in {result.wall_s:.1f} s, {result.held_out_loss:.4f} nats/byte")
    print(
        "volunteer     factor  rounds  seconds   stall  worst round  between  fresh  pulled  received/round  sent/round"
    )
    for one in result.volunteers:
        rounds = len(one.merged)
        print(
            f"{one.name:12}  {one.factor:6g}  {rounds:6}  {one.wall_s:7.1f}  {one.stall:6.2%}"
            f"  {1000 * one.worst_stall_s:8.0f} ms  {one.between:7.2%}  {one.fresh:5.1%}  {one.num_pulled:6}"
            f"  {one.received_bytes / rounds / 1e6:11.3f} MB  {one.sent_bytes / rounds / 1e6:7.3f} MB"
            + ("  <- the machine was too busy for this factor" if one.too_busy else "")
        )
        if stale := [event.round for event in one.merged if not any(event.weights)]:
            print(f"{'':14}merged no gradient in round {', '.join(map(str, stale))}")
    print(
        f"a volunteer and round: {result.a_round('num_pulled'):.2f} gradients merged, "
        f"{result.a_round('received_bytes') / 1e6:.3f} MB received, {result.a_round('sent_bytes') / 1e6:.3f} MB sent"
    )
    if links := [one.link for one in result.volunteers if one.link is not None]:
        up, down = (statistics.mean(getattr(link, way) for link in links) for way in ("up_bytes", "down_bytes"))
        rounds = statistics.mean(len(one.rounds) for one in result.volunteers)
        print(
            f"a volunteer's link carried {up / 1e6:.1f} MB up and {down / 1e6:.1f} MB down, all told: "
            f"{up / rounds / 1e6:.3f} and {down / rounds / 1e6:.3f} MB a round, "
            f"{up / result.wall_s / 1e3:.1f} and {down / result.wall_s / 1e3:.1f} kB/s"
        )


def judge(result: Result, is_int8: bool) -> None:
    """Print whether the bars hold."""
    stall, fresh = max(one.stall for one in result.volunteers), min(one.fresh for one in result.volunteers)
    held = {True: "holds", False: "DOES NOT HOLD"}
    aim = "reached" if stall <= AIM_STALL else "not reached"
    print(f"stall at most {MOST_STALL:.0%}: the worst {stall:.2%}: {held[stall <= MOST_STALL]} (aim 0.1%: {aim})")
    print(f"fresh at least {LEAST_FRESH:.0%}: the worst {fresh:.1%}: {held[fresh >= LEAST_FRESH]}")
    sent = result.bytes_of_a_publication
    bar = f"{held[sent <= MOST_BYTES]}" if is_int8 else "no bar for these formats"
    print(f"bytes a parameter, merged partner and round at most {MOST_BYTES}: {sent:.3f}: {bar}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--tokens", type=int, help="of the whole run; default as the run file says")
    parser.add_argument("--methods", default="gossip,diloco-paced", help="comma-separated; default both")
    parser.add_argument(
        "--swarm", action="append", metavar="F,F,...|NxF", help="default 2,2.6,5.2,11.4; may be repeated"
    )
    parser.add_argument("--link", type=float, default=20.0, help="of each volunteer, up and down, Mbit/s; default 20")
    parser.add_argument("--rtt", type=float, help="milliseconds from a peer to another and back")
    parser.add_argument("--fail-pulls", type=float, default=0.0, help="per cent of transfers that break off midway")
    options = parser.parse_args()
    links = ["--link-up", f"{options.link:g}", "--link-down", f"{options.link:g}"]
    links += [] if options.rtt is None else ["--rtt", f"{options.rtt:g}"]
    links += [f"--fail-pulls={options.fail_pulls:g}"] if options.fail_pulls else []
    tokens = [] if options.tokens is None else [f"run.total_tokens={options.tokens}"]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; {' '.join(links)}", flush=True)
    for swarm in options.swarm or ["2,2.6,5.2,11.4"]:
        factors = factors_of(swarm)
        for method in options.methods.split(","):
            changes = [*METHODS[method], *tokens, *options.set]
            run = read_run(options.run_file, changes, 0)
            began_s = time.monotonic()
            result = train(run, factors, links, options.run_file.resolve().parent)
            show(f"{method}, volunteers {swarm}", result)
            if method == "gossip":
                judge(result, (run.merge.theta_format, run.merge.gradient_format) == ("int8", "int8"))
            print(f"({time.monotonic() - began_s:.0f} s in all, load {os.getloadavg()[0]:.1f} after)", flush=True)


if __name__ == "__main__":
    main()
