"""`swarmtrain export`: write the current model of a swarm, or of a peer's folder, as files that anyone can load."""

from __future__ import annotations

from pathlib import Path

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.option_errors import OptionsError

__all__ = ["command"]


@click.command(
    name="export",
    epilog=example("swarmtrain export INVITE --to my-model", "swarmtrain export --dir my-run --to my-model"),
)
@click.argument("invite", metavar="[INVITE]", required=False)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Export the newest model or checkpoint of a peer's folder, without asking a swarm.",
)
@click.option(
    "--to",
    "target",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="FOLDER",
    help="Folder to write the model to.",
)
@click.option(
    "--accept-clock",
    is_flag=True,
    help="Use the other peers' clock even if it differs from this machine's by more than ten minutes.",
)
def command(invite: str | None, directory: Path | None, target: Path, accept_clock: bool) -> None:
    """Write the model as files that anyone can load.

    Writes config.json, model.safetensors, the run file and the held-out text. With INVITE, takes the newest state from
    any live peer of the run; the bootstrap is not needed.
    """
    if (invite is None) == (directory is None):
        raise OptionsError("give either INVITE or --dir FOLDER", code="options-conflict")
    if directory is not None:
        from swarmtrain.peer.checkpoints.export import export_from_folder

        run_tokens = export_from_folder(directory, target)
    else:
        assert invite is not None
        from swarmtrain.cli.stop_signals import stop_on_signals
        from swarmtrain.network.discovery.invite import parse_invite
        from swarmtrain.peer.checkpoints.export import export_from_swarm

        parsed = parse_invite(invite)
        from swarmtrain.peer.lifecycle.node import Interrupted

        try:
            with stop_on_signals() as stop:
                run_tokens = export_from_swarm(parsed, target, stop, accept_clock=accept_clock)
        except Interrupted:
            raise click.Abort from None
    click.echo(f"wrote the model after {run_tokens} tokens to {target}")
