"""Model that a person names by its folder, with the model that it belongs to if it is an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from swarmtrain.model.export import ExportedModel

MODEL_DIR = click.option(
    "--model-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Folder of the model that an adapter belongs to, if this machine has it nowhere else.",
)


def load_for_use(folder: Path, model_dir: Path | None = None) -> ExportedModel:
    """Load the model in `folder`; an adapter into the model in `model_dir`, or where this machine has it."""
    import platformdirs

    from swarmtrain.cli.stop_signals import stop_on_signals
    from swarmtrain.peer.checkpoints.adapter_base import load_with_base
    from swarmtrain.peer.checkpoints.export import onlooker_place
    from swarmtrain.peer.lifecycle.stop import Interrupted

    try:
        with stop_on_signals() as stop:
            return load_with_base(folder, onlooker_place(platformdirs.user_cache_path("swarmtrain"), model_dir, stop))
    except Interrupted:
        raise click.Abort from None
