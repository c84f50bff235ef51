"""Fail one of two peers of a stage: does training continue within 30 s, at the rate of the remaining peers?

    python benchmarks/pipeline_faults.py examples/pipeline.toml --seconds 40 --slowdown 8 \\
        --set model.width=256 --set model.num_layers=6

Six real volunteers hold three stages, two each, and nobody moves (`benchmarks/pipeline_swarm.py`). One peer of the
second stage is killed (SIGKILL), stopped (SIGSTOP), ten times slower than the others, or answers every request with
random bytes of the right size. The throughput of the last stage is measured from 30 s after the fault on, and compared
with the throughput without a fault: the stage's other peer can do half of it, and 0.55 beside a slow one.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cold_start import read_run
from pipeline_swarm import EVEN, Odd, Watched, started

VICTIM = 3
GARBAGE = """
import os
from swarmtrain.peer.pipeline import stage_service
right = stage_service.StageServer.answer_untrusted

async def answer_untrusted(self, caller, question, body):
    message, sent = await right(self, caller, question, body)
    return message, [os.urandom(len(part)) for part in sent]

stage_service.StageServer.answer_untrusted = answer_untrusted
from swarmtrain.cli.main import main
main()
"""
ODD = {
    "slow": Odd(number=VICTIM, slower=10.0),
    "garbage": Odd(number=VICTIM, program=("-c", GARBAGE)),
}
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
IDEAL = {"even": 1.0, "killed": 0.5, "stopped": 0.5, "slow": 0.55, "garbage": 0.5}


@contextmanager
def with_fault(given: argparse.Namespace, fault: str) -> Iterator[tuple[Watched, float]]:
    """Yield a swarm in its steady state, and the time at which its fault began."""
    changes = ["run.total_tokens=1_000_000_000", *given.set, 'pipeline.balance="none"']
    with started(given.run_file, EVEN, given.slowdown, changes, ODD.get(fault)) as watched:
        names = [f"volunteer-{number}" for number in range(len(EVEN))]
        while not {told.name for told in watched.rates}.issuperset(names):
            watched.watch(1.0)
        if fault in SIGNALS or fault == "even":
            watched.watch(20.0)
        if fault in SIGNALS:
            watched.swarm.children[names[VICTIM]].process.send_signal(SIGNALS[fault])
        yield watched, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--slowdown", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=40.0, help="how long each is measured")
    parser.add_argument("--faults", default="even,killed,stopped,slow,garbage")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    given = parser.parse_args()
    last, even = read_run(given.run_file, given.set, 0).pipeline.stages - 1, 0.0
    for fault in given.faults.split(","):
        with with_fault(given, fault) as (watched, fault_s):
            watched.watch(30.0)
            rate = watched.measure(last, given.seconds)
            within = watched.tokens_per_s(last, fault_s, fault_s + 30.0)
        even = even or rate
        print(
            f"{fault:>8}: {rate:6.0f} tokens/s, {rate / even:.2f} of the even one's, {rate / even / IDEAL[fault]:.2f} "
            f"of those that remain; {within:.0f} tokens/s in the first 30 s",
            flush=True,
        )


if __name__ == "__main__":
    main()
