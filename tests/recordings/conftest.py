"""What the tests of the recordings share with those of real processes and of simulated runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent.parent / name) for name in ("processes", "simulate")]
