"""Files of a run's model, as `swarmtrain doctor` sees them: which are here, where the others come from, and the room
for them. Nothing is fetched or hashed."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmtrain.model.base import base_in_words
from swarmtrain.model.hub import HubError, HubModel
from swarmtrain.peer.doctor.machine import Finding
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, PinnedFiles
from swarmtrain.run import RunFile
from swarmtrain.words import counted, size_in_words

__all__ = ["ModelFilesFound", "check_model_files", "find_model_files"]

_HUB_S = 8.0


@dataclass(frozen=True, kw_only=True)
class ModelFilesFound:
    """What was found of a run's model files."""

    files: PinnedFiles
    missing: Sequence[PinnedFile]
    """Files that are not here, by name and size."""
    lacking_bytes: int
    """Bytes of them that are still to come."""
    free_bytes: int
    hub: str | None
    """Why the hub does not deliver them; empty if it does, None if the run's model is not there."""


def find_model_files(run: RunFile, files: PinnedFiles, cache: Path) -> ModelFilesFound:
    """Look for the files in the folder `cache` and in the hub's cache; if any is missing, ask the hub."""
    folder, model = ModelFolder(cache, files).path, HubModel.parse(run.model.base)
    if model is not None and not model.is_pinned:
        model = None

    def places(file: PinnedFile) -> list[Path]:
        cached = None if model is None else model.cached_file(file.name)
        return [folder / file.name, *([] if cached is None else [cached])]

    missing = [file for file in files.files if not any(_size(path) == file.size_bytes for path in places(file))]
    here_bytes = 0
    for file in missing:
        with contextlib.suppress(OSError):
            here_bytes += (folder / f"{file.name}.part").stat().st_blocks * 512
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return ModelFilesFound(
        files=files,
        missing=missing,
        lacking_bytes=max(0, sum(file.size_bytes for file in missing) - here_bytes),
        free_bytes=shutil.disk_usage(place).free,
        hub=None if model is None or not missing else _hub_says(model, missing),
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _hub_says(model: HubModel, missing: Sequence[PinnedFile]) -> str:
    """Return why the hub does not deliver these files; empty if it does."""
    try:
        sizes = model.reach(_until(time.monotonic() + _HUB_S))
    except HubError as error:
        return str(error)
    other = [file.name for file in missing if sizes.get(file.name) != file.size_bytes]
    return f"its {other[0]} is another than the run pins" if other else ""


def _until(end_s: float) -> Callable[[], None]:
    def check() -> None:
        if time.monotonic() >= end_s:
            raise HubError("the hub does not answer")

    return check


def check_model_files(run: RunFile, found: ModelFilesFound, num_peers: int) -> Finding:
    """Judge whether this machine has the files of the run's model, or can get them from the hub, or else from one of
    `num_peers` peers that answered."""
    total_bytes, lacking = found.files.total_bytes, size_in_words(found.lacking_bytes)
    words = f"{base_in_words(run.model)}: {counted(len(found.files.files), 'file')}, {size_in_words(total_bytes)}"
    if not found.missing:
        return Finding("model", "ok", f"{words}, all here")
    words += f"; {counted(len(found.missing), 'file')} of them not here, {lacking} to fetch"
    by_hand = "give a folder with them with --model-dir when you join"
    if found.lacking_bytes > found.free_bytes:
        words += f", and the disk has {size_in_words(found.free_bytes)} free"
        return Finding("model", "problem", words, f"make room in the cache, or {by_hand}")
    if found.hub == "":
        return Finding("model", "ok", f"{words} from the hub, which is reached")
    if not num_peers:
        reason = f"; the hub does not deliver them: {found.hub}" if found.hub else ""
        return Finding("model", "problem", f"{words}{reason}; no peer answers that may have them", by_hand)
    if found.hub:
        words += f" from other peers, since the hub does not deliver them: {found.hub}"
        return Finding("model", "warning", words, f"check the connection to the hub, or {by_hand}")
    return Finding("model", "ok", f"{words} from other peers")
