"""Time limit for what a test waits for by the real clock."""

from __future__ import annotations

PATIENCE_S = 30.0
"""What takes milliseconds may take seconds on a machine with other work: reached only when something is wrong.

Swarms of real processes have a longer one (`processes/swarm.py`).
"""
