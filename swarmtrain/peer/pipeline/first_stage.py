"""The first stage of a pipeline, at a volunteer that may hold it: from taking to leaving it, it drives microbatches."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from swarmtrain.data.prepare import PeerPlace, TrainingData, training_batches
from swarmtrain.errors import RunTimeError
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.pipeline.microbatch_source import MicrobatchSource
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.scheduler import MicrobatchScheduler, TellRetries
from swarmtrain.peer.pipeline.stage_replicas import StageReplicas
from swarmtrain.peer.pipeline.stage_service import WireCalls
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.stages import places_of

__all__ = ["FirstStage"]

_LAST_DRAIN_S = 0.5
_STOP_DRIVING_S = 5.0


class FirstStage:
    """Drives while the first stage is held. The main thread starts and stops it; driving itself is the network's."""

    def __init__(
        self,
        context: VolunteerContext,
        data: TrainingData,
        base: Path,
        swarm: Swarm,
        stages: StageReplicas,
        calls: WireCalls,
    ) -> None:
        """`data` is this peer's text, of files below `base`; `swarm` the run's."""
        self._context, self._data, self._base = context, data, base
        self._swarm, self._stages, self._calls = swarm, stages, calls
        self._source: MicrobatchSource | None = None
        self._driving: MicrobatchScheduler | None = None

    @property
    def corpus_sha256(self) -> str:
        """Of its text."""
        return self._data.corpus.digest

    def batches_at(self, position: int) -> MicrobatchSource:
        """Its data, from where a checkpoint says that they were drawn to; further, if it was held here before."""
        if self._source is None:
            context = self._context
            place = PeerPlace(run_sha256=context.published.sha256, peer_id=context.me, position=position)
            batches = training_batches(context.run, self._data, place, self._base, context.published.held_out)
            self._source = MicrobatchSource(batches, context.run.microbatch_sequences)
        return self._source

    # ------------------------------------------------------------- driving

    def drive(self, desk: StageRequestQueue) -> None:
        """The first stage is held, whose questions arrive at `desk`: drive from now on."""
        self._context.wait(self._drive(desk))

    async def _drive(self, desk: StageRequestQueue) -> None:
        context, swarm = self._context, self._swarm
        assert self._source is not None
        self._driving = MicrobatchScheduler(
            context.me,
            context.run,
            self._source,
            desk,
            self._calls,
            TellRetries(context.emit, swarm.peers.refused),
            self.peers_of_stages,
            context.stop.fail,
            self._places_told,
        )
        await self._driving.start()

    def stop(self) -> None:
        """Begin no more microbatches, and wait for those under way."""
        driving, self._driving = self._driving, None
        if driving is not None:
            self._context.wait(driving.stop())

    def stop_soon(self) -> None:
        """The same of one that leaves: it waits for half a second."""
        driving, self._driving = self._driving, None
        if driving is not None:
            with contextlib.suppress(TimeoutError, RunTimeError):
                self._context.network.run(driving.stop(_LAST_DRAIN_S), _STOP_DRIVING_S)

    @property
    def num_in_flight(self) -> int:
        """Microbatches under way."""
        return 0 if self._driving is None else self._driving.num_in_flight

    def take_loss(self) -> float | None:
        """The mean loss, in nats per token, of what came back since this was asked last; None if nothing has."""
        if self._driving is None:
            return None
        losses = self._driving.losses
        taken = [losses.popleft() for _ in range(len(losses))]
        return sum(taken) / len(taken) if taken else None

    # ------------------------------------------------------------- what driving asks, in the network thread

    def peers_of_stages(self) -> Mapping[int, list[str]]:
        """Who holds each stage now."""
        peers: dict[int, list[str]] = {stage: [] for stage in range(self._context.run.pipeline.stages)}
        for held in self._stages.all:
            if held.desk.is_open:
                peers[held.number].append(self._context.me)
        for info in self._swarm.membership.volunteers():
            for stage in () if info.place is None else info.place.stages:
                peers.get(stage, []).append(info.peer)
        return peers

    def _places_told(self) -> list[StagePeer]:
        """What everybody holds, this peer as it was told last."""
        others, mine = places_of(self._swarm.membership.volunteers()), self._swarm.presence.me.place
        return others if mine is None else [*others, mine]
