"""Choose the stages that a volunteer takes on arrival, by what they cost here, and take and leave stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from swarmtrain.errors import UserError
from swarmtrain.events import AssignedEvent, JoinedEvent
from swarmtrain.machine_memory import machine_memory
from swarmtrain.model.parameter_count import similar_built_in
from swarmtrain.model.run_stages import RunStageShape
from swarmtrain.model.stages import balanced_boundaries, measured_costs, stage_shapes
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.peer.checkpoints.manager import kept_stages
from swarmtrain.peer.devices.compute import ComputeDevice, finish
from swarmtrain.peer.devices.machine import card_bytes_of_graph, card_bytes_of_stage
from swarmtrain.peer.estimate import (
    STAGE_BYTES_PER_PARAMETER,
    activation_bytes,
    merge_bytes,
    own_program_bytes,
    positions_bytes,
)
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.pipeline.context import PipelineContext
from swarmtrain.peer.pipeline.first_stage import FirstStage
from swarmtrain.peer.pipeline.scheduler import NoBatches
from swarmtrain.peer.pipeline.stage_record import StageRecord
from swarmtrain.peer.pipeline.stage_replica import StageReplica, StageSite
from swarmtrain.protocol.pipeline.balance import first_stages
from swarmtrain.protocol.pipeline.moves import FirstStageWatch
from swarmtrain.run import RunFile
from swarmtrain.words import counted, size_in_words

_POLL_INTERVAL_S = 0.2
_COMPANY_S = 1.0
"""Seconds to wait once enough peers are present, so that all have seen each other before any of them chooses."""


class StageAssignment:
    """Takes and leaves stages; with the first stage it also starts and stops driving."""

    def __init__(
        self,
        pipeline: PipelineContext,
        site: StageSite,
        first: FirstStage,
        record: StageRecord,
        end: FirstStageWatch,
    ) -> None:
        """`end` says when no more microbatches come to stages after the first."""
        self._context, self._swarm, self._stages = pipeline.volunteer, pipeline.swarm, pipeline.stages
        self._shapes, self._rule = pipeline.shapes, pipeline.rule
        self._site, self._first, self._record, self._end = site, first, record, end
        given = self._context.settings.first_stages
        self._given = tuple(stage for stage in given if stage < len(self._shapes))

    def choose(self) -> None:
        """Take the stages that need this peer most, once enough peers are present."""
        context, record = self._context, self._record
        # before the others choose, since their choice depends on it
        record.chooses(kept_stages(context.folder, context.published, context.me, len(self._shapes)))
        self._wait_for_company()
        stages, reason = first_stages(context.me, record.places(), swarm_time(), self._rule)
        if self._given:
            stages, reason, self._given = self._given, "it was started so", ()
        context.emit(AssignedEvent(stages=stages, reason=reason))
        record.goes_to(stages)
        for stage in stages:
            self.enter(stage)
        record.has_taken(num_moves=max(1, len(stages)))
        self._tell_joined()

    def _wait_for_company(self) -> None:
        context, swarm, min_peers = self._context, self._swarm, self._context.run.merge.min_peers
        missing = min_peers
        while missing > 0:
            others = swarm.membership.volunteers()
            begun = any(info.place is not None and info.place.stages for info in others)
            missing = 0 if begun else min_peers - len(others) - 1
            if missing > 0:
                more = counted(missing, "more volunteer")
                context.control.starting(f"waiting for {more} before the first round")
                context.stop.sleep(_POLL_INTERVAL_S)
        context.wait(swarm.greeter.greet_everyone())
        context.stop.sleep(_COMPANY_S)
        context.wait(swarm.greeter.greet_everyone())

    def enter(self, stage: int) -> None:
        """Fetch a stage's present weights and train it from now on."""
        self._context.control.starting(f"fetching the weights of stage {stage}")
        held = StageReplica(
            self._site,
            stage,
            self._shapes[stage],
            self._first.batches_at if stage == 0 else lambda position: NoBatches(),
            lambda: self._end.is_over,
            corpus_sha256=self._first.corpus_sha256 if stage == 0 else "",
        )
        # Peers of the stage, or on their way to it: to dial anybody else would help nothing.
        infos = [info for info in self._swarm.membership.live() if info.addresses]
        of_stage = [info for info in infos if info.is_bootstrap or (info.place and stage in info.place.planned)]
        held.enter(tuple(InvitedPeer(info.peer, info.addresses) for info in of_stage))
        held.begin()
        self._stages.add(held)
        if stage == 0:
            self._first.drive(held.queue)

    def leave(self, stage: int) -> None:
        """Finish the stage's piece of work, and say goodbye to its other peers."""
        if stage == 0:
            self._first.stop()
        self._stages.drop(stage).end()

    def _tell_joined(self) -> None:
        held, context = self._stages.all, self._context
        context.emit(
            JoinedEvent(
                round=self._stages.round,
                run_tokens=self._stages.run_tokens,
                num_peers=len(self._swarm.membership.answering()) + 1,
                state_from=next((each.state_from for each in held if each.state_from), ""),
                resumed_round=next((each.resumed_round for each in held if each.resumed_round is not None), None),
                wall_s=process_age_s(),
            )
        )
        context.control.training_stages(self._stages.numbers)


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
