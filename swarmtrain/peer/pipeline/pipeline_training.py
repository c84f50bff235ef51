"""Training of stages of a model by a volunteer: each phase of its life (see `volunteer.Training`).

Threads: the main thread decides which stages are held; each held stage trains on its own thread
(`peer/pipeline/stage_replica.py`); the network thread drives microbatches while the first stage is held
(`peer/pipeline/first_stage.py`). The run's swarm knows who is here and what each peer holds; each stage has a swarm of
its own, which merges (decision 27).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from swarmtrain.data.prepare import TrainingData, training_data
from swarmtrain.errors import RunTimeError
from swarmtrain.events import DoneEvent
from swarmtrain.model.four_bits import check_four_bits
from swarmtrain.model.run_model import check_positions
from swarmtrain.model.run_stages import RunStageShape, run_stage_shapes
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.stage_calls import StageClient, StageHost, stage_stream_name
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.manager import PeersFile
from swarmtrain.peer.control.arrival import DownloadProgress
from swarmtrain.peer.devices.choice import choose_compute
from swarmtrain.peer.devices.compute import ComputeDevice, enough_memory
from swarmtrain.peer.devices.report import ComputeReport
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.lifecycle.departure import hand_over_stages
from swarmtrain.peer.lifecycle.node import leave_swarm, show_invite
from swarmtrain.peer.lifecycle.preparation import data_base
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.pipeline.context import PipelineContext
from swarmtrain.peer.pipeline.first_stage import FirstStage
from swarmtrain.peer.pipeline.mover import StageMover, StageMoves
from swarmtrain.peer.pipeline.stage_assignment import StageAssignment, StageRoom, room_for_stages, whole_tokens_per_s
from swarmtrain.peer.pipeline.stage_record import StageRecord
from swarmtrain.peer.pipeline.stage_replica import StageReplicas, StageSite, stages_pulse
from swarmtrain.peer.pipeline.stage_service import StageServer, StageShapes, WireCalls
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.balance import Rule
from swarmtrain.protocol.pipeline.moves import FirstStageWatch, MovePolicy, stage_costs
from swarmtrain.run import RunFile

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.2
_KEEP_PEERS_EVERY_S = 10.0
_LINGER_S = 60.0
_SWITCH_S = 0.0005
"""Python's thread switch interval, in seconds. Each message of a microbatch waits for Python's lock, which the
computing threads hold; with the usual 5 ms the waits add up to more than the computing.
"""


@dataclass(frozen=True, kw_only=True)
class PreparedPipeline:
    """Results of a pipeline volunteer's preparation."""

    shapes: Sequence[RunStageShape]
    compute: ComputeDevice
    """Device on which the stages will be, and the precision that they are computed in."""
    room: StageRoom
    data: TrainingData
    whole_tokens_per_s: float
    """Speed of this machine through the whole model; see `whole_tokens_per_s`."""


def prepare_pipeline(context: VolunteerContext) -> PipelineTraining:
    """Prepare what needs no other peer: choose a device, read the text, find how many stages fit into memory, measure
    the speed."""
    sys.setswitchinterval(_SWITCH_S)
    run, published, settings = context.run, context.published, context.settings
    limits = settings.limits
    assert run.published is not None and run.published.boundaries is not None
    context.control.starting("preparing the text, and measuring how fast this machine is")
    check_positions(run.model)
    shapes = run_stage_shapes(run, context.model_folder, run.published.boundaries)
    if settings.base_bits == 4:
        check_four_bits(run)
    chosen = choose_compute(run, settings.device, settings.precision, vram_bytes=settings.vram_bytes)
    ComputeReport(run, chosen, context.emit).start()
    context.limits.trains_on([chosen.choice.device])
    room = room_for_stages(run, shapes, limits.memory_bytes, chosen.card_bytes)
    base = data_base(run, settings.data_folder)
    data = training_data(run, base, published.held_out, published.tokenizer, settings.cache_folder)
    context.limits.between_steps()
    compute = chosen.compute
    with enough_memory("measuring how fast this machine is", compute.device):
        speed = whole_tokens_per_s(run, compute) / limits.slowdown
    if not compute.is_host:
        speed *= context.limits.card_share
    return PipelineTraining(
        context,
        PreparedPipeline(shapes=shapes, compute=compute, room=room, data=data, whole_tokens_per_s=speed),
    )


class PipelineTraining:
    """Stages of a model, which the volunteer chooses and changes as the run needs."""

    def __init__(self, context: VolunteerContext, prepared: PreparedPipeline) -> None:
        run, me, published = context.run, context.me, context.run.published
        assert published is not None and published.stage_costs is not None
        self._context, shapes = context, prepared.shapes
        rule = Rule(costs=stage_costs(published.stage_costs))
        stages = self._stages = StageReplicas(me, rule.costs)
        swarm = self.swarm = Swarm(
            context.node,
            context.published,
            (),
            average_bytes_untrusted,
            context.emit,
            PeerInfo(peer=me, name=context.name, training=True, device=context.control.board.device_in_short),
            durable=stages.durable,
        )
        self._peers_file = PeersFile(context.folder, swarm)
        self._end = FirstStageWatch(run.run.total_tokens)
        mover = StageMover(
            me,
            MovePolicy(
                rule=rule,
                balance=run.pipeline.balance,
                every_s=run.pipeline.balance_every_s,
                most_stages=prepared.room.most_stages,
            ),
        )
        wire = wire_of(run)
        client = StageClient(context.node, context.published.sha256, on_failure=swarm.peers.call_failed)
        calls = WireCalls(me, client, wire, stages.queues)
        self._first = FirstStage(context, prepared.data, swarm, stages, calls)
        pipeline = PipelineContext(volunteer=context, shapes=shapes, rule=rule, swarm=swarm, stages=stages, mover=mover)
        self._record = StageRecord(
            pipeline, most_stages=prepared.room.most_stages, whole_tokens_per_s=prepared.whole_tokens_per_s
        )
        site = StageSite(
            context=context,
            compute=prepared.compute,
            graph_bytes=prepared.room.graph_bytes,
            on_first_round=self._record.tell_started,
            on_arriving=DownloadProgress(context.control.board, context.emit).look,
        )
        self._assignment = StageAssignment(pipeline, site, self._first, self._record, self._end)
        self._moves = StageMoves(pipeline, self._assignment, self._record, calls)
        asked_to_stay = self._moves.asked_to_stay
        server = StageServer(wire, len(shapes), stages.queues, swarm.peers.refused, asked_to_stay)
        self._host = StageHost(context.node.traffic, server)
        self._next_keep_s = 0.0

    @property
    def round(self) -> int:
        """Round that the peer takes part in next. See `Training`."""
        return self._stages.round

    # ------------------------------------------------------------- joining

    def enter(self) -> None:
        """Enter the swarm: answer other peers and learn which ones are present; announce nothing of this peer yet. See
        `Training`."""
        context, swarm = self._context, self.swarm
        swarm.presence.change(place=self._record.place())
        context.control.starting("looking for other peers")
        context.wait(context.node.serve_pipes(stage_stream_name(context.published.sha256), self._host.serve))
        context.wait(swarm.start(context.fetcher.through))
        context.wait(swarm.watch_daemon(context.stop.fail))
        context.control.watch(swarm, context.network, stages_pulse(swarm, self._stages), self._stages)

    def join(self) -> None:
        """Take the swarm's present weights, if they are preferred to this peer's, and announce this peer. See
        `Training`."""
        self._context.wait(self.swarm.announce())
        show_invite(self.swarm, self._context.folder, self._context.emit)
        self._assignment.choose()
        self._context.control.joined(self._context.fetcher.invite.peers)

    # ------------------------------------------------------------- training

    def train(self) -> bool:
        """See `Training`. Returns True once every stage that is held has its tokens."""
        while not self._stages.are_done:
            self._context.stop.sleep(_POLL_INTERVAL_S)
            if self._context.pause.held:
                return False
            self._look()
            if self._end.is_over:
                self._first.stop()  # a round that is not full counts for what it has
            elif not self._stages.any_has_ended:
                self._moves.look()
                if not self._stages.all:
                    self._assignment.choose()
        return True

    def _look(self) -> None:
        """Read the other volunteers' progress, and report this peer's."""
        now, membership = time.monotonic(), self.swarm.membership
        here = [*membership.volunteers(), self.swarm.presence.me]
        self._end.look(here, membership.known(), self._stages.run_tokens, now)
        self._record.tell()
        self._record.tell_throughput(self._first)
        if now >= self._next_keep_s:
            self._next_keep_s = now + _KEEP_PEERS_EVERY_S
            with contextlib.suppress(OSError):  # checkpoints report it
                self._peers_file.keep()

    # ------------------------------------------------------------- a pause

    def withdraw(self) -> None:
        """See `Training`: leaves every stage."""
        for stage in self._stages.numbers:
            self._assignment.leave(stage)
        self._context.wait(self.swarm.withdraw())

    def come_back(self) -> None:
        """See `Training`: takes the stages that need this peer then."""
        self._context.wait(self.swarm.announce())
        self._assignment.choose()

    # ------------------------------------------------------------- the end

    def finish(self) -> DoneEvent:
        """Continue to serve, at the run's end, for peers that still need this one; return the final event. See
        `Training`."""
        context, give_up_s = self._context, time.monotonic() + _LINGER_S
        context.control.finishing("serving until the archive has the last weights")
        self._first.stop()
        self._record.tell(now=True)
        held = self._stages.all
        with contextlib.suppress(RunTimeError):
            for each in held:
                each.tell_done()
            while time.monotonic() < give_up_s:
                if not any(each.exchange.still_needed(each.session.progress) for each in held):
                    break
                for swarm in (self.swarm, *(each.swarm for each in held)):
                    context.wait(swarm.greeter.greet_everyone())
                context.stop.sleep(0.3)
        return self._done("total_tokens")

    def hand_over(self) -> DoneEvent:
        """Continue to serve, if this peer ends before the run, until its work that no other peer has is archived;
        return the final event. See `Training`."""
        context = self._context
        self._first.stop_soon()
        hand_over_stages(context.control, context.network, self._stages.all, context.folder.path)
        return self._done(context.stop.reason)

    def _done(self, reason: str) -> DoneEvent:
        """Return the final event of this peer's part.

        The run's tokens are the greater of two counts: the presence may be older than the last rounds.
        """
        counted = min(self._stages.most_run_tokens, self._context.run.run.total_tokens)
        return DoneEvent(
            held_out_loss=None,
            tokens=self._stages.contribution,
            run_tokens=max(self.swarm.presence.me.run_tokens, counted),
            wall_s=process_age_s(),
            reason=reason,
        )

    def leave(self) -> None:
        """See `Training`: leaves each stage, then the run."""
        held = self._stages.all
        for each in held:
            each.stop_soon()
        for end in (self._first.stop_soon, *(each.end for each in held)):
            try:
                end()
            except Exception as error:
                # Whatever happens here, the other stages and the run's swarm must still be left.
                _log.info("leaving the stages failed: %r", error)
        leave_swarm(self._context.network, self.swarm, self._context.node)


def wire_of(run: RunFile) -> StageShapes:
    """Return the shapes and formats of what travels between the stages of a run."""
    return StageShapes(
        most_sequences=run.microbatch_sequences,
        context_tokens=run.model.context_tokens,
        width=run.model.width,
        vocabulary_size=run.model.vocabulary_size,
        activations=run.pipeline.activations,
    )
