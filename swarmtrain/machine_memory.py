"""Memory of this machine, or of the container in which this process runs if that is less.

Whoever asks whether something fits asks here: in a container the machine's memory is not there to be used.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Memory that this process may use at most, what is free of it now, and what limits it, for a sentence."""

    total_bytes: int
    available_bytes: int
    limited_by: str = "this machine"


def machine_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Memory:
    """Return this machine's memory, or the container's if that is less: of all control groups of this process, of
    either version, the least counts."""
    machine = psutil.virtual_memory()
    memory = Memory(machine.total, machine.available)
    for folder in _group_folders(groups, own):
        limit, used = (_number(folder / name) for name in ("memory.max", "memory.current"))
        if limit is None:  # version 1 of control groups
            limit, used = (_number(folder / f"memory.{name}_in_bytes") for name in ("limit", "usage"))
        if limit is None or limit >= memory.total_bytes:
            continue
        available = max(0, limit - max(0, (used or 0) - _reclaimable(folder)))
        memory = Memory(limit, min(memory.available_bytes, available), "the container")
    return memory


def _group_folders(groups: Path, own: Path) -> list[Path]:
    """Return the folders of this process's control groups that may limit memory, the widest first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    folders = [groups, groups / "memory"]
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers in ("", "memory"):
            folder = groups / controllers
            for part in Path(path.lstrip("/")).parts:
                folder /= part
                folders.append(folder)
    return folders


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _reclaimable(folder: Path) -> int:
    """Return the memory of the group that caches files, which the system reclaims when something else needs it."""
    with contextlib.suppress(OSError):
        match = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0
