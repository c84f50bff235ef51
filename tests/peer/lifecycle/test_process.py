"""Settings of a peer's process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

HEAPS = """
import ctypes, sys, threading
from swarmtrain.peer.lifecycle.process import use_few_arenas

if sys.argv[1] == "few":
    use_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
together = threading.Barrier(8)

def take():
    together.wait()
    libc.malloc(ctypes.c_size_t(1000))
    together.wait()

threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def num_heaps(tmp_path: Path, how: str, **environment: str) -> int:
    """Count the heaps of a process in which eight threads have allocated memory."""
    told = tmp_path / "heaps.xml"
    told.unlink(missing_ok=True)
    known = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", HEAPS, how, str(told)]
    subprocess.run(command, check=True, timeout=PATIENCE_S, env={**known, **environment})
    return told.read_text().count("<heap ")


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_threads_share_few_heaps(tmp_path: Path) -> None:
    assert num_heaps(tmp_path, "few") <= 2 < num_heaps(tmp_path, "many")
    assert num_heaps(tmp_path, "few", MALLOC_ARENA_MAX="5") == 5, "as its user says"
