"""Search for faults: `python -m fault_search`, or `make search`; docs/simulating.md says what it finds.

The progress bar is on standard error. Findings are on standard output: each broken invariant once, as a test with the
shortest schedule. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import sys
from collections.abc import Sequence
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fault_search.broken import broken
from fault_search.play import as_test, draw, shrink
from fault_search.schedule import WorldKind


def main(arguments: Sequence[str] | None = None) -> int:
    """Play schedules, and print the invariants that break. Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fault_search", description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, metavar="N", help="How many; until Ctrl-C if it is not said.")
    parser.add_argument("--seed", type=int, metavar="N", help="Of the first one; by chance if not said.")
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count() or 1, help="Processes. [a core each]")
    parser.add_argument("--world", choices=get_args(WorldKind), help="World of all of them. [each in turn]")
    options = parser.parse_args(arguments)
    first = secrets.randbelow(2**40) if options.seed is None else options.seed
    seeds = itertools.count(first) if options.schedules is None else range(first, first + options.schedules)
    console, known = Console(stderr=True), set[str]()
    columns = BarColumn(), TextColumn("{task.completed} schedules"), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as bar:
        task = bar.add_task(f"seeds from {first}", total=options.schedules)
        try:
            for seed, violations in broken(seeds, options.jobs, options.world):
                bar.advance(task)
                schedule = draw(seed, options.world)
                for violation in violations:
                    if (invariant := f"{schedule.world} {violation.invariant}") in known:
                        continue
                    known.add(invariant)
                    bar.console.print(f"seed {seed}: {violation}; looking for the shortest schedule", markup=False)
                    shortest = shrink(schedule, violation.invariant)
                    sys.stdout.write(f"# seed {seed}\n{as_test(shortest, violation.invariant)}\n")
                    sys.stdout.flush()
        except KeyboardInterrupt:
            pass
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
