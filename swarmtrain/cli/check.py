"""`swarmtrain check`: what a run file would train, what it costs each peer, and any doubt about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.run_files import GivenRun, run_argument, run_examples

if TYPE_CHECKING:
    from swarmtrain.cli.estimate import Estimate
    from swarmtrain.run import RunFile

__all__ = ["command"]


@click.command(
    name="check",
    epilog=run_examples() + example("swarmtrain check stdlib-gpt", "swarmtrain check run.toml --peers 16"),
)
@run_argument
@click.option("--peers", type=click.IntRange(1, 100_000), default=4, show_default=True, help="Equal peers to assume.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="What the run's data paths are relative to.  [default: the run file's folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(given: GivenRun, peers: int, data: Path | None, as_json: bool) -> None:
    """Say what RUN.toml trains, what it costs, any doubt.

    The text is looked at as `bootstrap` does; of a data set of the hub the first documents are fetched.
    """
    import dataclasses
    import json

    from swarmtrain.cli.estimate import doubts, estimate

    run = given.load()
    from swarmtrain.data.prepare import first_look
    from swarmtrain.model.gpt import num_parameters  # takes a second: after the file is known to be good
    from swarmtrain.peer.merge_rules import mean_of

    mean_of(run.merge.robust)  # it is here, or that is said

    cost = estimate(run, num_parameters(run.model), peers)
    look = first_look(run, data or given.base)
    found = (*doubts(run, cost, look.num_bytes, _machine_bytes()), *([look.problem] if look.problem else []))
    if as_json:
        table = {"run": run.run.name, **dataclasses.asdict(cost), "corpus_bytes": look.num_bytes, "doubts": found}
        click.echo(json.dumps({**table, "not_looked_at": look.unseen}))
        return
    for line in report(run, cost, look.num_bytes, found):
        click.echo(line)
    for text in look.unseen:
        click.echo(f"  not looked at: {text}")


def report(run: RunFile, cost: Estimate, corpus_bytes: int | None, found: tuple[str, ...]) -> list[str]:
    """The lines a person reads."""
    from swarmtrain.events import count_in_words as count
    from swarmtrain.events import size_in_words as size
    from swarmtrain.peer.estimate import activation_wire_bytes

    model, peers = run.model, f"{cost.num_peers} peer{'s' * (cost.num_peers > 1)}"
    below = cost.times_below_allreduce
    stages, sequences = run.pipeline.stages, run.microbatch_sequences
    rows = {
        "parameters": f"{count(stages * cost.num_parameters)} ({model.num_layers} layers, width {model.width}, "
        f"{model.num_heads} heads; {model.vocabulary_size} tokens of {model.tokenizer})",
        "data": f"{run.data.source}, {'size not known here' if corpus_bytes is None else size(corpus_bytes) + ' here'}"
        + shards_in_words(run, corpus_bytes),
        "inner step": f"{count(cost.tokens_per_step)} tokens: {run.inner.batch_sequences} sequences of "
        f"{model.context_tokens}",
        "stages": f"{stages}, each about {count(cost.num_parameters)} parameters and held by {peers}; "
        f"{size(activation_wire_bytes(run))} between two of them for {count(sequences * model.context_tokens)} tokens",
        "round": f"{run.merge.inner_steps} inner steps, {count(cost.tokens_per_round)} tokens with {peers}",
        "whole run": f"{count(run.run.total_tokens)} tokens: {cost.num_rounds} rounds, {cost.inner_steps_per_peer} "
        f"inner steps of each of {peers}",
        "sent": ("up to " if len(run.merge.gradient_formats) > 1 else "")
        + f"{size(cost.bytes_sent_per_round)} per round and peer with {peers}"
        + ("" if below is None else f", {below:.1f} times below an all-reduce at every step")
        + _with_states(run, cost),
        "memory": f"about {size(cost.memory_bytes)} per peer: {size(cost.memory_program_bytes)} program, "
        f"{size(cost.memory_parameters_bytes)} parameters, {size(cost.memory_activations_bytes)} activations",
    }
    if stages == 1:
        del rows["stages"]
    lines = [f"run {run.run.name}", *(f"  {name:<11} {text}" for name, text in rows.items())]
    return [*lines, *(f"  doubt: {text}" for text in found)] if found else [*lines, "  no doubts"]


def _with_states(run: RunFile, cost: Estimate) -> str:
    """What is sent besides merges, after a semicolon."""
    from swarmtrain.events import size_in_words as size

    if run.merge.method == "server" or run.pipeline.stages > 1:
        return ""
    return (
        f"; up to {size(cost.bytes_sent_most_per_round)} in a round in which the archive or a late joiner takes its "
        "state"
    )


def shards_in_words(run: RunFile, corpus_bytes: int | None) -> str:
    """Into how many shards the data are cut, after a comma; empty where the run wants none."""
    if run.merge.method != "gossip" or not run.data.shards:
        return ""
    if run.data.streaming:
        return "; streamed, so there are no shards: what of it nobody has seen is not known"
    if corpus_bytes is None or run.model.tokenizer != "bytes":
        return f", in {run.data.shards} shards at most"
    if num_shards := run.num_shards(corpus_bytes):
        return f", in {num_shards} shards"
    return "; too little for shards: a round would read each more than once"


def _machine_bytes() -> int | None:
    """This machine's memory in bytes, where the system says it."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
