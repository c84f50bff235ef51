"""Files of a run's model as its bootstrap has them: found by the run file, pinned by their hashes, and served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from swarmtrain.model.base import base_of, downloaded
from swarmtrain.model.hub import HubModel
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.model_files.fetcher import FilesPlace, ModelFileFetcher, SwarmSource, names_in, pin_folder
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.protocol.pinned_files.file_list import PinnedFiles
from swarmtrain.run import RunFile


@dataclass(frozen=True)
class BaseFiles:
    """Files of a run's base, before the run is published."""

    folder: Path
    """Where this machine has them: the folder that the run file names, or the hub's cache."""
    pinned: PinnedFiles


def pin_base(run: RunFile, folder: Path, place: FilesPlace) -> BaseFiles | None:
    """Find the files of the base of a resolved run, whose run file is in `folder`, and hash them; None for a built-in
    model.

    Those of the hub are downloaded, and compared with its hashes. Raises RunFileError.
    """
    if run.model.is_built_in:
        return None
    base = base_of(run.model, folder)
    if isinstance(base, HubModel):
        place.progress.begin("fetching the model's files from the hub")
        place.asks_hub(run.network)
        snapshot = downloaded(run.model, base, place.progress.show, place.stop.check)
        pinned = pin_folder(snapshot.folder, snapshot.names, place, run.model.num_parameters)
        for file in pinned.files:
            snapshot.check_hash(file.name, file.sha256)
        return BaseFiles(snapshot.folder, pinned)
    names = names_in(base, weights=not run.model.from_scratch)
    return BaseFiles(base, pin_folder(base, names, place, run.model.num_parameters))


def place_of_base(run: RunFile, folder: Path, place: FilesPlace) -> FilesPlace | None:
    """Return where a bootstrap looks for the pinned files: as `place` says, and first in the folder that the run file
    names, if it names one. None for a built-in model.

    `run` is as the person wrote it, in `folder`.
    """
    if run.model.is_built_in:
        return None
    base = base_of(run.model, folder)
    return dataclasses.replace(place, given=base if isinstance(base, Path) else None)


def described_model(
    published: PublishedRun, place: FilesPlace, swarm: SwarmSource | None, *, weights: bool = False
) -> Path | None:
    """Return a folder with the files that describe the run's model, for who has its weights already; None for a
    built-in model. With `weights` those that the run begins with are there too.

    Raises RunTimeError if neither this machine nor the hub has them, nor peers of `swarm`, if there is one.
    """
    if not published.model_files:
        return None
    return ModelFileFetcher(published, place).fetch(swarm, weights=weights).path


def kept_model_folder(published: PublishedRun, settings: PeerSettings) -> Path | None:
    """Return the folder of the run's model files that a peer of this machine has fetched; None for a built-in model."""
    if not published.model_files:
        return None
    files = PinnedFiles.from_bytes_untrusted(published.model_files)
    return ModelFolder(settings.cache_folder or settings.directory, files).path
