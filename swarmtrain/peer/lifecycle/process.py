"""Facts and settings of this process. Imports nothing heavy, since it is used before a peer's imports."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

__all__ = ["process_age_s", "trim_heap", "use_few_arenas"]

_M_ARENA_MAX = -8
"""Parameter of glibc's `mallopt`."""
_ARENAS = 2


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
    if sys.platform.startswith("linux") and not told:
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, _ARENAS)


def trim_heap() -> None:
    """Return the free memory of glibc's heap to the system: 236 of 404 MB while training 10 million parameters.

    Without glibc nothing happens.
    """
    if sys.platform.startswith("linux"):
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
