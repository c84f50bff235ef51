"""`swarmtrain export`: write the current model of a swarm, or of a peer's folder, as files that anyone can load."""

from __future__ import annotations

from pathlib import Path

import click

from swarmtrain.cli.common import example, use_hf_token
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo


@click.command(
    name="export",
    epilog=example(
        "swarmtrain export INVITE --to my-model",
        "swarmtrain export --dir my-run --to my-model",
        "swarmtrain export --dir my-run --push me/my-model",
        "swarmtrain export --dir my-run --merge --to my-model",
    ),
)
@click.argument("invite", metavar="[INVITE]", required=False)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Export the newest model or checkpoint of a peer's folder, or an earlier export, without asking a swarm.",
)
@click.option(
    "--to",
    "target",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder to write the model to.",
)
@click.option(
    "--push",
    "repository",
    metavar="OWNER/NAME",
    help="Upload the model to this repository of Hugging Face's hub, with the login of HF_TOKEN or of `hf auth login`.",
)
@click.option(
    "--private",
    "is_private",
    is_flag=True,
    help="With --push: make a new repository private; else everybody can read it, as with Hugging Face's own tools.",
)
@click.option(
    "--model-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Folder with the files of the run's model, if it is one of Hugging Face and they are nowhere else.",
)
@use_hf_token()
@click.option(
    "--merge",
    "is_merged",
    is_flag=True,
    help="Merge the run's adapter into the model that it belongs to, and write that.",
)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    help="Type of the numbers of the weights, which are trained in float32.  [default: that of the Hugging Face model "
    "with which the run began, float32 without one or for an adapter]",
)
@click.option(
    "--accept-clock",
    is_flag=True,
    help="Use the other peers' clock even if it differs from this machine's by more than ten minutes.",
)
def command(
    invite: str | None,
    directory: Path | None,
    target: Path | None,
    repository: str | None,
    is_private: bool,
    model_dir: Path | None,
    is_merged: bool,
    dtype: str | None,
    accept_clock: bool,
) -> None:
    """Write the model as files that anyone can load.

    Writes what transformers' AutoModelForCausalLM and AutoTokenizer load, a model card, the run file and the held-out
    text. An adapter is written as peft loads it, unless --merge makes a whole model of it. With INVITE, takes the
    newest state from any live peer of the run; the bootstrap is not needed.
    """
    if (invite is None) == (directory is None):
        raise OptionsError("give either INVITE or --dir FOLDER", code="options-conflict")
    if target is None and repository is None:
        raise OptionsError("give --to FOLDER, --push OWNER/NAME, or both", code="options-conflict")
    if is_private and repository is None:
        raise OptionsError("--private: belongs to --push, which is missing; give both", code="options-conflict")
    from swarmtrain.peer.checkpoints.export import cast_model

    if repository is None:
        assert target is not None
        tokens = _exported(invite, directory, target, model_dir, accept_clock, is_merged)
        cast_model(target, dtype)
        echo(f"wrote the model after {tokens} tokens to {target}")
        return
    from swarmtrain.cli.background import say
    from swarmtrain.peer.checkpoints.hub_upload import (
        HELD_OUT,
        check_login,
        has_own_text,
        kept_or_temporary,
        upload_model,
    )

    check_login(repository)
    with kept_or_temporary(target) as folder:
        tokens = _exported(invite, directory, folder, model_dir, accept_clock, is_merged)
        cast_model(folder, dtype)
        address = upload_model(folder, repository, is_private=is_private)
        if has_own_text(folder):
            say(f"{HELD_OUT} is not uploaded: it is a piece of the run's text, which may be private")
    where = "" if target is None else f" to {target}, and"
    echo(f"wrote the model after {tokens} tokens{where} to {address}")


def _exported(
    invite: str | None,
    directory: Path | None,
    target: Path,
    model_dir: Path | None,
    accept_clock: bool,
    is_merged: bool,
) -> int:
    """Export from the swarm of `invite`, or from `directory`; return the run's tokens."""
    import platformdirs

    from swarmtrain.cli.stop_signals import stop_on_signals
    from swarmtrain.network.discovery.invite import parse_invite
    from swarmtrain.peer.checkpoints.export import export_from_folder, export_from_swarm, onlooker_place
    from swarmtrain.peer.lifecycle.stop import Interrupted

    parsed = None if invite is None else parse_invite(invite)
    try:
        with stop_on_signals() as stop:
            place = onlooker_place(platformdirs.user_cache_path("swarmtrain"), model_dir, stop)
            if parsed is not None:
                return export_from_swarm(parsed, target, place, accept_clock=accept_clock, is_merged=is_merged)
            assert directory is not None
            return export_from_folder(directory, target, place, is_merged=is_merged)
    except Interrupted:
        raise click.Abort from None
