"""Search: `python -m swarmtrain.simulate.search`, or `make search`; docs/simulating.md says what it finds.

The bar is on standard error, what is found on standard output: each invariant that breaks once, as a test with the
shortest schedule. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import secrets
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from swarmtrain.simulate.search.play import as_test, draw, play, shrink
from swarmtrain.simulate.search.schedule import Violation

__all__ = ["broken", "main"]

_AT_ONCE = 10
"""Schedules that a process is given at a time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Play schedules, and print what breaks."""
    parser = argparse.ArgumentParser(prog="python -m swarmtrain.simulate.search", description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, metavar="N", help="How many; until Ctrl-C if it is not said.")
    parser.add_argument("--seed", type=int, metavar="N", help="Of the first one; by chance if not said.")
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count() or 1, help="Processes. [a core each]")
    options = parser.parse_args(arguments)
    first = secrets.randbelow(2**40) if options.seed is None else options.seed
    seeds = itertools.count(first) if options.schedules is None else range(first, first + options.schedules)
    console, known = Console(stderr=True), set[str]()
    columns = BarColumn(), TextColumn("{task.completed} schedules"), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as bar:
        task = bar.add_task(f"seeds from {first}", total=options.schedules)
        try:
            for seed, violations in broken(seeds, options.jobs):
                bar.advance(task)
                new = {f"{draw(seed).world} {violation.invariant}" for violation in violations} - known
                if new:
                    known |= new
                    bar.console.print(f"seed {seed}: {violations[0]}; looking for the shortest schedule", markup=False)
                    sys.stdout.write(f"# seed {seed}\n{as_test(shrink(draw(seed)))}\n")
                    sys.stdout.flush()
        except KeyboardInterrupt:
            pass
    return 1 if known else 0


def broken(seeds: Iterable[int], jobs: int) -> Iterator[tuple[int, list[Violation]]]:
    """Of each seed, what does not hold in its schedule; in the order in which they are done."""
    if jobs == 1:
        yield from map(_play_seed, seeds)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _begin) as pool:  # whatever ends this ends them
        window = (list(itertools.islice(of, 4 * jobs * _AT_ONCE)) for of in itertools.repeat(iter(seeds)))
        for some in itertools.takewhile(bool, window):  # imap would take all seeds there are before it began
            yield from pool.imap_unordered(_play_seed, some, _AT_ONCE)


def _play_seed(seed: int) -> tuple[int, list[Violation]]:
    return seed, play(draw(seed))


def _begin() -> None:
    """In each process: the one that started it ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
