"""Record the simulated runs again with today's code.

    PYTHONPATH=. python tests/recordings/make.py [learning] [systems] [NAME...]

The result is deterministic. The real runs stay: they were recorded by the code before the engine, which had its own
recorder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "processes"), str(HERE.parent / "simulate")]

from lines import Recording, save  # noqa: E402 - they are beside this file
from simulated import LEARNING, SYSTEMS, record_learning, record_systems  # noqa: E402


def text_sha256(folder: Path) -> str:
    """Return the digest of the texts that a run trains on."""
    found = sha256()
    for path in sorted((folder / "texts").glob("*.txt")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _learnt(name: str) -> Recording:
    with tempfile.TemporaryDirectory(prefix="recording-") as folder:
        return record_learning(name, Path(folder))


def main(wanted: Sequence[str]) -> None:
    """Record the wanted runs."""
    torch.set_num_threads(1)
    runs: list[tuple[str, str, Callable[[], Recording]]] = []
    runs += [("learning", name, partial(_learnt, name)) for name in LEARNING]
    runs += [("systems", name, partial(record_systems, name)) for name in SYSTEMS]
    for what, name, record in runs:
        if not wanted or {what, name} & set(wanted):
            began_s, recording = time.monotonic(), record()
            path, took_s = save(recording), time.monotonic() - began_s
            print(f"{path.name}: {len(recording.lines)} lines, {path.stat().st_size / 1e3:.0f} kB, {took_s:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
