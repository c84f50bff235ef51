"""This process. Imports nothing heavy: it is asked before a peer has its imports, too."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

__all__ = ["process_age_s", "trim_heap", "use_few_arenas"]

_M_ARENA_MAX = -8
"""Of glibc's `mallopt`."""
_ARENAS = 2


def process_age_s() -> float:
    """Seconds since this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError, AttributeError):
        return time.process_time()


def use_few_arenas() -> None:
    """Let threads share two of glibc's heaps, before there are threads: decision 0037.

    By default each gets its own, up to eight a core, and what is freed in one is of no use in another: memory grows for
    hours. Who sets `MALLOC_ARENA_MAX` (or `GLIBC_TUNABLES`) knows better; elsewhere than with glibc nothing is done.
    """
    told = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform.startswith("linux") and not told:
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, _ARENAS)


def trim_heap() -> None:
    """Give back to the system what glibc's heap holds free: where a model of 10 million parameters trains, 236 of its
    404 MB. Elsewhere than with glibc nothing is done."""
    if sys.platform.startswith("linux"):
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
