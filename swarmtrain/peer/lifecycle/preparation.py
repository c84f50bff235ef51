"""Prepare a volunteer before it enters a swarm: where its files are, its initial weights, and a summary of the run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from swarmtrain.data.below import NOWHERE
from swarmtrain.errors import UserError
from swarmtrain.events import count_in_words
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.run import RunFile

__all__ = ["data_base", "initial_seed", "summary_of"]


def initial_seed(run: RunFile, peer: str) -> int:
    """Return the seed of a peer's initial weights: the run's, or one of the peer's own with `merge.init = "own"`."""
    if run.merge.init == "common":
        return run.run.seed
    digest = hashlib.sha256(f"initial weights {run.run.seed} {peer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def summary_of(run: RunFile) -> str:
    """Return one sentence that says what a volunteer is about to run."""
    data = {
        "python-stdlib": "this machine's Python standard library",
        "datasets": f"the data set {run.data.dataset}",
    }.get(run.data.source, f"your files {', '.join(run.data.paths)}")
    cut = f", cut into {run.pipeline.stages} stages of which you hold some" if run.pipeline.stages > 1 else ""
    steps = "step" if run.merge.inner_steps == 1 else f"{run.merge.inner_steps} steps"
    parameters = count_in_words(num_parameters(run.model))
    return (
        f"a model of {parameters} parameters on {data}, until {count_in_words(run.run.total_tokens)} tokens, "
        f"merging every {steps} ({run.merge.method})" + cut
    )


def data_base(run: RunFile, data_folder: Path | None) -> Path:
    """Return the folder that the run's data paths are relative to.

    A run comes from a stranger: it may name files only below a folder that this machine's owner gave with `--data`.
    Raises UserError.
    """
    section = run.data
    local = section.paths if section.source != "datasets" else () if run.dataset_revision else (section.dataset,)
    for path in local:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(
                f"this run asks for {path}, outside the folder given with --data, which is not read; tell the person "
                "who invited you",
                code="path-outside",
            )
    if data_folder is not None:
        return data_folder.absolute()
    if local and not (section.source == "datasets" and section.dataset.count("/") == 1):  # it may be one of the hub
        what = "data set" if section.source == "datasets" else section.source
        raise UserError(
            f"this run trains on your own {what} files, {', '.join(local)}: give their folder with --data "
            f"FOLDER, so that FOLDER/{local[0]} is there",
            code="data-folder-needed",
        )
    return NOWHERE
