"""What a run takes of a volunteer's machine: said, and checked, before anything large is fetched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from swarmtrain.errors import RunTimeError
from swarmtrain.machine_memory import machine_memory
from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.control.limits import check_memory, least_cost
from swarmtrain.peer.devices.machine import find_devices
from swarmtrain.peer.estimate import disk_bytes
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.protocol.pinned_files.file_list import PinnedFiles
from swarmtrain.run import RunFile
from swarmtrain.words import size_in_words

_DATA_COPIES = 4
"""Times the size of its files that a data set of the hub takes: as files, as the library's tables, and as tokens."""


class Needs(NamedTuple):
    """Bytes that a run takes of a volunteer's machine, about."""

    memory_bytes: int
    model_bytes: int
    data_bytes: int | None
    """Of data sets of the hub; None if the hub does not say how large they are."""
    checkpoints_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Return what is known to be needed on the disk."""
        return self.model_bytes + (self.data_bytes or 0) + self.checkpoints_bytes

    def __str__(self) -> str:
        parts = {"model": self.model_bytes, "data": self.data_bytes or 0, "checkpoints": self.checkpoints_bytes}
        of = ", ".join(f"{name} {size_in_words(part)}" for name, part in parts.items() if part)
        unknown = "; the size of its data is not known" if self.data_bytes is None else ""
        return (
            f"about {size_in_words(self.memory_bytes)} of memory and {size_in_words(self.disk_bytes)} on the disk "
            f"({of}{unknown})"
        )


def needs_of(published: PublishedRun, settings: PeerSettings) -> Needs:
    """Return what a run takes. Asks the hub for the size of its data."""
    run = published.run
    num_parameters = num_trained_parameters(run)
    is_new = not (settings.directory / "checkpoints").exists()  # else the data is here
    files = 0
    if published.model_files and settings.model_folder is None:  # else they are here
        files = PinnedFiles.from_bytes_untrusted(published.model_files).total_bytes
    return Needs(
        least_cost(run, num_parameters, settings.device.num_host_ranks).memory_bytes,
        files,
        _data_bytes(run) if is_new else 0,
        disk_bytes(num_parameters),
    )


def _data_bytes(run: RunFile) -> int | None:
    """Return the bytes on the disk of the run's data sets of the hub; None if one of them is not known."""
    pairs = zip(run.data.mixture, run.dataset_revisions, strict=True)
    of_hub = [(source, revision) for source, revision in pairs if revision and not source.streaming]
    if not of_hub:
        return 0
    from swarmtrain.data.huggingface import files_bytes

    sizes = [files_bytes(source, revision) for source, revision in of_hub]
    return None if None in sizes else _DATA_COPIES * sum(size or 0 for size in sizes)


def check_needs(needs: Needs, published: PublishedRun, settings: PeerSettings) -> None:
    """Raise UserError if a run takes more memory than `--memory`, and RunTimeError, which a person may overrule, if it
    takes more than this machine has, or more of its disk than is allowed."""
    run, is_whole = published.run, published.run.pipeline.stages == 1
    if is_whole:  # else it holds as many stages as fit
        check_memory(run, num_trained_parameters(run), settings.limits.memory_bytes, settings.device.num_host_ranks)
    if settings.accept_size:
        return
    memory, has_card = machine_memory(), any(each.free_bytes is not None for each in find_devices(0))
    if is_whole and not has_card and needs.memory_bytes > memory.total_bytes:
        raise RunTimeError(
            f"this run takes {needs}, and {memory.limited_by} has {size_in_words(memory.total_bytes)} of memory: "
            "join a run with a smaller model",
            code="takes-much",
        )
    folder, has = settings.directory, ""
    free_bytes = shutil.disk_usage(folder).free + sum(
        os.lstat(Path(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names
    )
    if 0 < settings.disk_bytes < needs.disk_bytes:
        has = f"--disk allows {size_in_words(settings.disk_bytes)}: allow more with --disk"
    elif needs.disk_bytes - needs.model_bytes > free_bytes:  # who fetches the model looks for its room where it goes
        has = f"{folder} has {size_in_words(free_bytes)} left: make room, give another --dir"
    if has:
        raise RunTimeError(f"this run takes {needs}, and {has}, or join a run with a smaller model", code="takes-much")
