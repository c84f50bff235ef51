"""`swarmtrain generate`: let an exported model write text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import THREADS, example
from swarmtrain.cli.device_options import DEVICE
from swarmtrain.cli.exported_model import MODEL_DIR, load_for_use

if TYPE_CHECKING:
    from swarmtrain.model.export import ExportedModel
    from swarmtrain.protocol.devices import DeviceRequest

__all__ = ["command"]

_LEAST_INVITE = 40
"""Characters of an invite at least: the run's hash alone has more. Shorter words are names of folders."""


@click.command(
    name="generate",
    epilog=example(
        "swarmtrain generate runs/first/bootstrap/model --prompt 'def '",
        "swarmtrain generate MODEL --tokens 500 --temperature 0",
        "swarmtrain generate MODEL --device cpu",
        "swarmtrain generate INVITE --prompt 'def '",
    ),
)
@click.argument("source", metavar="MODEL|INVITE")
@click.option("--prompt", default="def ", show_default=True, help="Text to continue.")
@click.option(
    "--tokens",
    type=click.IntRange(1, 1_000_000),
    default=256,
    show_default=True,
    metavar="N",
    help="Most tokens to write. A model that writes the token that ends a text stops there.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.7,
    show_default=True,
    metavar="T",
    help="Randomness. 0: always the likeliest token; 1: as the model was trained; higher: more varied.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Random seed; the same seed writes the same text.",
)
@MODEL_DIR
@THREADS
@DEVICE
@click.option(
    "--accept-clock",
    is_flag=True,
    help="With INVITE: use the other peers' clock even if it differs from this machine's by more than ten minutes.",
)
def command(
    source: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    model_dir: Path | None,
    threads: int | None,
    device: DeviceRequest,
    accept_clock: bool,
) -> None:
    """Continue a prompt with a model.

    MODEL is its folder, an export or any model of Hugging Face. With INVITE, takes the newest state from any live peer of the run, as `export` does.
    """
    from swarmtrain.cli.background import say
    from swarmtrain.cli.progress import long_work
    from swarmtrain.errors import UserError
    from swarmtrain.peer.checkpoints.export import Sampling, sample_text

    if not prompt:
        raise UserError("the prompt is empty; give at least one character with --prompt", code="empty-prompt")
    exported = _exported(source, model_dir, accept_clock)
    with long_work("writing", tokens, "tokens") as advance:
        text = sample_text(exported, prompt, Sampling(tokens, temperature, seed, threads or 0, device), advance, say)
    click.echo(text)


def _exported(source: str, model_dir: Path | None, accept_clock: bool) -> ExportedModel:
    """Return the model of a folder, or that of a swarm as it is now."""
    import platformdirs

    from swarmtrain.cli.background import say
    from swarmtrain.cli.stop_signals import stop_on_signals
    from swarmtrain.network.discovery.invite import invite_in, parse_invite
    from swarmtrain.peer.checkpoints.export import model_of_swarm, onlooker_place
    from swarmtrain.peer.lifecycle.node import Interrupted

    if Path(source).exists() or len(invite_in(source)) < _LEAST_INVITE or not invite_in(source).startswith("st"):
        return load_for_use(Path(source), model_dir)
    invite = parse_invite(source)
    try:
        with stop_on_signals() as stop:
            place = onlooker_place(platformdirs.user_cache_path("swarmtrain"), model_dir, stop)
            exported = model_of_swarm(invite, place, accept_clock=accept_clock)
    except Interrupted:
        raise click.Abort from None
    say(f"the swarm's model after {exported.run_tokens} tokens:")
    return exported
