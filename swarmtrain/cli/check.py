"""`swarmtrain check`: print what a run file would train, what it costs each peer, and warnings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli import swarm_options
from swarmtrain.cli.common import example, use_hf_token
from swarmtrain.cli.output import echo
from swarmtrain.cli.run_files import GivenRun, run_argument, run_examples
from swarmtrain.errors import Problem, RunFileError, with_code

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from swarmtrain.data.prepare import FirstLook
    from swarmtrain.peer.devices.expected_device import ExpectedDevice
    from swarmtrain.peer.estimate import Estimate
    from swarmtrain.run import RunFile
    from swarmtrain.run_adapter import AdapterSection
    from swarmtrain.run_batch import BatchTarget

_LOOK_WEIGHTS_BYTES = 1 << 30
"""Size of weights that are read within seconds, into as much memory or twice that."""


@click.command(
    name="check",
    epilog=run_examples() + example("swarmtrain check stdlib-gpt", "swarmtrain check run.toml --peers 16"),
)
@run_argument
@swarm_options.PEERS
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Folder to which the run's data paths are relative.  [default: the run file's folder]",
)
@use_hf_token()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(given: GivenRun, peers: int | None, data: Path | None, as_json: bool) -> None:
    """Print what RUN.toml trains, what it costs, and warnings.

    Reads the text as `bootstrap` does, of a Hugging Face data set the first documents; writes all conversations of
    files of up to 4 MB by the chat template; and reads the weights of a model in a folder, up to 1 GB. Names the device
    that this machine would train on by its memory, without trying it. An error is what `bootstrap` would refuse; with
    any, the exit code is 2. A warning is about what is allowed, but perhaps not meant.
    """
    import dataclasses
    import json

    from swarmtrain.cli.estimate import doubts
    from swarmtrain.peer.estimate import estimate

    run = given.load_resolved()
    peers = swarm_options.peers_for(run, peers)
    from swarmtrain.data.prepare import first_look
    from swarmtrain.machine_memory import machine_memory
    from swarmtrain.model.base import base_description
    from swarmtrain.model.parameter_count import num_trained_parameters
    from swarmtrain.peer.devices.expected_device import (
        expected_device,
    )  # takes a second: after the file is known to be good

    cost = estimate(run, num_trained_parameters(run), peers)
    look = first_look(run, data or given.base, base_description(run, given.base))
    weights, unread = _look_at_weights(run, given.base)
    refused, unseen = (*_refused(run), *look.problems, *weights), (*look.unseen, *unread)
    found = doubts(run, cost, look.sizes, machine_memory())
    on = expected_device(run)
    if as_json:
        table = {"run": run.run.name, **dataclasses.asdict(cost), "corpus_bytes": look.num_bytes}
        table |= {"corpus_bytes_estimated": look.is_estimated}
        table |= {"sources": _sources_as_json(run, look.sizes)} if run.data.sources else {}
        table |= {"errors": refused, "error_codes": [each.code for each in refused], "doubts": found}
        table |= {"not_looked_at": unseen, "device": _as_json(on)}
        echo(json.dumps(table))
    else:
        errors = [with_code(f"  error: {each}", each.code) for each in refused]
        warnings = [f"  warning: {text}" for text in found] or ["  no warnings"]
        for line in [f"run {run.run.name}", *errors] if errors else (*report(run, cost, look, on), *warnings):
            echo(line)  # what the run costs is of a run that can be published
        for text in unseen:
            echo(f"  not checked: {text}")
    if refused:
        click.get_current_context().exit(RunFileError.exit_code)


def _refused(run: RunFile) -> list[Problem]:
    """List what a bootstrap would refuse besides the text."""
    from swarmtrain.peer.merging.rules import mean_of
    from swarmtrain.run import published_bytes

    problems: list[Problem] = []
    for look in (lambda: mean_of(run.merge.robust), lambda: published_bytes(run)):
        try:
            look()
        except RunFileError as error:
            problems += error.problems
    return problems


def _look_at_weights(run: RunFile, folder: Path) -> tuple[list[Problem], list[str]]:
    """Read the weights of `model.base` as a bootstrap does, unless they are many or on the hub.

    Returns (what a bootstrap would refuse of them, what was not looked at).
    """
    from swarmtrain.errors import UserError
    from swarmtrain.model.base import base_of
    from swarmtrain.model.run_stages import check_weights
    from swarmtrain.model.stages import expected_boundaries
    from swarmtrain.words import size_in_words

    if run.model.is_built_in or run.model.from_scratch:
        return [], []
    base = base_of(run.model, folder)
    if not isinstance(base, Path):
        return [], ["the weights of model.base, which bootstrap downloads"]
    if (size_bytes := sum(path.stat().st_size for path in base.glob("*.safetensors"))) > _LOOK_WEIGHTS_BYTES:
        return [], [f"the weights of model.base, {size_in_words(size_bytes)}, which bootstrap reads"]
    stages = run.pipeline.stages
    try:
        check_weights(run, base, run.pipeline.boundaries or expected_boundaries(run.model, stages))
    except UserError as error:
        return list(error.problems), []
    return [], []


def _sources_as_json(run: RunFile, sizes: Sequence[int | None]) -> list[dict[str, str | float | int | None]]:
    data = zip(run.data.sources, run.data.shares, sizes, strict=True)
    return [
        {"name": source.name, "share": share, "source": source.source, "corpus_bytes": size}
        for source, share, size in data
    ]


def _as_json(on: ExpectedDevice) -> dict[str, str | int | None]:
    return {
        "name": on.device.name,
        "title": on.device.title,
        "free_bytes": on.device.free_bytes,
        "microbatch_sequences": on.microbatch_sequences,
        "recomputes": on.recomputes,
        "why": on.why,
        "least_card_bytes": on.least_card_bytes,
    }


def report(run: RunFile, cost: Estimate, look: FirstLook, on: ExpectedDevice | None = None) -> list[str]:
    """Describe the run and its costs, in lines for a person.

    `look` is what was found of its text here; `on` is what this machine would train on, if known.
    """
    from swarmtrain.model.base import base_in_words
    from swarmtrain.model.parameter_count import num_parameters
    from swarmtrain.peer.estimate import activation_wire_bytes
    from swarmtrain.words import count_in_words as count
    from swarmtrain.words import counted
    from swarmtrain.words import size_in_words as size

    model, peers = run.model, counted(cost.num_peers, "peer")
    below = cost.times_below_allreduce
    stages, sequences = run.pipeline.stages, run.microbatch_sequences
    has_samples = any(source.has_samples for source in run.data.mixture)
    tokenizer = "its own tokenizer" if model.tokenizer == "model" else model.tokenizer
    least, why = ("at least ", "; only tokens that are learnt count") if has_samples else ("", "")
    rounds = counted(cost.num_rounds, "round")
    if cost.fewest_rounds < cost.num_rounds:
        rounds = f"{cost.fewest_rounds:,} to {rounds} (fewest if volunteers end each batch two steps late)"
    rows = {
        "model": base_in_words(model),
        "parameters": f"{count(num_parameters(model))} ({counted(model.num_layers, 'layer')}, width "
        f"{model.width}, {counted(model.num_heads, 'head')}; {model.vocabulary_size} tokens of {tokenizer})",
        "adapter": _adapter_in_words(run.adapter),
        "data": ", ".join(_data_in_words(run, look)) + shards_in_words(run, look.sizes),
        "inner step": f"{count(cost.tokens_per_step)} tokens: {counted(run.inner.batch_sequences, 'sequence')} of "
        f"{model.context_tokens}",
        "stages": f"{stages}, each about {count(cost.num_parameters)} parameters and held by {peers}; "
        f"{size(activation_wire_bytes(run))} between two of them for {count(sequences * model.context_tokens)} tokens",
        "round": _batch_in_words(run.batch_target, run.tokens_per_step)
        if run.merge.kind.common_step
        else f"{counted(run.merge.inner_steps, 'inner step')}, {count(cost.tokens_per_round)} tokens with {peers}",
        "whole run": f"{count(run.run.total_tokens)} tokens: {least}{rounds}, "
        f"{counted(cost.inner_steps_per_peer, 'inner step')} of each of {peers}{why}",
        "sent": ("up to " if len(run.merge.gradient_formats) > 1 else "")
        + f"{size(cost.bytes_sent_per_round)} per round and peer with {peers}"
        + ("" if below is None else f", {below:.1f} times below an all-reduce at every step")
        + _with_states(run, cost),
        "memory": f"about {size(cost.memory_bytes)} per peer with {peers}: {size(cost.memory_program_bytes)} program, "
        f"{size(cost.memory_parameters_bytes)} parameters, {size(cost.memory_activations_bytes)} activations",
        "device": str(on),
    }
    if on is None:
        del rows["device"]
    if not run.adapter.is_used:
        del rows["adapter"]
    if model.is_built_in:
        del rows["model"]
    if stages == 1:
        del rows["stages"]
    return [f"run {run.run.name}", *(f"  {name:<11} {text}" for name, text in rows.items())]


def _batch_in_words(target: BatchTarget, step_tokens: int) -> str:
    """Describe the size of the large batches that all volunteers make together."""
    from swarmtrain.words import count_in_words, counted

    steps = counted(math.ceil(target.first_tokens / step_tokens), "inner step")
    first = f"{steps} of all volunteers together, {count_in_words(target.first_tokens)} tokens"
    if not target.grows:
        return first
    return f"{first} at first; grows with the run up to {count_in_words(target.most_tokens)} tokens"


def _adapter_in_words(section: AdapterSection) -> str:
    """Describe the adapter: its size, groups and layers."""
    from swarmtrain.words import count_in_words, counted

    groups = f"{counted(section.num_groups, 'group')} of rank {section.rank_of_group}"
    return (
        f"{count_in_words(section.num_parameters)} parameters, which alone are trained and sent: rank {section.rank} "
        f"in {groups}, beside {', '.join(section.modules)}"
    )


def _data_in_words(run: RunFile, look: FirstLook) -> Iterator[str]:
    """Yield each source with its share of the sequences, and its size here."""
    from swarmtrain.peer.lifecycle.preparation import source_shares_in_words
    from swarmtrain.words import size_in_words

    about = "about " if look.is_estimated else ""
    for source, share, size in zip(run.data.mixture, source_shares_in_words(run), look.sizes, strict=True):
        here = "size not known here" if size is None else f"{about}{size_in_words(size)} here"
        yield f"{share} {source.name} ({source.source}, {here})" if source.name else f"{source.source}, {here}"


def _with_states(run: RunFile, cost: Estimate) -> str:
    """Say what is sent besides merges, after a semicolon; empty if nothing is."""
    from swarmtrain.words import size_in_words as size

    if run.merge.kind.has_server or run.pipeline.stages > 1:
        return ""
    return (
        f"; up to {size(cost.bytes_sent_most_per_round)} in a round in which the archive or a late joiner takes its "
        "state"
    )


def shards_in_words(run: RunFile, sizes: Sequence[int | None]) -> str:
    """Say into how many shards the data are cut, after a comma; empty if the run wants none. `sizes` are those of the
    sources in bytes, if they are known."""
    if not run.merge.kind.shards or not run.data.shards:
        return ""
    if all(source.is_streamed for source in run.data.mixture):
        return "; streamed, so there are no shards: what of it nobody has seen is not known"
    known = [0 if source.is_streamed else size for source, size in zip(run.data.mixture, sizes, strict=True)]
    if None in known or run.model.tokenizer != "bytes":
        return f", in {run.data.shards} shards at most"
    if num_shards := max(run.num_shards(*(size or 0 for size in known))):
        return f", in {num_shards} shards"
    return "; too little for shards: a round would read each more than once"
