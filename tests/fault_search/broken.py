"""Plays schedules on several cores. Not in `__main__`, whose functions a spawned process does not find."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from functools import partial

from fault_search.play import draw, play
from fault_search.schedule import Violation, WorldKind
from swarmtrain.environment import PEER, keep_minimal_environment

_AT_ONCE = 10
"""Schedules that a process receives at a time."""


def broken(seeds: Iterable[int], jobs: int, world: WorldKind | None = None) -> Iterator[tuple[int, list[Violation]]]:
    """Yield each seed with the violations of its schedule, in the order in which they are done.

    All play in `world`, or each in the world whose turn it is.
    """
    play_seed = partial(_play_seed, world)
    if jobs == 1:
        yield from map(play_seed, seeds)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _begin) as pool:  # whatever ends this ends them
        window = (list(itertools.islice(of, 4 * jobs * _AT_ONCE)) for of in itertools.repeat(iter(seeds)))
        for some in itertools.takewhile(bool, window):  # imap would take all seeds there are before it began
            yield from pool.imap_unordered(play_seed, some, _AT_ONCE)


def _play_seed(world: WorldKind | None, seed: int) -> tuple[int, list[Violation]]:
    return seed, play(draw(seed, world))


def _begin() -> None:
    """Prepare a worker process: ignore Ctrl-C, because the process that started it ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_minimal_environment(PEER)
