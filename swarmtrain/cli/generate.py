"""`swarmtrain generate`: let an exported model write text."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from swarmtrain.cli.common import THREADS, example, use_hf_token
from swarmtrain.cli.device_options import DEVICE
from swarmtrain.cli.exported_model import MODEL_DIR, load_for_use
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo

if TYPE_CHECKING:
    from swarmtrain.model.export import ExportedModel
    from swarmtrain.peer.model_files.fetcher import FilesPlace
    from swarmtrain.protocol.devices import DeviceRequest

_LEAST_INVITE = 40
"""Characters of an invite at least: the run's hash alone has more. Shorter words are names of folders."""
_NICENESS = 10
"""Beside a peer of ordinary priority that is a tenth of one core. At 19 it would be a seventieth: 3 s of work took five
minutes."""


@click.command(
    name="generate",
    epilog=example(
        "swarmtrain generate runs/first/bootstrap/model --prompt 'def '",
        "swarmtrain generate MODEL --tokens 500 --temperature 0",
        "swarmtrain generate MODEL --device cpu",
        "swarmtrain generate MODEL --chat",
        "swarmtrain generate INVITE --prompt 'Once upon a time'",
        "swarmtrain generate --dir FOLDER",
    ),
)
@click.argument("source", metavar="[MODEL|INVITE]", required=False)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Use the newest model of a peer's folder, also while the peer trains.",
)
@click.option(
    "--prompt",
    metavar="TEXT",
    show_default="the first words of the model's held-out text; with a chat template Hello!",
    help="Text to continue, or what to ask a model that has a chat template.",
)
@click.option(
    "--chat/--raw",
    default=None,
    help="Go on with the conversation, until an empty line, Ctrl-D or Ctrl-C; or continue the prompt as plain text.",
)
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
@use_hf_token()
@THREADS
@DEVICE
@click.option(
    "--accept-clock",
    is_flag=True,
    help="With INVITE: use the other peers' clock even if it differs from this machine's by more than ten minutes.",
)
@click.pass_context
def command(
    ctx: click.Context,
    source: str | None,
    directory: Path | None,
    prompt: str | None,
    chat: bool | None,
    tokens: int,
    temperature: float,
    seed: int,
    model_dir: Path | None,
    threads: int | None,
    device: DeviceRequest,
    accept_clock: bool,
) -> None:
    """Continue a prompt with a model, or ask a chat model.

    A model that has a chat template is asked by it, and its answer printed; --raw continues the prompt instead.

    MODEL is its folder, an export or any model of Hugging Face. With INVITE, takes the newest state from any live peer of the run, as `export` does.

    With --dir, takes the newest model from a peer's folder: the final one, a bootstrap's archive, or the state that a
    volunteer wrote after its last round. The peer may be training: it is not asked, and beside it this command runs at
    a low priority (niceness 10), on one thread of the processor unless --threads or --device says otherwise.
    """
    from swarmtrain.cli.background import say
    from swarmtrain.cli.progress import long_work
    from swarmtrain.data.sample_prompt import typed_prompt
    from swarmtrain.errors import UserError
    from swarmtrain.peer.checkpoints.export import Sampling, chat_prompt, sample_text
    from swarmtrain.peer.lifecycle.folder_lock import is_in_use
    from swarmtrain.protocol.devices import DeviceRequest

    if (source is None) == (directory is None):
        raise OptionsError("give MODEL, INVITE or --dir FOLDER, one of them", code="options-conflict")
    if prompt == "":
        raise UserError("the prompt is empty; give at least one character with --prompt", code="empty-prompt")
    if directory is not None and is_in_use(directory):
        _give_way()
        threads = threads or 1
        if ctx.get_parameter_source("device") is ParameterSource.DEFAULT:
            device = DeviceRequest("cpu")
    exported = (
        _of_peer(directory, model_dir, accept_clock) if source is None else _named(source, model_dir, accept_clock)
    )
    messages: list[dict[str, str]] = []
    typed = itertools.chain([prompt] if prompt else [], iter(_typed, ""))
    with contextlib.suppress(EOFError, KeyboardInterrupt) if chat else contextlib.nullcontext():
        for question in typed if chat else [prompt]:
            messages.append({"role": "user", "content": question or "Hello!"})
            turn = None if chat is False else chat_prompt(exported, messages)
            if chat and turn is None:
                raise UserError("the model has no chat template; leave out --chat", code="no-chat-template")
            asked, ends = turn or (question or typed_prompt(exported.held_out), ())
            sampling = Sampling(tokens, temperature, seed, threads or 0, device, ends)
            with long_work("writing", tokens, "tokens") as advance:
                text = sample_text(exported, asked, sampling, advance, say)
            messages.append({"role": "assistant", "content": text})
            echo(text if turn else f"{asked}{text}")


def _typed() -> str:
    """Return the line that a person types. Raises EOFError at Ctrl-D."""
    echo("> ", nl=False, err=True)
    return input().strip()


def _give_way() -> None:
    """Take a low priority, so that the peer that runs here trains nearly as before."""
    import os

    os.nice(_NICENESS)


def _named(source: str, model_dir: Path | None, accept_clock: bool) -> ExportedModel:
    """Return the model of a folder, or that of a swarm as it is now."""
    from swarmtrain.cli.background import say
    from swarmtrain.network.discovery.invite import invite_in, parse_invite
    from swarmtrain.peer.checkpoints.export import model_of_swarm

    if Path(source).exists() or len(invite_in(source)) < _LEAST_INVITE or not invite_in(source).startswith("st"):
        return load_for_use(Path(source), model_dir)
    invite = parse_invite(source)
    with _place(model_dir) as place:
        exported = model_of_swarm(invite, place, accept_clock=accept_clock)
    say(f"the swarm's model after {exported.run_tokens} tokens:")
    return exported


def _of_peer(directory: Path | None, model_dir: Path | None, accept_clock: bool) -> ExportedModel:
    """Return the newest model of a peer of this machine."""
    from swarmtrain.cli.background import say
    from swarmtrain.peer.checkpoints.export import model_of_folder

    assert directory is not None
    with _place(model_dir) as place:
        exported, what = model_of_folder(directory, place, accept_clock=accept_clock)
    say(f"{what}:")
    return exported


@contextmanager
def _place(model_dir: Path | None) -> Iterator[FilesPlace]:
    """Yield where this machine may have the files of a run's model. Ctrl-C ends the command meanwhile."""
    import platformdirs

    from swarmtrain.cli.stop_signals import stop_on_signals
    from swarmtrain.peer.checkpoints.export import onlooker_place
    from swarmtrain.peer.lifecycle.stop import Interrupted

    try:
        with stop_on_signals() as stop:
            yield onlooker_place(platformdirs.user_cache_path("swarmtrain"), model_dir, stop)
    except Interrupted:
        raise click.Abort from None
