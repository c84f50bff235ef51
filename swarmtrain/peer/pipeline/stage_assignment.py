"""Choose the stages that a volunteer takes on arrival, and take and leave stages. Runs on the main thread."""

from __future__ import annotations

from swarmtrain.events import AssignedEvent, JoinedEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.peer.checkpoints.manager import kept_stages
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.pipeline.context import PipelineContext
from swarmtrain.peer.pipeline.first_stage import FirstStage
from swarmtrain.peer.pipeline.microbatch_source import NoBatches
from swarmtrain.peer.pipeline.stage_record import StageRecord
from swarmtrain.peer.pipeline.stage_replica import StageReplica, StageSite
from swarmtrain.protocol.pipeline.balance import first_stages
from swarmtrain.protocol.pipeline.stages import FirstStageWatch
from swarmtrain.words import counted

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
