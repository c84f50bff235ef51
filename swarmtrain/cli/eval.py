"""`swarmtrain eval`: measure the held-out loss of an exported model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import THREADS, example
from swarmtrain.cli.device_options import DEVICE

if TYPE_CHECKING:
    from torch import Tensor

    from swarmtrain.model.evaluation import TextLoss
    from swarmtrain.protocol.devices import DeviceRequest

__all__ = ["command"]

_BATCH_SEQUENCES = 16


@click.command(
    name="eval",
    epilog=example(
        "swarmtrain eval runs/first/bootstrap/model",
        "swarmtrain eval MODEL --text book.txt",
        "swarmtrain eval MODEL --device cuda",
    ),
)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Text to measure on.  [default: the run's held-out text]")  # fmt: skip
@THREADS
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: Path, text: Path | None, threads: int | None, device: DeviceRequest, as_json: bool) -> None:
    """Measure the loss of the model in folder MODEL.

    Prints nats and bits per byte of text, and perplexity per token; lower is better.
    """
    import json

    from swarmtrain.cli.background import say
    from swarmtrain.cli.progress import long_work
    from swarmtrain.data.batches import held_out_batches
    from swarmtrain.data.tokens import tokenizer_from_bytes_untrusted
    from swarmtrain.errors import UserError
    from swarmtrain.model.evaluation import TextLoss, evaluate
    from swarmtrain.model.export import load_exported
    from swarmtrain.peer.devices.model_device import move_model
    from swarmtrain.peer.lifecycle.node import use_threads, useful_threads

    exported = load_exported(model)
    try:
        data = exported.held_out if text is None else text.read_bytes()
    except OSError as error:
        raise UserError(
            f"{text}: {error.strerror}; give a file that can be read with --text", code="file-unreadable"
        ) from None
    if len(data) < 2:
        raise UserError(
            f"{text or model}: has no text to measure the loss on; give one with --text FILE", code="no-text"
        )
    trained = exported.model
    tokenizer = tokenizer_from_bytes_untrusted(exported.tokenizer, trained.vocabulary_size)
    use_threads(threads or useful_threads(exported.model))
    place = move_model(exported.model, device, _BATCH_SEQUENCES, say)
    tokens = tokenizer.encode(data)
    with long_work("measuring", len(tokens) - 1, "tokens") as advance:
        batches = _told(held_out_batches(tokens, trained.context_tokens, _BATCH_SEQUENCES), advance)
        sum_nats, num_targets = evaluate(exported.model, batches)
    loss = TextLoss(sum_nats, num_targets, len(data))
    if as_json:
        fields = {
            "held_out_loss": loss.nats_per_byte,
            "bits_per_byte": loss.bits_per_byte,
            "perplexity": loss.perplexity,
            "bytes": loss.num_bytes,
            "tokens": loss.num_tokens,
            "run_tokens": exported.run_tokens,
            "device": place,
        }
        click.echo(json.dumps(fields))
    else:
        click.echo(_in_words("held-out loss" if text is None else "loss", loss))


def _in_words(what: str, loss: TextLoss) -> str:
    perplexity = "" if loss.perplexity is None else f", perplexity {loss.perplexity:.4g} a token"
    return (
        f"{what} {loss.nats_per_byte:.4f} nats/byte over {loss.num_bytes} bytes "
        f"({loss.bits_per_byte:.4f} bits/byte{perplexity})"
    )


def _told(batches: Iterable[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    """Yield `batches` (B, T + 1), and call `advance` after each with its number of targets."""
    for batch in batches:
        yield batch
        advance(batch[:, 1:].numel())
