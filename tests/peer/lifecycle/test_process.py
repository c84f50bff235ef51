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


STEPS = """
import contextlib, ctypes, resource, sys
from swarmtrain.peer.lifecycle.process import keeping_freed_memory

SIZE = 100_000_000
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(SIZE)))
    ctypes.memset(place, 1, SIZE)
    libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_freed_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    step(), step()
    faults, kept = step(), resident()
print(faults, resident() < kept - 0.9 * SIZE, step())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_what_a_step_frees_is_kept_for_the_next_and_given_back_at_the_end() -> None:
    def steps(how: str, **environment: str) -> tuple[int, bool, int]:
        """Return a third step's page faults, whether its memory is given back afterwards, and a fourth one's."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", STEPS, how]
        told = subprocess.check_output(command, timeout=PATIENCE_S, env={**known, **environment}, text=True).split()
        return int(told[0]), told[1] == "True", int(told[2])

    usual = steps("usual")[0]
    faults, is_given_back, afterwards = steps("kept")
    assert faults < 5 < 20 < usual, "even where the system maps pages of 2 MiB"
    assert is_given_back and afterwards > 20
    assert steps("kept", MALLOC_TRIM_THRESHOLD_="1000000")[0] > 20, "as its user says"
