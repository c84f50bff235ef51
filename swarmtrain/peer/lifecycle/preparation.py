"""Prepare a volunteer before it enters a swarm: where its files are, its initial weights, and a summary of the run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from swarmtrain.data.below import NOWHERE
from swarmtrain.errors import UserError
from swarmtrain.model.base import base_in_words
from swarmtrain.model.parameter_count import num_parameters, num_trained_parameters
from swarmtrain.run import RunFile
from swarmtrain.run_data import SourceKeys
from swarmtrain.words import count_in_words, shares_in_words


def initial_seed(run: RunFile, peer: str) -> int:
    """Return the seed of a peer's initial weights: the run's, or one of the peer's own with `merge.init = "own"`."""
    if run.merge.init == "common":
        return run.run.seed
    digest = hashlib.sha256(f"initial weights {run.run.seed} {peer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def summary_of(run: RunFile) -> str:
    """Return one sentence that says what a volunteer is about to run."""
    data = ", ".join(
        f"{share} {_source_in_words(source)}".strip()
        for source, share in zip(run.data.mixture, source_shares_in_words(run), strict=True)
    )
    cut = f", cut into {run.pipeline.stages} stages of which you hold some" if run.pipeline.stages > 1 else ""
    steps = "step" if run.merge.inner_steps == 1 else f"{run.merge.inner_steps} steps"
    merging = f"merging every {steps}"
    if run.merge.kind.common_step:
        target = run.batch_target
        merging = f"one step together for every {count_in_words(target.first_tokens)} tokens"
        if target.grows:
            merging += f", later for up to {count_in_words(target.most_tokens)}"
    parameters = count_in_words(num_parameters(run.model))
    model = f"a model of {parameters} parameters"
    if not run.model.is_built_in:
        model = f"{model} ({base_in_words(run.model)})"
    if run.adapter.is_used:
        trained = count_in_words(num_trained_parameters(run))
        model = f"an adapter of rank {run.adapter.rank} ({trained} parameters) beside {model}"
    return (
        f"{model} on {data}, until {count_in_words(run.run.total_tokens)} tokens, {merging} ({run.merge.method})" + cut
    )


def source_shares_in_words(run: RunFile) -> list[str]:
    """Return the share of each source of the data, such as `75%`; empty for a source without a name."""
    return shares_in_words([round(1e6 * share) for share in run.data.shares]) if run.data.sources else [""]


def _source_in_words(source: SourceKeys) -> str:
    match source.source:
        case "python-stdlib":
            return "this machine's Python standard library"
        case "datasets":
            return f"the data set {source.dataset}"
        case _:
            return f"your files {', '.join(source.paths)}"


def data_base(run: RunFile, data_folder: Path | None) -> Path:
    """Return the folder that the run's data paths are relative to.

    A run comes from a stranger: it may name files only below a folder that this machine's owner gave with `--data`.
    Raises UserError.
    """
    named = [
        (source, path)
        for source, revision in zip(run.data.mixture, run.dataset_revisions, strict=True)
        for path in (source.paths if source.source != "datasets" else () if revision else (source.dataset,))
    ]
    for _, path in named:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(
                f"this run asks for {path}, outside the folder given with --data, which is not read; tell the person "
                "who invited you",
                code="path-outside",
            )
    if data_folder is not None:
        return data_folder.absolute()
    # Without a folder, a data set `owner/name` can only be one of the hub.
    local = [(source, path) for source, path in named if source.source != "datasets" or path.count("/") != 1]
    if local:
        kinds = dict.fromkeys("data set" if source.source == "datasets" else source.source for source, _ in local)
        paths = list(dict.fromkeys(path for _, path in local))
        raise UserError(
            f"this run trains on your own {' and '.join(kinds)} files, {', '.join(paths)}: give their folder with "
            f"--data FOLDER, so that FOLDER/{paths[0]} is there",
            code="data-folder-needed",
        )
    return NOWHERE
