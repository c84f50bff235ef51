"""This process. Imports nothing heavy: it is asked before a peer has its imports, too."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["process_age_s"]


def process_age_s() -> float:
    """Seconds since this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError, AttributeError):
        return time.process_time()
