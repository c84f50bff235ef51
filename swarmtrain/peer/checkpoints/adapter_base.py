"""Use an exported adapter: find the model that it belongs to on this machine, load it into that, and merge them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from swarmtrain.errors import PeerError, RunFileError, UserError
from swarmtrain.model.base import downloaded
from swarmtrain.model.export import ExportedModel, adapted_model, export_merged, load_exported
from swarmtrain.model.hub import HubModel
from swarmtrain.model.model_card import ModelCard
from swarmtrain.peer.model_files.fetcher import FilesPlace, names_in
from swarmtrain.peer.model_files.model_folder import path_of_list
from swarmtrain.run import parse_published_untrusted, run_sha256
from swarmtrain.words import one_line


def merged_export(source: Path, target: Path, place: FilesPlace) -> int:
    """Write the whole model that the adapter in `source` makes of its base; return the run's tokens.

    Raises UserError, and OSError if `target` cannot be written.
    """
    base = base_of_export(source, place)
    if base is None:
        raise UserError(
            "--merge: this run trains all weights of its model, and no adapter; leave --merge out",
            code="options-conflict",
        )
    run = parse_published_untrusted(data := (source / "run.toml").read_bytes(), sha256 := run_sha256(data))
    card = ModelCard(run=run, run_sha256=sha256, num_parameters=run.model.num_parameters, run_tokens=0, peer_tokens={})
    return export_merged(source, target, base, card.as_merged)


def base_of_export(folder: Path, place: FilesPlace) -> Path | None:
    """Return where this machine has the model that the adapter in `folder` belongs to; None if a whole model is there.

    Taken is the folder of `--model-dir`, else the cache of runs, else the hub's, which the model is downloaded to if it
    is missing. Raises UserError if the model is nowhere.
    """
    section = adapted_model(folder)
    if section is None or place.given is not None:
        return None if section is None else place.given
    with contextlib.suppress(OSError, PeerError):  # without a run file, or with an altered one
        published = parse_published_untrusted(data := (folder / "run.toml").read_bytes(), run_sha256(data)).published
        if published is not None and published.model_files_sha256 is not None:
            kept = path_of_list(place.cache, published.model_files_sha256)
            with contextlib.suppress(RunFileError):
                if names_in(kept, weights=True):
                    return kept
    if (model := HubModel.parse(section.base)) is not None and model.is_pinned:
        place.progress.begin("fetching the model's files from the hub")
        return downloaded(section, model, place.progress.show, place.stop.check).folder
    raise UserError(
        f"{folder}: is an adapter of {one_line(section.base)}; give the folder of that model with --model-dir",
        code="model-files-needed",
    )


def load_with_base(folder: Path, place: FilesPlace) -> ExportedModel:
    """Load the model in `folder`, or the adapter there in the model that it belongs to. Raises UserError."""
    return load_exported(folder, base_of_export(folder, place))
