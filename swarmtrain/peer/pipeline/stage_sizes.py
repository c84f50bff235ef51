"""Resources that stages take: memory, and how fast this machine is at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from swarmtrain.errors import UserError
from swarmtrain.machine_memory import machine_memory
from swarmtrain.model.parameter_count import similar_built_in
from swarmtrain.model.run_stages import RunStageShape
from swarmtrain.model.stages import balanced_boundaries, measured_costs, stage_shapes
from swarmtrain.peer.devices.compute import ComputeDevice, finish
from swarmtrain.peer.devices.machine import card_bytes_of_graph, card_bytes_of_stage
from swarmtrain.peer.estimate import (
    STAGE_BYTES_PER_PARAMETER,
    activation_bytes,
    merge_bytes,
    own_program_bytes,
    positions_bytes,
)
from swarmtrain.run import RunFile
from swarmtrain.words import size_in_words

_OF_MACHINE = 0.5
"""Share of the machine's memory that a volunteer without a limit takes."""


@dataclass(frozen=True)
class StageRoom:
    """Stages that fit into a peer's memory, and the memory left for each stage's graphs of microbatches."""

    most_stages: int
    graph_bytes: float


def stage_bytes(run: RunFile, shape: RunStageShape) -> int:
    """Return the bytes that a peer's memory holds of one stage, without graphs of microbatches."""
    _, merging = merge_bytes(run, shape.num_parameters, run.merge.num_partners)
    return STAGE_BYTES_PER_PARAMETER * shape.num_parameters + positions_bytes(run) + merging


def graph_bytes(run: RunFile, shape: RunStageShape) -> int:
    """Return the bytes kept from one microbatch's forward until its backward, the last stage's logits included."""
    blocks = shape.last_block - shape.first_block
    return activation_bytes(run, run.microbatch_sequences, blocks, has_head=shape.has_head)


def room_for_stages(
    run: RunFile, shapes: Sequence[RunStageShape], limit_bytes: int, card_bytes: int | None = None
) -> StageRoom:
    """Return how many stages fit into `limit_bytes` of main memory (0 for no limit), and the memory left for graphs.

    With `card_bytes` the stages are on a card with so much memory, where they must fit too, and where graphs are. Which
    of the stages they will be is not known yet. Raises UserError if not even the largest stage fits into main memory.
    """
    most_bytes = limit_bytes or int(_OF_MACHINE * machine_memory().total_bytes)
    program = own_program_bytes(run)
    largest = max(stage_bytes(run, shape) for shape in shapes)
    one_graph = max(graph_bytes(run, shape) for shape in shapes)
    most = (most_bytes - program) // (largest + one_graph)
    if most < 1:
        if limit_bytes:
            raise UserError(
                f"a stage of this run needs about {size_in_words(program + largest + one_graph)} of memory, and "
                f"--memory allows {size_in_words(limit_bytes)}: allow more, or join a run with more stages",
                code="too-little-memory",
            )
        most = 1
    most = min(most, len(shapes))
    left = most_bytes - program - most * largest
    if card_bytes is not None:
        largest, one_graph = _card_bytes(run, shapes)
        most = max(1, min(most, card_bytes // (largest + one_graph)))
        left = card_bytes - most * largest
    return StageRoom(most_stages=most, graph_bytes=max(one_graph, left / 2 / most))


def _card_bytes(run: RunFile, shapes: Sequence[RunStageShape]) -> tuple[int, int]:
    """Return the bytes that the largest stage takes on a card, and those of the largest graph."""
    return max(map(card_bytes_of_stage, shapes)), max(card_bytes_of_graph(run, shape) for shape in shapes)


def whole_tokens_per_s(run: RunFile, compute: ComputeDevice | None = None) -> float:
    """Return the tokens per second through the whole model of this machine's processor, or of the device of `compute`,
    measured on parts of the model."""
    compute = ComputeDevice() if compute is None else compute
    on = (compute.device, compute.autocast, partial(finish, compute.device))
    costs = measured_costs(similar_built_in(run.model), run.microbatch_sequences, *on)
    tokens = run.microbatch_sequences * run.model.context_tokens
    return tokens / (costs.embedding + run.model.num_layers * costs.block + costs.head)


def cut_and_measure(run: RunFile) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return (boundaries between stages, each stage's share of the model's computing), measured on this machine.

    Boundaries are the run file's, or else those that make the stages cost most nearly the same.
    """
    model, pipeline = run.model, run.pipeline
    costs = measured_costs(similar_built_in(model), run.microbatch_sequences)
    boundaries = pipeline.boundaries or balanced_boundaries(model.num_layers, pipeline.stages, costs)
    seconds = [
        costs.embedding * shape.has_embedding
        + costs.block * (shape.last_block - shape.first_block)
        + costs.head * shape.has_head
        for shape in stage_shapes(model, boundaries)
    ]
    return tuple(boundaries), tuple(max(1e-6, round(each / sum(seconds), 6)) for each in seconds)
