"""`swarmtrain generate`: let an exported model write text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import THREADS, example
from swarmtrain.cli.device_options import DEVICE

if TYPE_CHECKING:
    from swarmtrain.protocol.devices import DeviceRequest

__all__ = ["command"]


@click.command(
    name="generate",
    epilog=example(
        "swarmtrain generate runs/first/bootstrap/model --prompt 'def '",
        "swarmtrain generate MODEL --tokens 500 --temperature 0",
        "swarmtrain generate MODEL --device cpu",
    ),
)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--prompt", default="def ", show_default=True, help="Text to continue.")
@click.option(
    "--tokens",
    type=click.IntRange(1, 1_000_000),
    default=256,
    show_default=True,
    metavar="N",
    help="Number of tokens to write.",
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
@THREADS
@DEVICE
def command(
    model: Path, prompt: str, tokens: int, temperature: float, seed: int, threads: int | None, device: DeviceRequest
) -> None:
    """Continue a prompt with the model in folder MODEL."""
    from swarmtrain.cli.background import say
    from swarmtrain.cli.progress import long_work
    from swarmtrain.errors import UserError
    from swarmtrain.peer.checkpoints.export import Sampling, sample_text

    if not prompt:
        raise UserError("the prompt is empty; give at least one character with --prompt", code="empty-prompt")
    with long_work("writing", tokens, "tokens") as advance:
        text = sample_text(model, prompt, Sampling(tokens, temperature, seed, threads or 0, device), advance, say)
    click.echo(text)
