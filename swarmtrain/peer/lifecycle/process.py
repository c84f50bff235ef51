"""Facts and settings of this process. Imports nothing heavy, since it is used before a peer's imports."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_M_ARENA_MAX, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -8, -1, -3, -4
"""Parameters of glibc's `mallopt`."""
_ARENAS = 2
_NEVER, _NONE = -1, 0
_MOST_MAPS, _MAP_BYTES = 65_536, 32 * 1024 * 1024
"""glibc's own limit of maps, and the size from which on it comes to map by itself; it trims at twice that size."""
_TOLD_BY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def process_age_s() -> float:
    """Return the seconds since this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError, AttributeError):
        return time.process_time()


def use_few_arenas() -> None:
    """Let all threads share two of glibc's heaps; call it before there are threads (decision 37).

    By default each thread gets its own, up to eight a core, and what is freed in one is of no use in another: memory
    grows for hours. An explicit `MALLOC_ARENA_MAX` or `GLIBC_TUNABLES` takes precedence. Without glibc nothing happens.
    """
    told = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not told and (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have glibc keep for the next inner step what one has freed; give it back to the system at the end.

    Each step makes its activations and gradients anew. By default glibc maps each large one, and returns what is freed
    at the heap's end: of 124 million parameters 0.4 to 0.6 GB a step, whose page faults took 0.2 of 4.6 s. The peak of
    memory, which is within a step, was no higher in a loop without a swarm (decision 90). Variables of the environment
    that set this for glibc take precedence. Without glibc nothing happens.
    """
    told = any(name in os.environ for name in _TOLD_BY) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = None if told else _of_glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_MMAP_MAX, _NONE)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _MOST_MAPS)
        mallopt(_M_MMAP_THRESHOLD, _MAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _MAP_BYTES)
        trim_heap()


def trim_heap() -> None:
    """Return the free memory of glibc's heap to the system: 236 of 404 MB while training 10 million parameters.

    Without glibc nothing happens.
    """
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., Any] | None:
    """Return a function of the C library that only glibc has; None where there is another one."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    found: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None)
    return found
