"""`swarmtrain eval`: measure the held-out loss of an exported model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import THREADS, example, use_hf_token
from swarmtrain.cli.device_options import DEVICE
from swarmtrain.cli.exported_model import MODEL_DIR, load_for_use
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo

if TYPE_CHECKING:
    from torch import Tensor

    from swarmtrain.data.held_out import HeldOutTokens
    from swarmtrain.data.tokens import Tokenizer
    from swarmtrain.model.evaluation import TextLoss
    from swarmtrain.model.task_scores import TaskRequest
    from swarmtrain.protocol.devices import DeviceRequest

_BATCH_SEQUENCES = 16


@click.command(
    name="eval",
    epilog=example(
        "swarmtrain eval runs/first/bootstrap/model",
        "swarmtrain eval MODEL --text book.txt",
        "swarmtrain eval MODEL --device cuda",
        "swarmtrain eval MODEL --tasks arc_easy,hellaswag",
    ),
)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Text to measure on.  [default: the run's held-out text]")  # fmt: skip
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness to score the model on instead, such as arc_easy,hellaswag (needs the extra `eval`).")  # fmt: skip
@click.option("--include-path", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER", help="Folder of more task files for --tasks.")  # fmt: skip
@MODEL_DIR
@use_hf_token()
@THREADS
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: Path,
    text: Path | None,
    tasks: str | None,
    include_path: Path | None,
    model_dir: Path | None,
    threads: int | None,
    device: DeviceRequest,
    as_json: bool,
) -> None:
    """Measure the loss of the model in folder MODEL.

    It is an export, or any model of Hugging Face. Prints nats per byte of text, and on a line of its own bits per byte and perplexity per token; lower is better. With --tasks, prints the scores of
    lm-evaluation-harness.
    """
    if tasks is not None:
        from swarmtrain.model.task_scores import TaskRequest

        if text is not None:
            raise OptionsError("give either --text or --tasks", code="options-conflict")
        names = tuple(name for part in tasks.split(",") if (name := part.strip()))
        if not names:
            raise OptionsError("--tasks: names no task; give one or several, such as arc_easy", code="unknown-task")
        _score(model, TaskRequest(names=names, include_path=include_path), threads, device, as_json)
    elif include_path is not None:
        raise OptionsError("--include-path: belongs to --tasks, which is missing; give both", code="options-conflict")
    else:
        _measure(model, text, model_dir, threads, device, as_json)


def _measure(
    model: Path,
    text: Path | None,
    model_dir: Path | None,
    threads: int | None,
    device: DeviceRequest,
    as_json: bool,
) -> None:
    import json

    from swarmtrain.cli.background import say
    from swarmtrain.cli.progress import long_work
    from swarmtrain.data.held_out import held_out_tokens
    from swarmtrain.errors import UserError
    from swarmtrain.model.evaluation import TextLoss, evaluate
    from swarmtrain.peer.checkpoints.export import tokenizer_of
    from swarmtrain.peer.devices.model_device import move_model
    from swarmtrain.peer.lifecycle.node import use_threads, useful_threads

    exported = load_for_use(model, model_dir)
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
    trained, tokenizer = exported.model, tokenizer_of(exported)
    use_threads(threads or useful_threads(exported.model))
    place = move_model(exported.model, device, _BATCH_SEQUENCES, say)
    if text is None:
        texts = _held_out_parts(model, data, tokenizer)
    else:
        texts = {"": held_out_tokens("text", data, tokenizer)}
    parts = {}
    with long_work("measuring", sum(part.num_targets for part in texts.values()), "tokens") as advance:
        for source, part in texts.items():
            batches = _told(part.batches(trained.context_tokens, _BATCH_SEQUENCES), advance)
            nats, number = evaluate(exported.model, batches)
            parts[source] = TextLoss(nats + part.unspelt_nats, number, part.num_bytes)
    loss = TextLoss.of_parts(parts)
    if as_json:
        fields: dict[str, object] = {
            "held_out_loss": loss.nats_per_byte if loss.is_finite else None,  # JSON has no NaN
            "bits_per_byte": loss.bits_per_byte if loss.is_finite else None,
            "perplexity": loss.perplexity,
            "bytes": loss.num_bytes,
            "tokens": loss.num_tokens,
            "run_tokens": exported.run_tokens,
            "device": place,
        }
        if loss.by_source:
            fields["sources"] = [
                {
                    "name": name,
                    "held_out_loss": each.nats_per_byte if each.is_finite else None,
                    "bytes": each.num_bytes,
                }
                for name, each in loss.by_source.items()
            ]
        echo(json.dumps(fields, allow_nan=False))
    else:
        echo(_in_words("held-out loss" if text is None else "loss", loss))
        for name, each in loss.by_source.items():
            echo(f"  {_in_words(name, each)}")
        if loss.is_finite:
            perplexity = "" if loss.perplexity is None else f", perplexity {loss.perplexity:.4g} a token"
            echo(f"the same in other units: {loss.bits_per_byte:.4f} bits/byte{perplexity}")


def _held_out_parts(model: Path, held_out: bytes, tokenizer: Tokenizer) -> dict[str, HeldOutTokens]:
    """Return the part of each source of the exported model's run; the whole text, as "", if it has one source."""
    from swarmtrain.data.corpus import held_out_of_sources
    from swarmtrain.data.held_out import held_out_parts, held_out_tokens
    from swarmtrain.errors import BadBytesError, RunFileError
    from swarmtrain.run import parse_published_untrusted, run_sha256

    try:
        data = (model / "run.toml").read_bytes()
        run = parse_published_untrusted(data, run_sha256(data))
    except (OSError, BadBytesError, RunFileError):  # another program's folder, or a method that is not installed
        return {"": held_out_tokens("text", held_out, tokenizer)}
    parts = held_out_of_sources(run, held_out)
    if sum(map(len, parts.values())) == len(held_out) and all(parts.values()):
        return held_out_parts(run, held_out, tokenizer)
    return {"": held_out_tokens(run.data.mixture[0].format, held_out, tokenizer)}


def _score(model: Path, request: TaskRequest, threads: int | None, device: DeviceRequest, as_json: bool) -> None:
    import json

    from swarmtrain.cli.background import say
    from swarmtrain.data.batches import START_TOKEN
    from swarmtrain.data.tokenizer_json import own_tokenizer
    from swarmtrain.model.export import adapted_model, load_exported
    from swarmtrain.model.task_scores import score_lines, task_scores
    from swarmtrain.peer.devices.model_device import move_model
    from swarmtrain.peer.lifecycle.node import use_threads, useful_threads

    if adapted_model(model) is not None:
        raise OptionsError(
            f"--tasks: {model} is an adapter, and whole models are scored; make one with `swarmtrain export --dir FOLDER "
            "--merge --to MODEL`",
            code="options-conflict",
        )
    exported = load_exported(model)
    use_threads(threads or useful_threads(exported.model))
    place = move_model(exported.model, device, 1, say)
    is_own = own_tokenizer(exported.tokenizer) is not None
    del exported  # the library loads the model by itself
    scores = task_scores(model, request, place, START_TOKEN if is_own else None)
    if as_json:
        echo(json.dumps({"tasks": scores, "device": place}))
    else:
        echo("\n".join(score_lines(scores)))


def _in_words(what: str, loss: TextLoss) -> str:
    if not loss.is_finite:
        return f"{what} is not a finite number over {loss.num_bytes} bytes: training diverged"
    return f"{what} {loss.nats_per_byte:.4f} nats/byte over {loss.num_bytes} bytes"


def _told(batches: Iterable[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    """Yield `batches` (B, T + 1), and call `advance` after each with its number of targets."""
    from swarmtrain.algorithm.batch import num_targets

    for batch in batches:
        yield batch
        advance(num_targets(batch))
