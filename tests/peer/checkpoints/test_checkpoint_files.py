"""Checkpoints as files: killed at every call that writes, on a disk that fails, and damaged afterwards."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from swarmtrain.peer.checkpoints.files import CheckpointFolder, DamagedError, StoredCheckpoint, TensorBytes

RUN, PEER = "ab" * 32, "somebody"
CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink")
KILLED_WITHIN_S = 120.0
"""Time limit for an interpreter, and for thirty that are killed at one call each."""


@functools.cache
def content(round: int) -> bytes:
    return bytes((round * 7 + i) % 251 for i in range(4 * 3000))


def tensors(round: int) -> list[TensorBytes]:
    data = memoryview(content(round))
    return [
        TensorBytes(name="theta", shape=(1000,), data=data[:4000]),
        TensorBytes(name="moments", shape=(2, 1000), data=data[4000:]),
    ]


def put(folder: CheckpointFolder, round: int) -> None:
    folder.write(round, tensors(round), {"own": {"batches": 10 * round}})


def usable(folder: CheckpointFolder) -> list[int]:
    """List the rounds of intact checkpoints, newest first, and check their bytes."""
    rounds = []
    for entry in folder.newest_first():
        if isinstance(entry, StoredCheckpoint):
            try:
                data = folder.tensors_of(entry).read_bytes()
            except DamagedError:
                continue
            rounds.append(entry.manifest["round"])
            assert data[8 + int.from_bytes(data[:8], "little") :] == content(rounds[-1])
            assert entry.manifest["own"] == {"batches": 10 * rounds[-1]}
    return rounds


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def fresh(path: Path) -> CheckpointFolder:
    return CheckpointFolder(path, RUN, PEER)


def filled(path: Path, rounds: int = 3) -> CheckpointFolder:
    folder = fresh(path)
    for round in range(1, rounds + 1):
        put(folder, round)
    return folder


def test_what_is_written_is_a_safetensors_file(tmp_path: Path) -> None:
    folder = fresh(tmp_path / "checkpoints")
    written = folder.write(7, tensors(7), {"own": {"batches": 70}})
    (entry,) = folder.newest_first()
    assert isinstance(entry, StoredCheckpoint)
    with safe_open(folder.tensors_of(entry), framework="np") as file:
        assert file.get_tensor("theta").tobytes() + file.get_tensor("moments").tobytes() == content(7)
        assert file.get_tensor("moments").shape == (2, 1000)
    found = names(folder.path)
    assert found == ["00000001-round-00000007.json", "00000001-round-00000007.safetensors"]
    assert written.path == folder.path / found[0] and written.round == 7
    assert written.size_bytes == sum(path.stat().st_size for path in folder.path.iterdir())
    assert {path.stat().st_mode & 0o777 for path in folder.path.iterdir()} == {0o600}


def test_three_are_kept_in_the_order_of_writing(tmp_path: Path) -> None:
    folder = filled(tmp_path, 5)
    assert usable(folder) == [5, 4, 3]
    put(folder, 2)  # a state of more tokens and a lower round, taken from others
    put(fresh(tmp_path), 2)
    assert usable(fresh(tmp_path)) == [2, 2, 5]
    assert len(names(tmp_path)) == 6


def _tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"torn": _tear, "altered": _alter, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_one_is_noticed_and_does_not_count(tmp_path: Path, suffix: str, damage: str) -> None:
    filled(tmp_path)
    newest = next(tmp_path.glob(f"*-round-00000003.{suffix}"))
    DAMAGES[damage](newest)
    folder = fresh(tmp_path)
    assert usable(folder) == [2, 1]
    put(folder, 4)
    assert usable(fresh(tmp_path)) == [4, 2, 1], "a damaged one must not push out a whole one"
    assert len(names(tmp_path)) == 6, "the damaged one is gone once a new one is there"


def test_every_altered_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    (newest,) = tmp_path.glob("*-round-00000002.json")
    whole = newest.read_bytes()
    for index in range(len(whole.rstrip())):
        newest.write_bytes(whole[:index] + bytes([whole[index] ^ 4]) + whole[index + 1 :])
        assert usable(fresh(tmp_path)) == [1], index
    newest.write_bytes(whole)
    assert usable(fresh(tmp_path)) == [2, 1]


def test_others_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for number, other in enumerate((CheckpointFolder(tmp_path, "cd" * 32, PEER), CheckpointFolder(tmp_path, RUN, "x"))):
        other.write(9 + number, tensors(9), {})
    newer = tmp_path / "00000003-round-00000011.json"
    manifest = {"format": 2, "run_sha256": RUN, "peer": PEER}
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    newer.write_text(json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}))
    folder = filled(tmp_path, 4)
    reasons = [entry[1] for entry in folder.newest_first() if not isinstance(entry, StoredCheckpoint)]
    assert reasons == [
        "it has format 2, and this version of swarmtrain reads 1",
        "it is another peer's",
        "it is of another run",
    ]
    assert usable(folder) == [4, 3, 2] and len(names(tmp_path)) == 6 + 5


# ---------------------------------------------------------------- a failing disk


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> list[str]:
    """Make the `call`-th writing call of `os` fail with `number`; yields the names of the calls made."""
    made: list[str] = []

    def patched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) - 1 == call:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return run

    for name in CALLS:
        monkeypatch.setattr(os, name, patched(name))
    return made


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_any_call_destroys_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failed: set[str] = set()
    for call in range(100):
        path = tmp_path / str(call)
        folder = filled(path)
        with monkeypatch.context() as patch:
            made = fail_at(patch, call, number)
            try:
                put(folder, 4)
            except OSError as error:
                assert error.errno == number
                failed.add(made[call])
                assert usable(fresh(path)) == [3, 2, 1]
                assert len(names(path)) == 6, "what was half written is removed"
            else:
                assert usable(fresh(path))[:3] == [4, 3, 2]
        put(folder, 5)
        assert usable(fresh(path))[0] == 5
        assert len(names(path)) == 6
        if call >= len(made):
            break
        shutil.rmtree(path)
    assert failed == {"mkdir", "open", "write", "fsync", "rename"}


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path)
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, real.f_frsize, real.f_blocks, 1, 1, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    made = fail_at(monkeypatch, -1, 0)
    with pytest.raises(OSError, match="No space left"):
        put(folder, 4)
    assert made == ["mkdir"] and usable(folder) == [3, 2, 1]


# ---------------------------------------------------------------- SIGKILL


def write_killed(path: Path, call: int, half: bool) -> list[str]:
    """Fork a process that writes round 4 and is killed before its call number `call`, or halfway through a write.

    Returns the calls that it reached. Run in a separate process without threads, since it forks.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        made = 0

        def patched(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                real_write(writer, f"{name} ".encode())
                if made == call:
                    if half and name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
                return real(*args, **kwargs)

            return run

        real_write = os.write
        for name in CALLS:
            setattr(os, name, patched(name))
        put(fresh(path), 4)
        os._exit(0)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as file:
        calls = file.read().split()
    assert status == (-signal.SIGKILL if call < len(calls) else 0)
    return calls


def kill_everywhere(base: Path) -> None:
    """Kill at each call; whatever the moment, the checkpoint before or the new one is there, whole."""
    hit: dict[str, int] = {}
    found: list[int] = []
    for half in (False, True):
        for call in range(100):
            path = base / f"{call}{half}"
            filled(path)
            calls = write_killed(path, call, half)
            rounds = usable(fresh(path))
            assert rounds[:2] in ([3, 2], [4, 3]), (calls, rounds)
            found.append(rounds[0])
            put(fresh(path), 5)
            assert usable(fresh(path)) == [5, rounds[0], rounds[1]], calls
            assert len(names(path)) == 6, "what the dead left is removed"
            shutil.rmtree(path)
            if call >= len(calls):
                assert rounds == [4, 3, 2]
                break
            hit[calls[-1]] = hit.get(calls[-1], 0) + 1
    assert found[0] == 3 and found[-1] == 4
    print(json.dumps(hit))


@pytest.mark.slow  # starts an interpreter for each call
def test_killed_at_every_call_that_writes(tmp_path: Path) -> None:
    code = "import sys, pathlib, test_checkpoint_files as t; t.kill_everywhere(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=KILLED_WITHIN_S,
    )
    assert done.returncode == 0, done.stderr
    hit = json.loads(done.stdout)
    # Twice each: killed before the call, and once more in the pass that dies halfway through a write. The tensors are
    # written in three pieces (header and two tensors) and the manifest in one; opened and synced is the folder too.
    assert hit == {"mkdir": 2, "open": 6, "write": 8, "fsync": 6, "rename": 4, "unlink": 4}
